"""MaxText's training step of Llama-3-8B, planned and counted as `lrjax.plan` does it with ours.

    python3.12 -m venv /tmp/maxtext && /tmp/maxtext/bin/pip install "maxtext[tpu]==0.2.5"
    /tmp/maxtext/bin/python -m benchmarks.maxtext_plan --length=40960 [--compile]

Runs in an environment of MaxText's own, with its `train_compile`: v5p:2x2x4, context 16, one sequence a step, AdamW,
full remat, flash attention, as `configs/llama8b_128k.py:compare`. Its step is traced with its jax, and the products in
its jaxpr are counted by our counter; attention's kernel by the same closed form with the blocks that its config names.
--compile has its compiler say the peak of a device, which depends on the version of libtpu.
"""

import argparse
import json
import sys
from unittest import mock

MODEL = {"num_layers": 32, "num_heads": 32, "head_dim": 128}


class _Traced(Exception):
    """Carries what has been asked for out of MaxText's main."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=40960)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    import jax
    from maxtext.trainers.pre_train import train_compile

    from lrjax.planning.counting import BACKWARD_PRODUCTS, dot_flops, visited_pairs

    argv = [
        "train_compile", "model_name=llama3-8b", "compile_topology=v5p-32", "compile_topology_num_slices=1",
        "run_name=plan", "base_output_directory=/tmp", "dataset_type=synthetic", "enable_checkpointing=False",
        "ici_fsdp_parallelism=1", "ici_context_parallelism=16", "per_device_batch_size=0.0625",
        f"max_target_length={args.length}", "remat_policy=full", "attention=flash", "opt_type=adamw",
        "weight_dtype=float32", "dtype=bfloat16", "skip_jax_distributed_system=True",
    ]  # fmt: skip
    seen = {}

    def jit_and_compile(
        func, inputs, keywords, mesh, in_shardings, out_shardings, static_argnums, donate_argnums, config, rules
    ):  # fmt: skip
        with jax.set_mesh(mesh), rules:
            traced = jax.jit(
                func, in_shardings=in_shardings, out_shardings=out_shardings,
                static_argnums=static_argnums, donate_argnums=donate_argnums,
            ).trace(*inputs, **keywords)  # fmt: skip
            products = dot_flops(traced.jaxpr.jaxpr)
            blocks = config.sa_block_q, config.sa_block_kv
            pairs = visited_pairs(args.length, *blocks)
            # Forward, again under remat, and backward.
            passes = 2 + 2 + BACKWARD_PRODUCTS["splash"]
            attention = (
                2 * passes * MODEL["num_layers"] * MODEL["num_heads"] * MODEL["head_dim"] * pairs
            )
            seen.update(
                length=args.length, jax=jax.__version__, blocks=blocks, products_pflop=products / 1e15,
                attention_pflop=attention / 1e15, executed_pflop=(products + attention) / 1e15,
            )  # fmt: skip
            if args.compile:
                memory = traced.lower().compile().memory_analysis()
                peak = memory.peak_memory_in_bytes
                seen.update(peak_gib=peak / 2**30)
        raise _Traced

    with mock.patch.object(train_compile, "jit_and_compile", jit_and_compile):
        try:
            train_compile.main(argv)
        except _Traced:
            print(json.dumps(seen))
            return
    sys.exit("train_compile did not come to its training step")


if __name__ == "__main__":
    main()
