"""Runs functions one at a time, each in a process of its own, and collects what they measured.

    results = run("benchmarks.train_step", ["lrjax", "torch"], ["--length=2048"])

starts `python -m benchmarks.train_step --contender=NAME --length=2048` for each; the process ends with
`report(seconds=..., ...)`, whose values come back together with the process's peak of resident memory. So no
contender inherits another's memory, threads or compiled code.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time

_MARK = "RESULT "


def run(module: str, names: list[str], flags: list[str]) -> dict[str, dict]:
    """Results by contender; one that fails (or is killed for its memory) has the key "error"."""
    results = {}
    for name in names:
        command = [sys.executable, "-m", module, f"--contender={name}", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if done.returncode or not lines:
            results[name] = {"error": f"exit code {done.returncode}"}
        else:
            results[name] = json.loads(lines[-1].removeprefix(_MARK))
        print(f"{name}: {results[name]}", file=sys.stderr)
    return results


def report(**values) -> None:
    """Ends a contender: its values and its peak resident memory go to the process that started it."""
    values["peak_bytes"] = peak_bytes()
    print(_MARK + json.dumps(values))


def peak_bytes() -> int:
    """The most memory this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_steps(step, count: int) -> dict[str, float]:
    """Calls `step` once to warm up, then `count` times; seconds of the median and of the best call."""
    step()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"median_seconds": statistics.median(seconds), "best_seconds": min(seconds)}


def machine() -> str:
    """The processor's name and how many of its cores this process may use."""
    import os

    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
