"""What a user's function may do wrong, and what is said of it; that it leaves nothing behind."""

import json
import logging
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch

from flows.cli.main import run_command
from flows.runs.functions import load_function
from schemas.errors import NonFiniteError, RewardError
from stages.ops.guest import Patience, call_guest
from stages.ops.rewards import function_scorer


def scorer(tmp_path, body, **patience):
    """Of a function in a file of its own, with this body."""
    path = tmp_path / "rewards.py"
    path.write_text("import sys, time\nimport numpy as np\nimport torch\n\n\ndef score(prompts, responses):\n" + "".join(
        f"    {line}\n" for line in body.splitlines()))
    return function_scorer("rewards.py:score", load_function("rewards.py:score", [path]), Patience(**patience))


@pytest.mark.parametrize("body, message", [
    ("return [1 / 0 for _ in responses]", r"raised ZeroDivisionError: division by zero \(rewards.py, line 7, in "),
    ("return np.linalg.inv(np.zeros((2, 2)))", r"raised LinAlgError: Singular matrix \(rewards.py, line 7, in score\)"),
    ("sys.exit(0)", r"called sys.exit\(0\) \(rewards.py, line 7, in score\)"),
    ("exit('bye')", r"called sys.exit\('bye'\)"),
    ("return open('table.csv').read()", "FileNotFoundError: .*table.csv.*only the modules that it imports are kept"),
    ("return map(lambda r: 1 / 0, responses)", r"raised ZeroDivisionError: .* \(rewards.py, line 7, in <lambda>"),
    ("return (sys.exit(0) for _ in responses)", r"called sys.exit\(0\)"), ("return [10**400] * 9", "expected 9 numbers"),
    ("return ['1'] * 9", "expected 9 numbers"), ("return '123456789'", "expected 9 numbers"),
    ("return [torch.zeros(2)] * 9", "gave 2 numbers for the 12 tokens"),
    ("return None", "expected 9 numbers, found None"), ("return 'abc'", "expected 9 numbers, found abc"),
    ("return [1.0]", r"expected 9 numbers, one a response, found shape \(1,\)"),
    ("return {'a': 1}", "expected 9 numbers"), ("return [[1.0]] * 9", "gave 1 numbers for the 12 tokens"),
    ("raise KeyboardInterrupt", None)])
def test_what_goes_wrong_names_the_function_and_its_line(tmp_path, rollouts, body, message):
    if message is None:  # a person's, not an error
        with pytest.raises(KeyboardInterrupt):
            scorer(tmp_path, body)(rollouts)
        return
    with pytest.raises(RewardError, match=f"^reward rewards.py:score: (the function )?.*{message}"):
        scorer(tmp_path, body)(rollouts)


@pytest.mark.parametrize("body", [
    "return torch.arange(9.0, requires_grad=True)", "return torch.arange(9, dtype=torch.bfloat16)", "return np.arange(9)",
    "return [torch.tensor(float(i), requires_grad=True) for i in range(9)]", "return list(range(9))",
    "return (i for i in range(9))", "return map(int, range(9))", "return [np.float64(i) for i in range(9)]"])
def test_what_counts_as_numbers(tmp_path, rollouts, body):
    assert scorer(tmp_path, body)(rollouts).tolist() == list(range(9))


def test_a_score_that_is_none_is_shown_with_its_prompt(tmp_path, rollouts, recwarn):
    with pytest.raises(NonFiniteError) as error:
        scorer(tmp_path, "return [0, None, *[1e40] * 7]")(rollouts)
    assert "rewards.py:score: gave None for the response in row 1 and 7 more, to the prompt " in str(error.value)
    assert repr(rollouts.prompt[1]) in str(error.value)
    assert not recwarn.list


CHANGES = {
    "torch.set_grad_enabled(False)": torch.is_grad_enabled,
    "torch.set_default_dtype(torch.float64)": torch.get_default_dtype,
    "torch.set_num_threads(torch.get_num_threads() + 1)": torch.get_num_threads, "np.seterr(all='raise')": np.geterr,
    "torch.use_deterministic_algorithms(True)": torch.are_deterministic_algorithms_enabled,
    "torch.set_default_device('meta')": torch.get_default_device, "import os; os.chdir('/')": os.getcwd,
    "torch.autograd.set_detect_anomaly(True)": torch.is_anomaly_enabled, "sys.stdout = None": lambda: sys.stdout,
    "torch.set_float32_matmul_precision('medium')": torch.get_float32_matmul_precision}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("end", ["return [0.0] * 9", "raise ValueError"])
def test_what_it_switches_is_switched_back(tmp_path, rollouts, change, end):
    before = CHANGES[change]()
    score = scorer(tmp_path, f"{change}\nassert sys.argv\n{end}")
    if "raise" in end:
        with pytest.raises(RewardError, match="ValueError"):
            score(rollouts)
    else:
        score(rollouts)
    assert CHANGES[change]() == before


def test_what_it_prints_is_on_stderr(tmp_path, rollouts, capsys):
    scorer(tmp_path, "print('seen')\nreturn [0.0] * 9")(rollouts)
    out, error = capsys.readouterr()
    assert out == "" and "seen" in error


def test_one_that_does_not_return_is_named_again_and_again(tmp_path, rollouts, caplog):
    scorer(tmp_path, "time.sleep(0.9)\nreturn [0.0] * 9", warning=0.2)(rollouts)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "reward rewards.py:score: the function has not returned for 0 s" and len(lines) >= 2
    time.sleep(0.5)
    assert len(caplog.records) == len(lines)  # and no more when it has


@pytest.mark.parametrize("body", ["time.sleep(60)", "while True: pass", "while True:\n    try:\n        time.sleep(0.01)\n"
                                  "    except Exception:\n        pass"])
@pytest.mark.parametrize("where", ["main", "thread"])
def test_past_the_limit_it_is_ended(tmp_path, rollouts, body, where):
    """In a thread of its own what waits in the system ends when it comes back."""
    body = body.replace("60", "60" if where == "main" else "1")
    errors = []

    def score():
        with pytest.raises(RewardError) as error:
            scorer(tmp_path, body, limit=0.3)(rollouts)
        errors.append(str(error.value))

    if where == "main":
        score()
    else:
        thread = threading.Thread(target=score)
        thread.start()
        thread.join(30)
    assert errors == ["reward rewards.py:score: the function has not returned for 0.3 s (execution.function_timeout sets "
                      "the limit)"]


def test_the_traceback_is_there_for_who_asks(tmp_path, rollouts, caplog):
    with caplog.at_level(logging.DEBUG, "baton"), pytest.raises(RewardError):
        scorer(tmp_path, "return 1 / 0")(rollouts)
    assert "Traceback" in caplog.text and "return 1 / 0" in caplog.text


def test_an_error_of_ours_stays_what_it_is():
    with pytest.raises(NonFiniteError, match=r"^as it is$"):
        call_guest("reward", lambda: (_ for _ in ()).throw(NonFiniteError("as it is")), error=RewardError)


def test_a_reward_that_exits_ends_no_training_well(example, tmp_path, prefect_server, capsys):
    """Exit code 1, a line that names it, and the document of --json alone on stdout."""
    (example / "exits.py").write_text("def score(prompts, responses):\n    raise SystemExit(0)\n")
    components = json.dumps({"exits": {"source": "exits.py:score"}})
    assert run_command(["train", str(example), "--store", str(tmp_path / "store"), "--json", "--set",
                        f"reward.components={components}", "--set", "reward_model=null", "--set", "value.start=actor"]) == 1
    out, error = capsys.readouterr()
    assert out == "" and "reward exits.py:score: the function called sys.exit(0) (exits.py, line 2, in score)" in error
