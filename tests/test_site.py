"""The documents as a site: built without a warning, its links lead somewhere, it asks the network for nothing."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[1]
SITES = {"en": "en", "zh": "zh_CN"}


class Parsed(HTMLParser):
    """A page's links, what it loads, its anchors, its text, and how many formulas are drawn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.formulas = 0
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.formulas += tag == "math" and given.get("display") == "block"
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])
        elif tag in ("link", "script", "img", "iframe", "source"):
            self.loaded |= {given[name] for name in ("href", "src") if given.get(name)}

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Both languages side by side, as `make docs` puts them."""
    folder = tmp_path_factory.mktemp("site")
    for name, language in SITES.items():
        build = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs/site", "-D", f"language={language}", "-d",
                 folder / "doctrees" / name, ".", folder / name]
        done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Parsed]:
    return {page: Parsed(page.read_text("utf-8")) for name in SITES for page in (site / name).rglob("*.html")}


def test_links_lead_somewhere(pages):
    lost = []
    for page, parsed in pages.items():
        for link in parsed.links:
            target, anchor = urldefrag(link)
            if re.match(r"\w+:", target):
                continue
            file = (page.parent / unquote(target)).resolve() if target else page
            found = pages.get(file)
            if not file.is_file() or (anchor and found is not None and unquote(anchor) not in found.anchors):
                lost.append((page.name, link))
    assert lost == []


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert {source for parsed in pages.values() for source in parsed.loaded if re.match(r"(\w+:)?//", source)} == set()
    styles = "".join(file.read_text("utf-8") for file in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import", styles) == []


def test_every_document_is_a_page_of_one_of_the_sites(site):
    documents = {page.relative_to(ROOT).with_suffix(".html") for pattern in ("*.md", "docs/**/*.md", "data/*/README.md")
                 for page in ROOT.glob(pattern)}
    made = {page.relative_to(site / name) for name in SITES for page in (site / name).rglob("*.html")}
    assert documents <= made


@pytest.mark.parametrize("language", SITES)
def test_every_formula_is_drawn_without_a_script(site, pages, language):
    for source in sorted((ROOT / "docs" / language).glob("*.md")):
        page = pages[site / language / "docs" / language / f"{source.stem}.html"]
        written = re.sub(r"```.*?```", "", source.read_text("utf-8"), flags=re.S).count("$$") // 2
        assert page.formulas == written and "$$" not in page.text, source


def test_a_cited_line_is_an_anchor_of_its_page(site, pages):
    """docs/numerics.md links formulas to the lines that compute them."""
    page = site / "en" / "docs" / "numerics.html"
    lines = [link for link in pages[page].links if "/code/" in link and "#L-" in link]
    assert len(lines) > 30  # which test_links_lead_somewhere followed


def test_the_search_knows_words_of_both_languages(site):
    for name, words in {"en": ("advantag", "whiten", "checkpoint"), "zh": ("优势", "策略", "截断")}.items():
        index = (site / name / "searchindex.js").read_text("utf-8")
        assert set(words) <= json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))["terms"].keys()
