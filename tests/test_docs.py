"""The pages of docs/ say what the program has: its options, its flags, its files."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

from cgd_jax import __main__ as cli
from cgd_jax import config_files
from cgd_jax import flags as command_flags
from configs import base

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
# The others tell of what somebody might add, and of what was.
TRUE_TODAY = [page for page in PAGES if page.name not in ("CONTRIBUTING.md", "CHANGELOG.md")]
KEYS = flatten_dict(base.get_config().to_dict(), sep=".")
GROUPS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
OPTION = re.compile(rf"\b(?:{'|'.join(GROUPS)})(?:\.[a-z_0-9]+)+\b")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tables():
    path = ROOT / "docs" / "option_tables.py"
    spec = importlib.util.spec_from_file_location("option_tables", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_options_has_every_key_with_its_default_and_a_meaning(tables):
    rows = re.findall(
        r"^\| \[`([\w.]+)`\]\{#([\w-]+)\} \| `(.*?)` \| (.*) \|$", tables.options(), re.M
    )
    found = {key: (default, meaning) for key, _, default, meaning in rows}
    defaults = flatten_dict(base.get_config().to_dict(), sep=".")
    assert found.keys() == defaults.keys()
    assert len({anchor for _, anchor, _, _ in rows}) == len(rows)
    for key, (default, meaning) in found.items():
        assert default.strip('"') == ("" if defaults[key] == "" else repr(defaults[key])), key
        # A few names say all there is to say.
        assert meaning.strip() or key in ("train.steps",), key


def test_page_of_options_has_every_comment_of_the_base_config(tables):
    text = tables.options()
    source = Path(base.__file__).read_text(encoding="utf-8")
    comments = re.findall(r"(?:^ *|  )# (.*)$", source, re.MULTILINE)
    assert len(comments) > 50
    for comment in comments:
        assert tables.cell(comment) in text, comment


def test_comments_belong_to_their_keys(tables, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        "def get_config():\n"
        "    config = ConfigDict()\n"
        "    # Of the whole group,\n"
        "    # in two lines.\n"
        "    config.data = data = ConfigDict()\n"
        "    data.size = 3  # pixels\n"
        "    # Both.\n"
        "    data.name = 'a # b'\n"
        "    data.path = ''\n"
        "    # What follows:\n"
        "    data.crop = 2  # more pixels\n"
        "    data.flip = True\n"
    )
    assert list(tables.read_comments(path)) == [
        ("data", "Of the whole group, in two lines.", ""),
        ("data.size", "", "pixels"),
        ("data.name", "", "Both."),
        ("data.path", "", "Both."),
        ("data.crop", "What follows:", "more pixels"),
        ("data.flip", "", ""),
    ]


def test_page_of_experiments_says_what_each_file_changes(tables):
    text = tables.experiments()
    for path in (ROOT / "configs").glob("*.py"):
        assert path.stem == "base" or f"### {path.name}\n" in text
    glyphs = text[text.index("### glyphs.py") : text.index("### grocery.py")]
    assert "| [`model.width`](#model-width) | `32` |" in glyphs
    assert "`model.gem_p`" not in glyphs  # as in base.py


@pytest.mark.parametrize("page", TRUE_TODAY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_name_options_that_exist(page):
    known = {*KEYS, *(key.rpartition(".")[0] for key in KEYS)}
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = {option for code in re.findall(r"`([^`\n]+)`", text) for option in OPTION.findall(code)}
    files = re.compile(r"\.(py|csv|json|md|png|npz|safetensors)$")
    assert {name for name in named - known if not files.search(name)} == set()


@pytest.mark.parametrize("page", TRUE_TODAY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_have_flags_and_options_that_exist(page):
    for text in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(text, comments=True)
        flags = [word for word in words if word.startswith("--")]
        given = {word.lstrip("-").partition("=")[::2] for word in flags}
        names = {word for word in words[:1] if word in cli.COMMANDS}
        names |= {value for flag, value in given if flag == "mode"}
        names = names or {"train"}
        if "--help" in flags:
            continue
        for flag, value in given:
            key = flag.removeprefix("config.")
            if "." in key or key == "seed":
                assert key in KEYS, text
                continue
            flag = flag.removeprefix("no") if flag not in (*cli.FLAGS, "config") else flag
            for name in names:
                assert flag in (*cli.COMMANDS[name].takes.split(), *command_flags.OF_ALL), text
            if flag == "config":
                name = value.partition(":")[0]
                a_users = re.fullmatch(r"\w+\.py", name)  # of no folder: a file one has written
                assert a_users or config_files.find(name), text


def commands(text: str) -> list[str]:
    """Returns the commands of this project in the code blocks of a page and in its lines."""
    found = []
    for _, block in FENCE.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line for line in lines if "main.py" in line or line.startswith("cgd_jax ")]
    found += re.findall(r"`((?:python main\.py|cgd_jax) [^`]*)`", FENCE.sub("", text))
    calls = [re.split(r"(?:^|\s)\S*(?:main\.py|cgd_jax) ", line, maxsplit=1) for line in found]
    return [re.sub(r'["&]*\s*&?$', "", call[1]) for call in calls if len(call) > 1]


def test_commands_are_found():
    text = (
        "```\na=1 python main.py --mode=eval \\\n  --workdir=x &\n```\nor `python main.py --k=2`\n"
    )
    assert [shlex.split(found) for found in commands(text)] == [
        ["--mode=eval", "--workdir=x"],
        ["--k=2"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def messages():
    """The texts of the program as patterns: a group for each value that is filled in.

    A quote of one may end behind a sentence, or where a value follows.
    """
    for path in ROOT.glob("cgd_jax/**/*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            pieces = [""]
            for part in parts:
                if isinstance(part, ast.FormattedValue):
                    pieces.append(r"\s*(.+?)\s*")
                elif isinstance(part, ast.Constant) and "\n   " not in str(part.value):
                    first, *sentences = re.split(r"(?<=\.)\s+", str(part.value))
                    pieces[-1] += r"\s*".join(map(re.escape, first.split()))
                    pieces += [r"\s*" + r"\s*".join(map(re.escape, x.split())) for x in sentences]
            if "".join(pieces).count(r"\s*") > 3:  # else it would be in any text
                pattern = ""
                for piece in reversed(pieces[1:]):
                    pattern = f"(?:{piece}{pattern})?"
                yield re.compile(pieces[0] + pattern)


def is_said(text, patterns, within=True):
    """Whether a text is one of the messages; what is filled in is short, or, `within`, said too."""
    for match in filter(None, (pattern.fullmatch(text) for pattern in patterns)):
        values = [value for value in match.groups() if value and len(value.split()) > 5]
        if not values or (within and all(is_said(value, patterns, False) for value in values)):
            return True
    return False


def test_troubleshooting_quotes_what_the_program_says():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"(?:^ *> .*\n)+", text, re.MULTILINE)
    assert len(quotes) > 6
    patterns = list(messages())
    for quote in quotes:
        words = re.sub(r"^ *> ", "", quote, flags=re.MULTILINE).split()
        words = [word for word in words if word not in ("Warning:", "…")]
        assert is_said(" ".join(words), patterns), " ".join(words)
    assert not is_said("The loss or its gradient is finite at step 312.", patterns)
    assert not is_said(
        " ".join([*words, "That", "and", "more", "that", "it", "never", "says."]), patterns
    )
