"""The pages of a run in a browser: `make pages RUN=reviews`, half a minute.

Opens `baton report` and `baton inspect` in headless Chromium (Debian's package) at desktop and phone width, light and dark.
Each page is below 5 MB, paints within two seconds, is no wider than the window, asks the network for nothing and writes no
error to the console. In the report every curve is drawn, and a click on one shows the samples of that iteration; in the
inspector the keys go from response to response, and each has its tokens. Pictures go to build/pages.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from itertools import product
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store

OUT = Path(__file__).parents[2] / "build" / "pages"
SIZES = {"desktop": (1400, 900), "phone": (390, 844)}
MOST = 5_000_000  # bytes of a page
SOON = 2_000  # milliseconds to its first paint
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-component-update",
         "--disable-sync")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("run")
    options = parser.parse_args()
    if (chromium := shutil.which("chromium")) is None:
        parser.error("no chromium here; Debian's package chromium has it")
    OUT.mkdir(parents=True, exist_ok=True)
    commands = ["report"]
    if open_run(Store(options.store), options.run).config.kind == "language":
        commands.append("inspect")
    files = [OUT / f"{options.run}-{command}.html" for command in commands]
    for command, file in zip(commands, files, strict=True):
        if run_command([command, options.run, "--store", options.store, "--html", str(file), "--quiet"]):
            return 1
    failed = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for file, size, scheme in product(files, SIZES, ("light", "dark")):
            found = look(browser, file, size, scheme)
            failed += bool(found)
            print(f"{file.name}, {size}, {scheme}: {'; '.join(found) or 'sound'}", flush=True)
        browser.close()
    return int(failed > 0)


def look(browser: Browser, file: Path, size: str, scheme: str) -> list[str]:
    """What is wrong with the page."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    found: list[str] = []
    page.on("console", lambda message: message.type in {"error", "warning"} and found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file:") or found.append(f"asks for {request.url}"))
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    if file.stat().st_size > MOST:
        found.append(f"{file.stat().st_size:,} bytes")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)[0]")
    if paint is None or paint > SOON:
        found.append(f"first paint after {paint} ms")
    if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
        found.append(f"{wide} pixels wide")
    page.screenshot(path=file.with_name(f"{file.stem}-{size}-{scheme}.png"), full_page=size == "desktop")
    if page.locator("#charts").count():
        found += _curves(page)
    else:
        found += _responses(page)
    page.close()
    return found


def _curves(page: Page) -> list[str]:
    """Every chart has a curve once it is scrolled to, and a click on its right end shows the samples of its last iteration,
    or of that nearest to it."""
    for place in page.locator("#charts .chart").all():
        place.scroll_into_view_if_needed()
    found, expected, drawn = [], page.evaluate("data.charts.length"), page.locator("#charts svg")
    if drawn.count() != expected or not expected:
        found.append(f"{drawn.count()} of {expected} charts")
    for i in range(drawn.count()):
        if not drawn.nth(i).locator("path.line").count():
            found.append(f"chart {i} has no curve")
    over = page.evaluate("data.charts.findIndex(chart => chart.x === 'iteration')")
    last = page.evaluate(f"Math.max(...data.charts[{over}].lines.flatMap(line => line.iterations))")
    nearest = page.evaluate(f"kept.reduce((best, each) => Math.abs(each - {last}) < Math.abs(best - {last}) ? each : best)")
    page.evaluate("document.querySelector('#shown').replaceChildren()")
    box = drawn.nth(over).bounding_box()
    lines = [line.bounding_box() for line in drawn.nth(over).locator("path.line").all()]
    right = max(line["x"] + line["width"] for line in lines)
    drawn.nth(over).click(position={"x": right - box["x"], "y": box["height"] / 2})
    shown = page.locator("#iteration").input_value()
    if shown != str(nearest) or page.locator("#shown tr").count() < 2:
        found.append(f"a click at iteration {last} shows samples of {shown}")
    return found


def _responses(page: Page) -> list[str]:
    """`j` opens the next response, whose tokens are all there."""
    found, rows = [], page.evaluate("data.responses.length")
    for number in range(min(3, rows)):
        tokens, drawn = page.evaluate(f"data.responses[{number}].tokens.length"), page.locator("#detail .token")
        title = page.locator("#detail h2").first.inner_text()
        if not title.startswith(f"Row {page.evaluate(f'data.responses[{number}].row')},") or drawn.count() < tokens:
            found.append(f"response {number} shows {title!r} with {drawn.count()} of {tokens} tokens")
        page.keyboard.press("j")
    return found


if __name__ == "__main__":
    sys.exit(main())
