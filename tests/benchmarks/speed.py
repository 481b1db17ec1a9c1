"""How fast, beside others and beside limits, in one run: `make bench`, some hours; ONLY="gpt2 cartpole" for some of it.

Each figure is a ratio against a peer or a limit of the same machine at the same time, the median of several rounds; a time
alone says little, since machines differ and are shared. Prints the rows, keeps them in docs/performance.json, and
writes the table of docs/performance.md. Peers are in a virtual environment of their own, .peers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path

import control_speed
import language_speed
import stage_speed
import view_speed
from flat import flat_row
from overhead import overhead
from rows import Row

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs" / "performance.json", ROOT / "docs" / "performance.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows; all if none is named, but for \"overhead\"")
    options = parser.parse_args()
    modules = (language_speed, stage_speed, control_speed, view_speed)
    rows = {row.name: row for module in modules for row in module.rows(options.rounds)}
    rows["flat"] = flat_row()
    if unknown := set(options.names) - {*rows, "overhead"}:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(rows)}, overhead")
    if "overhead" in options.names:
        overhead(options.rounds)
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in options.names or rows:
        if name in rows:
            figure, of = rows[name].measure()
            found[name] = {"figure": figure, "of": of}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(line(rows[name], figure, of), flush=True)
    write_page("\n".join(line(row, **found[name]) if name in found else f"| {row.work} | not measured | | |"
                         for name, row in rows.items()))
    return int(not all(rows[name].holds(found[name]["figure"]) for name in options.names or rows if name in rows))


def line(row: Row, figure: float, of: str) -> str:
    """A row of the table."""
    reached = "" if row.holds(figure) else " **not reached**"
    return f"| {row.work} | {figure:.3g}{reached} | {row.sense.replace('>=', '≥').replace('<=', '≤')} {row.goal:g} | {of} |"


def write_page(table: str) -> None:
    """Puts the table between its marks."""
    head = f"{os.cpu_count()} cores, {platform.machine()}\n\n| work | figure | goal | of |\n|---|---|---|---|\n"
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub("(?s)(<!-- table -->\n).*(<!-- end -->)", lambda marks: marks[1] + head + table + "\n" + marks[2],
                           text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
