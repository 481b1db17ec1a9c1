"""The site in a browser: `make docs-pages`, half a minute.

Opens pages of build/site in headless Chromium at desktop and phone width, light and dark: none asks the network for
anything, writes an error or is wider than the window; formulas are drawn, the background is the scheme's, and the search
finds a word in each language. Pictures go to build/pages.
"""

from __future__ import annotations

import shutil
import sys
from itertools import product
from pathlib import Path

from pages import FLAGS, OUT, SIZES
from playwright.sync_api import Browser, Page, sync_playwright

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = ["en/README.html", "en/docs/en/2-ppo.html", "en/docs/numerics.html", "en/docs/tables.html", "en/docs/commands.html",
         "en/code/stages/gae.py.html", "zh/README.zh.html", "zh/docs/zh/3-gae.html", "zh/docs/zh/5-rlhf.html"]
WORDS = {"en": "advantage", "zh": "优势函数"}
DRAWN = "[...document.querySelectorAll('math')].every(math => math.getBoundingClientRect().height > 8)"


def main() -> int:
    if (chromium := shutil.which("chromium")) is None:
        sys.exit("no chromium here; Debian's package chromium has it")
    OUT.mkdir(parents=True, exist_ok=True)
    failed = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for name, size, scheme in product(PAGES, SIZES, ("light", "dark")):
            found = look(browser, name, size, scheme)
            failed += bool(found)
            print(f"{name}, {size}, {scheme}: {'; '.join(found) or 'sound'}", flush=True)
        for language, word in WORDS.items():
            found = search(browser, language, word)
            failed += found == 0
            print(f"search for {word}: {found} pages", flush=True)
        browser.close()
    return int(failed > 0)


def look(browser: Browser, name: str, size: str, scheme: str) -> list[str]:
    """What is wrong with the page."""
    page, found = opened(browser, SITE / name, size, scheme)
    width = SIZES[size][0]
    if (wide := page.evaluate("document.documentElement.scrollWidth")) > width:
        found.append(f"{wide} pixels wide in a window of {width}")
    if not page.evaluate(DRAWN):
        found.append("a formula is not drawn")
    behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
    if (sum(map(int, behind.strip("rgba()").split(",")[:3])) < 382) != (scheme == "dark"):
        found.append(f"{scheme}, and its background is {behind}")
    page.screenshot(path=OUT / f"site-{Path(name).stem}-{size}-{scheme}.png")
    page.close()
    return found


def search(browser: Browser, language: str, word: str) -> int:
    """Pages that are found, by what a reader types into the field."""
    page, errors = opened(browser, SITE / language / "index.html", "desktop", "light")
    page.wait_for_selector("input[name=q]")
    page.fill("input[name=q]", word)
    page.press("input[name=q]", "Enter")
    page.wait_for_selector("#search-results ul.search li", timeout=10_000)
    found = page.locator("#search-results ul.search li").count()
    page.close()
    return 0 if errors else found


def opened(browser: Browser, file: Path, size: str, scheme: str) -> tuple[Page, list[str]]:
    """A page, and a list that gets what it asks the network for and its errors."""
    width, height = SIZES[size]
    page, found = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme), []
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else found.append(f"asks {asked.url}"))
    page.on("console", lambda said: found.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_timeout(300)
    return page, found


if __name__ == "__main__":
    sys.exit(main())
