"""Where figures come from: the commit and the machine of every run, kept in its workdir.

note(workdir)                     # WORKDIR/provenance.json: [{"commit", "machine", "devices"}, ...]
run_of(checkpoint)                # what run left it: {"config", "seed", "made_by"}
"""

import os
import pathlib
import platform
import subprocess

import jax

from lrjax import workdir as wd

FILE = "provenance.json"


def note(workdir) -> None:
    """Adds the state of the code and the machine that go on with a run, if they are new to it."""
    if jax.process_index() != 0:
        return
    found, new = notes(workdir), {"commit": commit(), "machine": machine(), "devices": devices()}
    if new not in found:
        wd.write_json(pathlib.Path(workdir) / FILE, [*found, new])


def notes(workdir) -> list[dict]:
    file = pathlib.Path(workdir) / FILE
    return wd.read_json(file) if file.is_file() else []


def run_of(checkpoint) -> dict | None:
    """Of WORKDIR/checkpoints/NAME the name of the run's config, its seed and its notes; None for other checkpoints."""
    folder = pathlib.Path(checkpoint).resolve().parent
    if folder.name != "checkpoints" or not (folder.parent / "config.json").is_file():
        return None
    config = wd.read_config(folder.parent)
    return {"config": config.name, "seed": config.seed, "made_by": notes(folder.parent)}


def commit() -> str:
    """The commit of the code that runs; with "+" where lrjax/ or configs/ differ from it."""

    def git(*arguments):
        root = str(pathlib.Path(__file__).parent.parent)
        try:
            return subprocess.run(
                ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (
            OSError,
            subprocess.CalledProcessError,
        ):  # no git, or no checkout: an installed lrjax
            return None

    head = git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return "unknown: not run from a git checkout"
    return head + ("+" if git("status", "--porcelain", "--", "lrjax", "configs") else "")


def machine() -> str:
    """Processor, cores and versions; no names."""
    model = platform.processor() or platform.machine()
    file = pathlib.Path("/proc/cpuinfo")
    if file.is_file():
        lines = [line for line in file.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{os.cpu_count()} cores of {model}, jax {jax.__version__}, Python {platform.python_version()}"


def devices() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
