"""The numbers of a run by step: history.csv, TensorBoard, the progress bar."""

import csv
import time
from collections.abc import Callable
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from cgd_jax.reports.tables import metric_name, write_csv
from cgd_jax.runtime import console, files


class History:
    """One row for each step that was logged or evaluated: history.csv, and TensorBoard's events."""

    def __init__(
        self,
        folder: Path,
        step: int,
        track: Callable[[int, dict[str, float]], object] = lambda step, values: None,
    ):
        """Opens the history in a run's folder, without its rows later than `step`."""
        self.track = track
        self.path = folder / "history.csv"
        self.rows = [row for row in read_history(self.path) if row["step"] <= step]
        self._write()
        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        # tensorboardX's SummaryWriter has a thread that dies of a full disk, and the run hangs.
        self.events = EventsWriter(str(events / "events"))
        # Makes TensorBoard forget what was written after this step.
        start = SessionLog(status=SessionLog.START)
        self.events.write_event(Event(step=step + 1, session_log=start))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with files.warn_on_write_error("The end of TensorBoard's events"):
            self.events.close()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds values to the row of a step; the columns are those that any row has a value for."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        self.rows[-1].update(values)
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        with files.warn_on_write_error(f"The row of step {step}"):
            self.events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            self.events.flush()
        with files.warn_on_write_error(self.path.name):
            self._write()
        self.track(step, values)

    def _write(self) -> None:
        rows = [
            {name: f"{value:.6g}" for name, value in row.items()} | {"step": int(row["step"])}
            for row in self.rows
        ]
        write_csv(self.path, rows)


def read_history(path: str | Path) -> list[dict[str, float]]:
    """Returns the rows of a history.csv; none if the file does not exist."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {column: float(value) for column, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


class Progress(tqdm):
    """A progress bar of the training steps, and log lines where the output is no terminal."""

    def __init__(self, step: int, steps: int):
        look = {"desc": "training", "unit": " step", "leave": False, **console.bar_width()}
        super().__init__(initial=step, total=steps, disable=None, smoothing=0.1, **look)
        self.first, self.steps, self.started, self.said = step, steps, time.time(), step

    def log(self, step: int, row: dict[str, float]) -> None:
        """Shows a row of the history: losses in the bar and as a line, recalls as a line.

        Where there is a bar, ten lines of losses stay, and those of evaluated steps.
        """
        losses = [f"{label} {row[key]:.3f}" for key, label in _LOSSES.items() if key in row]
        if "images_per_second" in row:
            losses.append(f"{row['images_per_second']:.0f} img/s")
        recalls = [f"{metric_name(k)} {100 * row[k]:.2f} %" for k in row if k.startswith("recall@")]
        if not self.disable:
            self.set_postfix_str(", ".join(losses if console.columns() > 110 else losses[:1]))
        elif losses:
            left = (time.time() - self.started) / (step - self.first) * (self.steps - step)
            minutes, seconds = divmod(round(left), 60)
            losses.append(f"{minutes}:{seconds:02} left")
        stays = self.disable or bool(recalls) or step - self.said >= self.steps / 10
        for parts in (losses if stays else [], recalls):
            if parts:
                self.said = step
                console.log(f"step {step:{len(str(self.steps))}}/{self.steps}  {'  '.join(parts)}")


_LOSSES = {"loss": "loss", "ranking_loss": "ranking", "classification_loss": "class"}
