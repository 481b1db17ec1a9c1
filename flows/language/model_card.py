"""The model card of an export: what was trained from what, how well it did, and how to load it."""

from __future__ import annotations

from typing import Any

import yaml

from flows.runs.run import Run
from schemas.artifacts import ArtifactRef, TrainState

SHOWN = {  # metric → what it is, for people
    "evaluate/gold": "judge's score of held-out prompts (gold)", "evaluate/score": "reward of held-out prompts",
    "evaluate/win_rate": "wins against the starting actor", "evaluate/kl": "KL to the reference, nats a response, held-out",
    "reward/score": "score of the training responses", "reward/raw_score": "reward of the training responses",
    "gae/kl": "KL to the reference, nats a response, training", "rollout/response_length": "tokens of a training response",
    "reward_model/heldout_accuracy": "pairs that the reward model orders right",
}
LOADING = {
    "model": "AutoModelForCausalLM.from_pretrained(folder)",
    "scorer": "AutoModelForSequenceClassification.from_pretrained(folder)",
    "adapter": "AutoPeftModelForCausalLM.from_pretrained(folder{held})",
    "scoring adapter": "AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1{held})",
}
HELD = {  # precision → how transformers is told to hold a base in it
    "float32": "", "bfloat16": "dtype=torch.bfloat16",
    "int8": "quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)",
    "nf4": 'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
           "bnb_4bit_compute_dtype=torch.bfloat16)",
}


def model_card(run: Run, state: TrainState, role: str, *, base: str | None, alone: bool) -> str:
    """Markdown. `base`: what an adapter is over, none of a whole model; `alone`: whether it loads without Baton."""
    scores = role != "actor"
    kind = ("scoring adapter" if scores else "adapter") if base else "scorer" if scores else "model"
    front: dict[str, Any] = {
        "library_name": "peft" if base else "transformers", "tags": ["baton", "ppo", "rlhf", *(["lora"] if base else [])],
        "pipeline_tag": "text-classification" if scores else "text-generation"}
    if base:
        front["base_model"] = base.partition("@")[0]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {run.name}: {role.replace('_', ' ')} after iteration {state.iteration}",
        f"Trained with PPO by Baton ({_made(run, state)}).",
        "## Load it", _loading(kind, alone, run.config.base_model.precision),
        "## Scores", _scores(run, state),
        "## Data", "\n".join(f"- {name}: `{ref}`" for name, ref in sorted(run.inputs.items())),
        "## Lineage", _lineage(run, getattr(state, role).artifact),
        "## Config", f"```yaml\n{yaml.safe_dump(run.record.config, sort_keys=False)}```"]
    return "\n\n".join(parts) + "\n"


def _made(run: Run, state: TrainState) -> str:
    parent = f", forked from {run.record.parent}" if run.record.parent else ""
    made = run.record.created[:10]
    return f"run `{run.name}`{parent}, made {made}, iteration {state.iteration} of {run.config.iterations}"


def _loading(kind: str, alone: bool, precision: str) -> str:
    if not alone:
        return ("A scalar head over a body that transformers has no classifier of: "
                "`flows.language.model_folders.load_scalar(folder)` of Baton loads it.")
    held = HELD[precision] if "adapter" in kind else ""
    call = LOADING[kind].format(held=f", {held}" if held else "")
    theirs = {"transformers": ["AutoTokenizer", *(["BitsAndBytesConfig"] if "BitsAndBytes" in held else [])]}
    theirs.setdefault("peft" if "adapter" in kind else "transformers", []).append(call.partition(".")[0])
    imports = [f"from {library} import {', '.join(sorted(names))}" for library, names in sorted(theirs.items())]
    return "\n".join(["```python", *(["import torch"] if "torch." in held else []), *imports, "", f"model = {call}",
                      "tokenizer = AutoTokenizer.from_pretrained(folder)", "```"])


def _scores(run: Run, state: TrainState) -> str:
    """Of the start, and of this iteration; of evaluations the last one up to it."""
    start = run.state(0).metrics
    evaluated = next((one for i in range(state.iteration, 0, -1)
                      if "evaluate" in (one := run.state(i)).artifacts), None)
    now = {**(evaluated.metrics if evaluated else {}), **state.metrics}
    rows = [f"| {what} | {_number(start.get(name))} | {_number(now.get(name))} | `{name}` |"
            for name, what in SHOWN.items() if name in start or name in now]
    last = f" (evaluated after iteration {evaluated.iteration})" if evaluated and evaluated is not state else ""
    return f"| | start | iteration {state.iteration}{last} | metric |\n|---|---|---|---|\n" + "\n".join(rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _lineage(run: Run, model: ArtifactRef) -> str:
    """The artifacts that a model comes from, newest first, with digests of their contents."""
    lines, todo, seen = [], [model], set()
    while todo:
        ref = todo.pop(0)
        if ref in seen:
            continue
        seen.add(ref)
        manifest = run.store.manifest(ref)
        lines.append(f"- `{ref}` (content `{manifest.content[:12]}`)")
        todo += [source for role, source in manifest.recipe.inputs.items() if role in ("actor", "critic", "base", "start")]
    return "\n".join(lines)
