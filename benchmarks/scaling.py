"""How a device's share of a training step falls with the number of devices, compiled for 1 to 16 fake ones.

    python -m benchmarks.scaling --picture=docs/pictures/scaling.png [--times=1] [--out=scaling.json]

A model of 0.2B parameters (AdamW, float32 state, full remat). Three series: sixteen sequences of 4,096 tokens split
over `fsdp`, and one of 65,536 split over `context`, where every device gathers all keys and values, or as a ring.
FLOPs are those of the program, loops included (attention's in closed form), over the devices; memory is the compiler's:
what a device keeps (parameters, moments, batch) and what it needs besides. Nothing is run. `--times=4` has four times
the sequences, and one of four times the length: what does not fall weighs less then.

One thing differs from a run on CPUs: there one device alone makes a weight's gradient of a transpose in bfloat16,
which under a split would gather all tokens (`linear.outer_sum`). Here it makes it as several devices do, and TPUs.
"""

import argparse
import json
import os
import pathlib

DEVICES = (1, 2, 4, 8, 16)
SHAPE = {
    "vocab_size": 32768, "num_layers": 8, "embed_dim": 1024, "num_heads": 16, "num_kv_heads": 4, "head_dim": 64,
    "mlp_dim": 4096,
}  # fmt: skip
SERIES = {  # mesh axis, sequences, tokens of each, how a sequence is shared
    "fsdp": ("fsdp", 16, 4096, "gather"),
    "context": ("context", 1, 65536, "gather"),
    "context, ring": ("context", 1, 65536, "ring"),
}


def size(name: str, times: int) -> tuple[int, int]:
    _, batch, length, _ = SERIES[name]
    return (batch * times, length) if batch > 1 else (batch, length * times)


def measure(name: str, devices: int, times: int) -> dict[str, float]:
    """FLOPs and bytes of a device."""
    import jax

    from lrjax import config as config_lib
    from lrjax import sharding
    from lrjax.models import linear
    from lrjax.planning import estimate, steps

    linear.outer_sum = lambda x_TI, g_TO: linear.contract(x_TI, g_TO, ((0,), (0,)))

    axis, *_, context_parallel = SERIES[name]
    batch, length = size(name, times)
    config = config_lib.default()
    config.model.update(
        shape=SHAPE, remat="full", attention="blockwise", context_parallel=context_parallel
    )
    config.window, config.target_length, config.train_length = 4096, length, length
    config.extend.update(global_batch_size=batch)
    config.mesh.update(**{"fsdp": 1, "context": 1, axis: devices})
    mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices()[:devices])
    with sharding.layout(mesh, config.rules):
        program = steps.train(config, mesh, length)
        executed = estimate.flops(program, "blockwise", train=True)["executed"]
        memory = program.traced.lower().compile().memory_analysis()
    return {
        "flops": executed / devices,
        "kept_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def draw(found: dict, path: pathlib.Path, times: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"flops": "FLOPs", "kept_bytes": "memory kept", "temporary_bytes": "memory besides"}
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(12, 3.6), sharey=True, layout="constrained"
    )
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        for (quantity, label), marker in zip(labels.items(), "osv", strict=True):
            share = [point[quantity] / points["1"][quantity] for point in points.values()]
            axis.loglog(DEVICES, share, marker=marker, label=label, base=2)
        axis.loglog(
            DEVICES, [1 / n for n in DEVICES], "--", color="grey", label="1 / devices", base=2
        )
        batch, length = size(name, times)
        axis.set_title(f"{batch} x {length:,} tokens over {name}")
        axis.set_xticks(DEVICES, DEVICES)
        axis.set_xlabel("devices")
    axes[0].set_ylabel("share of one device alone")
    axes[0].legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
    parser.add_argument("--picture", type=pathlib.Path, help="PNG file")
    parser.add_argument("--times", type=int, default=1, help="as many tokens")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(DEVICES)}"
    found = {name: {str(n): measure(name, n, args.times) for n in DEVICES} for name in SERIES}
    for name, points in found.items():
        print(
            f"over {name:13} {'TFLOP':>9} {'kept GB':>9} {'besides GB':>11}   times the devices, of one alone"
        )
        for n, point in points.items():
            of_one = " ".join(f"{point[q] * int(n) / points['1'][q]:.2f}" for q in point)
            print(
                f"{n:>18} {point['flops'] / 1e12:9.2f} {point['kept_bytes'] / 1e9:9.3f} "
                f"{point['temporary_bytes'] / 1e9:11.3f}   {of_one}"
            )
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    if args.picture:
        draw(found, args.picture, args.times)


if __name__ == "__main__":
    main()
