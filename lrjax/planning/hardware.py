"""Devices that are not there: what XLA needs to compile for a TPU topology or for NVIDIA cards.

TPUs need the package libtpu (no TPU), GPUs jax-cuda12-plugin (no driver, no card): `requirements-plan.txt`. Programs
come out of the same compilers that a pod runs, which say what a program takes and refuse what does not fit.
"""

import importlib.util
import os

from lrjax.errors import UserError
from lrjax.planning.chips import chips_in, parse

# What XLA asks of an H100 SXM5 80GB (a `GpuTargetConfigProto`); figures read off a card.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(topology: str) -> list:
    """The devices of a topology such as "v5p:2x2x4" or "h100:8", to make a mesh of.

    Raises:
        UserError: a topology that is not known, or the compiler for it is not installed.
    """
    chip, shape = parse(topology)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jax.experimental import topologies

    package = "jax_cuda12_plugin" if chip.name == "h100" else "libtpu"
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--topology {topology}: needs the package {package}; pip install -r requirements-plan.txt "
            "(make plan does)"
        )
    if chip.name == "h100":
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology=f"1x1x{chips_in(shape)}",
            target_config=_H100,
        )  # fmt: skip
        return list(description.devices)
    # libtpu would look for the metadata of the cloud machine it thinks it is on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
