"""Progress bars, where somebody looks at a terminal."""

from __future__ import annotations

import os
import sys
from functools import partial

from tqdm import tqdm

SEEN = sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ  # asked once: a stage of a control task takes milliseconds
progress_bar = partial(tqdm, leave=False, disable=not SEEN)
