"""`baton examples`: those that come with the package, copied to where they may be changed."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from flows.cli.command import Answer, command
from schemas.errors import DISTRIBUTION, ConfigError, installed_by

PACKAGED, CHECKOUT = Path(__file__).parents[1] / "examples", Path(__file__).parents[2] / "data"
MADE = shutil.ignore_patterns("__pycache__", "*.gguf", "*.partial", "model", "scorer*")  # by an example's own scripts
EXTRA = re.compile(re.escape(DISTRIBUTION) + r"\[([\w-]+)\]")


@command
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option("--to", type=click.Path(path_type=Path), default=Path("data"), metavar="DIR", show_default=True,
              help="Where they are copied to, each into a folder of its name.")
def examples(names: tuple[str, ...], to: Path, root: str) -> Answer:
    """List the examples that come with Baton, or copy some. What is copied is yours to change."""
    there = {folder.parent.name: folder.parent for folder in sorted(_home().glob("*/config.yaml"))}
    if unknown := [name for name in names if name not in there]:
        raise ConfigError(f"no example {', '.join(unknown)}; there are {', '.join(there)}")
    if not names:
        return _listed(there)
    copied = [_copied(there[name], to / name) for name in dict.fromkeys(names)]
    lines = [line for folder in copied for line in _next(folder)]
    return Answer([str(folder) for folder in copied],
                  lambda console: console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False))


def _home() -> Path:
    return PACKAGED if PACKAGED.is_dir() else CHECKOUT


def _readme(example: Path) -> str:
    return (example / "README.md").read_text(encoding="utf-8")


def _about(example: Path) -> str:
    """The first sentence of its README, which begins after the title; links as their texts."""
    first = " ".join(_readme(example).split("\n\n")[1].split())
    return re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", re.split(r"(?<=\.)\s", first)[0])


def _extras(example: Path) -> list[str]:
    """Of the package, which it needs."""
    return sorted(set(EXTRA.findall(_readme(example))))


def _listed(there: dict[str, Path]) -> Answer:
    data = [{"name": name, "about": _about(example), "extras": _extras(example)} for name, example in there.items()]

    def show(console: Console) -> None:
        grid = Grid("example", "what it is", "needs")
        for row in data:
            grid.add_row(row["name"], row["about"], Text(", ".join(map(installed_by, row["extras"]))))
        console.print(grid)
        console.print("baton examples reviews copies one to data/reviews; then baton train data/reviews", highlight=False)

    return Answer(data, show)


def _copied(example: Path, folder: Path) -> Path:
    """All of it, or nothing. Raises `ConfigError` where something is there already, or cannot be written."""
    if folder.exists():
        raise ConfigError(f"{folder}: is there already; --to DIR copies the example elsewhere")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
            shutil.copytree(example, Path(place, folder.name), ignore=MADE).rename(folder)
    except (OSError, shutil.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{folder}: {reason}; --to DIR copies the example elsewhere") from None
    return folder


def _next(folder: Path) -> list[str]:
    return [*(f"{installed_by(extra)}   # {folder} needs it" for extra in _extras(folder)), f"baton train {folder}"]
