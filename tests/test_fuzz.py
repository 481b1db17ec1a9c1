"""Inputs that once led to a traceback, and a few more at random: each is read, or refused in words."""

import base64

import pytest
from fuzz import CORPUS, TARGETS, as_bytes, attempt, signed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*.txt")), ids=lambda file: file.stem)
def test_the_corpus(file):
    assert attempt(file.stem.partition("-")[0], base64.b64decode(file.read_text())) is None


@pytest.mark.parametrize("name", TARGETS)
def test_some_inputs(name):
    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def look(data):
        assert attempt(name, data.draw(TARGETS[name].inputs())) is None

    look()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_is_read(name):
    """Else every input would be refused, and nothing would have been tried."""
    valid = TARGETS[name].valid()
    if not isinstance(valid, bytes):
        valid = signed(valid) if name in ("manifest", "record") else as_bytes(valid)
    TARGETS[name].read(b"\x00\x64" + valid[2:] if name == "reply" else valid)
