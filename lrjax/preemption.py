"""Being stopped: SIGTERM, or a platform's notice, ends a run at the next step with its state saved and exit code 0.

    with preemption.watch() as stop:
        while step < steps:
            ...
            if stop.requested(step): save; raise preemption.Preempted(...)

One process catches SIGTERM itself. Several have `jax.distributed`'s preemption service do it: they agree on a step, so
that all save the same one. The time from the signal to the end is one or two steps and the writing of a checkpoint.
"""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run was told to stop, and its state is on disk; the same command goes on."""


class _Notice:
    def __init__(self):
        self.came = False

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process of a run is told the same."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.came


@contextlib.contextmanager
def watch():
    """Makes SIGTERM a notice that `requested` tells of, in place of an end at once."""
    notice = _Notice()
    # jax.distributed has a handler of its own; only the main thread may set one.
    mine = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def receive(signum, frame):
        del signum, frame
        notice.came = True

    before = signal.signal(signal.SIGTERM, receive) if mine else None
    try:
        yield notice
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)
