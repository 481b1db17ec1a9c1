"""Which reward servers may be asked, and their bearer tokens: each is bound to its host, and is sent to no other.

    BATON_ALLOWED_SERVERS=rewards.example.org,127.0.0.1:8000
    BATON_REWARD_TOKEN=rewards.example.org=SECRET,127.0.0.1:8000=OTHER

A token is sent over https alone, or to this machine itself, so that it crosses no network in clear.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from schemas.errors import ConfigError

ALLOWED = "BATON_ALLOWED_SERVERS"
VARIABLE = "BATON_REWARD_TOKEN"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def server_token(url: str) -> str | None:
    """The token of the server at that address, none if it has none. Raises `ConfigError` if it may not be asked."""
    parts = urlsplit(url)
    names = (parts.netloc.lower(), (parts.hostname or "").lower())
    allowed = os.environ.get(ALLOWED)
    if allowed is not None and not {*names} & {name.strip().lower() for name in allowed.split(",")}:
        raise ConfigError(f"reward server {url}: {ALLOWED} does not name {parts.netloc}; add it there, host or host:port")
    tokens = _tokens()
    token = tokens.get(names[0]) or tokens.get(names[1])
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
