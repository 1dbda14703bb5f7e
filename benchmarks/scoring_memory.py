"""Memory and speed of scoring a pair of SmolLM2-135M's at 8,192 tokens: lrjax against whole logits, and transformers.

    python -m benchmarks.scoring_memory --out=scoring_memory.json [--length=8192]

Every contender runs in a process of its own with both models loaded, their matrices in bfloat16. "Extra" is the
highest resident memory during scoring less the resident memory before it (Linux: VmHWM, reset through
/proc/self/clear_refs), compilation included, or with JAX_PLATFORMS=cuda the GPU's (of JAX with what loading the models
took beyond them, if that was more); "compiled" is what the compiler says its program needs beside its arguments.

* `lrjax`: `lrjax.longrecipe.scoring.make_scorer`, which holds the logits of a chunk of tokens at a time.
* `whole_logits`: the same models, [B, L, V] of both written out, the change of logit and log-probability from them.
* `transformers`: two forward passes in bfloat16 with its default attention, one after the other; the logits of each are
  dropped when the tokens' logits and log-probabilities are read off them.

Tokens a second are of the second call: compilation and first touches of memory are left out; tokens a second of CPU
time stand beside them, for machines that are busy otherwise. Aims: at least the speed
of transformers, at a tenth of its extra memory.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from benchmarks import contenders

NAMES = ["lrjax", "whole_logits", "transformers"]


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (highest since the last reset) of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def run(name: str, length: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lrjax.checkpoints import loading
    from lrjax.longrecipe import scoring
    from lrjax.models import head
    from lrjax.models.bits import from_bits, to_bits
    from lrjax.models.llama import Llama

    config, base_params, _ = loading.load_for_reading("smollm2", "bfloat16")
    extended = dataclasses.replace(config, rope_theta=310_700.0, max_position_embeddings=16384)

    def larger(x):
        values = (1.01 * from_bits(x).astype(jnp.float32)).astype(from_bits(x).dtype)
        return jax.block_until_ready(to_bits(values) if x.dtype == jnp.uint16 else values)

    extended_params = jax.tree.map(larger, base_params)
    tokens_BL = np.random.default_rng(0).integers(config.vocab_size, size=(1, length))
    positions_BL = np.arange(length, dtype=np.int32)[None]
    inputs = tokens_BL.astype(np.int32), positions_BL, np.ones((1, length), np.int32)

    @jax.jit
    def whole_logits(params, other, tokens_BL, positions_BL, segment_ids_BL):
        def of(config, params):
            x_BLD = Llama(config).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
            return head.logits(params, x_BLD)[:, :-1]

        def pick(a_BLV):
            return jnp.take_along_axis(a_BLV, tokens_BL[:, 1:, None], axis=-1)[..., 0]

        base_BLV, extended_BLV = of(config, params), of(extended, other)
        logprob = pick(jax.nn.log_softmax(extended_BLV)) - pick(jax.nn.log_softmax(base_BLV))
        return pick(extended_BLV) - pick(base_BLV), logprob

    scorer = scoring.make_scorer(config, extended) if name == "lrjax" else whole_logits
    before = reset_peak()
    compiled = scorer.lower(base_params, extended_params, *inputs).compile()
    jax.block_until_ready(compiled(base_params, extended_params, *inputs))
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(base_params, extended_params, *inputs))
    contenders.report(
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
        extra_bytes=highest() - before,
        compiled_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )


def reset_peak() -> int:
    """Sets the highest memory back to the present one, where it can be, and returns the present one."""
    if not contenders.on_gpu():
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    import jax

    return jax.devices()[0].memory_stats()["bytes_in_use"]


def highest() -> int:
    return contenders.peak_bytes() if contenders.on_gpu() else resident("VmHWM")


def run_transformers(length: int, folder: pathlib.Path) -> None:
    import copy

    import numpy as np
    import torch
    import transformers

    # Not from the GGUF file: transformers would keep its weights packed and unpack them in every product.
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    base = base.to(contenders.torch_device())
    extended = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in extended.parameters():
            parameter.mul_(1.01)
    vocab_size = base.config.vocab_size
    tokens_BL = torch.from_numpy(np.random.default_rng(0).integers(vocab_size, size=(1, length)))
    tokens_BL = tokens_BL.to(contenders.torch_device())

    @torch.inference_mode()
    def score():
        stats = []
        for model in (base, extended):
            logits_BLV = model(tokens_BL, use_cache=False).logits[:, :-1]
            logit_BL = logits_BLV.gather(-1, tokens_BL[:, 1:, None])[..., 0].float()
            logprob_BL = logit_BL - torch.logsumexp(logits_BLV, dim=-1).float()
            stats.append((logit_BL, logprob_BL))
            del logits_BLV
        changes = [after - before for before, after in zip(*stats, strict=True)]
        contenders.finish()
        return changes

    before = reset_peak()
    score()
    start, cpu = time.perf_counter(), time.process_time()
    score()
    contenders.report(
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
        extra_bytes=highest() - before,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the one document")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
    parser.add_argument("--contenders", default=",".join(NAMES), help="names, comma-separated")
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender == "transformers":
        return run_transformers(args.length, args.folder)
    if args.contender:
        return run(args.contender, args.length)
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder) / "smollm2"
        convert = [sys.executable, "-m", "lrjax.convert", "smollm2", str(target), "--to=hf"]
        subprocess.run(convert, check=True)
        flags = [f"--length={args.length}", f"--folder={target}"]
        results = contenders.run("benchmarks.scoring_memory", args.contenders.split(","), flags)
    print(f"Scoring a pair of SmolLM2-135M, {args.length} tokens, {contenders.machine()}")
    print(f"{'':16}{'extra GB':>10}{'compiled GB':>13}{'tokens/s':>10}{'a CPU s':>10}")
    for name, result in results.items():
        if "error" in result:
            print(f"{name:16}{result['error']:>10}")
            continue
        extra, speed = result["extra_bytes"] / 1e9, args.length / result["seconds"]
        compiled = f"{result['compiled_bytes'] / 1e9:.2f}" if "compiled_bytes" in result else "-"
        steady = args.length / result["cpu_seconds"]
        print(f"{name:16}{extra:>10.2f}{compiled:>13}{speed:>10.0f}{steady:>10.0f}")
    if args.out:
        figures = {"length": args.length, "machine": contenders.machine(), "contenders": results}
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
