"""Digests of files: weights are hashed by BLAKE3, and by SHA-256 where an artifact from before format 7 was."""

import shutil
from contextlib import closing

import pytest
from conftest import rewrite
from pydantic import ValidationError

from flows.chains import warm_of
from flows.cli.main import run_command
from flows.perform import perform
from flows.runs.run import open_run, references
from flows.runs.verify import verify
from flows.store.attempt import folder_of
from flows.store.digests import Hash, file_digest, sha256_file
from flows.store.store import Store, attempt_of
from schemas.artifacts import FileEntry, call_of, short_digest


def as_before(root, ref, written=None):
    """The artifact's manifest as it was before format 7. `written`: a folder of its files, if they are not in the store."""
    folder = written or root / attempt_of(Store(root).manifest(ref))
    rewrite(root / folder_of(ref) / "manifest.json", lambda data: data.update(files=[
        {key: value for key, value in entry.items() if key != "digest"} | {"sha256": sha256_file(folder / entry["path"])}
        for entry in data["files"]]))


def drop_weights(root, ref):
    """As of an update between snapshots: digests alone."""
    folder = root / attempt_of(Store(root).manifest(ref))
    weights = sorted(path for path in folder.rglob("*.safetensors"))
    for path in weights:
        path.unlink()
    rewrite(root / folder_of(ref) / "manifest.json",
            lambda data: data.update(unwritten=[path.relative_to(folder).as_posix() for path in weights]))


def store_as_before(root, name):
    """All of a run, and what its manifests say of each other."""
    refs = references(open_run(Store(root), name))
    for ref in refs:
        as_before(root, ref)
    for ref in refs:
        store = Store(root)
        inputs = {role: store.manifest(source).content for role, source in store.manifest(ref).recipe.inputs.items()}
        rewrite(root / folder_of(ref) / "manifest.json", lambda data, inputs=inputs: data.update(input_contents=inputs))


@pytest.mark.parametrize("algorithm, of_abc", [
    ("sha256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ("blake3", "blake3:6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85")])
def test_digests_are_those_that_are_published(tmp_path, algorithm, of_abc):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file", algorithm) == of_abc
    pieces = Hash(algorithm)
    pieces.update(b"a")
    pieces.update(memoryview(b"bc"))
    assert pieces.digest() == of_abc


@pytest.mark.parametrize("digests, field", [
    ({"digest": "0" * 64, "sha256": "0" * 64}, "sha256"), ({"digest": f"md5:{'0' * 64}"}, "digest"), ({}, "digest")])
def test_an_entry_has_one_digest(digests, field):
    with pytest.raises(ValidationError, match=field):
        FileEntry.model_validate({"path": "x", "bytes": 1} | digests)


def test_weights_are_hashed_by_blake3_and_all_else_by_sha_256(trained):
    run = open_run(Store(trained[1]), "tiny")
    entries = run.store.manifest(run.last().actor.artifact).files + run.store.manifest(run.last().artifacts["gae"]).files
    assert {entry.path.endswith(".safetensors") for entry in entries} == {True, False}
    assert all((entry.algorithm == "blake3") == entry.path.endswith(".safetensors") for entry in entries)


def test_an_older_log_is_replayed_and_reproduced(trained, tmp_path, capsys):
    """Weights that were not written are held against the digests that were taken."""
    each, some = tmp_path / "each", tmp_path / "some"
    for store, every in ((each, 1), (some, 5)):
        assert run_command(["train", str(trained[0]), "--store", str(store), "--iterations", "4", "--quiet", "--set",
                            f"checkpoints.every={every}", "--set", "tracking.enabled=false"]) == 0
    run = open_run(Store(some), "tiny")
    refs = [run.state(iteration).artifacts["ppo"] for iteration in (1, 2, 3)]
    for ref in refs:
        as_before(some, ref, each / attempt_of(Store(each).manifest(ref)))
    options = ("tiny", "--iteration", "3", "--store", str(some))
    for command, missing in ((("stage", "ppo"), [True, False, True]), (("restore",), [True, False, False])):
        assert run_command([*command, *options, "--quiet"]) == 0  # a stage restores what it reads
        assert [len(Store(some).missing(ref)) > 0 for ref in refs] == missing
    rewrite(some / folder_of(refs[-1]) / "manifest.json", lambda data: data["files"][-1].update(sha256="0" * 64))
    capsys.readouterr()
    assert run_command(["stage", "ppo", *options]) == 1
    assert "committed 000000000000, now " in capsys.readouterr().out


def test_an_older_artifact_that_is_lost_is_made_anew(copied):
    """With other digests of the same bytes: what was made from it is as good as before."""
    root = copied[1]
    store_as_before(root, "tiny")
    assert verify(Store(root), None)[1] == []
    ref = open_run(Store(root), "tiny").state(1).artifacts["ppo"]
    shutil.rmtree(root / folder_of(ref))
    assert run_command(["stage", "ppo", "tiny", "--iteration", "1", "--store", str(root), "--quiet"]) == 0
    assert {entry.algorithm for entry in Store(root).manifest(ref).files} == {"sha256", "blake3"}
    assert verify(Store(root), None)[1] == []
    weights = next((root / folder_of(ref)).rglob("actor/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    (finding,) = verify(Store(root), None)[1]
    assert (finding.file, finding.field) == (str(weights), "size")
    drop_weights(root, ref)
    rewrite(root / folder_of(ref) / "manifest.json", lambda data: data.update(created="2999-01-01T00:00:00+00:00"))
    assert verify(Store(root), None)[1] == []
    rewrite(root / folder_of(ref) / "manifest.json", lambda data: data.update(created="1999-01-01T00:00:00+00:00"))
    assert {finding.field.partition(".")[0] for finding in verify(Store(root), None)[1]} == {"input_contents"}


def test_an_older_version_was_first(copied, monkeypatch):
    root, find = copied[1], Store.find
    run = open_run(Store(root), "tiny")
    ref = run.state(2).artifacts["ppo"]
    as_before(root, ref)
    store = Store(root)
    call = call_of(store.manifest(ref), store.absolute)
    monkeypatch.setattr(Store, "find", lambda store, other: None if other == ref else find(store, other))
    with closing(warm_of(run.config.kind, store, call.execution)) as warm:
        produced = perform(call, store, warm)
    assert (produced.how, produced.different) == ("adopted", {})


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("setting, same", [("ppo.dual_clip=1e9", True), ("ppo.learning_rate=0.5", False)])
def test_weights_by_another_recipe_and_another_digest(copied, capsys, kept, setting, same):
    root = copied[1]
    for command in (["fork", "tiny", "--at", "1", "--run", "other", "--set", setting], ["train", "--run", "other"]):
        assert run_command([*command, "--store", str(root), "--quiet"]) == 0
    ours, theirs = (open_run(Store(root), name).state(2).artifacts["ppo"] for name in ("tiny", "other"))
    assert ours != theirs
    as_before(root, theirs)
    if not kept:
        drop_weights(root, ours)
    capsys.readouterr()
    assert run_command(["diff", "tiny", "other", "--store", str(root)]) == 0
    said = capsys.readouterr().out
    assert ("the same bytes" if same else "differ first in iteration 2, stage ppo") in said


def test_a_digest_for_people_is_digits():
    assert short_digest("blake3:" + 16 * "0123") == short_digest(16 * "0123") == "012301230123"
