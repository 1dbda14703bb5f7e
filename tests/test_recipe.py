"""The whole recipe on the tiny config: every stage, stopping and going on, and what a user gets wrong."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import COMPILE_SOON

from lrjax.checkpoints import streaming

ROOT = pathlib.Path(__file__).parent.parent
# Not the eight fake devices of the other tests: a run as a user starts it.
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_SOON}
COMPILE_WELL = {
    **ENVIRONMENT,
    "XLA_FLAGS": "",
}  # a real model: running it takes longer than compiling
STAGES = ["import", "probe", "score", "analyse", "select", "extend", "replay", "merge", "evaluate"]


def command(workdir, *flags, config="configs/tiny.py:quick"):
    return [
        sys.executable,
        "-m",
        "lrjax.main",
        f"--config={config}",
        f"--workdir={workdir}",
        *flags,
    ]


def run(workdir, *flags, environment=ENVIRONMENT, **kwargs):
    return subprocess.run(
        command(workdir, *flags, **kwargs),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    result = run(workdir)
    assert result.returncode == 0, result.stderr[-2000:]
    return workdir


@pytest.mark.slow
def test_every_stage_leaves_its_output(finished):
    summary = json.loads((finished / "report" / "summary.json").read_text())
    assert list(summary["stages"]) == STAGES
    names = [
        "base",
        "contiguous",
        "longrecipe",
        "longrecipe_score",
        "raised_theta",
        "replayed",
        "merged",
    ]
    assert sorted(summary["evaluation"]) == sorted(names)
    for tasks in summary["evaluation"].values():
        assert set(tasks["niah"]) == {"64", "512"}
        assert set(tasks["short"]) == {"facts", "dialect", "copy"}
    assert summary["stages"]["extend"]["tokens"] == 3 * 6 * 16 * 154
    assert (finished / "report" / "index.html").stat().st_size > 100_000
    # config.evaluate.during: needles every 3 steps of one method.
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    asked = [(row["stage"], row["step"]) for row in rows if "evaluation/niah/512" in row]
    assert asked == [("longrecipe", 3), ("longrecipe", 6)]
    last = json.loads((finished / "evaluation/longrecipe/steps/6/niah.json").read_text())
    assert last == json.loads((finished / "evaluation/longrecipe/niah.json").read_text())
    perplexity = json.loads((finished / "evaluation/base/perplexity.json").read_text())
    assert perplexity["sliding_window"]["tokens"] == 4 * 511 and "longppl" in perplexity["longppl"]


@pytest.mark.slow
def test_a_second_call_does_nothing_again(finished):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    result = run(finished)
    assert result.returncode == 0
    assert "import: complete" in result.stderr
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_workdir_of_another_config_is_refused(finished):
    result = run(finished, "--config.seed=7")
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert "belongs to another config; it differs in seed (0 there, 7 here)" in line


@pytest.mark.slow
def test_killed_in_extend_and_started_again_gives_the_same_metrics(finished, tmp_path):
    """SIGKILL after the first rows of a method; then the same command."""
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = workdir / "metrics.jsonl"
    deadline = time.time() + 300
    # Step 3 of 6: the checkpoint of step 2 is there, or being written.
    wanted = ('"stage": "longrecipe", "step": 3', '"stage":"longrecipe","step":3')
    while not (metrics.exists() and any(text in metrics.read_text() for text in wanted)):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "stages" / "extend.json").exists()
    result = run(workdir, f"--stages={','.join(STAGES[:-1])}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert metrics.read_bytes() == (finished / "metrics.jsonl").read_bytes()
    # The same bits in every model, and so in everything that is evaluated afterwards.
    for name in ("contiguous", "longrecipe", "longrecipe_score", "replayed", "merged"):
        mine, theirs = (
            streaming.open_source(run / "checkpoints" / name) for run in (workdir, finished)
        )
        assert mine.tensors == theirs.tensors
        for tensor, (shape, _) in mine.tensors.items():
            size = math.prod(shape)
            np.testing.assert_array_equal(
                mine.read(tensor, 0, size),
                theirs.read(tensor, 0, size),
                err_msg=f"{name}: {tensor}",
            )


@pytest.mark.slow
def test_analyse_says_what_selections_keep(finished):
    flags = ["--chunk=16", "--documents=12", "--lds_documents=1", "--methods=anchor,first"]
    flags += ["--ablation_documents=2", "--part=16", "--model=probe"]
    command = [sys.executable, "-m", "lrjax.analyse", str(finished), *flags]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((finished / "analysis" / "selections.json").read_text())
    assert result.stdout.strip() == (finished / "analysis" / "selections.md").read_text().strip()
    assert set(found["scores"]) == {"logit", "absolute", "centred", "logprob"}
    for row in found["methods"].values():
        kept, with_source = row["kept"][0], row["with_source"][0]
        assert 0 <= with_source <= kept <= 1 and row["kept"][1] <= kept <= row["kept"][2]
        assert row["references"] > 12 and row["kept_share"] == pytest.approx(154 / 512)
    # What stands at the start of a document has its source before it.
    first = found["methods"]["first"]
    assert first["with_source"] == first["kept"]
    # The same by what the model makes use of: a token is kept or not, the whole has both.
    used = found["ablation"]
    assert used["documents"] == 2 and 0 <= used["references"][0] <= 1
    for row in found["methods"].values():
        if row["ablation"]["references"]:
            assert row["ablation"]["with_source"][0] <= row["ablation"]["kept"][0] <= 1
    assert "hidden parts of 16 tokens" in result.stdout
    kept = finished / "analysis" / "ablation.jsonl"
    before = kept.read_bytes()
    assert before.count(b"\n") == 2
    again = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.stdout == result.stdout and kept.read_bytes() == before


@pytest.mark.slow
def test_smollm2_passes_through_every_stage(tmp_path):
    config = "configs/smollm2_135m.py:quick"
    result = run(tmp_path / "run", config=config, environment=COMPILE_WELL)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "report" / "summary.json").read_text())
    assert list(summary["stages"]) == STAGES
    assert set(summary["evaluation"]) == {"merged"}
    result = json.loads((tmp_path / "run/evaluation/merged/vt.json").read_text())
    assert summary["evaluation"]["merged"]["vt"] == {"1024": result["1024"]["score"]}
    assert "vt" in (tmp_path / "run/report/index.html").read_text()


MISTAKES = [
    (["--config.nonsense=1"], "configs/tiny.py", "nonsense"),
    ([], "configs/tiny.py:nonsense", "variant 'nonsense'; allowed: none, quick"),
    ([], "configs/none.py", "configs/none.py"),
    (["--stages=cook"], "configs/tiny.py", "unknown stage 'cook'; allowed: import, probe"),
    (["--config.train_length=600"], "configs/tiny.py", "train_length 600 is over"),
    (["--config.model.source=/nowhere"], "configs/tiny.py", "/nowhere: no checkpoint there"),
    (["--config.data.long=nowhere"], "configs/tiny.py:quick", "data source 'nowhere' is not"),
]
# Imports the program once; each mistake is made in a copy of the process. Arguments: command lines as JSON, a folder.
MAKE_MISTAKES = """
import json, os, sys
from lrjax import main
from lrjax.command import run_program
for number, flags in enumerate(json.loads(sys.argv[1])):
    if not os.fork():
        os.dup2(os.open(f"{sys.argv[2]}/{number}.stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["lrjax.main", *flags]
        run_program(main.main)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Exit code and standard error of every mistake."""
    folder = tmp_path_factory.mktemp("mistakes")
    lines = [
        command(folder / f"run-{number}", *flags, config=config)[3:]
        for number, (flags, config, _) in enumerate(MISTAKES)
    ]
    done = subprocess.run(
        [sys.executable, "-c", MAKE_MISTAKES, json.dumps(lines), str(folder)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    codes = map(int, done.stdout.split())
    return [(code, (folder / f"{i}.stderr").read_text()) for i, code in enumerate(codes)]


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[message for *_, message in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(told, number):
    code, stderr = told[number]
    lines = [line for line in stderr.strip().splitlines() if " recipe.py:" not in line]
    assert code == 2, stderr
    assert MISTAKES[number][2] in lines[-1]
    assert "Traceback" not in stderr
