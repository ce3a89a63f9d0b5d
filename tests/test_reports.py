"""Reports: tables that line up, histories that go on, figures that show what they say."""

import csv
import io
import os
import struct
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cgd_jax.data import Dataset, Split
from cgd_jax.preprocess import IMAGENET, Normalization, normalize
from cgd_jax.reports import plots, tables, throughput
from cgd_jax.reports.history import History, Progress, read_history


def split_of(labels, size=8):
    """Images in the gray of their class."""
    labels = np.asarray(labels)
    images = np.broadcast_to(labels[:, None, None, None] * 10, (len(labels), size, size, 3))
    return Split(images.astype(np.uint8), labels, [str(i) for i in labels], {}, 7)


def test_tables_line_up():
    recalls = {
        "raw pixels": {"recall@1": 0.5, "recall@1000": 1.0},
        "CGD": {"recall@1": 0.98765, "recall@1000": 1.0, "map@r": 0.5},
    }
    lines = tables.metrics_table(recalls).splitlines()
    assert lines[0].split() == ["R@1", "R@1000", "MAP@R"]
    assert lines[-1].split() == ["CGD", "98.77", "100.00", "50.00"]
    assert len({line.index(".", 20) for line in lines[2:]}) == 1
    table = tables.dataset_table(Dataset(split_of([0, 0, 0, 1]), split_of([2, 2]), split_of([2])))
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["train", "2", "4", "1", "2", "3", "7"],
        ["query", "1", "2", "2", "2", "2", "7"],
        ["gallery", "1", "1", "1", "1", "1", "7"],
    ]


@pytest.mark.parametrize("columns", [28, 40, 80])
def test_columns_that_do_not_fit_follow_below(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    header = ["", *(f"R@{10**i}" for i in range(12))]
    rows = [["raw pixels", *range(12)], ["CGD", *range(100, 112)]]
    text = tables.table(header, rows)
    assert max(map(len, text.splitlines())) <= columns
    parts = [part.splitlines() for part in text.split("\n\n")]
    for number, row in ((2, rows[0]), (3, rows[1])):
        cells = [cell for part in parts for cell in part[number].removeprefix(row[0]).split()]
        assert cells == [*map(str, row[1:])]
        assert all(part[number].startswith(row[0]) for part in parts)
    assert [name for part in parts for name in part[0].split()] == header[1:]
    assert len(tables.table(header, rows, "github").splitlines()) == 4


def test_history_goes_on_where_the_run_does(tmp_path):
    with History(tmp_path, 0) as history:
        history.add(1, {"loss": 0.5})
        history.add(2, {"loss": 0.25})
        history.add(2, {"recall@1": 1 / 3})  # evaluated
        history.add(3, {"loss": 0.1})
    path = tmp_path / "history.csv"
    assert path.read_text().splitlines()[0] == "step,loss,recall@1"
    with History(tmp_path, 2) as again:
        assert again.rows == [
            {"step": 1, "loss": 0.5},
            {"step": 2, "loss": 0.25, "recall@1": 0.333333},
        ]
        again.add(1234567, {"loss": 0.2})
    assert [row["loss"] for row in read_history(path)] == [0.5, 0.25, 0.2]
    assert read_history(path)[-1]["step"] == 1234567, "a late step is not rounded"
    assert read_history(tmp_path / "none.csv") == []


def read_events(path):
    """The events of a TensorBoard file: records of length, checksum, event, checksum."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    return events


def test_tensorboard_gets_the_history(tmp_path):
    with History(tmp_path, 4) as history:
        history.add(6, {"loss": 0.5, "accuracy": 0.25})
    (path,) = tmp_path.glob("tensorboard/events.out.tfevents.*")
    version, start, row = read_events(path)
    assert version.file_version == "brain.Event:2"
    assert start.step == 5 and start.session_log.status == SessionLog.START
    assert row.step == 6
    values = {value.tag: value.simple_value for value in row.summary.value}
    assert values == {"loss": 0.5, "accuracy": 0.25}


def test_a_history_that_cannot_be_written_is_kept_for_later(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    with History(tmp_path, 0) as history:
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", full)
            patch.setattr(history.events, "flush", full)
            history.add(1, {"loss": 0.5})
        assert not list(tmp_path.glob("*.tmp"))
        history.add(2, {"loss": 0.25})
    assert caplog.text.count("No space left on device. Training goes on") == 2
    assert [row["loss"] for row in read_history(tmp_path / "history.csv")] == [0.5, 0.25]
    (path,) = tmp_path.glob("tensorboard/events*")
    assert [event.step for event in read_events(path)[2:]] == [1, 2]


def color_at(picture, x, y):
    return to_hex(picture[y, x] / 255)


def test_frames_tell_right_from_wrong(tmp_path, drawn):
    dataset = Dataset(split_of([9]), split_of([1, 2]), split_of([2, 1, 3]))
    path = tmp_path / "retrievals.png"
    nearest = np.array([[0, 1, 2], [2, 0, 1]])
    plots.plot_retrievals(path, dataset, np.array([1, 0]), nearest, "a $title$\n")
    picture = np.asarray(Image.open(path).convert("RGB"))
    green, red, step, first = plots.GREEN, plots.RED, 114, 70 + 8
    assert picture.shape == (70 + 2 * step + 8, 4 * step + 8, 3)
    for line, frames in enumerate([("#000000", green, red, red), ("#000000", red, red, green)]):
        for i, color in enumerate(frames):
            assert color_at(picture, 8 + i * step, first + line * step) == color
    # The images themselves: the query of label 2, its neighbours of the labels 2, 1 and 3.
    grays = [picture[first + 53, 8 + i * step + 53].tolist() for i in range(4)]
    assert grays == [[10 * label] * 3 for label in (2, 2, 1, 3)]
    assert drawn[0].get_suptitle().startswith("a $title$\\n\nQueries drawn at random")
    assert "wrong" not in drawn[0].get_suptitle()


def test_failing_queries_stand_below(tmp_path, drawn):
    """The first four behind the eight that are drawn as they come."""
    query, gallery = split_of([1] * 19 + [3]), split_of([1, 2, 3])
    nearest = np.array([[0]] * 9 + [[1]] * 10 + [[2]])
    path = tmp_path / "a.png"
    plots.plot_retrievals(path, Dataset(query, query, gallery), np.arange(20), nearest, "t")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[0] == 70 + (8 + 4) * 114 + 8
    frames = [color_at(picture, 8 + 114, 70 + 8 + line * 114) for line in range(12)]
    assert frames == [plots.GREEN] * 8 + [plots.RED] * 4
    assert "the last 4 rows those with a wrong first neighbour" in drawn[0].get_suptitle()


LOSSES = [
    {"step": 1.0, "loss": 2.0, "ranking_loss": 0.0, "classification_loss": 2.0},
    {"step": 2.0, "loss": 1.0, "recall@1": 0.5, "recall@2": 0.7},
]
SIGNS = {
    "active_triplets": 0.9,
    "mean_embedding_norm": 0.4,
    "positive_distance": 0.5,
    "negative_distance": 1.2,
    "hardest_positive": 0.9,
    "hardest_negative": 0.8,
    "ranking_gradient": 0.01,
    "classification_gradient": 3.0,
}


@pytest.mark.parametrize("rows", [LOSSES, LOSSES[:1], [], [row | SIGNS for row in LOSSES]])
def test_curves_of_any_history_can_be_drawn(tmp_path, rows, drawn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_curves(tmp_path / "a.png", rows, {"raw pixels": {"recall@1": 0.3}}, 0.1)
    assert len(drawn[0].axes) == (5 if "active_triplets" in dict(*rows[:1]) else 2)
    assert "R@1, raw pixels" in lines_of(drawn[0].axes[1])
    assert len({*np.asarray(Image.open(tmp_path / "a.png").convert("L")).flat}) > 10


def lines_of(axes):
    """What a panel shows: label → the values."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_curves_show_the_history(drawn, tmp_path):
    baselines = {f"pretrained {letter}": {"recall@1": i / 10} for i, letter in enumerate("SMGR")}
    baselines["raw $pixels$"] = {"recall@1": 0.9}
    seen = "classes, 3 of 40 seen in training"
    plots.plot_curves(tmp_path / "a.png", [row | SIGNS for row in LOSSES], baselines, 0.1, seen)
    losses, recalls, distances, shares, gradients = map(lines_of, drawn[0].axes)
    assert losses["total"] == [2, 1] and losses["classification"] == [2]
    assert losses["margin"] == [0.1, 0.1] and "ranking" not in losses, "a loss of 0 is not there"
    assert recalls["R@1"] == [50] and recalls["R@2"] == [70]
    assert all(recalls[f"R@1, {name}"][0] == 100 * x["recall@1"] for name, x in baselines.items())
    assert drawn[0].axes[1].get_title() == "Classes, 3 of 40 seen in training"
    assert distances["hardest negative"] == [0.8, 0.8] and len(distances) == 4
    assert shares == {"active triplets": [0.9, 0.9], "norm of the mean": [0.4, 0.4]}
    assert gradients == {"ranking": [0.01, 0.01], "classification": [3, 3]}
    plots.plot_curves(tmp_path / "a.png", LOSSES, {})
    assert len(drawn[1].axes) == 2 and drawn[1].axes[1].get_title() == "Test classes"
    assert "margin" not in lines_of(drawn[1].axes[0])


def test_samples_are_shown_in_their_own_colors_below_the_names_of_their_classes(tmp_path, drawn):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    for normalization in (IMAGENET, Normalization.of(0.5, 0.25)):
        images = np.asarray(normalize(pixels, normalization))
        plots.plot_samples(tmp_path / "a.png", images, [*"aabbbb"], 3, normalization)
        shown = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
        assert shown.shape[:2] == (2 * 84 + 4, 3 * 68 + 4)
        assert np.abs(shown[104:168, 4:68, :3] - pixels[3]).max() <= 1

    # The first of a class, and the first of a row.
    assert [text.get_text() for text in drawn[0].texts] == ["a", "b", "b"]
    assert [round(text.get_position()[0]) for text in drawn[0].texts] == [4, 140, 4]


def test_classes_are_called_unseen_where_they_are():
    assert tables.describe_classes(40, 0) == "classes never seen in training"
    assert tables.describe_classes(2400, 1003) == "classes, 1,003 of 2,400 seen in training"
    assert tables.describe_classes(40, 40) == "classes that were all seen in training"


@pytest.mark.parametrize(
    "of_g,said",
    [(0.25, "Against S, the best branch,"), (0.5, "Against S, one of the best branches,")],
)
def test_the_best_branch_is_the_best(of_g, said):
    found = {
        "queries": 8,
        "k": 3,
        "branches": {"S": 0.5, "G": of_g},
        "combined": 0.75,
        "any_branch": 0.75,
        "best_branch": "S",
        "pairs": [{"branches": ["S", "G"], "overlap": 0.5, "error_correlation": None}],
        "gain": {"total": 0.25, "confidence": [0.1, 0.4], "won": 2, "lost": 0},
        "outcomes": [{"right": [], "queries": 4, "combined_right": 2, "gain": 2}],
    }
    text = " ".join(tables.complementarity_text(found).split())
    assert f"{said} the combination wins 2 queries and loses 0: +25.00" in text


def test_tables_show_names_as_they_are():
    rows = {"a|b\n*c*": {"recall@1": 0.5}}
    assert "a\\|b\\\\n\\*c\\* |" in tables.metrics_table(rows, "github")
    assert "a|b\\n*c*" in tables.metrics_table(rows)
    assert tables.run_table({"work folder": "a\nb"}) == "work folder  a\\nb"


def test_the_meter_counts_what_was_done(monkeypatch):
    clock = iter([0.0, 10.0, 13.0, 20.0, 20.0])
    monkeypatch.setattr(throughput.time, "time", lambda: next(clock))
    meter = throughput.Meter(images=32, flops=5e12, peak=10e12)
    with meter.waiting():
        meter.count()
    meter.count()
    row = meter.read()
    assert row == {
        "images_per_second": 2 * 32 / 20,
        "input_wait": 3 / 20,
        "tflops_per_second": 0.5,
        "share_of_peak": 0.05,
    }


def test_peaks_are_those_of_the_longest_name(monkeypatch):
    device = SimpleNamespace(device_kind="TPU v5 lite")
    monkeypatch.setattr(throughput.jax, "devices", lambda: [device])
    monkeypatch.setattr(throughput.jax, "device_count", lambda: 4)
    assert throughput.peak_flops("bfloat16") == 4 * 197e12
    assert np.isnan(throughput.peak_flops("float32"))
    device.device_kind = "cpu"
    assert np.isnan(throughput.peak_flops("bfloat16"))


def test_progress_prints_lines_where_there_is_no_terminal(capsys):
    with Progress(10, 200) as progress:
        progress.update()
        progress.log(20, {"loss": 0.5, "images_per_second": 99.6, "recall@1": 0.5, "accuracy": 1})
    losses, recalls = capsys.readouterr().out.splitlines()
    assert losses.startswith("step  20/200  loss 0.500  100 img/s  ") and losses.endswith("left")
    assert recalls == "step  20/200  R@1 50.00 %"


def test_lines_of_training_fit_a_terminal(capsys):
    row = {"loss": 2.23721, "ranking_loss": 0.4433, "classification_loss": 1.7940}
    row |= {f"recall@{k}": 1.0 for k in (1, 2, 4, 8)} | {"images_per_second": 1234.5}
    with Progress(0, 1500) as progress:
        progress.started -= 600
        progress.log(1000, row)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 80, lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", [0, 80])
def test_on_a_terminal_there_is_a_bar_and_some_lines_stay(width, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(terminal, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((width, 24)))
    with Progress(0, 100) as progress:
        for step in range(1, 101):
            progress.update()
            recalls = {"recall@1": 0.5} if step == 55 else {}
            progress.log(step, {"loss": 1 / step} | recalls)
    said = [line.split("/100")[0] for line in capsys.readouterr().out.splitlines()]
    # Ten in all, and both lines of the step that was evaluated.
    tenths = [*range(10, 51, 10), 55, 55, *range(65, 100, 10)]
    assert said == [f"step {step:3}" for step in tenths]
    assert "training" in terminal.getvalue() and "100/100" in terminal.getvalue()


def test_metrics_of_every_class_as_csv(tmp_path):
    rows = [{"class": 7, "mrr": 1 / 3}, {"class": 5, "mrr": 0.5}]
    tables.write_csv(tmp_path / "classes.csv", rows)
    with open(tmp_path / "classes.csv", newline="") as file:
        read = [{"class": int(r["class"]), "mrr": float(r["mrr"])} for r in csv.DictReader(file)]
    assert read == rows
    assert os.listdir(tmp_path) == ["classes.csv"]
