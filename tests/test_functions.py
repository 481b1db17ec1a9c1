"""Which functions may run: BATON_ALLOWED_FUNCTIONS, at the start and on a worker."""

import hashlib
import sys

import pytest

from flows.cli.main import run_command
from flows.control.environments import make_environment
from flows.runs.functions import function_file, load_function
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
    assert load_function("rewards.py:score", file)(["a"], ["b"]) == [0.0]


@pytest.mark.parametrize("allowed", ["", "other.py:*", "rewards.py:loss", f"sha256:{'0' * 64}"])
def test_what_is_not_allowed_is_not_even_imported(file, monkeypatch, allowed):
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", allowed)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=f"'rewards.py:score': BATON_ALLOWED_FUNCTIONS does not .* or sha256:{digest}"):
        load_function("rewards.py:score", file)
    assert not (file.parent / "ran").exists()


def test_an_installed_function_is_not_imported_either(package, monkeypatch):
    """Nor its package, when the file that is imported into the store is looked for; by content it can be allowed."""
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", "rewards.py:*")
    file = function_file("my_package.rewards:score", package)
    assert file == package / "my_package" / "rewards.py"
    with pytest.raises(ConfigError, match=r"'my_package.rewards:score': BATON_ALLOWED_FUNCTIONS"):
        load_function("my_package.rewards:score", file)
    assert not (package / "ran").exists() and "my_package" not in sys.modules
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}")
    assert load_function("my_package.rewards:score", file)(["a"], ["b"]) == [0.0]


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
            function_file(f"{module}:score", tmp_path)


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
            load_function(f"{place}:score", tmp_path / place)
    assert not (tmp_path / "ran").exists()
