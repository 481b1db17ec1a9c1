"""Every file of a finished run damaged in turn: noticed when it is read, and by verify, which names it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import rewrite

from flows.cli.main import run_command
from flows.runs.run import open_run, references
from flows.runs.verify import Verifier, verify
from flows.store.attempt import folder_of
from flows.store.store import Store
from schemas.artifacts import ArtifactRef
from schemas.errors import StoreError
from schemas.tables import TABLES

DAMAGES = {
    "truncated": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "longer": lambda data: data + b"\0",
}


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def read_everything(root: Path, name: str) -> None:
    """As somebody who uses all of a run: every state, table, file and model's folder."""
    for ref in read_records(root, name):
        read_artifact(root, ref)


def read_records(root: Path, name: str) -> list[ArtifactRef]:
    """All that the run's states and record refer to."""
    run = open_run(Store(root), name)
    states = run.states()
    assert [state.iteration for state in states] == list(range(len(states)))
    return references(run)


def read_artifact(root: Path, ref: ArtifactRef) -> None:
    store = Store(root)
    manifest = store.manifest(ref)
    for role, source in manifest.recipe.inputs.items():
        assert store.manifest(source).content == manifest.input_contents[role]
    for entry in manifest.files:
        store.table(ref, TABLES[entry.path]) if entry.path in TABLES else store.file(ref, entry.path)
    for inner in {entry.path.split("/")[0] for entry in manifest.files if "/" in entry.path}:
        store.folder(ref, inner)


def files_of(root: Path) -> list[Path]:
    return sorted(path for part in ("artifacts", "runs") for path in (root / part).rglob("*")
                  if path.is_file() and path.name != "lease")


def test_every_file_damaged_in_every_way_is_noticed(copied):
    """One bit in three places of each, beside the rest; make torture flips every byte of the small ones."""
    root, rng, count = copied[1], np.random.default_rng(0), 0
    read_everything(root, "tiny")
    assert verify(Store(root), None)[1] == []
    for path in files_of(root):
        data = path.read_bytes()
        flips = [flipped(data, int(at)) for at in rng.choice(8 * len(data), 3, replace=False)]
        gone = [] if path.name == "000002.json" else [None]  # without its last state a run is one that is not as far
        for damaged in [*(damage(data) for damage in DAMAGES.values()), *flips, *gone]:
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            require_noticed(root, path)
            path.write_bytes(data)
            count += 1
    assert count > 500
    assert verify(Store(root), None)[1] == []


def require_noticed(root: Path, path: Path) -> None:
    """On read by an error, and by verify in a finding that names the file and says what helps: a file of an artifact when
    that is read and verified, a record when the run is."""
    kind, stage, identity = path.relative_to(root).parts[:3]
    ref = ArtifactRef(stage=stage, identity=identity) if kind == "artifacts" else None
    try:
        read_artifact(root, ref) if ref else read_records(root, "tiny")
    except Exception as error:
        assert str(path) in str(error) or not path.exists(), (path, error)
    else:
        raise AssertionError(f"{path}: read as if nothing were wrong")
    verifier = Verifier(Store(root))
    found = list(verifier.artifact(ref) if ref else verifier.run("tiny"))
    named = [one for one in found if one.file == str(path) or (not path.exists() and path.parent.name in one.file)]
    assert named and all(one.hint and one.field and one.expected and one.found for one in named), (path, found)


def test_a_state_that_is_missing_in_the_middle_is_noticed(copied):
    (copied[1] / "runs/tiny/iterations/000001.json").unlink()
    (finding,) = verify(Store(copied[1]), "tiny")[1]
    assert finding.file.endswith("000002.json") and finding.expected == "000001.json next, none left out"


def test_a_file_that_no_manifest_lists_is_not_read_with_a_model(copied, capsys):
    """transformers would take up an added_tokens.json, or code, that lies in a model's folder."""
    run = open_run(Store(copied[1]), "tiny")
    actor = run.last().actor
    stray = Path(run.store.place(actor.artifact, actor.folder), "added_tokens.json")
    stray.write_text("{}")
    with pytest.raises(StoreError, match=f"{stray}: file: expected no file but those the manifest lists"):
        run.store.folder(actor.artifact, actor.folder)
    assert run_command(["verify", "tiny", "--store", str(copied[1]), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["file"] == str(stray)


def test_findings_name_the_command_that_helps(copied, capsys):
    """What a person does who follows them: damaged artifacts and states are made again, to the same bytes."""
    example, root = copied
    run = open_run(Store(root), "tiny")
    before = {ref: run.store.manifest(ref).digests() for ref in references(run)}
    values, prompts = run.state(2).artifacts["value"], run.inputs["prompts"]
    for ref in (values, prompts):
        path = next(path for path in (root / folder_of(ref) / "attempts").rglob("*") if path.is_file())
        path.write_bytes(b"")
    (root / "runs/tiny/iterations/000002.json").write_text("{")
    assert run_command(["gc", "--older-than", "0", "--store", str(root)]) == 1  # it does not know what the run needs
    assert "000002.json: content: expected JSON" in capsys.readouterr().err
    hints = {one.file.rpartition("/")[2]: one.hint for one in verify(Store(root), None)[1]}
    assert hints == {
        "000002.json": "remove it and those after it; baton train --run tiny finds their artifacts and writes them again",
        "prompts.parquet": f"remove {root / folder_of(prompts)}, then the command that made the run (baton train CONFIG "
                           "--run tiny) imports it again",
        "values.parquet": "mend the records first, then baton verify again"}
    (root / "runs/tiny/iterations/000002.json").unlink()
    assert run_command(["train", "--run", "tiny", "--store", str(root), "--quiet"]) == 0
    hints = {one.file.rpartition("/")[2]: one.hint for one in verify(Store(root), None)[1]}
    again = "baton stage value tiny --iteration 2 makes it again"
    assert hints["values.parquet"] == f"remove {root / folder_of(values)}, then {again}"
    for ref in (values, prompts):
        shutil.rmtree(root / folder_of(ref))
    assert run_command(["train", str(example), "--store", str(root), "--quiet", "--set", "tracking.enabled=false"]) == 0
    assert run_command(["stage", "value", "tiny", "--iteration", "2", "--store", str(root), "--quiet"]) == 0
    assert verify(Store(root), None)[1] == []
    again = open_run(Store(root), "tiny")
    assert {ref: again.store.manifest(ref).digests() for ref in references(again)} == before


@pytest.mark.parametrize("change, field", [
    (lambda d: d.update(iteration=1), "iteration"), (lambda d: d.update(kl_coef="much"), "kl_coef"),
    (lambda d: d.pop("actor"), "actor"), (lambda d: d.update(more=1), "more"),
])
def test_a_state_that_says_what_it_cannot_is_named_with_the_field(copied, change, field):
    rewrite(copied[1] / "runs/tiny/iterations/000002.json", change)
    (finding,) = verify(Store(copied[1]), "tiny")[1]
    assert finding.field == field and finding.file.endswith("000002.json")


def test_a_run_that_is_not_there(trained, capsys):
    assert run_command(["verify", "nobody", "--store", str(trained[1])]) == 2
    assert "no run 'nobody'" in (error := capsys.readouterr().err) and "runs there: tiny" in error
