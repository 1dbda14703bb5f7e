"""Several processes as one run: through all stages, killed and stopped on the way, the same as one process."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from conftest import COMPILE_SOON

from lrjax import multihost
from lrjax.reporting.metrics import read_rows

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = [
    "--config=configs/tiny.py:quick",
    "--config.mesh.fsdp=2",
    "--config.mesh.context=2",
    "--config.row_multiple=4",
    # Few and small steps, and one checkpoint to evaluate: most of a run this short is compiling in any case.
    "--config.pretrain.a_periodic.steps=2",
    "--config.pretrain.b_language.steps=2",
    "--config.probe.steps=2",
    "--config.extend.steps=4",
    "--config.replay.steps=2",
    "--config.extend.global_batch_size=4",
    "--config.replay.global_batch_size=4",
    "--config.evaluate.checkpoints=('merged',)",
    "--config.evaluate.niah.lengths=(512,)",
    "--config.evaluate.perplexity.source=",
    "--config.merge.curve=()",
    "--config.evaluate.during.every=0",
    "--config.evaluate.during.tasks=()",
]


def start(workdir, processes, devices, log, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_SOON, "DEVICES": str(devices),
        "PORT": str(port), "PYTHON": sys.executable,
    }  # fmt: skip
    return subprocess.Popen(
        ["launch/local_processes.sh", str(processes), *FLAGS, *flags, f"--workdir={workdir}"],
        cwd=ROOT, env=environment, stdout=log, stderr=log,
    )  # fmt: skip


def finish(process, log):
    code = process.wait(timeout=900)
    assert code == 0, pathlib.Path(log.name).read_text()[-3000:]


def wait_for(row, workdir, process):
    """Until the metrics have a row."""
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 900
    while not (metrics.exists() and row in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def kill_second(process):
    """SIGKILL to process 1 of those that the script started."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children.split()[1]), signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_killed_and_stopped_and_started_again_are_one_process(tmp_path):
    """Two processes of two devices each: fsdp over the processes, the sequence within them.

    Both begin with the base that the one process pretrained. Checkpoints are of steps 2 and 4.
    """
    workdir = tmp_path / "two"
    base = f"--config.model.source={tmp_path / 'one' / 'checkpoints' / 'base'}"
    with open(tmp_path / "log", "w") as log:
        finish(start(tmp_path / "one", 1, 4, log), log)
        two = start(workdir, 2, 2, log, base)
        wait_for('"stage": "contiguous", "step": 3', workdir, two)
        kill_second(two)
        assert two.wait(timeout=30) == 128 + signal.SIGKILL
        two = start(workdir, 2, 2, log, base)
        wait_for('"stage": "longrecipe", "step": 1', workdir, two)
        two.send_signal(signal.SIGTERM)
        finish(two, log)
        assert not (workdir / "stages" / "extend.json").exists()
        finish(start(workdir, 2, 2, log, base), log)
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    rows[0] = [row for row in rows[0] if not row["stage"].startswith("pretrain")]
    assert [(r["stage"], r["step"]) for r in rows[1]] == [(r["stage"], r["step"]) for r in rows[0]]
    for mine, theirs in zip(
        *rows, strict=True
    ):  # sums over processes in another order: measured 8e-7
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), mine
    summaries = [
        json.loads((tmp_path / name / "report" / "summary.json").read_text())
        for name in ("one", "two")
    ]
    assert list(summaries[0]["stages"]) == list(summaries[1]["stages"])
    assert summaries[0]["evaluation"].keys() == summaries[1]["evaluation"].keys()
    for name, tasks in summaries[0]["evaluation"].items():
        assert tasks["short"] == pytest.approx(summaries[1]["evaluation"][name]["short"], rel=1e-5)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, ""),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ""),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "3"}, "SLURM"),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_the_scheduler_is_known_by_its_variables(environment, found):
    assert multihost.scheduler(environment) == found


def test_a_process_without_its_number_is_a_mistake(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "lrjax.main", *FLAGS, f"--workdir={tmp_path}", "--num_processes=2"],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "--coordinator, --process_id: missing" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "environment", "arguments", "expected"),
    [
        ("tpu_vm.sh", {"SPOT": "1"}, ["create"], "--accelerator-type=v5p-32"),
        ("tpu_vm.sh", {"WORKDIR": "gs://b/run"}, ["run", "--stages=extend"], "--stages=extend"),
        ("xpk.sh", {"WORKDIR": "gs://b/run", "CLUSTER": "c", "SLICES": "2"}, [], "mesh.data=2"),
        ("slurm.sh", {"WORKDIR": "/shared/run"}, [], "--workdir=/shared/run"),
    ],
)
def test_launch_scripts_print_their_commands(script, environment, arguments, expected):
    result = subprocess.run(
        [ROOT / "launch" / script, *arguments],
        cwd=ROOT, env={**os.environ, "DRY_RUN": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def test_kubernetes_objects_are_whole():
    service, job = yaml.safe_load_all((ROOT / "launch" / "gke_gpu.yaml").read_text())
    assert service["spec"]["clusterIP"] == "None"
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
    (container,) = pod["containers"]
    assert f"--num_processes={job['spec']['completions']}" in container["args"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
