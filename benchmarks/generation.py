"""Prefill and greedy decoding at SmolLM2-135M's shape: lrjax against transformers + torch; eight questions on one text.

    python -m benchmarks.generation --out=generation.json [--prompt=4096] [--new=32] [--repeats=3]

Batch 1, random weights, no end token. Every contender runs in a process of its own; seconds are of the median and the
best call after a warm-up, memory is the process's peak of resident memory, its imports and weights included.

* `lrjax_bfloat16`, `lrjax_float32`: `lrjax.evaluation.reader.Reader`, a new prompt every time.
* `torch_bfloat16`, `torch_float32`: `LlamaForCausalLM.generate` with SDPA.
* `depths_together`, `depths_apart`: lrjax in bfloat16, eight questions of 24 tokens with 16 new tokens each on a text
  of `--prompt` tokens (needles at eight depths of one haystack): all of them through `reader.answers`, which reads the
  text once, and one after the other by `generate`.
"""

import argparse
import json
import pathlib

from benchmarks import contenders
from benchmarks.train_step import SHAPE

NAMES = [
    "lrjax_bfloat16", "lrjax_float32", "torch_bfloat16", "torch_float32", "depths_together", "depths_apart",
]  # fmt: skip
QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 8, 24, 16


def _lrjax_model(dtype: str):
    """Random weights (a block of them again and again); as with torch, no float32 copy is made on the way."""
    import jax
    import numpy as np

    from lrjax.checkpoints.tensors import flatten, nest
    from lrjax.models.bits import ready
    from lrjax.models.llama import LlamaConfig, abstract_params

    config = LlamaConfig(**SHAPE, dtype=dtype)

    block = (0.02 * np.random.default_rng(0).standard_normal(1_000_003, np.float32)).astype(dtype)
    flat = {}
    for name, leaf in flatten(abstract_params(config)).items():
        values = jax.numpy.asarray(np.resize(block, leaf.shape))
        flat |= flatten(jax.block_until_ready(ready(config, nest({name: values}))))
    return config, nest(flat)


def run_lrjax(prompt: int, new: int, repeats: int, dtype: str) -> None:
    import numpy as np

    from lrjax.evaluation.reader import Reader

    config, params = _lrjax_model(dtype)
    rng = np.random.default_rng(0)
    reader = Reader(config, params, prompt + new)

    def step():
        tokens = rng.integers(0, config.vocab_size, prompt).astype(np.int32)
        assert len(reader.answer(tokens, new)) == new

    contenders.report(**contenders.time_steps(step, repeats))


def run_torch(prompt: int, new: int, repeats: int, dtype: str) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["embed_dim"],
        intermediate_size=SHAPE["mlp_dim"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        max_position_embeddings=max(8192, prompt + new),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(getattr(torch, dtype))  # so that no float32 copy is made on the way
    device = contenders.torch_device()
    model = transformers.LlamaForCausalLM(config).to(device).eval()

    def step():
        tokens_BL = torch.randint(0, config.vocab_size, (1, prompt), device=device)
        out = model.generate(
            tokens_BL,
            attention_mask=torch.ones_like(tokens_BL),
            max_new_tokens=new,
            do_sample=False,
        )
        contenders.finish()
        assert out.shape[1] == prompt + new

    with torch.inference_mode():
        contenders.report(**contenders.time_steps(step, repeats))


def run_depths(prompt: int, repeats: int, together: bool) -> None:
    import numpy as np

    from lrjax.evaluation.generate import generate
    from lrjax.evaluation.reader import answers

    config, params = _lrjax_model("bfloat16")
    rng = np.random.default_rng(0)

    def draw(count):
        return rng.integers(0, config.vocab_size, count).astype(np.int32)

    def step():
        text = draw(prompt)
        prompts = [np.concatenate([text, draw(QUESTION_TOKENS)]) for _ in range(QUESTIONS)]
        if together:
            rows = dict(answers(config, params, prompts, ANSWER_TOKENS, batch_size=QUESTIONS))
        else:
            rows = [generate(config, params, [each], ANSWER_TOKENS)[0] for each in prompts]
        assert len(rows) == QUESTIONS

    contenders.report(**contenders.time_steps(step, repeats))


def summarise(results: dict[str, dict]) -> dict[str, float]:
    """Prints the table; returns the ratios of the best calls and of the peaks of memory."""
    print(f"{'':18}{'s (median)':>12}{'s (best)':>12}{'peak GB':>10}")
    for name, result in results.items():
        if "error" in result:
            print(f"{name:18}{result['error']:>12}")
            continue
        print(
            f"{name:18}{result['median_seconds']:>12.2f}{result['best_seconds']:>12.2f}"
            f"{result['peak_bytes'] / 1e9:>10.2f}"
        )

    def least(prefix, what):
        return min(
            (r[what] for n, r in results.items() if n.startswith(prefix) and "error" not in r),
            default=float("nan"),
        )

    ratios = {
        "lrjax / torch, speed": least("torch", "best_seconds") / least("lrjax", "best_seconds"),
        "lrjax / torch, memory": least("lrjax", "peak_bytes") / least("torch", "peak_bytes"),
        "depths together / apart, speed": least("depths_apart", "best_seconds")
        / least("depths_together", "best_seconds"),
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}x")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="new tokens")
    parser.add_argument(
        "--repeats", type=int, default=3, help="measured calls, after one to warm up"
    )
    parser.add_argument("--contenders", default=",".join(NAMES), help="names, comma-separated")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
    parser.add_argument("--contender", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        family, _, kind = args.contender.partition("_")
        if family == "lrjax":
            run_lrjax(args.prompt, args.new, args.repeats, kind)
        elif family == "torch":
            run_torch(args.prompt, args.new, args.repeats, kind)
        else:
            run_depths(args.prompt, args.repeats, kind == "together")
        return
    flags = [f"--prompt={args.prompt}", f"--new={args.new}", f"--repeats={args.repeats}"]
    results = contenders.run("benchmarks.generation", args.contenders.split(","), flags)
    print(f"SmolLM2-135M, {args.prompt} + {args.new} tokens, {contenders.machine()}")
    ratios = summarise(results)
    if args.out:
        figures = {
            "prompt": args.prompt, "new": args.new, "machine": contenders.machine(), "contenders": results,
            "ratios": ratios,
        }  # fmt: skip
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
