"""How Sphinx builds this site: sphinx-build -W --keep-going docs docs/_build/html."""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NewType

import numpy.typing
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
# Signatures show the name of this type, and not the dozen that it stands for.
numpy.typing.ArrayLike = NewType("ArrayLike", object)  # type: ignore[misc]

import option_tables  # noqa: E402

# The one place that says where the project lives; the workflow that deploys the site sets it.
REPOSITORY = os.environ.get("REPOSITORY_URL", "https://github.com/OWNER/cgd_jax")

project = "cgd_jax"
author = "The cgd_jax developers"
html_title = "cgd_jax"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["attrs_inline", "attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_html_meta = {
    "description": "Image retrieval with combined global descriptors (CGD) in JAX: training on "
    "CPU, GPU and TPU, poolings, losses, metrics, and search of your own pictures.",
}
highlight_language = "none"  # of code without a language: commands and layouts
smartquotes = False  # --config is no –config
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {
        "color-brand-primary": "#0b6e5b",
        "color-brand-content": "#0b6e5b",
        "color-brand-visited": "#0b6e5b",
    },
    "dark_css_variables": {
        "color-brand-primary": "#5fd4b9",
        "color-brand-content": "#5fd4b9",
        "color-brand-visited": "#5fd4b9",
    },
}

# Docstrings are in Google style, with single backticks around code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "ignore-module-all": False}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False

log = logging.getLogger(__name__)

LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]*)(#[^)\s]*)?(?=\))")
FIGURE = re.compile(r"^!\[[^\]]*\]\((figures/\w+\.svg)\)$", re.MULTILINE)
TABLES = {
    "<!-- every option -->": option_tables.options,
    "<!-- every experiment -->": option_tables.experiments,
    "<!-- every study -->": lambda: "```{toctree}\n:glob:\n\n*\n```",
}


def prepare(app: Sphinx, name: str, source: list[str]) -> None:
    """Turns what GitHub shows of a page into what this site can do with it.

    Links to files of the repository outside docs/ lead there, own drawings become part of the
    page, so that they follow its colours, and markers are replaced by tables.
    """
    folder = (HERE / f"{name}.md").parent
    text = source[0]

    def to_repository(link: re.Match) -> str:
        target = Path(os.path.normpath(folder / link[1]))
        if target.is_relative_to(HERE):  # a page
            return link[0]
        if not target.exists():
            log.warning("there is no %s", target.relative_to(ROOT), location=name)
        kind = "tree" if target.is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{target.relative_to(ROOT).as_posix()}{link[2] or ''}"

    text = LINK.sub(to_repository, text)
    text = FIGURE.sub(as_part_of_page, text)
    text = text.replace("https://github.com/OWNER/cgd_jax", REPOSITORY)
    text = text.replace("OWNER/cgd_jax", REPOSITORY.removeprefix("https://github.com/"))
    for marker, table in TABLES.items():
        if marker in text:
            text = text.replace(marker, table())
    source[0] = text


def mark_code(app, what, name, obj, options, lines: list[str]) -> None:
    """Marks blocks of a docstring that are indented by four as the code that they are."""
    last = ""  # line that is not empty
    for i, line in reversed(list(enumerate(lines))):
        last = next((other for other in reversed(lines[:i]) if other), " ")
        if line.startswith("    ") and not lines[i - 1] and not last.startswith(" "):
            lines[i:i] = ["::", ""]


def part_paragraphs(app, what, name, obj, options, lines: list[str]) -> None:
    """Puts an empty line where text of a docstring is indented further, or less, than before."""
    for i in range(len(lines) - 1, 0, -1):
        line, before = lines[i], lines[i - 1]
        deeper = len(line) - len(line.lstrip()) - (len(before) - len(before.lstrip()))
        opens = before.lstrip().startswith((":", "-", ".."))
        goes_on = line.lstrip().startswith((":", "-", ".."))
        if line and before and (deeper > 0 and not opens or deeper < 0 and not goes_on):
            lines.insert(i, "")


def as_part_of_page(figure: re.Match) -> str:
    """Returns a drawing in a frame that scrolls on small screens."""
    drawing = (HERE / figure[1]).read_text(encoding="utf-8")
    return f'```{{raw}} html\n<div class="drawing">\n{drawing}</div>\n```'


def inline_formula(translator, node: nodes.math) -> None:
    """Writes a formula in a line as MathML, which browsers draw without a script."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def display_formula(translator, node: nodes.math_block) -> None:
    """Writes a formula on a line of its own as MathML."""
    translator.body.append(f"<div class='math'>{convert(node.astext(), display='block')}</div>")
    raise nodes.SkipNode


class Targets(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self):
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src", "xlink:href"):
                self.links.add(value or "")
            if name == "id":
                self.ids.add(value or "")


def check_links(app: Sphinx, error: Exception | None) -> None:
    """Warns of links within the site that lead nowhere, those in drawings included."""
    if error or app.builder.name != "html":
        return
    pages = {}
    for path in Path(app.outdir).rglob("*.html"):
        pages[path] = Targets()
        pages[path].feed(path.read_text(encoding="utf-8"))
    for path, page in pages.items():
        for link in sorted(page.links):
            file, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:|//", link):
                continue
            target = path if not file else Path(os.path.normpath(path.parent / file.split("?")[0]))
            if not target.exists():
                log.warning("%s links to %s, which is not there", path.name, link)
            elif anchor and target in pages and anchor not in pages[target].ids:
                log.warning("%s links to %s, where there is no such place", path.name, link)


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (inline_formula, None), (display_formula, None))
    app.connect("source-read", prepare)
    # Before and after napoleon, which reads the sections of a docstring at 500.
    app.connect("autodoc-process-docstring", mark_code, priority=400)
    app.connect("autodoc-process-docstring", part_paragraphs, priority=600)
    app.connect("build-finished", check_links)
