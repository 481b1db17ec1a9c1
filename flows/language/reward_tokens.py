"""Bearer tokens for reward servers: each is bound to its host, and is sent to no other.

    BATON_REWARD_TOKEN=rewards.example.org=SECRET,127.0.0.1:8000=OTHER

Only over https, or to this machine itself, so that no token crosses a network in clear.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from schemas.errors import ConfigError

VARIABLE = "BATON_REWARD_TOKEN"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def token_for(url: str) -> str | None:
    """The token of the server at that address, none if it has none. Raises `ConfigError`."""
    parts = urlsplit(url)
    tokens = _tokens()
    token = tokens.get(parts.netloc.lower()) or tokens.get((parts.hostname or "").lower())
    if token and parts.scheme != "https" and parts.hostname not in LOOPBACK:
        raise ConfigError(f"reward server {url}: {VARIABLE} has a token for it, which would be sent in clear; use https://")
    return token


def _tokens() -> dict[str, str]:
    """Host, or host:port → token."""
    entries = [entry.strip() for entry in os.environ.get(VARIABLE, "").split(",") if entry.strip()]
    tokens = {}
    for entry in entries:
        host, _, token = entry.partition("=")
        if not (host and token.strip("=")):  # a token alone may end with the padding of base64
            raise ConfigError(f"{VARIABLE}: expected host=token, several of them separated by commas; a token is sent to "
                              "its host alone")
        tokens[host.lower()] = token
    return tokens
