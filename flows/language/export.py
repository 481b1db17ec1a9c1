"""`baton export`: a model of a run as a Hugging Face folder that plain transformers, or PEFT, loads, with a model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from flows.language.model_card import model_card
from flows.language.model_folders import base_of, is_scorer, load_causal, load_scalar, load_tokenizer
from flows.language.warm_models import WarmModels
from flows.runs.run import Run
from schemas.artifacts import ModelRef, TrainState
from schemas.errors import ConfigError
from stages.ops import lora
from stages.ops.precision import FLOAT32, QUANTIZED, Precision
from stages.ops.scalar_head import ScalarHead

ROLES = ("actor", "critic", "reward_model")
ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}")  # as a run's record names a model that was got from there


def export(run: Run, state: TrainState, role: str, folder: Path, *, merge: bool) -> Path:
    """The model in that role after the state's iteration; `merge`: an adapter added to its base.

    Raises `ConfigError` where there is none, or something else is in the folder.
    """
    ref: ModelRef | None = getattr(state, role)
    if ref is None:
        raise ConfigError(f"run {run.name!r} has no {role}; it has "
                          f"{', '.join(name for name in ROLES if getattr(state, name) is not None)}")
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there already, and holds something; name another folder, or empty it")
    source = run.store.folder(ref.artifact, ref.folder)
    base = base_of(source)
    if merge and base is None:
        raise ConfigError(f"--merge: the {role} is a whole model, and no adapter; leave it out")
    precision = run.config.base_model.precision
    if merge and precision in QUANTIZED:
        raise ConfigError(f"--merge: the adapter was trained over a base in {precision}, and added to the base's weights in "
                          "float32 it would be another model; leave it out, and load the base in that")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        partial = Path(place) / "model"
        if base is not None and not merge:
            _write_adapter(run, source, base, partial)
        elif merge or (role != "actor" and not is_scorer(source)):  # a critic that begins as the actor, with a head of 0
            _write_model(run, ref, role, partial)
        else:
            shutil.copytree(source, partial)
        over = None if merge or base is None else _address(run, base)
        card = model_card(run, state, role, base=over, alone=not _needs_baton(partial))
        (partial / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    return folder


def _write_model(run: Run, ref: ModelRef, role: str, folder: Path) -> None:
    """The whole model, an adapter added to its base."""
    with closing(WarmModels(run.store, run.config.execution)) as warm:
        model = warm.own(ref, load_causal if role == "actor" else load_scalar, _held(run))
        whole = lora.merged(model.module.float()) if model.base else model.module
        if isinstance(whole, ScalarHead):
            whole.save(folder)
        else:
            whole.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)


def _held(run: Run) -> Precision:
    """As the weights under adapters were held in training."""
    return Precision(weights=run.config.base_model.precision) if run.config.lora else FLOAT32


def _write_adapter(run: Run, source: Path, base: ModelRef, folder: Path) -> None:
    """The adapter, naming a base that PEFT finds, and the base's tokenizer."""
    shutil.copytree(source, folder)
    file = folder / lora.CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    name, _, revision = _address(run, base).partition("@")
    file.write_text(json.dumps(config | {"base_model_name_or_path": name, "revision": revision or None}, indent=2) + "\n",
                    encoding="utf-8")
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(run.store.folder(base.artifact, base.folder))
    tokenizer.save_pretrained(folder)


def _address(run: Run, base: ModelRef) -> str:
    """Of an adapter's base: its name and commit on the hub, or its folder in the store.

    Raises `ConfigError` if that is in a bucket.
    """
    for role, source in run.config.models.items():
        if base.artifact == run.inputs.get(role) and ON_HUB.fullmatch(source):
            return source
    place = run.store.place(base.artifact, base.folder)
    if "://" in place:
        raise ConfigError(f"the adapter's base is in a bucket ({place}), where PEFT does not look: --merge")
    return os.path.abspath(place)


def _needs_baton(folder: Path) -> bool:
    """Whether it is a scorer of a family that transformers has no classifier of."""
    file = folder / "config.json"
    return file.is_file() and ScalarHead.__name__ in (json.loads(file.read_text()).get("architectures") or ())
