"""The documents as a site, in a language (`-D language=en` or `zh_CN`): `make docs`.

Sources are the repository's own Markdown files, as a code host shows them. What such a host does by itself is done here:
links to source files lead to pages with their lines, links between the languages from one site to the other, formulas are
MathML, and no page asks the network for anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.search.zh import SearchChinese
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[2]
LEARN = ("1-policy-gradient", "2-ppo", "3-gae", "4-continuous", "5-rlhf", "6-exercises", "7-walk")
HOW_TO = ("models", "data", "rewards", "config", "control", "commands", "reading-a-run", "debugging", "rerun", "store",
          "work-pool", "scaling", "serving", "security")
REFERENCE = ("numerics", "tables", "architecture", "code", "performance", "field", "journal")
EXAMPLES = sorted(f"data/{path.parent.name}/README" for path in ROOT.glob("data/*/README.md"))
PAGES = {
    "en": {"Learn": [f"docs/en/{page}" for page in LEARN], "How to": [f"docs/{page}" for page in HOW_TO],
           "Know exactly": [*(f"docs/{page}" for page in REFERENCE), "CHANGELOG", "CONTRIBUTING"], "Examples": EXAMPLES},
    "zh_CN": {"学习": [f"docs/zh/{page}" for page in LEARN]},
}
START = {"en": "README", "zh_CN": "README.zh"}
FOLDER = {"en": "en", "zh_CN": "zh"}
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(```.*?```)", re.S)

project = "Baton"
author = copyright = "the authors of Baton"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "mailto": None, "site": {"url": "{{path}}#{{fragment}}"}}
highlight_language = "none"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = "Baton"
html_show_search_summary = False  # it is fetched, which a page on a disk may not
html_show_sourcelink = False
html_copy_source = False
html_permalinks_icon = "#"
exclude_patterns = [".*", "build", "mutants", "data/store"]
html_math_renderer = "mathml"


class Chinese(SearchChinese):
    """With a query's words found by the browser, as jieba finds those of the pages."""

    language_name = "English"  # whose stemmer it takes; Sphinx 9.0 looks for one of this name
    js_splitter_code = """
var splitQuery = query => [...new Intl.Segmenter("zh", {granularity: "word"}).segment(query)]
  .filter(part => part.isWordLike).map(part => part.segment);
"""


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_search_language(Chinese)
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_formula, None))
    app.connect("config-inited", _choose_pages)
    app.connect("source-read", _prepare)
    app.connect("html-collect-pages", _more_pages)
    app.connect("env-purge-doc", lambda app, env, page: _cited(env).pop(page, None))
    return {"parallel_read_safe": False}


def _choose_pages(app: Sphinx, config: Config) -> None:
    there = [START[config.language], *(page for pages in PAGES[config.language].values() for page in pages)]
    config.root_doc, config.include_patterns = there[0], [f"{page}.md" for page in there]


# --- formulas ---

def _inline_formula(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _formula(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


# --- links ---

def _prepare(app: Sphinx, page: str, source: list[str]) -> None:
    """Links out of this site's pages, and on its first page the contents."""
    parts = FENCE.split(source[0])
    parts[::2] = [LINK.sub(lambda link: _link(app, page, link), part) for part in parts[::2]]
    source[0] = "".join(parts)
    if match := re.fullmatch(r"docs/(en|zh)/(.+)", page):
        other, name = {"en": ("zh", "中文"), "zh": ("en", "English")}[match[1]]
        source[0] = f"[{name}](site:../../../{other}/docs/{other}/{match[2]}.html)\n\n{source[0]}"
    if page == START[app.config.language]:
        source[0] += "".join(f"\n```{{toctree}}\n:caption: {caption}\n:hidden:\n\n" + "\n".join(f"/{name}" for name in pages)
                             + "\n```\n" for caption, pages in PAGES[app.config.language].items())


def _link(app: Sphinx, page: str, link: re.Match[str]) -> str:
    target, anchor = normpath(join(dirname(page), link[2])), link[3] or "#"
    if (site := _site_of(app.config.language, target)) == FOLDER[app.config.language]:
        return link[0]
    if site is not None:
        return f"{link[1]}site:{_up(page)}../{site}/{target.removesuffix('.md')}.html{anchor}{link[4]}"
    if (ROOT / target).is_file() and not target.endswith(".png"):
        _cited(app.env).setdefault(page, set()).add(target)
        return f"{link[1]}site:{_up(page)}code/{target}.html{re.sub('^#L', '#L-', anchor)}{link[4]}"
    return link[0]


def _site_of(language: str, target: str) -> str | None:
    """The folder of the site that has a page of that file, this language's before others."""
    for each in sorted(PAGES, key=lambda other: other != language):
        if target.endswith(".md") and target.removesuffix(".md") in {START[each], *chain(*PAGES[each].values())}:
            return FOLDER[each]
    return None


def _up(page: str) -> str:
    """From a page to the site's folder."""
    return "../" * page.count("/")


def _cited(env: Any) -> dict[str, set[str]]:
    """Page → the source files to which it links; kept with the pages, so that a build of some of them knows all."""
    if not hasattr(env, "baton_cited"):
        env.baton_cited = {}
    return env.baton_cited


def _more_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """One that leads to the first page, and one for each source file that is linked to, its lines with anchors."""
    frame = {"parents": [], "toc": ""}
    start = f"{START[app.config.language]}.html"
    yield "index", frame | {"title": project, "body": f'<meta http-equiv="refresh" content="0; url={start}">'}, "page.html"
    for target in sorted(set().union(*_cited(app.env).values())):
        try:
            lexer = get_lexer_for_filename(target)
        except ClassNotFound:
            lexer = TextLexer()
        text = (ROOT / target).read_text(encoding="utf-8")
        body = highlight(text, lexer, HtmlFormatter(linespans="L", cssclass="highlight"))
        yield f"code/{target}", frame | {"title": target, "body": f"<h1>{target}</h1>{body}"}, "page.html"
