"""Commands that say how a run went: `baton doctor`, `baton report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from flows.cli.command import Answer, command, open_shown, write_text
from schemas.errors import ConfigError


@command
@click.argument("run")
def doctor(run: str, root: str) -> Answer:
    """Say what is wrong with RUN's training. By which numbers, and what people do about it."""
    from flows.views.doctor import examine

    what = open_shown(root, run)
    found = examine(what, what.states())

    def print_all(console: Console) -> None:
        for verdict in found.verdicts:
            first, last = verdict.iterations
            console.print(Text(f"{verdict.name}, iterations {first} to {last}", "bold"))
            console.print(Text(f"  {verdict.reason}"))
            console.print(Text(f"  What helps: {verdict.remedy}\n", "dim"))
        console.print(Text(f"{run}: {found.summary}"))
        for name, why in found.left_out.items() if found.checked else ():
            console.print(Text(f"  not checked: {name}, {why}", "dim"))

    return Answer(asdict(found), print_all)


@command
@click.argument("run")
@click.option("--compare", "other", metavar="RUN", help="Another run beside it, in the same charts.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Where the page goes; RUN.html by default.")
@click.option("--png", type=click.Path(path_type=Path), metavar="DIR", help="The charts as pictures too.")
def report(run: str, other: str | None, html: Path | None, png: Path | None, root: str) -> Answer:
    """A page about RUN. Curves, samples, what is wrong and what it was made from, in one file that needs no network."""
    from flows.views.report import report as make_report
    from flows.views.report import write_pictures

    what, beside = open_shown(root, run), open_shown(root, other) if other else None
    text = make_report(what, beside)
    file = html or Path(f"{run}.html")
    write_text(file, text)
    try:
        pictures = write_pictures(what, beside, png) if png else []
    except OSError as error:
        raise ConfigError(f"{error.filename or png}: {error.strerror}") from None
    size = len(text.encode())

    def say(console: Console) -> None:
        console.print(f"{file}: {size:,} bytes; open it in a browser", highlight=False, soft_wrap=True)
        if pictures:
            console.print(f"{png}: {len(pictures)} pictures", highlight=False, soft_wrap=True)

    return Answer({"file": str(file), "bytes": size, "pictures": list(map(str, pictures))}, say)
