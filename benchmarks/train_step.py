"""One training step of SmolLM2-135M's shape: lrjax against transformers + torch and against plain flax.

    python -m benchmarks.train_step --out=train_step.json [--length=2048] [--steps=5]

Batch 1, AdamW, random weights, loss on every token. Every contender runs in a process of its own; tokens/s
are of the median and of the best step after a warm-up, memory is the process's peak of resident memory.

* `lrjax`: `lrjax.training.loop.make_train_step`, bfloat16 compute, float32 parameters and optimizer state, remat of
  all but attention, as in configs/smollm2_135m.py: on a CPU that costs no time, writing the rest takes as long.
* `lrjax_float32`: the same, computing in float32.
* `lrjax_kept`, `lrjax_cudnn`: `lrjax` without remat, and with cuDNN's attention too (GPUs).
* `torch_float32`, `torch_bfloat16`: `LlamaForCausalLM` with SDPA, eager, torch.optim.AdamW; in bfloat16 the
  parameters and the optimizer state are bfloat16 as well.
* `flax`: what one writes first: nn.Dense in bfloat16, jax.nn.dot_product_attention, whole logits, optax.
"""

import argparse
import json
import pathlib

from benchmarks import contenders

SHAPE = {
    "vocab_size": 49152,
    "num_layers": 30,
    "embed_dim": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "mlp_dim": 1536,
    "rope_theta": 100000.0,
    "tie_embeddings": True,
}
NAMES = ["lrjax", "lrjax_float32", "torch_float32", "torch_bfloat16", "flax"]
OF_GPUS = {"kept": {"remat": "none"}, "cudnn": {"remat": "none", "attention": "cudnn"}}


def run_lrjax(length: int, steps: int, dtype: str, **changes) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from lrjax.models.llama import LlamaConfig, init_params
    from lrjax.training.loop import make_train_step

    config = LlamaConfig(**SHAPE, **{"dtype": dtype, "remat": "attention"} | changes)
    optimizer = optax.adamw(1e-5, weight_decay=0.1)
    params = jax.jit(lambda rng: init_params(config, rng))(jax.random.key(0))
    state = {"params": params, "opt_state": jax.jit(optimizer.init)(params)}
    del params
    ones_BL = jnp.ones((1, length), jnp.int32)
    batch = {
        "tokens": jax.random.randint(jax.random.key(1), (1, length), 0, config.vocab_size),
        "positions": jnp.arange(length)[None],
        "segment_ids": ones_BL,
        "weights": ones_BL.astype(jnp.float32).at[:, 0].set(0.0),
    }
    train_step = make_train_step(config, optimizer, micro_batches=1)

    def step():
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))

    contenders.report(**contenders.time_steps(step, steps))


def run_torch(length: int, steps: int, dtype: str) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["embed_dim"],
        intermediate_size=SHAPE["mlp_dim"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        max_position_embeddings=max(8192, length),
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    device = contenders.torch_device()
    model = transformers.LlamaForCausalLM(config).to(device, getattr(torch, dtype)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    tokens_BL = torch.randint(0, SHAPE["vocab_size"], (1, length), device=device)

    def step():
        optimizer.zero_grad()
        model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()
        optimizer.step()
        contenders.finish()

    contenders.report(**contenders.time_steps(step, steps))


def run_flax(length: int, steps: int) -> None:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    shape = argparse.Namespace(**SHAPE)
    dtype = jnp.bfloat16

    def rotate(x_BLNH):
        frequency_h = shape.rope_theta ** -(jnp.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles_LNh = (jnp.arange(length)[:, None] * frequency_h)[:, None]
        first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
        cos, sin = jnp.cos(angles_LNh), jnp.sin(angles_LNh)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
        return rotated.astype(dtype)

    def dense(features, name):
        return nn.DenseGeneral(features, use_bias=False, dtype=dtype, name=name)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x_BLD, _):
            y_BLD = nn.RMSNorm(dtype=dtype)(x_BLD)
            q_BLNH = rotate(dense((shape.num_heads, shape.head_dim), "q")(y_BLD))
            k_BLKH = rotate(dense((shape.num_kv_heads, shape.head_dim), "k")(y_BLD))
            v_BLKH = dense((shape.num_kv_heads, shape.head_dim), "v")(y_BLD)
            out_BLNH = jax.nn.dot_product_attention(q_BLNH, k_BLKH, v_BLKH, is_causal=True)
            x_BLD += dense(shape.embed_dim, "o")(out_BLNH.reshape(1, length, -1))
            y_BLD = nn.RMSNorm(dtype=dtype)(x_BLD)
            gate_BLF = nn.silu(dense(shape.mlp_dim, "gate")(y_BLD))
            up_BLF = dense(shape.mlp_dim, "up")(y_BLD)
            return x_BLD + dense(shape.embed_dim, "down")(gate_BLF * up_BLF), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens_BL):
            embed = nn.Embed(shape.vocab_size, shape.embed_dim, dtype=dtype)
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=shape.num_layers,
            )
            x_BLD, _ = layers()(embed(tokens_BL), None)
            return embed.attend(nn.RMSNorm(dtype=dtype)(x_BLD))

    model, optimizer = Model(), optax.adamw(1e-5, weight_decay=0.1)
    tokens_BL = jax.random.randint(jax.random.key(1), (1, length), 0, shape.vocab_size)
    params = jax.jit(model.init)(jax.random.key(0), tokens_BL)
    state = params, jax.jit(optimizer.init)(params)
    del params

    def train_step(state, tokens_BL):
        def loss(params):
            logits_BLV = model.apply(params, tokens_BL)[:, :-1].astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits_BLV, tokens_BL[:, 1:]
            ).mean()

        value, grads = jax.value_and_grad(loss)(state[0])
        updates, opt_state = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    train_step = jax.jit(train_step, donate_argnums=0)

    def step():
        nonlocal state
        state, value = train_step(state, tokens_BL)
        jax.block_until_ready((state, value))

    contenders.report(**contenders.time_steps(step, steps))


def summarise(results: dict[str, dict], length: int) -> dict[str, float]:
    """Prints the table; returns the ratios of the best steps."""
    print(f"{'':16}{'tokens/s (median)':>20}{'tokens/s (best)':>18}{'peak GB':>10}")
    for name, result in results.items():
        if "error" in result:
            print(f"{name:16}{result['error']:>20}")
            continue
        median, best = length / result["median_seconds"], length / result["best_seconds"]
        print(f"{name:16}{median:>20.0f}{best:>18.0f}{result['peak_bytes'] / 1e9:>10.2f}")

    def best(prefix):
        times = [
            r["best_seconds"]
            for n, r in results.items()
            if n.startswith(prefix) and "error" not in r
        ]
        return min(times, default=None)

    ratios = {
        f"lrjax / {peer}": best(peer) / best("lrjax")
        for peer in ("torch", "flax")
        if best(peer) and best("lrjax")  # both were run
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x (best step of each)")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens of the one example")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one to warm up")
    parser.add_argument("--contenders", default=",".join(NAMES), help="names, comma-separated")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
    known = [*NAMES, *(f"lrjax_{name}" for name in OF_GPUS)]
    parser.add_argument("--contender", choices=known, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        family, _, dtype = args.contender.partition("_")
        if family == "lrjax" and dtype in OF_GPUS:
            run_lrjax(args.length, args.steps, "bfloat16", **OF_GPUS[dtype])
        elif family == "lrjax":
            run_lrjax(args.length, args.steps, dtype or "bfloat16")
        elif family == "torch":
            run_torch(args.length, args.steps, dtype)
        else:
            run_flax(args.length, args.steps)
        return
    flags = [f"--length={args.length}", f"--steps={args.steps}"]
    results = contenders.run("benchmarks.train_step", args.contenders.split(","), flags)
    print(f"SmolLM2-135M training step, {args.length} tokens, {contenders.machine()}")
    ratios = summarise(results, args.length)
    if args.out:
        figures = {
            "length": args.length,
            "machine": contenders.machine(),
            "contenders": results,
            "ratios": ratios,
        }
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
