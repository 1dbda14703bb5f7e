"""Metrics on disk: deterministic bytes, and a resumed stage leaves the file of an uninterrupted one."""

import io
import json
import re

import numpy as np
import pytest
import rich.console

from lrjax.errors import UserError
from lrjax.reporting.metrics import METRICS_FILE, TIMINGS_FILE, MetricWriter, Progress, read_rows


def run_steps(workdir, stage, steps, resume_step=None, speed=1.0):
    with MetricWriter(workdir, stage, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(
                step,
                {"loss": np.float32(1) / np.float32(step), "grad_norm": 0.1 * step},
                {"tokens_per_second": speed},
            )


def test_rows_have_fixed_bytes_and_no_timings(tmp_path):
    run_steps(tmp_path / "a", "extend", [1, 2, 3], speed=10.0)
    run_steps(tmp_path / "b", "extend", [1, 2, 3], speed=20.0)
    metrics = (tmp_path / "a" / METRICS_FILE).read_bytes()
    assert metrics == (tmp_path / "b" / METRICS_FILE).read_bytes()
    first = metrics.splitlines()[0].decode()
    assert first == '{"stage": "extend", "step": 1, "grad_norm": 0.1, "loss": 1.0}'
    timings = read_rows(tmp_path / "b" / TIMINGS_FILE)
    assert timings[2] == {"stage": "extend", "step": 3, "tokens_per_second": 20.0}


def test_floats_survive_to_the_last_digit(tmp_path):
    value = float(np.float32(1) / np.float32(3))
    run_steps(tmp_path, "extend", [3])
    assert read_rows(tmp_path / METRICS_FILE)[0]["loss"] == value


@pytest.mark.parametrize("tail", [b"", b'{"stage": "extend", "st', b'{"stage": "extend"', b"12"])
def test_resumed_run_writes_the_bytes_of_an_uninterrupted_one(tmp_path, tail):
    for workdir in (tmp_path / "whole", tmp_path / "killed"):
        run_steps(workdir, "pretrain", [1, 2])
    run_steps(tmp_path / "whole", "extend", range(1, 7))
    run_steps(tmp_path / "killed", "extend", range(1, 6))
    with open(tmp_path / "killed" / METRICS_FILE, "ab") as file:
        file.write(tail)  # SIGKILL in the middle of a row
    # The newest whole checkpoint is of step 3.
    run_steps(tmp_path / "killed", "extend", range(4, 7), resume_step=3)
    for name in (METRICS_FILE, TIMINGS_FILE):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_restart_from_nothing_drops_only_the_own_stage(tmp_path):
    run_steps(tmp_path, "probe", [1, 2])
    run_steps(tmp_path, "extend", [1, 2])
    run_steps(tmp_path, "extend", [1])
    rows = [(row["stage"], row["step"]) for row in read_rows(tmp_path / METRICS_FILE)]
    assert rows == [("probe", 1), ("probe", 2), ("extend", 1)]


def test_rows_are_on_disk_before_the_writer_closes(tmp_path):
    writer = MetricWriter(tmp_path, "extend")
    writer.write(1, {"loss": 2.0})
    assert len(read_rows(tmp_path / METRICS_FILE)) == 1
    assert read_rows(tmp_path / TIMINGS_FILE) == []
    writer.close()


def test_tensorboard_gets_metrics_and_timings(tmp_path):
    run_steps(tmp_path, "extend", [1])
    (events,) = (tmp_path / "tensorboard" / "extend").glob("events.*")
    content = events.read_bytes()
    assert b"loss" in content and b"tokens_per_second" in content


def test_broken_line_in_the_middle_is_named(tmp_path):
    row = json.dumps({"stage": "extend", "step": 1})
    (tmp_path / METRICS_FILE).write_text(f"{row}\nbroken\n{row}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        MetricWriter(tmp_path, "extend")


def test_value_that_is_not_finite_is_named(tmp_path):
    with (
        MetricWriter(tmp_path, "extend") as writer,
        pytest.raises(UserError, match="extend: grad_norm is nan at step 7"),
    ):
        writer.write(7, {"loss": 1.0, "grad_norm": float("nan")})
    assert read_rows(tmp_path / METRICS_FILE) == []


def test_progress_without_a_terminal_is_about_ten_lines():
    stream = io.StringIO()
    console = rich.console.Console(file=stream, force_terminal=False, width=40)
    with Progress("extend", 50, console=console) as progress:
        for step in range(1, 51):
            progress.update(step, loss=2.0, tokens_per_second=12345.6)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert re.fullmatch(
        r"extend: step 50 of 50 · loss 2\.0000 · 12,346 tokens/s · 0:00 left", lines[-1]
    )


def test_progress_on_a_terminal_shows_loss_and_speed():
    stream = io.StringIO()
    console = rich.console.Console(file=stream, force_terminal=True, width=120)
    with Progress("extend", 4, start=2, console=console) as progress:
        progress.update(3, loss=1.5, tokens_per_second=1000)
    text = stream.getvalue()
    assert "loss 1.5000" in text and "1,000 tokens/s" in text and "3/4" in text
