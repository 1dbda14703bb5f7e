"""What a program does, counted: FLOPs from its jaxpr, bytes between devices from its compiled HLO.

XLA's own `cost_analysis` counts the body of a loop once and a Pallas kernel not at all.
"""

import math
import re
from collections import Counter

import jax
import numpy as np

# ---------------------------------------------------------------------------------------------- FLOPs


def dot_flops(jaxpr, devices: int = 1) -> int:
    """FLOPs of the matrix products in a jaxpr, all devices together: loops by their lengths, what remat computes again
    counted again. Kernels and loops of unknown length (attention's) count nothing: see `attention_flops`."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner
        elif name in ("pallas_call", "while"):
            continue
        elif name == "cond":
            total += max(dot_flops(branch.jaxpr, devices) for branch in eqn.params["branches"])
        else:
            times = eqn.params["length"] if name == "scan" else 1
            if name == "shard_map":  # its shapes are a device's
                times = eqn.params["mesh"].size
            total += times * sum(dot_flops(inner, devices) for inner in _inner_jaxprs(eqn.params))
    return total


def _inner_jaxprs(params):
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jax.extend.core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jax.extend.core.Jaxpr):
                yield item


def visited_pairs(length: int, block_q: int, block_k: int) -> int:
    """Pairs of query and key in the blocks that a causal kernel visits."""
    starts = range(0, length, block_q)
    return sum(
        block_q * min(-(-(start + block_q) // block_k) * block_k, -(-length // block_k) * block_k)
        for start in starts
    )


# Products [L, L] x H that a kernel does in its backward pass: dq and dk, dv apart each compute scores again.
BACKWARD_PRODUCTS = {"splash": 7, "triton": 7, "cudnn": 5, "blockwise": 5, "reference": 4}


def attention_flops(config, sequences, length, implementation, *, train: bool, blocks) -> int:
    """FLOPs that attention executes: forward (2 products), again under remat, and backward."""
    pairs = visited_pairs(length, *blocks)
    products = 2
    if train:
        again = 2 if config.remat in ("full", "dots", "offload") else 0
        products += again + BACKWARD_PRODUCTS[implementation]
    return 2 * products * sequences * config.num_layers * config.num_heads * config.head_dim * pairs


# ---------------------------------------------------------------------------------------------- bytes

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8,
}  # fmt: skip
_COLLECTIVE = re.compile(
    r"= (?P<type>\(?[^=]*?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|called_computations|branch_computations)="
    r"(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")


def bytes_per_mesh_axis(hlo: str, mesh) -> dict[str, int]:
    """Bytes that a device sends over each mesh axis ("fsdp", "fsdp+context", ...) in one run of a compiled program.

    All-gather, reduce-scatter and all-to-all send (n - 1) / n of the whole array, all-reduce twice that.
    """
    lines_of, entry, name = {}, None, None
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match["name"]
            lines_of[name] = []
            entry = name if match["entry"] else entry
        elif name is not None:
            lines_of[name].append(line)
    own, calls = {}, {}
    for name, lines in lines_of.items():
        own[name], calls[name] = Counter(), []
        for line in lines:
            if match := _COLLECTIVE.search(line):
                axis, size = _axis(line, match["op"], mesh)
                sent = _sent(match, line, size)
                own[name][axis] += sent
            if called := _CALLED.findall(line):
                times = _trips(line, lines_of)
                for several, one in called:
                    names = (inner.strip().lstrip("%") for inner in (several or one).split(","))
                    calls[name] += [(inner, times) for inner in names if inner in lines_of]
    total: Counter = Counter()

    def visit(name, times):
        for axis, sent in own[name].items():
            total[axis] += times * sent
        for inner, trips in calls[name]:
            visit(inner, times * trips)

    if entry is not None:
        visit(entry, 1)
    return {axis: int(sent) for axis, sent in total.items() if axis and sent}


def _trips(line: str, lines_of) -> int:
    """How often a loop's body runs; 1 for what is no loop, or one that ends when it likes."""
    if not (loop := _WHILE.search(line)):
        return 1
    if known := _TRIPS.search(line):
        return int(known[1])
    # TPU programs do not say it; their loops count up to a constant of their condition.
    bounds = [int(n) for text in lines_of.get(loop[1], ()) for n in _BOUND.findall(text)]
    return max(bounds, default=1)


def _sent(match, line, size) -> float:
    sizes = [
        _size(dtype, shape) for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match["type"])
    ]
    if not sizes:
        return 0.0
    # A started collective names its operands and results: the whole array is the largest of them.
    whole = max(sizes) if match["start"] else sum(sizes)
    op = match["op"]
    if op == "collective-permute":
        return whole
    if op == "reduce-scatter" and not match["start"]:
        whole *= size
    return whole * (size - 1) / size * (2 if op == "all-reduce" else 1)


def _size(dtype: str, shape: str) -> int:
    return _BYTES.get(dtype, 0) * math.prod(int(n) for n in shape.split(",") if n)


def _axis(line: str, op: str, mesh) -> tuple[str, int]:
    """The mesh axes along which the devices of the first group differ, and the size of a group."""
    if op == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}(.*?)\}\}", line + "}}")
        groups = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        group = next(([int(a), int(b)] for a, b in groups if a != b), [0]) if pairs else [0]
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape = [int(n) for n in iota[3].split(",")]
        ids = np.arange(math.prod(shape)).reshape(shape)
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        group = ids.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group = [int(n) for n in listed[1].split(",")]
    else:
        group = list(range(mesh.size))
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    moved = [
        name
        for name, row in zip(mesh.axis_names, places, strict=True)
        if len(set(row.tolist())) > 1
    ]
    return "+".join(moved), len(group)
