"""Reports: tables that line up, histories that go on, pictures that show what they say."""

import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cgd_jax.data import Dataset, Split
from cgd_jax.reports import plots, tables
from cgd_jax.reports.history import History, Progress, read_history
from cgd_jax.runtime import files


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
        again.add(3, {"loss": 0.2})
    assert [row["loss"] for row in read_history(path)] == [0.5, 0.25, 0.2]
    assert read_history(tmp_path / "none.csv") == []


def test_late_steps_are_not_rounded(tmp_path):
    with History(tmp_path, 0) as history:
        history.add(1234567, {"loss": 1 / 3})
    assert read_history(tmp_path / "history.csv") == [{"step": 1234567, "loss": 0.333333}]


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


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        files.write_json(path, {"a": 2})
    assert '"a": 1' in path.read_text()


def test_frames_tell_right_from_wrong(tmp_path):
    dataset = Dataset(split_of([9]), split_of([1, 2]), split_of([2, 1, 3]))
    path = tmp_path / "retrievals.png"
    plots.plot_retrievals(
        path, dataset, np.array([1, 0]), np.array([[0, 1, 2], [2, 0, 1]]), "title"
    )
    picture = np.asarray(Image.open(path))
    green = np.array([int(plots.GREEN[i : i + 2], 16) for i in (1, 3, 5)])
    red = np.array([int(plots.RED[i : i + 2], 16) for i in (1, 3, 5)])
    step, cell = 114, 106  # a place in the grid; a picture with its frame
    for line, colors in enumerate([(green, red, red), (red, red, green)]):
        for i, color in enumerate(colors, 1):
            corner = picture[80 + line * step, 16 + i * step]
            np.testing.assert_array_equal(corner, color)
    # The pictures themselves: the query of label 2, its first neighbour of label 2.
    centre = 80 + cell // 2
    assert np.all(picture[centre, 8 + cell // 2] == 20)
    assert np.all(picture[centre, 16 + step + cell // 2] == 20)
    assert np.all(picture[centre, 16 + 2 * step + cell // 2] == 10)


def test_failing_queries_get_a_part_of_their_own(tmp_path):
    query = split_of([1] * 20)
    gallery = split_of([1, 2])
    nearest = np.array([[0]] * 19 + [[1]])
    heights = []
    for neighbours in (np.zeros((20, 1), int), nearest):
        path = tmp_path / "picture.png"
        plots.plot_retrievals(path, Dataset(query, query, gallery), np.arange(20), neighbours, "t")
        heights.append(Image.open(path).height)
    assert heights[1] - heights[0] == 40 + 114


def test_curves_are_drawn_with_and_without_evaluations(tmp_path):
    rows = [
        {"step": 1.0, "loss": 2.0, "ranking_loss": 0.0, "classification_loss": 2.0},
        {"step": 2.0, "loss": 1.0, "recall@1": 0.5, "recall@2": 0.7},
    ]
    for name, some in [("all", rows), ("first", rows[:1]), ("none", [])]:
        plots.plot_curves(tmp_path / f"{name}.png", some, {"raw pixels": {"recall@1": 0.3}})
        assert Image.open(tmp_path / f"{name}.png").size == (1320, 480)


def test_progress_prints_lines_where_there_is_no_terminal(capsys):
    with Progress(10, 200) as progress:
        progress.update()
        progress.log(20, {"loss": 0.5, "images_per_second": 99.6, "recall@1": 0.5, "accuracy": 1})
    line = capsys.readouterr().out
    assert line.startswith("step  20/200  loss 0.5000  images/s 100  R@1 50.00 %")
    assert line.rstrip().endswith("left")
