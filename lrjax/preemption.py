"""Being stopped: SIGTERM, or a platform's notice, ends a run at the next step with its state saved and exit code 0.

    with preemption.watch() as stop:
        while step < steps:
            ...
            if stop.requested(): save; raise preemption.Preempted(...)

One process catches SIGTERM itself. Several have `jax.distributed`'s preemption service do it: they agree on a step, so
that all save the same one. The time from the signal to the end is one or two steps and the writing of a checkpoint.
"""

import contextlib
import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run was told to stop, and its state is on disk; the same command goes on."""


# Steps of this process over all stages: processes agree on a number, which must not start again with a stage.
_steps = itertools.count(1)


class _Notice:
    def __init__(self):
        self.came = False

    def requested(self) -> bool:
        """Whether to stop after this step; every process of a run is told the same. To be called once a step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_steps))
        return self.came


def end_on_notice() -> None:
    """Outside of `watch`, SIGTERM ends a single process by `Preempted`: the stage it is in will start again."""

    def receive(signum, frame):
        raise Preempted("stopped between training steps")

    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, receive)


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
