"""Stores of every format there has been are read, checked and gone on with: tests/formats has one of each."""

import shutil
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from conftest import rewrite
from test_verify import files_of

from flows.chains import warm_of
from flows.cli.main import run_command
from flows.runs.run import open_run, references
from flows.runs.verify import verify
from flows.store.store import Store
from schemas.errors import StoreError
from schemas.records import FORMAT_VERSION, version
from schemas.tables import TABLES

FORMATS = Path(__file__).parent / "formats"


@pytest.fixture
def store_of(tmp_path):
    def unpack(number):
        with tarfile.open(FORMATS / f"{number}.tar.gz") as packed:
            packed.extractall(tmp_path, filter="data")
        return tmp_path / "store"

    return unpack


def test_there_is_one_of_each():
    assert sorted(path.name for path in FORMATS.iterdir()) == [f"{n}.tar.gz" for n in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("number", range(1, FORMAT_VERSION + 1))
def test_everything_in_it_is_read(store_of, number):
    root = store_of(number)
    assert verify(Store(root), None) == (26, [])
    for name, iterations in (("language", 1), ("control", 2)):
        store = Store(root)
        run = open_run(store, name)
        assert run.last().iteration == iterations
        kinds = {entry.path: store.table(ref, TABLES[entry.path]) for ref in references(run)
                 for entry in store.manifest(ref).files if entry.path in TABLES}
        assert len(kinds) == {"language": 6, "control": 3}[name] and all(len(table) for table in kinds.values())
        with closing(warm_of(run.config.kind, store, run.config.execution)) as warm:
            warm.critic(run.last().critic)


@pytest.mark.parametrize("number", range(1, FORMAT_VERSION + 1))
def test_a_run_in_it_goes_on(store_of, number, prefect_server):
    root = store_of(number)
    assert run_command(["train", "--run", "control", "--iterations", "3", "--store", str(root), "--quiet"]) == 0
    assert open_run(Store(root), "control").last().iteration == 3 and verify(Store(root), None)[1] == []


@pytest.mark.parametrize("number", range(1, 5))
def test_a_language_run_in_it_goes_on_by_its_config_and_is_reproduced(store_of, number, tmp_path, prefect_server):
    """Up to format 4 data was imported as the JSON lines that it was; those same lines are still the run's data."""
    root = store_of(number)
    run, folder = open_run(Store(root), "language"), tmp_path / "language"
    folder.mkdir()
    for ref in run.inputs.values():
        for file in run.store.manifest(ref).files:
            shutil.copy(run.store.file(ref, file.path), folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(run.record.config))
    store = ["--store", str(root), "--quiet"]
    stages = run.state(1).artifacts if number == 4 else ("rollout",)  # tables hold their columns' words: those are bytes too
    for stage in stages:
        assert run_command(["stage", stage, "language", "--iteration", "1", *store]) == 0, stage
    assert run_command(["train", str(folder), "--run", "language", "--iterations", "2", *store]) == 0
    assert open_run(Store(root), "language").last().iteration == 2
    (folder / "prompts.jsonl").write_text('{"prompt": "other"}\n')
    assert run_command(["train", str(folder), "--run", "language", "--iterations", "2", *store]) == 2


def test_every_record_of_a_newer_format_is_refused_with_the_version_that_reads_it(copied):
    """By whatever opens it, and nothing is changed."""
    root = copied[1]
    for path in files_of(root):
        if (path.suffix == ".json" and path.parent.name in ("tiny", "iterations")) or path.name == "manifest.json":
            kept = path.read_bytes()
            rewrite(path, lambda data: data.update(format_version=FORMAT_VERSION + 1, baton="7.0.1", marvel=[1]))
            message = (f"{path}: format_version: expected at most {FORMAT_VERSION}, for Baton {version()}, found "
                       f"{FORMAT_VERSION + 1}, written by Baton 7.0.1; use Baton 7.0.1 or a newer one")
            with pytest.raises(StoreError) as error:
                store = Store(root)
                run = open_run(store, "tiny")
                for ref in references(run):
                    store.manifest(ref)
            assert str(error.value) == message
            assert any(finding.hint == "use Baton 7.0.1 or a newer one" for finding in verify(Store(root), None)[1])
            path.write_bytes(kept)
    assert verify(Store(root), None)[1] == []


def test_a_rerun_refuses_it_in_one_line(copied, capsys):
    rewrite(copied[1] / "runs/tiny/run.json", lambda data: data.update(format_version=9, baton="7.0.1"))
    for arguments in (["show", "tiny"], ["runs"], ["train", str(copied[0])], ["stage", "gae", "tiny", "--iteration", "1"],
                      ["gc"], ["fork", "tiny", "--at", "1", "--run", "x"]):
        assert run_command([*arguments, "--store", str(copied[1])]) == 1
        assert "use Baton 7.0.1 or a newer one" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert sorted(path.name for path in (copied[1] / "runs").iterdir()) == ["tiny"]
