"""Runs a program that a model wrote: no network, little time and memory, an empty folder of its own.

    passed = run_program("assert 1 + 1 == 2")

Nothing in lrjax calls this unless it is asked for by name (`--run_code`). The program runs as `python -I` in a new
session under `unshare` (Linux): without a network, in a process namespace that dies with it. Where that is not to be
had it is refused, not run. It still runs as the user and can read what the user can read: for programs of a model,
not of an attacker.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from lrjax.errors import UserError

_UNSHARE = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
# Set inside of the process: a function run between fork and exec is not safe where there are threads.
_LIMITS = """
import resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
for what, limit in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 1 << 20),
    (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(what, (limit, limit))
source = open("program.py", encoding="utf-8").read()
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
"""


def run_program(source: str, *, seconds: int = 5, memory_bytes: int = 1 << 30) -> bool:
    """Whether a Python program ends by itself and without an error.

    Args:
      seconds: of the clock, and of the processor.
      memory_bytes: of address space.

    Raises:
      UserError: this machine cannot cut the network off.
    """
    check_available()
    with tempfile.TemporaryDirectory(prefix="lrjax-program-") as folder:
        with open(os.path.join(folder, "program.py"), "w", encoding="utf-8") as file:
            file.write(source)
        command = [*_UNSHARE, sys.executable, "-I", "-c", _LIMITS, str(seconds), str(memory_bytes)]
        process = subprocess.Popen(
            command, cwd=folder, env={"PATH": "/usr/bin:/bin"}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@functools.cache
def check_available() -> None:
    """Raises `UserError` where a program cannot be kept off the network."""
    if shutil.which("unshare") is None:
        problem = "unshare (util-linux) is not installed"
    else:
        done = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        problem = " ".join(done.stderr.split()) or f"unshare ends with {done.returncode}"
    raise UserError(
        f"--run_code: programs cannot be kept off the network here ({problem}); "
        "allowed: a Linux machine with user namespaces"
    )
