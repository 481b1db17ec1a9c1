"""Tokens as text: what each token of a run's actor is, decoded alone."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from tokenizers import Tokenizer

from flows.runs.run import Run
from schemas.artifacts import ModelRef


class TokenTexts:
    """A function for DuckDB: (n,) names of runs and token ids to (n,) texts; a tokenizer is read when a token of
    its run is asked for."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._runs, self._tokenizers, self._known = runs, {}, {}

    def __call__(self, run: pa.Array, token: pa.Array) -> pa.Array:
        found = [None if number is None else self.text(name, number)
                 for name, number in zip(run.to_pylist(), token.to_pylist(), strict=True)]
        return pa.array(found, pa.string())

    def text(self, run: str, token: int) -> str:
        """A token, special ones as they are written; one that the tokenizer does not know as `<1234>`."""
        known = self._known.setdefault(run, {})
        if token not in known:
            tokenizer = self._tokenizer(run)
            there = tokenizer is not None and tokenizer.id_to_token(token) is not None
            known[token] = tokenizer.decode([token], skip_special_tokens=False) if there else f"<{token}>"
        return known[token]

    def _tokenizer(self, run: str) -> Tokenizer | None:
        """None where its folder has no `tokenizer.json`."""
        if run not in self._tokenizers:
            there = self._runs[run]
            model = there.state(0).actor
            has = f"{model.folder}/tokenizer.json" in there.store.manifest(model.artifact).digests()
            self._tokenizers[run] = tokenizer_of(there, model) if has else None
        return self._tokenizers[run]


def tokenizer_of(run: Run, model: ModelRef) -> Tokenizer:
    """The tokenizer in that model's folder."""
    return Tokenizer.from_file(str(run.store.file(model.artifact, f"{model.folder}/tokenizer.json")))
