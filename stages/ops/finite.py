"""NaN and infinity stop a stage, with the rows they came from."""

from __future__ import annotations

import numpy as np

from schemas.errors import NonFiniteError
from schemas.tables import Ragged


def require_finite(what: str, values: np.ndarray | Ragged, row_id: np.ndarray, hint: str = "") -> None:
    """Raises `NonFiniteError` naming the number, the rows and the first bad value.

    `values`: (B,), or ragged with B rows; `row_id`: (B,); `hint`: where that was, and what may help.
    """
    flat = values.values if isinstance(values, Ragged) else values
    bad = np.flatnonzero(~np.isfinite(flat))
    if bad.size:
        rows = values.row_of_value[bad] if isinstance(values, Ragged) else bad
        raise NonFiniteError(f"{what} is {flat[bad[0]]} in row{_list(np.unique(row_id[rows]))}{hint}")


def _list(rows: np.ndarray, shown: int = 8) -> str:
    text = ", ".join(str(row) for row in rows[:shown])
    more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
    return f"{'s' if len(rows) > 1 else ''} {text}{more}"
