"""Lists of photographs as spreadsheets, Windows and macOS write them."""

import codecs
import unicodedata

import pytest

from cgd_jax.data import image_list
from tests.dataset_samples import write

FILES = {f"{name}/{i}.jpg": "" for name in ("Äpfel", "b c", "d") for i in range(2)}
TEXT = "path,label\nÄpfel/0.jpg,Äpfel\nÄpfel/1.jpg,Äpfel\nb c/0.jpg,b\nd/1.jpg,d\n"


def read(tmp_path, text, encoding="utf-8", files=FILES):
    root = write(tmp_path / "in", files)
    (root / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return [row[:3] for row in image_list.read(root / "list.csv")]


EXPECTED = [
    ("", "Äpfel/0.jpg", "Äpfel"),
    ("", "Äpfel/1.jpg", "Äpfel"),
    ("", "b c/0.jpg", "b"),
    ("", "d/1.jpg", "d"),
]


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.encode("cp1252"),
    ],
)
def test_encodings(tmp_path, data):
    assert read(tmp_path, data) == EXPECTED


def test_an_encoding_that_nothing_proves_is_refused_with_the_line_and_the_remedy(tmp_path):
    only_labels = "path,label\nd/0.jpg,a\nd/1.jpg,Äpfel\n"
    with pytest.raises(
        ValueError, match="list.csv, line 3: the text is not valid UTF-8.*CSV UTF-8"
    ):
        read(tmp_path, only_labels, "cp1252")
    with pytest.raises(ValueError, match="line 2: .*not valid UTF-8"):
        read(tmp_path / "2", TEXT, "cp1252", files={"other/1.jpg": ""})
    with pytest.raises(ValueError, match="not valid UTF-16"):
        read(tmp_path, codecs.BOM_UTF16_LE + b"p\0a\0t")


def test_names_that_are_bytes_on_disk_as_in_the_list(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / b"\xe4.jpg".decode("utf-8", "surrogateescape")).write_text("")
    ((_, id, label),) = read(tmp_path, b"path,label\n\xe4.jpg,x\n", files={"d/1.jpg": ""})
    assert id == "\udce4.jpg" and label == "x"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"])
def test_delimiters_and_line_ends(tmp_path, delimiter, line):
    text = TEXT.replace(",", delimiter).replace("\n", line)
    assert read(tmp_path, text) == EXPECTED
    assert read(tmp_path, f"sep={delimiter}{line}" + text) == EXPECTED
    assert read(tmp_path, text + f"{line}{delimiter}{line}") == EXPECTED


def test_paths_of_windows(tmp_path):
    assert read(tmp_path, TEXT.replace("/", "\\")) == EXPECTED
    assert read(tmp_path, TEXT.replace("b c/0.jpg", ".\\B C\\0.JPG")) == EXPECTED
    # What is there under its own name is not looked for.
    files = {"a\\b.jpg": "", "a/b.jpg": "", "A/b.jpg": ""}
    text = "path,label\na\\b.jpg,x\nA/b.jpg,y\na/B.jpg,z\n"
    assert [row[1] for row in read(tmp_path / "2", text, files=files)] == [
        "a\\b.jpg",
        "A/b.jpg",
        "a/b.jpg",
    ]


@pytest.mark.parametrize("on_disk, in_list", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_compared_as_letters(tmp_path, on_disk, in_list):
    files = {unicodedata.normalize(on_disk, name): "" for name in FILES}
    rows = read(tmp_path, unicodedata.normalize(in_list, TEXT), files=files)
    assert rows[0] == ("", unicodedata.normalize(on_disk, "Äpfel/0.jpg"), "Äpfel")


def test_a_name_that_could_be_two_files_is_none(tmp_path):
    files = {"a/x.jpg": "", "a/X.jpg": ""}
    text = "path,label\na/x.JPG,1\n../in/a/X.jpg,1\n"
    assert [row[1] for row in read(tmp_path, text, files=files)] == ["a/x.JPG", "../in/a/X.jpg"]


def test_paths_outside_and_paths_that_cannot_be(tmp_path):
    write(tmp_path, {"beside/1.jpg": ""})
    absolute = str(tmp_path / "beside" / "1.jpg")
    names = ["..\\beside\\1.jpg", absolute, "x" * 300, "C:\\photos\\1.jpg"]
    rows = read(tmp_path, "path,label\n" + "".join(f"{name},x\n" for name in names))
    assert [row[1] for row in rows] == ["../beside/1.jpg", *names[1:]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "an empty file"),
        ("a.jpg,cat\nb.jpg,dog\n", "first line must name the columns path, label.*a.jpg,cat"),
        ("path,label\na.jpg,\n", "line 2: a path or a label is missing"),
        ("path,label\n\na.jpg\n", "line 3: a path or a label is missing"),
        ("path,label\na, b.jpg,cat\n", "line 2: there are 3 cells, but 2 columns.*quotation marks"),
        ("path,label\n" + "a" * (1 << 25) + ",x\n", "line 2: field larger"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_quotes_and_breaks_within_cells(tmp_path):
    rows = read(tmp_path, 'Label , PATH\n"a, ""b""\nc","d/0.jpg"\n')
    assert rows == [("", "d/0.jpg", 'a, "b"\nc')]
