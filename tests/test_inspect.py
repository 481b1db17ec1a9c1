"""`baton inspect`: the numbers are those of the tables; keys do what they say; text of a model acts nowhere."""

import asyncio
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from textual.widgets import DataTable, Input, Static

from flows.cli.inspector import Inspector, coloured, components, ranges_of, scale_of
from flows.cli.main import run_command
from flows.replay import replay
from flows.runs.run import open_run
from flows.store.store import Store
from flows.views.columns import NUMBERS
from flows.views.html_page import as_json, page
from flows.views.inspection import Response, elsewhere, responses
from flows.views.visible import visible
from schemas.errors import ConfigError
from schemas.tables import Advantages, Rewards, Rollouts

HOSTILE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\x1b[2J\x1b]0;t\x07", "a\u202eb\u2066c",
           "x" * 100_000, "{{ 7 * 7 }}", "[bold red]not markup[/]", "\u2028line", "\ufeffnul\x00", "&amp;", "`${1}`")


def run_of(trained):
    return open_run(Store(trained[1]), "tiny")


def hostile(row: int, text: str) -> Response:
    """A response whose every text is that."""
    shown = visible(text, newlines=True)
    return Response(row, row, shown, shown, "eos", 1, 0.5, 0.5, 0.1, 0.2, {shown: 1.0}, [shown], None,
                    {name: [0.25 * (row - 3)] for name in NUMBERS})


class Script(HTMLParser):
    """What stands in a page's script elements, and which elements there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts, self.elements, self._type = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._type = dict(attrs).get("type", "script") if tag == "script" else None

    def handle_data(self, data):
        if self._type:
            self.scripts[self._type] = self.scripts.get(self._type, "") + data

    def handle_endtag(self, tag):
        self._type = None


def test_a_response_has_the_numbers_of_the_tables(trained):
    run = run_of(trained)
    artifacts = run.state(2).artifacts
    rollouts, rewards, gae = (run.store.table(artifacts[stage], kind) for stage, kind in (
        ("rollout", Rollouts), ("reward", Rewards), ("gae", Advantages)))
    found = responses(run, 2)
    assert [each.row for each in found] == list(range(len(rollouts)))
    for i, each in enumerate(found):
        assert each.prompt == rollouts.prompt[i] and each.score == pytest.approx(rewards.score[i])
        assert each.length == len(each.tokens) == len(rollouts.response_tokens[i])
        np.testing.assert_allclose(each.numbers["kl"], gae.kl[i])
        np.testing.assert_allclose(each.numbers["advantage"], gae.advantages[i])
        assert each.kl == pytest.approx(float(gae.kl[i].sum()), abs=1e-6)
    assert responses(run, 2, (3,)) == [found[3]]


@pytest.mark.parametrize("iteration, rows, words", [
    (0, None, "iteration 0 of run 'tiny' has no rollouts; 1 to 2 have"), (9, None, "no iteration 9; it has 0…2"),
    (1, (99,), "no row 99; it has 0 to 7")])
def test_what_is_not_there(trained, iteration, rows, words):
    with pytest.raises(ConfigError, match=words):
        responses(run_of(trained), iteration, rows)


def test_a_control_task_has_no_responses(controlled):
    with pytest.raises(ConfigError, match=r"is a control task.*baton sql cartpole"):
        responses(open_run(Store(controlled[1]), "cartpole"), 1)


def test_the_ratios_of_an_update_made_again(copied):
    """Their mean is the metric; each epoch comes to each token once; the first minibatch finds the policy unchanged."""
    run = open_run(Store(copied[1]), "tiny")
    epochs, same = replay(run, 2)
    assert same and len(epochs) == run.config.ppo.epochs
    metrics = run.store.manifest(run.state(2).artifacts["ppo"]).metrics
    ratios = np.concatenate([epoch.ratio for epoch in epochs])
    assert not np.isnan(ratios).any()
    assert ratios.min() == pytest.approx(metrics["ratio_min"]) and ratios.max() == pytest.approx(metrics["ratio_max"])
    clipped = np.concatenate([epoch.clipped for epoch in epochs])
    assert clipped.mean() == pytest.approx(metrics["clip_fraction_loss"])
    assert np.isclose(epochs[0].ratio, 1, atol=1e-5).mean() >= 1 / run.config.ppo.minibatches / 2
    assert not np.isclose(epochs[1].ratio, 1, atol=1e-5).all()


def test_ratios_beside_the_other_numbers(copied, tmp_path, capsys):
    store = str(copied[1])
    file, replayed = tmp_path / "r.html", ["inspect", "tiny", "--iteration", "1", "--replay", "--store", store]
    assert run_command([*replayed, "--html", str(file)]) == 0
    data = json.loads(Script(file.read_text(encoding="utf-8")).scripts["application/json"])
    names = [f"{what}, epoch {number}" for number in (1, 2) for what in ("ratio − 1", "clipped")]
    assert data["columns"] == [*NUMBERS, *names]
    found = np.concatenate([each["numbers"]["ratio − 1, epoch 2"] for each in data["responses"]])
    epochs, _ = replay(open_run(Store(store), "tiny"), 1)
    np.testing.assert_allclose(found, epochs[1].ratio - 1, rtol=1e-3, atol=1e-6)
    capsys.readouterr()
    assert run_command([*replayed, "--row", "2"]) == 0
    assert "row 2" in (out := capsys.readouterr().out) and "row 1 " not in out
    assert run_command(["inspect", "tiny", "--iteration", "7", "--replay", "--store", store]) == 2


# --- the page ---

def test_a_page_stands_alone_and_holds_what_was_sampled(trained, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert run_command(["inspect", "tiny", "--iteration", "1", "--html", str(file), "--store", str(trained[1])]) == 0
    assert f"{file}: iteration 1 of tiny, 8 responses" in re.sub(r"\s+", " ", capsys.readouterr().out)
    text = file.read_text(encoding="utf-8")
    found = Script(text)
    data = json.loads(found.scripts["application/json"])
    ours = responses(run_of(trained), 1)
    assert [each["response"] for each in data["responses"]] == [each.response for each in ours]
    assert data["responses"][0]["numbers"]["kl"] == pytest.approx(ours[0].numbers["kl"], rel=1e-4, abs=1e-9)
    for each in data["responses"]:
        there = data["elsewhere"][str(each["prompt_id"])]
        assert {"run", "iteration", "score", "kl", "response"} < set(there[0])
        assert any(one["iteration"] == 1 and one["response"] == visible(each["response"], 400) for one in there)
    outside = [value for _, attributes in found.elements for name, value in attributes.items()
               if name in ("src", "href") and not value.startswith("data:")]
    assert not outside and "http" not in re.sub(r"<!doctype html>", "", text).replace("http-equiv", "")


def test_another_runs_responses_to_the_same_prompts(copied, tmp_path, capsys):
    shutil.copytree(copied[1], tmp_path / "two")
    store = str(tmp_path / "two")
    fork = ["fork", "tiny", "--at", "1", "--run", "other", "--set", "kl.coef=0.3", "--store", store, "--quiet"]
    assert run_command(fork) == 0
    assert run_command(["inspect", "tiny", "--html", str(tmp_path / "p.html"), "--compare", "other", "--store", store]) == 0
    data = json.loads(Script((tmp_path / "p.html").read_text(encoding="utf-8")).scripts["application/json"])
    runs = {one["run"] for some in data["elsewhere"].values() for one in some}
    assert data["iteration"] == 2 and runs == {"tiny", "other"}
    assert data["beside"] == [{"run": "other", "responses": []}]  # which has no iteration 2
    page = ["--iteration", "1", "--html", str(tmp_path / "p.html"), "--compare", "other"]
    assert run_command(["inspect", "tiny", *page, "--store", store]) == 0
    data = json.loads(Script((tmp_path / "p.html").read_text(encoding="utf-8")).scripts["application/json"])
    (other,) = data["beside"]
    assert other["run"] == "other" and other["responses"] == data["responses"]  # a fork's first iterations are its parent's
    assert run_command(["inspect", "tiny", "--compare", "other", "--store", store]) == 2
    assert "--compare shows two runs on a page: add --html FILE" in capsys.readouterr().err
    assert run_command(["inspect", "tiny", "--compare", "nope", "--store", store]) == 2
    assert "no run 'nope'" in capsys.readouterr().err


def test_text_of_a_model_is_no_markup_on_a_page():
    data = {"run": "r", "iteration": 1, "columns": NUMBERS, "left_out": 0, "elsewhere": {}, "beside": [], "responses": [
        vars(hostile(row, text)) for row, text in enumerate(HOSTILE)]}
    plain = Script(page("inspect.html", "inspect.js", data | {"responses": []}))
    found = Script(page("inspect.html", "inspect.js", data))
    assert found.elements == plain.elements and found.scripts["script"] == plain.scripts["script"]
    back = json.loads(found.scripts["application/json"])["responses"]
    assert [each["response"] for each in back] == [visible(text, newlines=True) for text in HOSTILE]
    assert not any(set(each["response"]) & set("\x1b\x00\u202e\u2066\u2028\ufeff") for each in back)
    assert json.loads(as_json({"a": [float("nan"), float("inf"), 1 / 3]})) == {"a": [None, None, 0.33333]}


def test_a_run_named_like_markup_cannot_be_made(trained, capsys):
    """Names go into pages too; and those have a pattern."""
    assert run_command(["inspect", "<b>", "--store", str(trained[1])]) == 2
    assert "run name '<b>'" in capsys.readouterr().err


# --- the terminal ---

def test_printed_where_there_is_no_terminal(trained, capsys):
    assert run_command(["inspect", "tiny", "--row", "1", "--colour", "value", "--store", str(trained[1])]) == 0
    out, each = capsys.readouterr().out, responses(run_of(trained), 2)[1]
    assert f"row 1   prompt {each.prompt_id}" in out and "coloured by value" in out
    assert f"{each.numbers['delta'][0]:.3f}" in out
    assert run_command(["inspect", "tiny", "--json", "--store", str(trained[1])]) == 0
    assert [one["response"] for one in json.loads(capsys.readouterr().out)] == [
        one.response for one in responses(run_of(trained), 2)]


def test_colours_are_red_below_and_green_above_nothing(trained):
    some = responses(run_of(trained), 2)
    scale = scale_of(some, "advantage")
    sizes = np.abs(np.concatenate([each.numbers["advantage"] for each in some]))
    assert scale == pytest.approx(np.quantile(sizes, 0.98))
    text = coloured(some[0], "advantage", scale)
    for span, value in zip((s for s in text.spans if s.style), some[0].numbers["advantage"], strict=False):
        red, green, _ = map(int, re.search(r"on rgb\((\d+),(\d+),(\d+)\)", str(span.style)).groups())
        assert (red > green) == (value < 0)


def test_components_go_from_red_to_green_over_the_iteration(trained):
    some = [replace(each, components={"a": float(i), "same": 1.0}) for i, each in enumerate(responses(run_of(trained), 2))]
    ranges = ranges_of(some)
    assert ranges == {"a": (0.0, len(some) - 1.0), "same": (1.0, 1.0)}
    for each, greener in ((some[0], False), (some[-1], True)):
        text = components(each, ranges)
        red, green, _ = map(int, re.search(r"on rgb\((\d+),(\d+),(\d+)\)", str(text.spans[0].style)).groups())
        assert text.plain.startswith(" a ") and (green > red) == greener
        same = re.search(r"on rgb\((\d+),(\d+),(\d+)\)", str(text.spans[1].style)).groups()
        assert same == ("30", "30", "30")  # which says nothing


def test_keys_in_the_terminal(trained):
    some = responses(run_of(trained), 2)

    async def use() -> None:
        app = Inspector("tiny, iteration 2", some, "kl", lambda prompt: elsewhere([run_of(trained)], {prompt}, 8)[prompt])
        async with app.run_test(size=(140, 40)) as pilot:
            table = app.query_one(DataTable)
            assert table.row_count == len(some) and app.order == some
            await pilot.press("j", "j", "k")
            assert table.cursor_row == 1
            await pilot.press("s")
            assert app.sorted_by == "score" and app.order == sorted(some, key=lambda r: r.score, reverse=True)
            await pilot.press("r")
            assert app.order == sorted(some, key=lambda r: r.score)
            await pilot.press("g")
            groups = [each.prompt_id for each in app.order]
            assert len(set(groups)) == 1 + sum(a != b for a, b in pairwise(groups))
            await pilot.press("c")
            assert app.column == NUMBERS[1]
            await pilot.press("i")
            await pilot.pause()
            screen = "\n".join(line.text for line in app.query_one("#response", Static).render_lines(
                app.query_one("#response", Static).region.reset_offset))
            assert "the same prompt in other iterations" in screen
            await pilot.press("slash", *some[0].prompt[:6].lower().replace(" ", "_").split("_")[0])
            await pilot.pause()
            assert app.query_one(Input).value and all(app.words in f"{r.prompt}{r.response}".lower() for r in app.order)
            await pilot.press("enter", "j")
            assert app.focused is table

    asyncio.run(use())


def test_hostile_text_in_the_terminal():
    some = [hostile(row, text) for row, text in enumerate(HOSTILE)]

    async def use() -> None:
        app = Inspector("hostile", some, "kl", lambda prompt: [{"iteration": 1, "score": 0.0, "kl": 0.0, "response": "[b]"}])
        async with app.run_test(size=(100, 30)) as pilot:
            for _ in some:
                await pilot.press("j")
                await pilot.pause()
            assert app.query_one(DataTable).cursor_row == len(some) - 1
            assert app.query_one("#response", Static)

    asyncio.run(use())
