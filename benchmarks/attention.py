"""Causal attention: lrjax's kernels beside torch's scaled_dot_product_attention.

    python -m benchmarks.attention [--lengths=2048,8192]                     blockwise, on a CPU
    JAX_PLATFORMS=cuda python -m benchmarks.attention                        the kernels for NVIDIA GPUs
    JAX_PLATFORMS=cuda python -m benchmarks.attention --queries=1024         the last queries of so many keys (a cache)

SmolLM2-135M's heads (9 of 64 numbers, 3 key heads; torch gets them repeated), one row, forward alone and with the
gradients of queries, keys and values. Milliseconds, best of 5 calls after one to compile (on a GPU of 5 times 10 calls
that are waited for together); each contender in a process of its own. With --queries forward alone.
"""

import argparse
import functools

from benchmarks import contenders

NAMES = ["blockwise_bfloat16", "blockwise_float32", "torch_bfloat16", "torch_float32"]
GPU_NAMES = ["triton_bfloat16", "cudnn_bfloat16", "blockwise_bfloat16", "torch_bfloat16"]
HEADS, KEY_HEADS, WIDTH = 9, 3, 64
CALLS = 5


def with_lrjax(dtype: str, length: int, queries: int | None, implementation: str):
    """(forward, forward and backward): functions that start so many calls and wait for the last."""
    import jax
    import jax.numpy as jnp

    from lrjax.models.attention import attention

    def random(seed, heads):
        x_BLNH = jax.random.normal(jax.random.key(seed), (1, length, heads, WIDTH))
        return x_BLNH.astype(dtype)

    inputs = random(0, HEADS)[:, -(queries or 0) :], random(1, KEY_HEADS), random(2, KEY_HEADS)
    segment_ids_BL = jnp.ones((1, length), jnp.int32)

    def attend(q, k, v, offset=0):
        q_segment_ids_BL = segment_ids_BL[:, : q.shape[1]]
        return attention(
            q, k, v, q_segment_ids_BL, segment_ids_BL, offset, implementation=implementation
        )

    def loss(*inputs):
        return attend(*inputs).astype(jnp.float32).sum()

    def several(f, *inputs):
        compiled = jax.jit(f)
        return lambda count: jax.block_until_ready([compiled(*inputs) for _ in range(count)])

    if queries:
        return (several(attend, *inputs, jnp.int32(length - queries)),)
    return several(attend, *inputs), several(jax.grad(loss, argnums=(0, 1, 2)), *inputs)


def with_torch(dtype: str, length: int, queries: int | None):
    import torch
    import torch.nn.attention.bias

    settings = {"dtype": getattr(torch, dtype), "device": contenders.torch_device()}
    q, k, v = (torch.randn((1, HEADS, length, WIDTH), **settings) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    masked = {"is_causal": True}
    if queries:
        q = q[:, :, -queries:]
        masked = {"attn_mask": torch.nn.attention.bias.causal_lower_right(queries, length)}

    def forward(count):
        with torch.no_grad():
            for _ in range(count):
                attend(q, k, v, **masked)
        contenders.finish()

    def gradients(count):
        for _ in range(count):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            attend(*leaves, **masked).float().sum().backward()
        contenders.finish()

    return (forward,) if queries else (forward, gradients)


def run(name: str, lengths: list[int], queries: int | None) -> None:
    implementation, dtype = name.split("_")
    count = 10 if contenders.on_gpu() else 1
    found = {}
    for length in lengths:
        if implementation == "torch":
            made = with_torch(dtype, length, queries)
        else:
            made = with_lrjax(dtype, length, queries, implementation)
        times = (contenders.time_steps(functools.partial(f, count), CALLS) for f in made)
        found[str(length)] = [1e3 * each["best_seconds"] / count for each in times]
    contenders.report(milliseconds=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--queries", type=int, help="default: as many as keys")
    parser.add_argument("--contenders", help="names, comma-separated")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    if args.queries is not None and not 0 < args.queries < min(lengths):
        parser.error(f"--queries={args.queries}: allowed: 1 to less than the shortest of --lengths")
    if args.contender:
        run(args.contender, lengths, args.queries)
        return
    names = GPU_NAMES if contenders.on_gpu() else NAMES
    flags = [f"--lengths={args.lengths}"]
    if args.queries:
        names = [name for name in names if not name.startswith("cudnn")]
        flags.append(f"--queries={args.queries}")
    names = args.contenders.split(",") if args.contenders else names
    results = contenders.run("benchmarks.attention", names, flags)
    of = f"{args.queries} queries" if args.queries else "forward / with backward"
    print(f"Causal attention of SmolLM2's heads, {contenders.machine()}; ms {of}")
    print(f"{'':20}" + "".join(f"{length:>20,}" for length in lengths))
    for name, result in results.items():
        cells = [result["error"]] if "error" in result else []
        for times in result.get("milliseconds", {}).values():
            cells.append(" / ".join(f"{time:.3g}" for time in times))
        print(f"{name:20}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
