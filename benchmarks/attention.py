"""Causal attention on a CPU: lrjax's blockwise kernel beside torch's scaled_dot_product_attention.

    python -m benchmarks.attention [--lengths=2048,8192]

SmolLM2-135M's heads (9 of 64 numbers, 3 key heads; torch gets them repeated), one row, forward alone and with the
gradients of queries, keys and values. Milliseconds, best of 5 calls after one to compile; each contender in a process
of its own.
"""

import argparse

from benchmarks import contenders

NAMES = ["lrjax_bfloat16", "lrjax_float32", "torch_bfloat16", "torch_float32"]
HEADS, KEY_HEADS, WIDTH = 9, 3, 64
CALLS = 5


def with_lrjax(dtype: str, length: int):
    """(forward, forward and backward): functions without arguments."""
    import jax
    import jax.numpy as jnp

    from lrjax.models.attention import attention

    def random(seed, heads):
        x_BLNH = jax.random.normal(jax.random.key(seed), (1, length, heads, WIDTH))
        return x_BLNH.astype(dtype)

    inputs = random(0, HEADS), random(1, KEY_HEADS), random(2, KEY_HEADS)
    segment_ids_BL = jnp.zeros((1, length), jnp.int32)

    def attend(q, k, v):
        return attention(q, k, v, segment_ids_BL, segment_ids_BL, implementation="blockwise")

    def loss(*inputs):
        return attend(*inputs).astype(jnp.float32).sum()

    forward, gradients = jax.jit(attend), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(forward(*inputs)), lambda: jax.block_until_ready(
        gradients(*inputs)
    )


def with_torch(dtype: str, length: int):
    import torch

    shape = 1, HEADS, length, WIDTH
    q, k, v = (torch.randn(shape, dtype=getattr(torch, dtype)) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            attend(q, k, v, is_causal=True)

    def gradients():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attend(*leaves, is_causal=True).float().sum().backward()

    return forward, gradients


def run(name: str, lengths: list[int]) -> None:
    library, dtype = name.split("_")
    make = {"lrjax": with_lrjax, "torch": with_torch}[library]
    found = {}
    for length in lengths:
        forward, both = make(dtype, length)
        found[str(length)] = [
            1e3 * contenders.time_steps(step, CALLS)["best_seconds"] for step in (forward, both)
        ]
    contenders.report(milliseconds=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--contender", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    if args.contender:
        run(args.contender, lengths)
        return
    results = contenders.run("benchmarks.attention", NAMES, [f"--lengths={args.lengths}"])
    print(
        f"Causal attention of SmolLM2's heads, {contenders.machine()}; ms forward / with backward"
    )
    print(f"{'':16}" + "".join(f"{length:>20,}" for length in lengths))
    for name, result in results.items():
        cells = [result["error"]] if "error" in result else []
        for forward, both in result.get("milliseconds", {}).values():
            cells.append(f"{forward:.0f} / {both:.0f}")
        print(f"{name:16}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
