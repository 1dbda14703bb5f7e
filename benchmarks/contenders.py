"""Runs functions one at a time, each in a process of its own, and collects what they measured.

    results = run("benchmarks.train_step", ["lrjax", "torch"], ["--length=2048"])

starts `python -m benchmarks.train_step --contender=NAME --length=2048` for each; the process ends with
`report(seconds=..., ...)`, whose values come back together with the process's peak of resident memory. So no
contender inherits another's memory, threads or compiled code.

On the CPU, unless JAX_PLATFORMS says otherwise: with cuda every contender, torch's too, runs on the first GPU, and
memory is what its arrays and its libraries' scratch space took of the device at the most.
"""

import json
import os
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
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, env={"JAX_PLATFORMS": "cpu"} | os.environ
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if done.returncode or not lines:
            results[name] = {"error": f"exit code {done.returncode}"}
        else:
            results[name] = json.loads(lines[-1].removeprefix(_MARK))
        print(f"{name}: {results[name]}", file=sys.stderr)
    return results


def report(**values) -> None:
    """Ends a contender: its values and its peak of memory go to the process that started it."""
    values["peak_bytes"] = peak_bytes()
    print(_MARK + json.dumps(values))


def on_gpu() -> bool:
    return "cuda" in os.environ.get("JAX_PLATFORMS", "")


def torch_device() -> str:
    """For torch's contenders; which call `finish` before they are timed to have done something."""
    return "cuda" if on_gpu() else "cpu"


def finish() -> None:
    """Waits for what torch has on its way on the GPU."""
    if on_gpu():
        import torch

        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The most memory this process has had so far: resident, or on the GPU in arrays."""
    if on_gpu():
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated()
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
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
    """The processor's name and how many of its cores this process may use, and the GPU's."""
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    if not on_gpu():
        return name
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    card = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return f"{card}; {name}"
