"""Public figures of accelerator chips, and the topologies that the planner knows.

Peak bfloat16 FLOP/s (dense), memory, its bandwidth, and what a chip sends to its neighbours, per chip. v4, v5e, v5p and
v6e were compared with cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e in November 2026 (v4's links are not told
there), the H100 with its SXM data sheet; tpu7x's memory, its bandwidth and half of its 8-bit peak are those of the
launch's reports, its links a guess. All prices (on demand, US dollars an hour and chip) are as remembered of 2025 and
not compared: look them up before you pay.
"""

import dataclasses

from lrjax.errors import UserError

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. Where JAX sees a chip as two devices (`devices` 2), a device has half of everything."""

    name: str
    flops: float  # bfloat16, per second
    memory: float  # bytes
    memory_bandwidth: float  # bytes per second
    # Bytes per second that a chip sends along one mesh axis: two of its links, one for each direction of a ring;
    # v4, v5p and tpu7x have six, v5e and v6e four. On an NVLink machine: all of it (half of 900 GB/s sent).
    axis_bandwidth: float
    price: float | None
    devices: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GB, 1228e9, 300e9 / 3, 3.22),
        Chip("v5e", 197e12, 16 * GB, 819e9, 200e9 / 2, 1.20),
        Chip("v5p", 459e12, 95 * GB, 2765e9, 600e9 / 3, 4.20),
        Chip("v6e", 918e12, 32 * GB, 1640e9, 400e9 / 2, 2.70),
        Chip("tpu7x", 2307e12, 192 * GB, 7370e9, 600e9 / 3, None, devices=2),
        Chip("h100", 989e12, 80 * GB, 3352e9, 450e9, 11.06),
    )
}

# Topologies that can be rented, small to large. A GPU's is the number of cards of one NVLink domain.
TOPOLOGIES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "h100": ("1", "2", "4", "8"),
}


def known_topologies() -> list[str]:
    return [f"{chip}:{shape}" for chip, shapes in TOPOLOGIES.items() for shape in shapes]


def parse(topology: str) -> tuple[Chip, str]:
    """ "v5p:2x2x4" -> its chip and shape. Raises `UserError`, with the list, for one that is not known."""
    name, _, shape = topology.partition(":")
    if name not in TOPOLOGIES or shape not in TOPOLOGIES[name]:
        raise UserError(
            f"--topology {topology!r}: not known; allowed: {', '.join(known_topologies())}"
        )
    return CHIPS[name], shape


def chips_in(shape: str) -> int:
    count = 1
    for size in shape.split("x"):
        count *= int(size)
    return count
