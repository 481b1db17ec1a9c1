"""Progress bars, where somebody looks at a terminal; tqdm's own TQDM_DISABLE turns them off there too."""

from __future__ import annotations

import sys
from functools import partial

from tqdm import tqdm

progress_bar = partial(tqdm, leave=False) if sys.stderr.isatty() else partial(tqdm, disable=True)
