"""What a training stage says while it runs: metrics on disk, in TensorBoard and on the screen.

    with MetricWriter(workdir, "extend", resume_step=step) as writer, Progress("extend", 100, start=step) as bar:
        writer.write(step, {"loss": 2.5}, {"tokens_per_second": 1e4})
        bar.update(step, loss=2.5, tokens_per_second=1e4)

`metrics.jsonl` holds what the config and the seed determine and nothing else, so that two runs can be compared
byte by byte; times stand in `timings.jsonl`. Both go to TensorBoard, a run for each stage.
"""

import importlib
import json
import math
import numbers
import os
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import rich.console
import rich.progress

from lrjax.errors import UserError

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"


class MetricWriter:
    """Appends the rows of one stage; only process 0 of a run writes.

    A stage that goes on from a checkpoint at `resume_step` writes its later steps again, so their old rows are
    dropped; with None or 0 the stage starts anew. Rows of other stages stay. Every row is flushed: a kill costs
    at most the row that is being written, and its half line is dropped by the next writer.
    """

    def __init__(self, workdir, stage: str, resume_step: int | None = None):
        self.stage = stage
        self._files = None
        if jax.process_index() != 0:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        step = resume_step or 0
        paths = (workdir / METRICS_FILE, workdir / TIMINGS_FILE)
        for path in paths:
            _drop_rows_after(path, stage, step)
        self._files = tuple(open(path, "a", encoding="utf-8") for path in paths)  # noqa: SIM115
        self._board = _tensorboardx().SummaryWriter(
            str(workdir / "tensorboard" / stage), purge_step=step + 1
        )

    def write(
        self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float] | None = None
    ) -> None:
        """Records a step.

        Args:
            step: number of the step, from 1.
            metrics: what the config and the seed determine.
            timings: what differs from run to run: seconds, tokens per second, memory.

        Raises:
            UserError: a value is not finite.
        """
        if self._files is None:
            return
        where = {"stage": self.stage, "step": int(step)}
        rows = [where | self._numbers(step, values) for values in (metrics, timings or {})]
        for file, row in zip(self._files, rows, strict=True):
            if len(row) > len(where):
                file.write(json.dumps(row) + "\n")
                file.flush()
        for row in rows:
            for name in row.keys() - where.keys():
                self._board.add_scalar(name, row[name], step)
        self._board.flush()

    def _numbers(self, step: int, values: Mapping[str, float]) -> dict:
        row = {}
        for name in sorted(values):
            value = values[name]
            row[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
            if not math.isfinite(row[name]):
                raise UserError(
                    f"{self.stage}: {name} is {row[name]} at step {step}; allowed: finite numbers"
                )
        return row

    def close(self) -> None:
        if self._files is not None:
            for file in self._files:
                file.close()
            self._board.close()
            self._files = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def read_rows(path) -> list[dict]:
    """The rows of a JSONL file that `MetricWriter` wrote, [] without the file, without a half-written last line.

    Raises:
        UserError: another line is not a row; it is named.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
                raise ValueError("no stage and step")
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer was killed here
                break
            raise UserError(
                f"{path}:{number}: {line[:80]!r}; allowed: a JSON object with stage and step"
            ) from error
        rows.append(row)
    return rows


def _drop_rows_after(path: pathlib.Path, stage: str, step: int) -> None:
    """Removes the rows of `stage` past `step`; the file is replaced whole or not at all."""
    kept = [row for row in read_rows(path) if row["stage"] != stage or row["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


class Progress:
    """A bar with loss, tokens per second and time left; about ten plain lines where there is no terminal.

    Args:
        stage: what runs, shown in front.
        total_steps: of the stage.
        start: the step it goes on from.
        console: a `rich.console.Console`; standard output when None.
    """

    def __init__(self, stage: str, total_steps: int, start: int = 0, console=None):
        self.stage, self.total_steps, self.start = stage, total_steps, start
        self._console = console or rich.console.Console()
        self._since = time.perf_counter()
        self._told = 10 * start // max(total_steps, 1)
        self._quiet = jax.process_index() != 0
        self._bar = None
        if self._console.is_terminal and not self._quiet:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[numbers]}", markup=False),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(stage, total=total_steps, completed=start, numbers="")

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` is done."""
        numbers_shown = f"loss {loss:.4f} · {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers_shown)
            return
        tenth = 10 * step // max(self.total_steps, 1)
        if self._quiet or (tenth <= self._told and step < self.total_steps):
            return
        self._told = tenth
        seconds_a_step = (time.perf_counter() - self._since) / max(step - self.start, 1)
        left = round(seconds_a_step * (self.total_steps - step))
        self._console.print(
            f"{self.stage}: step {step} of {self.total_steps} · {numbers_shown} · "
            f"{left // 60}:{left % 60:02d} left",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip

    def __enter__(self):
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception):
        if self._bar is not None:
            self._bar.stop()


def _tensorboardx():
    """tensorboardX without torch, which it would import for tensors that it is never given here: a second, 200 MB."""
    if "torch" in sys.modules:
        return importlib.import_module("tensorboardX")
    sys.modules["torch"] = None  # to import it is an ImportError, as where it is not installed
    try:
        return importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]
