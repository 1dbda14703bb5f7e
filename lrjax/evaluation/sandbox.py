"""Runs a program that a model wrote: no network, little time and memory, nothing it can write but an empty folder.

    passed = run_program("assert 1 + 1 == 2")

Nothing in lrjax calls this unless it is asked for by name (`--run_code`). The program runs as `python -I` in a new
session under `unshare` (Linux 5.12 and later): without a network, in a process namespace that dies with it, all file
systems read-only but for a folder in memory. Where that is not to be had it is refused, not run. It still runs as the
user, and can read what the user can read and talk to Unix sockets and devices that the user can open: for programs of
a model, not of an attacker.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

from lrjax.errors import UserError

_UNSHARE = ("unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child")
# Set inside of the process: a function run between fork and exec is not safe where there are threads. Standard input
# is a token and the program. The token is told after the program's last line: an exit status of 0 is no proof, as
# exit(0) and os._exit(0) before the tests give it too.
_DRIVER = """
import ctypes, os, resource, sys

def main():
    seconds, memory = map(int, sys.argv[1:])
    token, _, source = sys.stdin.buffer.read().partition(b"\\n")
    libc, long = ctypes.CDLL(None, use_errno=True), ctypes.c_long

    def call(name, *arguments):
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    # mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, {MOUNT_ATTR_RDONLY}): it has this number on every architecture.
    call("syscall", long(442), long(-100), b"/", long(0x8000), (ctypes.c_uint64 * 4)(1), long(32))
    folder = os.getcwd()
    call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", long(0), b"size=16m")
    os.chdir(folder)
    # The rights to undo it are given up: PR_SET_NO_NEW_PRIVS, then no capability.
    call("prctl", 38, long(1), long(0), long(0), long(0))
    call("capset", (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
    for what, limit in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    process, getpid, write, report = os.getpid(), os.getpid, os.write, os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    if getpid() == process:  # not in a fork of it
        write(report, token)

main()
"""


def run_program(source: str, *, seconds: int = 5, memory_bytes: int = 1 << 30) -> bool:
    """Whether a Python program runs to its very end, without an error.

    One that ends itself before (exit(0), os._exit(0), SystemExit) does not pass. One that looks for the token in the
    frames of its caller could still lie.

    Args:
      seconds: of the clock, and of the processor.
      memory_bytes: of address space.

    Raises:
      UserError: this machine cannot cut the network off or make its files read-only.
    """
    check_available()
    return _run(source, seconds, memory_bytes)[0]


def _run(source: str, seconds: int, memory_bytes: int) -> tuple[bool, str]:
    """(whether the program ran to its end, what was said before it began: why it cannot be run)."""
    token = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="lrjax-program-") as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as report,
        tempfile.TemporaryFile() as errors,
    ):
        given.write(f"{token}\n{source}".encode())
        given.seek(0)
        process = subprocess.Popen(
            [*_UNSHARE, sys.executable, "-I", "-c", _DRIVER, str(seconds), str(memory_bytes)],
            cwd=folder, env={"PATH": "/usr/bin:/bin", "TMPDIR": folder}, start_new_session=True,
            stdin=given, stdout=report, stderr=errors,
        )  # fmt: skip
        try:
            ended = process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        report.seek(0)
        errors.seek(0)
        # One byte more than the token: what else the report holds is not from the driver.
        passed = ended and report.read(len(token) + 1) == token.encode()
        return passed, errors.read().decode(errors="replace")


@functools.cache
def check_available() -> None:
    """Raises `UserError` where a program cannot be kept off the network and the files."""
    if shutil.which("unshare") is None:
        problem = "unshare (util-linux) is not installed"
    else:
        passed, said = _run("", 60, 1 << 30)
        if passed:
            return
        problem = (said.strip().splitlines() or ["an empty program does not end"])[-1]
    raise UserError(
        f"--run_code: programs cannot be kept off the network and the files here ({problem}); "
        "allowed: Linux 5.12 and later with user namespaces"
    )
