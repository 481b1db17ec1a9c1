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

PACKAGED = Path(__file__).parents[1] / "examples"
CHECKOUT = Path(__file__).parents[2] / "data"
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
    chosen = list(dict.fromkeys(names))
    _require_free(to, chosen)
    for name in chosen:
        _copy(there[name], to / name)
    lines = dict.fromkeys(line for name in chosen for line in _next(there[name], to))
    return Answer([str(to / name) for name in chosen],
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


def _require_free(to: Path, names: list[str]) -> None:
    """Raises `ConfigError` where something is there already, before any is copied."""
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to {to}: is no folder")
    if taken := [str(to / name) for name in names if (to / name).exists()]:
        raise ConfigError(f"{', '.join(taken)}: there already; --to DIR copies elsewhere")


def _copy(example: Path, folder: Path) -> None:
    """All of it, or nothing. Raises `ConfigError` where it cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
            shutil.copytree(example, Path(place, folder.name), ignore=MADE).rename(folder)
    except (OSError, shutil.Error) as error:
        raise ConfigError(f"{folder} cannot be written ({error}); --to DIR copies elsewhere") from None


def _next(example: Path, to: Path) -> list[str]:
    """The commands of its README up to the first that trains, for where it was copied to."""
    lines = []
    for line in re.findall(r"^    ((?:pip install|python data/|baton train).*?)(?: *#.*)?$", _readme(example), re.M):
        lines += [f"baton examples {other} --to {to}" for other in re.findall(r"data/(\w+)", line)
                  if other != example.name and other not in "".join(lines)]
        lines.append(line.replace("data/", f"{to}/"))
        if line.startswith("baton train"):
            break
    return lines
