"""Tables of what a search found."""

import pytest

from cgd_jax.search import report
from cgd_jax.search.duplicates import Group
from cgd_jax.search.queries import Answer, Found
from cgd_jax.search.stores import Hit


@pytest.mark.parametrize(
    "folder, rest",
    [
        ("in /home/a/very long/place:", ["x/1.jpg", "y/2.jpg"]),
        ("in photos:", ["1.jpg", "y/2.jpg"]),
        (None, ["/1.jpg", "/b/2.jpg"]),
        (None, ["1.jpg", "/b/2.jpg"]),
        (None, ["", "2.jpg"]),
        (None, []),
    ],
)
def test_the_folder_of_all_paths_is_named_once(folder, rest):
    root = folder.removeprefix("in ").removesuffix(":") + "/" if folder else ""
    hits = [Hit("id", 0.5, "a label", root + path) for path in rest]
    found = Found([Answer("query.jpg", b"", hits)], [], 2, 1.0)
    lines = report.as_text(found).partition("\n\n")[0].splitlines()
    assert lines.pop(0) == "query.jpg"
    if folder:
        assert lines.pop(0) == folder
    assert [line.partition("a label")[2].strip() for line in lines[2:]] == rest
    groups = report.groups_as_text([Group(0.5, hits)], 0.5).splitlines()
    assert (groups[0] == folder) == bool(folder) and len(groups) == 2 + bool(folder) + len(rest)
