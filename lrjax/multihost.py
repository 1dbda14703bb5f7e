"""Several processes as one run: `start()` before the first use of JAX's devices.

Explicitly, with the flags --coordinator=HOST:PORT --num_processes=N --process_id=I or the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; or from what Cloud TPU, SLURM or Kubernetes (GKE) put
into the environment, which `jax.distributed.initialize()` reads. A single process needs nothing.
"""

import os
import platform

import jax
from absl import flags, logging

from lrjax.errors import UserError

_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, for several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0.")


def start() -> None:
    """Connects the processes of a run, if it has several.

    Raises:
        UserError: flags or variables of which some are missing or cannot be.
    """
    explicit = {
        "coordinator": _COORDINATOR.value or os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
        "num_processes": _NUM_PROCESSES.value or _integer("JAX_NUM_PROCESSES", 0),
        "process_id": _PROCESS_ID.value
        if _PROCESS_ID.value >= 0
        else _integer("JAX_PROCESS_ID", -1),
    }
    unset = {"coordinator": "", "num_processes": 0, "process_id": -1}
    missing = [f"--{name}" for name, value in explicit.items() if value == unset[name]]
    if not missing:
        if not explicit["process_id"] < explicit["num_processes"]:
            raise UserError(
                f"--process_id {explicit['process_id']}: allowed: 0 to {explicit['num_processes'] - 1}"
            )
        jax.distributed.initialize(
            explicit["coordinator"], explicit["num_processes"], explicit["process_id"]
        )
    elif len(missing) < 3:
        raise UserError(f"{', '.join(missing)}: missing; several processes need all three flags")
    elif found := scheduler(os.environ):
        logging.info("several processes, as %s says", found)
        jax.distributed.initialize()
    if jax.process_count() > 1:
        logging.info(
            "process %d of %d on %s: %d of %d devices", jax.process_index(), jax.process_count(),
            platform.node(), jax.local_device_count(), jax.device_count(),
        )  # fmt: skip


def scheduler(environment) -> str:
    """The name of what started several processes, or "" for one by itself."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return "SLURM"
    if len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return "Cloud TPU"
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "Cloud TPU (several slices)"
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return "Kubernetes"
    return ""


def _integer(variable: str, default: int) -> int:
    value = os.environ.get(variable, "")
    if value and not value.isdigit():
        raise UserError(f"{variable}={value!r}: allowed: a number")
    return int(value) if value else default
