"""What a config takes on hardware that is not there: memory, FLOPs, traffic, time and cost.

    python -m lrjax.plan --config=configs/llama8b_128k.py:compare --topology=v5p:2x2x4 [--steps=train,score] [--json]
    python -m lrjax.plan --config=configs/llama8b_128k.py --fit [--chips=v5e,v5p]

Compiles the real steps of the run for the topology, by the compiler that the hardware would use
(requirements-plan.txt), which accepts them or says what they exceed. With --json, standard output holds one JSON object
and nothing else; otherwise a table. `--fit` tries the known topologies from small to large, then larger micro-batches.
"""

import json
import math
import os
import re
import time

# The planner needs no device; libtpu must not be taken for one.
os.environ["JAX_PLATFORMS"] = "cpu"

import pathlib

import jax
from absl import logging

from lrjax import config as config_lib
from lrjax import sharding
from lrjax.command import ProgramFlags, run_program
from lrjax.errors import UserError
from lrjax.main import config_of_flag
from lrjax.models import attention
from lrjax.planning import estimate, hardware
from lrjax.planning import steps as programs
from lrjax.planning.chips import TOPOLOGIES, chips_in, parse
from lrjax.planning.counting import bytes_per_mesh_axis

STEPS = ("train", "full_length_train", "score", "prefill")

_FLAGS = ProgramFlags()
_TOPOLOGY = _FLAGS.DEFINE_string("topology", None, "CHIP:SHAPE, such as v5p:2x2x4 or h100:8.")
_STEPS = _FLAGS.DEFINE_list("steps", list(STEPS), f"Only these: {', '.join(STEPS)}.")
_JSON = _FLAGS.DEFINE_bool("json", False, "Standard output holds the plan as JSON alone.")
_OUT = _FLAGS.DEFINE_string("out", None, "Write the JSON to this file too.")
_FIT = _FLAGS.DEFINE_bool(
    "fit", False, "Find the smallest topology that fits, and the largest batch on it."
)
_CHIPS = _FLAGS.DEFINE_list("chips", list(TOPOLOGIES), "With --fit: of these chips.")


def plan(config, topology: str, names=STEPS, devices=None) -> dict:
    """Compiles steps of a config for a topology.

    Args:
        names: of `STEPS`.
        devices: of the topology, when they are there already (tests: fake ones).

    Returns:
        The JSON object that the module speaks of.

    Raises:
        UserError: a topology or step that is not known, a mesh or a length that does not divide.
    """
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise UserError(f"--steps: unknown step {unknown[0]!r}; allowed: {', '.join(STEPS)}")
    chip, _ = parse(topology)
    config_lib.check(config)
    devices = hardware.devices(topology) if devices is None else devices
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    if mesh.size != len(devices):
        raise UserError(
            f"config.mesh: {dict(mesh.shape)} has {mesh.size} places, {topology} {len(devices)} devices; allowed: "
            "sizes whose product is that, or one of them -1"
        )
    result = {
        "config": config.name,
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "steps": {},
    }
    with sharding.layout(mesh, config.rules):
        for name in names:
            result["steps"][name] = _plan_step(config, mesh, chip, name)
    result["recipe"] = estimate.recipe(config, result["steps"], chip, mesh.size)
    return result


def _plan_step(config, mesh, chip, name) -> dict:
    start = time.perf_counter()
    train = name in ("train", "full_length_train")
    if train:
        length = config.train_length if name == "train" else config.target_length
        program = programs.train(config, mesh, length)
    else:
        program = {"score": programs.score, "prefill": programs.prefill}[name](config, mesh)
    implementation = program.model.attention
    if implementation == "auto":
        keys = config.target_length if name == "prefill" else program.length
        offset = 0 if name != "prefill" else None
        window = program.model.sliding_window
        if program.model.sliding_layers is not None:  # of some layers: traced
            window = jax.numpy.int32(window)
        implementation = attention.choose(
            program.length, keys, offset, program.model.context_parallel,
            head_dim=program.model.head_dim, dtype=program.model.dtype,
            window=window, soft_cap=program.model.attention_soft_cap,
        )  # fmt: skip
    counted = estimate.flops(program, implementation, train=train)
    step = {
        "accepted": False, "reason": "", "peak_bytes_per_device": None, "argument_bytes_per_device": None,
        "flops": counted, "bytes_per_mesh_axis": {}, "roofline_seconds": None, "tokens": program.tokens,
        "row_length": program.length, "sequences": program.sequences, "attention": implementation,
    }  # fmt: skip
    try:
        compiled = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        step["reason"] = refusal(str(error), config)
        step["compile_seconds"] = round(time.perf_counter() - start, 1)
        return step
    memory = compiled.memory_analysis()
    peak = _peak(memory)
    # The TPU compiler has refused what does not fit; the one for GPUs leaves that to the run.
    limit = chip.memory / chip.devices if chip.name == "h100" else math.inf
    step |= {
        "accepted": peak <= limit,
        "reason": "" if peak <= limit else over_memory(peak, limit, config),
        "peak_bytes_per_device": peak,
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        "host_bytes_per_device": memory.host_argument_size_in_bytes,
        "parts": _parts(program, memory),
        "bytes_per_mesh_axis": bytes_per_mesh_axis(compiled.as_text(), mesh),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }
    traffic = estimate.memory_traffic(
        program, mesh.size, mesh.shape["tensor"], config.extend.micro_batches, train=train
    )
    times = estimate.roofline(
        counted["executed"], traffic, step["bytes_per_mesh_axis"], chip, mesh.size
    )
    step |= {"roofline_seconds": times["total"], "roofline": times}
    step["tokens_per_second"] = program.tokens / times["total"]
    return step


def _peak(memory) -> int:
    """The compiler's peak; GPU programs do not say it, and then all that is allocated at once."""
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    allocated = memory.argument_size_in_bytes + kept + memory.temp_size_in_bytes
    return memory.peak_memory_in_bytes or allocated


def _parts(program, memory) -> dict:
    """Bytes of a device's parameters (each model's), optimizer state (wherever it is kept), and of all the rest at the
    peak: activations, gradients, the batch, the cache."""

    def size(tree):
        return sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(tree)
        )

    parts = {"parameters": size(program.params), "optimizer": size(program.opt_state)}
    parts["activations"] = _peak(memory) - memory.argument_size_in_bytes
    return parts


_NEEDS = re.compile(r"(?:Used|Requested|total of) ([\d.]+)([KMGT])?i?B?[^.]*? of ([\d.]+)([KMGT])")


def refusal(message: str, config) -> str:
    """What the compiler said, in one line: how much is over, and what would help."""
    if "RESOURCE_EXHAUSTED" in message or ("exceed" in message and "memory" in message.lower()):
        first = " ".join(message.split())
        if match := _NEEDS.search(first):
            used, limit = (
                float(n) * _UNITS[u or ""] for n, u in (match.group(1, 2), match.group(3, 4))
            )
            return over_memory(used, limit, config)
        return f"over memory: {first[:200]}; {_knobs(config)}"
    return "the compiler refuses it: " + " ".join(message.split())[:300]


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def over_memory(used: float, limit: float, config) -> str:
    return (
        f"needs {used / 2**30:.2f} GiB a device of {limit / 2**30:.2f} GiB, {(used - limit) / 2**30:.2f} GiB over; "
        f"{_knobs(config)}"
    )


def _knobs(config) -> str:
    """Settings of this config that are not yet turned towards less memory."""
    knobs = []
    if config.model.remat not in ("full", "offload"):
        knobs.append("config.model.remat=full")
    elif config.model.remat == "full":
        knobs.append("config.model.remat=offload")
    if not config.extend.offload:
        knobs.append("config.extend.offload=True")
    if config.extend.state_dtype == "float32":
        knobs.append("config.extend.state_dtype=bfloat16")
    if config.extend.global_batch_size > config.extend.micro_batches:
        knobs.append(f"config.extend.micro_batches={config.extend.global_batch_size}")
    return f"less memory with {', '.join([*knobs, 'a larger topology'])}"


def fit(config, chips=tuple(TOPOLOGIES)) -> dict:
    """The smallest known topology of each chip on which a training step fits, and the largest micro-batch there."""
    found = {}
    # Bytes a parameter, with one moment at least where there is one.
    moments = 0 if config.extend.optimizer == "adafactor" else 1
    least = (1 + moments) * (4 if config.extend.state_dtype == "float32" else 2)
    model = programs.model_of(config)
    weights = sum(x.size for x in jax.tree.leaves(programs.abstract_params(model)))
    for name in chips:
        if name not in TOPOLOGIES:
            raise UserError(f"--chips: unknown chip {name!r}; allowed: {', '.join(TOPOLOGIES)}")
        found[name] = None
        for shape in TOPOLOGIES[name]:
            chip, _ = parse(f"{name}:{shape}")
            if not config.extend.offload and least * weights > chips_in(shape) * chip.memory:
                continue  # not even the state fits
            try:
                result = plan(config, f"{name}:{shape}", ["train"])
            except UserError as error:
                logging.info("%s:%s: %s", name, shape, error)
                continue
            step = result["steps"]["train"]
            logging.info("%s:%s: %s", name, shape, step["reason"] or "fits")
            if step["accepted"]:
                found[name] = {
                    "topology": f"{name}:{shape}",
                    "micro_batches": _fewest(config, f"{name}:{shape}"),
                    "peak_bytes_per_device": step["peak_bytes_per_device"],
                }
                break
    return {"config": config.name, "fit": found}


def _fewest(config, topology: str) -> int:
    """The smallest number of micro-batches (the largest micro-batch) that still fits."""
    fewest = config.extend.micro_batches
    while fewest % 2 == 0:
        smaller = config.copy_and_resolve_references()
        with smaller.unlocked():
            smaller.extend.micro_batches = fewest // 2
        if not plan(smaller, topology, ["train"])["steps"]["train"]["accepted"]:
            break
        fewest //= 2
    return fewest


def table(result: dict) -> str:
    """A plan as text."""
    if "fit" in result:
        return "\n".join(
            f"{chip}: {found['topology']}, {found['micro_batches']} micro-batches, "
            f"{found['peak_bytes_per_device'] / 2**30:.2f} GiB a device"
            if found
            else f"{chip}: none of the known topologies"
            for chip, found in result["fit"].items()
        )
    lines = [
        f"{result['config']} on {result['topology']}, {result['devices']} devices, mesh {result['mesh']}",
        "",
    ]
    lines.append(
        f"{'step':18} {'tokens':>9} {'GiB/device':>10} {'PFLOP':>9} {'s':>8} {'tokens/s':>10}  bound"
    )
    for name, step in result["steps"].items():
        if not step["accepted"]:
            lines.append(f"{name:18} {step['tokens']:9,}  refused: {step['reason']}")
            continue
        times = step["roofline"]
        bound = max((n for n in times if n != "total"), key=times.get)
        lines.append(
            f"{name:18} {step['tokens']:9,} {step['peak_bytes_per_device'] / 2**30:10.2f} "
            f"{step['flops']['executed'] / 1e15:9.2f} {times['total']:8.2f} {step['tokens_per_second']:10,.0f}  {bound}"
        )
    recipe = result["recipe"]
    if recipe["hours"] is not None:
        cost = "" if recipe["cost"] is None else f" (about ${recipe['cost']:,.0f})"
        lines += [
            "",
            f"The recipe: {recipe['hours']:.1f} h at the roofline, "
            f"{recipe['hours_at_half_of_peak']:.1f} h at half of it{cost}",
        ]
    for name, ratio in recipe["ratio_to_full_length"].items():
        lines.append(f"Full-length training takes {ratio:.2f} x the FLOPs of ours ({name})")
    return "\n".join(lines)


def main(argv) -> None:
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help")
    config = config_of_flag()
    if _FIT.value:
        result = fit(config, _CHIPS.value)
    elif _TOPOLOGY.value is None:
        raise UserError("--topology is missing, or --fit; see --help")
    else:
        result = plan(config, _TOPOLOGY.value, _STEPS.value)
    text = json.dumps(result, indent=2)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(text + "\n")
    print(text if _JSON.value else table(result))
    refused = [s["reason"] for s in result.get("steps", {}).values() if not s["accepted"]]
    if refused:
        raise UserError(refused[0])


if __name__ == "__main__":
    run_program(main, _FLAGS)
