"""Tables of every key of configs/base.py and of what each experiment changes, as Markdown.

The site's page of options holds them, made anew at every build; tests/test_docs.py says that no
key is missing.
"""

import ast
import importlib
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from cgd_jax import losses, rules
from configs import base

__all__ = ["experiments", "options"]

CONFIGS = Path(base.__file__).parent
LONG = 160  # letters of a rule that is left to the page which lists the names


class Comment(NamedTuple):
    """What base.py says of a key."""

    key: str
    remark: str  # on it and those that follow
    meaning: str  # of itself


def options() -> str:
    """Returns a section for each part of the config, with a table of its keys."""
    defaults = flatten_dict(base.get_config().to_dict(), sep=".")
    comments = {comment.key: comment for comment in read_comments(Path(base.__file__))}
    lines: list[str] = []
    part = None
    order = list(comments)  # that of the file; the keys of a loss stand where the loss does
    place_of = lambda key: order.index(key if key in comments else key.rpartition(".")[0])
    for key, default in sorted(defaults.items(), key=lambda item: place_of(item[0])):
        group, _, _ = key.rpartition(".")
        section = key.partition(".")[0] if group else ""
        comment = comments.get(key, Comment(key, "", ""))
        own = comments.pop(group, Comment(group, "", ""))  # of the loss, say, once
        remark = comment.remark or own.remark
        if section != part:
            part = section
            lines += ["", f"### {section or 'The run'}", ""]
            lines += [remark, ""] * bool(remark) + list(HEAD)
        elif remark:
            lines += ["", remark, "", *HEAD]
        meaning = comment.meaning
        if not meaning and (loss := LOSSES.get(group.rpartition(".")[2])):
            meaning = f"of {{py:func}}`{loss.__name__} <{loss.__module__}.{loss.__name__}>`"
        described_key = described(key, default, meaning)
        lines.append(f"| [`{key}`]{{#{place(key)}}} | `{shown(default)}` | {described_key} |")
    return "\n".join(lines)


LOSSES = {
    **losses.RANKING_LOSSES,
    **losses.PROXY_LOSSES,
    **losses.CENTER_LOSSES,
    **losses.MINERS,
}
HEAD = ("| option | default | what it is |", "| --- | --- | --- |")


def place(key: str) -> str:
    """Returns the anchor of a key's row: options.md#model-gem-p."""
    return key.replace(".", "-").replace("_", "-")


def described(key: str, default: Any, meaning: str) -> str:
    """Returns a meaning with the values that are allowed."""
    rule = rules.rule_of(key, default).otherwise
    rule = rule.replace("is unknown; valid names are", "one of").replace("one of, ", "one, ")
    rule = rule.removeprefix("must be ")
    if not rule or len(rule) > LONG:
        return cell(meaning)
    rule = f"*{rule[0].upper()}{rule[1:]}.*"
    return cell(f"{meaning.rstrip('.')}. {rule}" if meaning else rule)


def cell(text: str) -> str:
    """Escapes what would end a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;") if "{py:" not in text else text


def shown(value: Any) -> str:
    return repr(value) if value != "" else '""'


def read_comments(path: Path) -> Iterator[Comment]:
    """Reads the comments of the assignments in `get_config` of a config file."""
    with path.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    tree = ast.parse(path.read_bytes())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    names = {"config": ""}  # name of a variable → the path that it stands for
    shared = ""
    for node in function.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        target = node.targets[0]
        assert isinstance(target.value, ast.Name)
        key = f"{names[target.value.id]}{target.attr}"
        for other in node.targets[1:]:
            if isinstance(other, ast.Name):
                names[other.id] = f"{key}."
        above, line = [], node.lineno - 1
        while line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        beside, alone = comments.get(node.end_lineno or node.lineno, ("", True))
        text = " ".join(above)
        if isinstance(node.value, ast.Call):  # of several keys
            yield Comment(key, text, "")
            shared = ""
        elif not alone:
            yield Comment(key, text, beside)
            shared = ""
        else:  # the text is of this key, and of the next if that has none
            shared = text or shared
            yield Comment(key, "", shared)


def experiments() -> str:
    """Returns a section for each file of configs/: what it is and what it changes in base.py."""
    defaults = flatten_dict(base.get_config().to_dict(), sep=".")
    lines: list[str] = []
    for path in sorted(CONFIGS.glob("*.py")):
        if path.stem == "base":
            continue
        module = importlib.import_module(f"{base.__package__}.{path.stem}")
        values = flatten_dict(module.get_config().to_dict(), sep=".")
        changed = {key: value for key, value in values.items() if value != defaults.get(key)}
        lines += ["", f"### {path.name}", "", (module.__doc__ or "").strip(), ""]
        lines += ["| option | value |", "| --- | --- |"]
        lines += [
            f"| [`{key}`](#{place(key)}) | `{shown(value)}` |" for key, value in changed.items()
        ]
    return "\n".join(lines)
