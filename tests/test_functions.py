"""Which functions may run: BATON_ALLOWED_FUNCTIONS, at the start and on a worker."""

import hashlib

import pytest

from flows.cli.main import run_command
from flows.runs.functions import load_function
from schemas.errors import ConfigError

SOURCE = "ran = open({path!r}, 'w').close()\ndef score(prompts, responses):\n    return [0.0] * len(responses)\n"


@pytest.fixture
def file(tmp_path):
    """A file with a function, which leaves a trace when it is run."""
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE.format(path=str(tmp_path / "ran")))
    return path


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


def test_an_installed_function_is_not_imported_either(monkeypatch, tmp_path):
    (tmp_path / "my_package.py").write_text(SOURCE.format(path=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BATON_ALLOWED_FUNCTIONS", "rewards.py:*")
    with pytest.raises(ConfigError, match="'my_package:score': BATON_ALLOWED_FUNCTIONS"):
        load_function("my_package:score", tmp_path / "my_package.py")
    assert not (tmp_path / "ran").exists()


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
