"""`baton inspect` in a terminal: responses in a list, one of them token by token, its tokens coloured by a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import DataTable, Footer, Input, Static

from flows.cli.display import number
from flows.views.inspection import Response

LOW, HIGH = (192, 57, 43), (31, 122, 77)
TOKENS_LISTED = 400
KEYS: dict[str, Callable[[Response], float]] = {
    "row": lambda r: r.row, "score": lambda r: _or_least(r.score), "kl": lambda r: _or_least(r.kl),
    "advantage": lambda r: _or_least(r.raw_advantage), "length": lambda r: r.length}


def _or_least(value: float | None) -> float:
    return -np.inf if value is None else value


def scale_of(responses: list[Response], column: str) -> float:
    """What a token's colour is full at: the 98th percentile of the sizes in this iteration."""
    sizes = [abs(value) for each in responses for value in each.numbers[column] if value is not None]
    return float(np.quantile(sizes, 0.98)) or 1.0 if sizes else 1.0


def ranges_of(responses: list[Response]) -> dict[str, tuple[float, float]]:
    """Component of the reward → the least and the greatest in this iteration."""
    given: dict[str, list[float]] = {}
    for each in responses:
        for name, value in each.components.items():
            given.setdefault(name, []).append(value)
    return {name: (min(values), max(values)) for name, values in given.items()}


def _shade(end: tuple[int, int, int], part: float) -> str:
    """A background between the terminal's and that colour."""
    red, green, blue = (round(30 + part * (full - 30)) for full in end)
    return f"rgb(240,240,240) on rgb({red},{green},{blue})"


def coloured(response: Response, column: str, scale: float) -> Text:
    """Its tokens: red below 0, green above; replies of several turns dim."""
    text = Text()
    for i, (token, value) in enumerate(zip(response.tokens, response.numbers[column], strict=True)):
        style = "dim" if response.sampled and not response.sampled[i] else ""
        if value is not None:
            part = min(1.0, abs(value) / scale)
            style = _shade(LOW if value < 0 else HIGH, part) if part > 0.05 else style
        text.append(token, style)
    return text


def components(response: Response, ranges: dict[str, tuple[float, float]]) -> Text:
    """Each with its number, from red for the least of the iteration to green for the greatest."""
    text = Text()
    for name, value in response.components.items():
        low, high = ranges[name]
        place = (value - low) / (high - low) if high > low else 0.5
        text.append(f" {name} {number(value)} ", _shade(LOW if place < 0.5 else HIGH, abs(2 * place - 1)))
        text.append("  ")
    return text


def shown(
    response: Response, column: str, scale: float, ranges: dict[str, tuple[float, float]], *, tokens: bool = False
) -> RenderableType:
    """A response for people; `tokens`: with the numbers of each of its tokens."""
    facts = Text(f"row {response.row}   prompt {response.prompt_id}   score {number(response.score)}   "
                 f"KL {number(response.kl)} nats   {response.length} tokens, ended by {response.finish_reason}", "bold")
    parts: list[RenderableType] = [facts, Text(response.prompt, "dim"), coloured(response, column, scale),
                                   Text(f"coloured by {column}, full at ±{number(scale)}", "dim")]
    if response.components:
        parts.append(components(response, ranges))
    return Group(*parts, *([_numbers(response)] if tokens else []))


def print_responses(console: Console, responses: list[Response], column: str, *, tokens: bool) -> None:
    """One below the other."""
    scale, ranges = scale_of(responses, column), ranges_of(responses)
    for response in responses:
        console.print(shown(response, column, scale, ranges, tokens=tokens))
        console.print()


def _numbers(response: Response) -> Grid:
    grid = Grid()
    for name in ("position", "token", *response.numbers):
        grid.add_column(name, justify="left" if name == "token" else "right")
    for i, token in enumerate(response.tokens[:TOKENS_LISTED]):
        grid.add_row(str(i), Text(repr(token)[1:-1]), *(number(values[i]) for values in response.numbers.values()))
    if len(response.tokens) > TOKENS_LISTED:
        grid.caption = f"the first {TOKENS_LISTED} of {len(response.tokens)} tokens; baton sql gives all"
    return grid


def _iterations(rows: list[dict[str, Any]]) -> Grid:
    """The responses to a prompt in all iterations, one a row."""
    grid = Grid("iteration", "score", "KL", "response", title="the same prompt in other iterations", title_justify="left")
    for row in rows:
        grid.add_row(str(row["iteration"]), number(row["score"]), number(row["kl"]), Text(row["response"]))
    return grid


class Inspector(App[None]):
    """Keys: j and k next and previous, s sort, r reverse, g group by prompt, c colour, i the prompt's responses in all
    iterations, / search, q quit."""

    CSS = """
    #list { width: 46; } #detail { padding: 0 1; } #search { display: none; } #search.open { display: block; }
    """
    BINDINGS: ClassVar = [
        Binding("j,n", "move(1)", "next"), Binding("k,p", "move(-1)", "previous"), Binding("s", "sort", "sort"),
        Binding("r", "reverse", "reverse"), Binding("g", "group", "by prompt"), Binding("c", "colour", "colour"),
        Binding("i", "iterations", "iterations"), Binding("slash", "search", "search"), Binding("q", "quit", "quit")]

    def __init__(
        self, title: str, responses: list[Response], column: str, elsewhere: Callable[[int], list[dict[str, Any]]]
    ) -> None:
        """`elsewhere`: a prompt's id to its responses in all iterations."""
        super().__init__()
        self.title, self.responses, self.column, self.elsewhere = title, responses, column, elsewhere
        self.ranges, self.with_iterations = ranges_of(responses), False
        self.sorted_by, self.down, self.grouped, self.words = "row", False, False, ""
        self.order: list[Response] = []
        self.scales = {name: scale_of(responses, name) for name in responses[0].numbers}

    def compose(self) -> ComposeResult:
        yield Static(Text(self.title, "bold"), id="title")
        yield Input(placeholder="search; Enter to go back to the list", id="search")
        with Horizontal():
            yield DataTable(id="list", cursor_type="row")
            with VerticalScroll(id="detail"):
                yield Static(id="response")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(DataTable).add_columns("row", "score", "KL", "tokens", "response")
        self.query_one(DataTable).focus()
        self._list()

    def _list(self) -> None:
        """Anew, in the order that is asked for."""
        words = self.words.lower()
        found = [each for each in self.responses if words in f"{each.prompt}\n{each.response}".lower()]
        found.sort(key=KEYS[self.sorted_by], reverse=self.down)
        if self.grouped:
            first = {each.prompt_id: place for place, each in reversed(list(enumerate(found)))}
            found.sort(key=lambda each: first[each.prompt_id])
        self.order, table = found, self.query_one(DataTable)
        table.clear()
        for each in found:
            table.add_row(f"{each.prompt_id}: {each.row}" if self.grouped else str(each.row), number(each.score),
                          number(each.kl), str(each.length), Text(each.response.strip()[:60].replace("\n", " ")))
        self.sub_title = f"{len(found)} of {len(self.responses)}"
        order = f"{self.sorted_by} {'↓' if self.down else '↑'}{', by prompt' if self.grouped else ''}"
        self.query_one("#title", Static).update(Text(f"{self.title}   {self.sub_title}   sorted by {order}", "bold"))
        self._show()

    def _show(self) -> None:
        table = self.query_one(DataTable)
        if not self.order:
            self.query_one("#response", Static).update(Text("nothing found", "dim"))
            return
        response = self.order[min(table.cursor_row, len(self.order) - 1)]
        detail = shown(response, self.column, self.scales[self.column], self.ranges, tokens=not self.with_iterations)
        if self.with_iterations:
            detail = Group(detail, Text(), _iterations(self.elsewhere(response.prompt_id)))
        self.query_one("#response", Static).update(detail)

    def on_data_table_row_highlighted(self, _: DataTable.RowHighlighted) -> None:
        self._show()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.words = event.value
        self._list()

    def on_input_submitted(self, _: Input.Submitted) -> None:
        self.query_one(Input).remove_class("open")
        self.query_one(DataTable).focus()

    def action_move(self, by: int) -> None:
        table = self.query_one(DataTable)
        table.move_cursor(row=max(0, min(table.row_count - 1, table.cursor_row + by)))

    def action_sort(self) -> None:
        names = list(KEYS)
        self.sorted_by = names[(names.index(self.sorted_by) + 1) % len(names)]
        self.down = self.sorted_by != "row"
        self._list()

    def action_reverse(self) -> None:
        self.down = not self.down
        self._list()

    def action_group(self) -> None:
        self.grouped = not self.grouped
        self._list()

    def action_colour(self) -> None:
        columns = list(self.responses[0].numbers)
        self.column = columns[(columns.index(self.column) + 1) % len(columns)]
        self._show()

    def action_iterations(self) -> None:
        self.with_iterations = not self.with_iterations
        self._show()

    def action_search(self) -> None:
        search = self.query_one(Input)
        search.add_class("open")
        search.focus()
