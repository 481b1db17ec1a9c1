"""Settings on the command line, and users' functions."""

import pytest

from flows.runs.functions import function_files, load_function
from schemas.config import apply_settings
from schemas.errors import ConfigError


def test_settings_are_yaml_and_nest():
    data = apply_settings({"ppo": {"epochs": 4}}, ["ppo.learning_rate=1e-5", "ppo.epochs=2", "evaluate.judge=null",
                                                   "reward.components={a: {source: x}}", "gae.whiten=false"])
    assert data == {"ppo": {"epochs": 2, "learning_rate": 1e-5}, "evaluate": {"judge": None},
                    "reward": {"components": {"a": {"source": "x"}}}, "gae": {"whiten": False}}


@pytest.mark.parametrize("setting", ["a", "=1", "a..b=1", ".a=1"])
def test_a_setting_of_another_form_is_refused(setting):
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_settings({}, [setting])


def test_a_setting_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="seed is a value, not a section"):
        apply_settings({"seed": 1}, ["seed.x=1"])


def test_two_versions_of_a_file_are_two_functions(tmp_path):
    file = tmp_path / "f.py"
    file.write_text("def score(p, r):\n    return [1.0] * len(r)\n")
    one = load_function("f.py:score", [file])
    file.write_text("def score(p, r):\n    return [2.0] * len(r)\n")
    assert (one(["p"], ["r"]), load_function("f.py:score", [file])(["p"], ["r"])) == ([1.0], [2.0])


def test_a_function_of_a_package_is_found_with_its_file(tmp_path):
    source = "statistics:mean"
    assert load_function(source, function_files(source, tmp_path))([1, 3]) == 2


def test_a_file_that_cannot_be_run_is_named(tmp_path):
    (tmp_path / "f.py").write_text("import no_such_package\n")
    with pytest.raises(ConfigError, match=r"f.py cannot be run: it raised ModuleNotFoundError: No module named "
                                          r"'no_such_package' \(f.py, line 1"):
        load_function("f.py:score", [tmp_path / "f.py"])
