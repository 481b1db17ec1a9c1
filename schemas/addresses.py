"""Addresses of servers, which must not carry a password to where they are written down."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator


def without_user_info(text: str) -> str:
    """The text, its addresses without `user:password@`, whatever a password holds, and without what a query keeps secret."""
    text = re.sub(r"(?<=://)[^\s'\"]+@", "", text)
    return re.sub(r"(?i)([?&][\w-]*(?:passw|token|secret|api[-_]?key|access[-_]?key)[\w-]*=)[^&\s'\"]+", r"\1…", text)


def _no_user_info(uri: str) -> str:
    if uri != without_user_info(uri):
        raise ValueError("holds a user name or password, which would be written down with the run; the environment gives it "
                         "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD; BATON_REWARD_TOKEN for reward servers)")
    return uri


Address = Annotated[str, AfterValidator(_no_user_info)]
