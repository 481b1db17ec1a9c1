"""Which functions may run: BATON_ALLOWED_FUNCTIONS, at the start and on a worker."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from brought import write_brought

from flows.cli.main import run_command
from flows.control.environments import make_environment
from flows.runs.functions import check_function, function_files, load_function
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.control import EnvironmentConfig
from schemas.errors import ConfigError

SOURCE = "ran = open({path!r}, 'w').close()\ndef score(prompts, responses):\n    return [0.0] * len(responses)\n"


@pytest.fixture
def file(tmp_path):
    """A file with a function, which leaves a trace when it is run."""
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE.format(path=str(tmp_path / "ran")))
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package whose `rewards` leaves a trace when it is run, as the package itself does."""
    (tmp_path / "my_package").mkdir()
    for name in ("__init__", "rewards"):
        (tmp_path / "my_package" / f"{name}.py").write_text(SOURCE.format(path=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_package", "my_package.rewards"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("allowed", [None, "rewards.py:*", "*", "other:f, rewards.py:score", "sha256"])
def test_what_is_allowed_runs(file, monkeypatch, allowed):
    if allowed == "sha256":
        allowed = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    if allowed is not None:
        monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", allowed)
    assert load_function("rewards.py:score", [file])(["a"], ["b"]) == [0.0]


@pytest.mark.parametrize("allowed", ["", "other.py:*", "rewards.py:loss", f"sha256:{'0' * 64}"])
def test_what_is_not_allowed_is_not_even_imported(file, monkeypatch, allowed):
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", allowed)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=f"'rewards.py:score': BATON_ALLOWED_FUNCTIONS does not .* or sha256:{digest}"):
        load_function("rewards.py:score", [file])
    assert not (file.parent / "ran").exists()


def test_an_installed_function_is_not_imported_either(package, monkeypatch):
    """Nor its package, when the file that is imported into the store is looked for; by content it can be allowed."""
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", "rewards.py:*")
    (file,) = function_files("my_package.rewards:score", package)
    assert file == package / "my_package" / "rewards.py"
    with pytest.raises(ConfigError, match=r"'my_package.rewards:score': BATON_ALLOWED_FUNCTIONS"):
        load_function("my_package.rewards:score", [file])
    assert not (package / "ran").exists() and "my_package" not in sys.modules
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}")
    assert load_function("my_package.rewards:score", [file])(["a"], ["b"]) == [0.0]


def test_an_environment_that_a_module_registers_has_to_be_allowed(package, monkeypatch):
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", "rewards.py:*")
    with pytest.raises(ConfigError, match=r"'my_package.rewards:Own-v0': BATON_ALLOWED_FUNCTIONS"):
        make_environment(EnvironmentConfig(id="my_package.rewards:Own-v0"))
    assert not (package / "ran").exists()
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", "my_package.*:*")
    with pytest.raises(ConfigError, match="Own"):  # imported, and registers no such environment
        make_environment(EnvironmentConfig(id="my_package.rewards:Own-v0"))
    assert (package / "ran").exists()


def test_a_module_without_a_source_file_brings_no_function(tmp_path):
    for module in ("sys", "no_such_package", "os.path", "my_package.no_such_module"):
        with pytest.raises(ConfigError, match=f"no such module: {module}"):
            function_files(f"{module}:score", tmp_path)


def test_a_run_whose_judge_is_not_allowed_is_not_made(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", "rewards.py:*")
    assert run_command(["train", str(example), "--store", str(tmp_path / "store")]) == 2
    assert "function 'grammar.py:gold': BATON_ALLOWED_FUNCTIONS does not allow it" in capsys.readouterr().err
    assert not (tmp_path / "store" / "runs").exists()


@pytest.mark.parametrize("allowed", ["mypackage.*:score", "mypackage.rewards:*", "mypackage*:*"])
def test_a_file_that_is_called_like_a_package_is_not_allowed_as_one(tmp_path, monkeypatch, allowed):
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", allowed)
    for place in ("mypackage.evil.py", "mypackage.rewards:evil.py"):
        (tmp_path / place).write_text(SOURCE.format(path=str(tmp_path / "ran")))
        with pytest.raises(ConfigError, match="BATON_ALLOWED_FUNCTIONS"):
            load_function(f"{place}:score", [tmp_path / place])
    assert not (tmp_path / "ran").exists()


# --- the modules beside a function's file ---

@pytest.fixture
def with_helpers(tmp_path):
    """A function in a folder with a helper, a package and a file that nothing imports."""
    folder = tmp_path / "mine"
    (folder / "words").mkdir(parents=True)
    (folder / "rewards.py").write_text("from helper import scale\nimport words.good\n\n\ndef score(prompts, responses):\n"
                                       "    import later\n    return [scale * later.seen() for _ in responses]\n")
    (folder / "helper.py").write_text("import words.bad\nscale = 2.0\n")
    (folder / "later.py").write_text("count = 0\n\n\ndef seen():\n    global count\n    count += 1\n    return count\n")
    for name in ("__init__", "good", "bad"):
        (folder / "words" / f"{name}.py").write_text("")
    (folder / "unused.py").write_text("raise RuntimeError")
    return folder


def test_modules_beside_a_file_travel_with_it(with_helpers, monkeypatch):
    files = function_files("rewards.py:score", with_helpers)
    assert files[0].name == "rewards.py" and {path.relative_to(with_helpers).as_posix() for path in files} == {
        "rewards.py", "helper.py", "later.py", "words/__init__.py", "words/good.py", "words/bad.py"}
    check_function("rewards.py:score", files)
    before = set(sys.modules), list(sys.path)
    score = load_function("rewards.py:score", files)
    assert [score(["p"], ["r"]), score(["p"], ["r"])] == [[2.0], [4.0]]  # a module that is kept from call to call
    assert sys.path == before[1] and not {"helper", "later", "words"} & {*sys.modules}
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", f"sha256:{hashlib.sha256(files[0].read_bytes()).hexdigest()}")
    with pytest.raises(ConfigError, match=r"does not allow it here; add its name or sha256:.*,sha256:"):
        load_function("rewards.py:score", files)


def test_checking_a_function_of_another_module_leaves_that_imported(tmp_path):
    import statistics

    (tmp_path / "rewards.py").write_text("from statistics import correlation as score\n")
    before = set(sys.modules)
    check_function("rewards.py:score", [tmp_path / "rewards.py"])
    assert sys.modules.get("statistics") is statistics and set(sys.modules) == before


def test_two_versions_of_a_helper_in_one_process(with_helpers, tmp_path):
    old = load_function("rewards.py:score", function_files("rewards.py:score", with_helpers))
    (with_helpers / "helper.py").write_text("scale = -1.0\n")
    new = load_function("rewards.py:score", function_files("rewards.py:score", with_helpers))
    assert old(["p"], ["r"])[0] > 0 > new(["p"], ["r"])[0]


def test_a_run_keeps_a_function_with_its_modules(example, with_helpers, tmp_path, prefect_server, capsys):
    """Trained, then reproduced after the originals are gone; a changed helper is another input."""
    for path in with_helpers.rglob("*.py"):
        (target := example / path.relative_to(with_helpers)).parent.mkdir(exist_ok=True)
        target.write_text(path.read_text())
    (example / "later.py").write_text("def seen():\n    return 1\n")
    arguments = ["train", str(example), "--store", str(tmp_path / "store"), "--quiet", "--set",
                 'reward.components={"mine": {"source": "rewards.py:score"}}', "--iterations", "1"]
    assert run_command(arguments) == 0
    (example / "helper.py").write_text("import words.bad\nscale = 3.0\n")
    assert run_command(arguments) == 2 and "data.reward.mine: other content" in capsys.readouterr().err
    for name in ("rewards.py", "helper.py", "later.py"):
        (example / name).unlink()
    run = open_run(Store(tmp_path / "store"), example.name)
    (ref,) = (ref for role, ref in run.inputs.items() if role == "reward.mine")
    assert sorted(entry.path for entry in run.store.manifest(ref).files) == [
        "helper.py", "later.py", "rewards.py", "words/__init__.py", "words/bad.py", "words/good.py"]
    assert run_command(["verify", "--store", str(tmp_path / "store")]) == 0
    call = ["stage", "reward", example.name, "--iteration", "1", "--store", str(tmp_path / "store"), "--json"]
    code = subprocess.run([sys.executable, "-m", "flows.cli.main", *call], capture_output=True, text=True, timeout=300)
    assert code.returncode == 0 and json.loads(code.stdout)["verdict"] == "same", code.stderr


def test_what_a_file_switches_and_prints_when_it_is_run_is_put_back(tmp_path, capsys):
    file = tmp_path / "rewards.py"
    file.write_text("import torch\ntorch.set_grad_enabled(False)\nprint('seen')\ndef score(p, r):\n    return [0.0]\n")
    load_function("rewards.py:score", [file])
    out, error = capsys.readouterr()
    assert torch.is_grad_enabled() and out == "" and "seen" in error
    file.write_text("def score(p, r)\n")
    with pytest.raises(ConfigError, match=r"rewards.py cannot be run: it raised SyntaxError: .*\(rewards.py, line 1\)$"):
        load_function("rewards.py:score", [file])


# --- data beside a function ---

READS = '''
from pathlib import Path

FILES = ["words.txt", "lists/*.txt"]
HERE = Path(__file__).parent

def score(prompts, responses):
    words = (HERE / "words.txt").read_text().split() + (HERE / "lists/more.txt").read_text().split()
    return [float(sum(word in response for word in words)) for response in responses]
'''


def test_data_that_a_functions_file_names_is_kept_with_it(tmp_path, prefect_server):
    folder = write_brought(tmp_path / "case", rewards_py=READS)
    (folder / "words.txt").write_text("a e")
    (folder / "lists").mkdir()
    (folder / "lists/more.txt").write_text("i")
    store = ["--store", str(tmp_path / "store"), "--quiet"]
    assert run_command(["train", str(folder), *store]) == 0
    run = open_run(Store(str(tmp_path / "store")), "case")
    entries = run.store.manifest(run.inputs["reward.length"]).files
    assert sorted(entry.path for entry in entries) == ["lists/more.txt", "rewards.py", "words.txt"]
    shutil.rmtree(folder)
    assert run_command(["stage", "reward", "case", "--iteration", "1", *store]) == 0


@pytest.mark.parametrize("line, words", [
    ('FILES = ["none.txt"]', "FILES in rewards.py names 'none.txt', and there is no such file"),
    ('FILES = ["../secret"]', "FILES in rewards.py names '../secret', and there is no such file"),
    ("FILES = [name for name in ()]", "is not a list of texts as it stands"),
])
def test_data_that_is_not_there_is_named(tmp_path, line, words):
    (tmp_path / "rewards.py").write_text(f"{line}\n\ndef score(prompts, responses): ...\n")
    with pytest.raises(ConfigError, match=words):
        function_files("rewards.py:score", tmp_path)
