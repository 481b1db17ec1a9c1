"""`baton show --live`: what a person sees in the terminal while a run trains."""

import re
import threading

import pytest
from rich.console import Console, Group
from test_inspect import HOSTILE

from flows.cli.live import _sample, follow, frame, holder_now
from flows.cli.main import run_command
from flows.runs.run import lease_key, open_run, state_key
from flows.store.lease import lease
from flows.store.store import Store
from flows.views.samples import Sample
from schemas.tables import Samples


def shown(run, states, width=120, height=50):
    console = Console(width=width, height=height, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(frame(run, states, holder_now(run), width, height))
    return console.export_text()


def test_a_finished_run_is_shown_once(trained):
    run = open_run(Store(trained[1]), "tiny")
    text = shown(run, run.states())
    assert "iteration 2/2" in text and "left" not in text
    for title, metric in (("Reward", "reward/score"), ("KL to the reference", "gae/kl"), ("Entropy", "ppo/entropy")):
        value = f"{run.last().metrics[metric]:.3f}"
        assert re.search(rf"{title}  [^\n]*{re.escape(value)}", text), title
    gold = run.store.table(run.last().artifacts["evaluate"], Samples).gold[0]
    assert "evaluated after iteration 2" in text and f"gold {gold:+.2f}" in text
    assert re.search(r"^ppo +\d+\.\d\d s +\d+%", text, re.MULTILINE)


def test_a_run_in_progress_says_what_trains_it(trained):
    run = open_run(Store(trained[1]), "tiny")
    states = run.states()[:2]
    assert "no process holds it; baton train --run tiny goes on" in shown(run, states)
    with lease(run.store, lease_key("tiny"), "run tiny"):
        text = shown(run, states)
    assert "iteration 1/2" in text and "trained by process" in text
    assert re.search(r"\d s each, about \d+ s left", text)
    assert shown(run, []).startswith("tiny: to be prepared; no process holds it")


@pytest.mark.parametrize("width, height", [(40, 20), (80, 24), (200, 60)])
def test_the_view_fits_the_terminal(trained, width, height):
    run = open_run(Store(trained[1]), "tiny")
    lines = shown(run, run.states(), width, height).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < height


def test_it_follows_until_the_last_iteration(copied, tmp_path):
    """A state that is committed while it looks appears, and the last one ends it."""
    run = open_run(Store(copied[1]), "tiny")
    last = copied[1] / state_key("tiny", 2)
    hidden = last.rename(tmp_path / "state")
    with (tmp_path / "screen").open("w") as file:
        console = Console(file=file, width=100, height=50, force_terminal=True)
        following = threading.Thread(target=follow, args=(run, console))
        following.start()
        following.join(3)
        assert following.is_alive()
        hidden.rename(last)
        following.join(60)
        assert not following.is_alive()
    text = (tmp_path / "screen").read_text()
    assert text.index("iteration 1/2") < text.index("iteration 2/2")


def test_a_run_that_goes_on_past_its_config_is_followed(copied, tmp_path):
    """`train --iterations` leaves the record as it is: what ends the view is that nothing holds the run."""
    run = open_run(Store(copied[1]), "tiny")
    with (tmp_path / "screen").open("w") as file:
        following = threading.Thread(target=follow, args=(run, Console(file=file, width=100, height=50)))
        with lease(run.store, lease_key("tiny"), "run tiny"):
            following.start()
            following.join(3)
            assert following.is_alive()
        following.join(60)
        assert not following.is_alive()


def test_a_control_run_shows_its_episodes(controlled):
    run = open_run(Store(str(controlled[1])), "cartpole")
    text = shown(run, run.states())
    assert "Return of an episode" in text and re.search(r"^episode_return [+-]\d", text, re.MULTILINE)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_text_of_a_model_does_nothing_to_the_terminal(text):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Group(_sample(Sample(text, text, {}, {"gold": 1.0}))))
    shown = console.export_text()
    assert shown.count("\n") == 1 and not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e\u2066]", shown)


def test_live_of_one_iteration_is_refused(trained, capsys):
    assert run_command(["show", "tiny", "--store", str(trained[1]), "--live", "--iteration", "1"]) == 2
    assert "--live with --iteration: one iteration does not change" in capsys.readouterr().err
    assert run_command(["show", "tiny", "--store", str(trained[1]), "--live"]) == 0
    assert "iteration 2/2" in capsys.readouterr().out
