"""Merging two or three checkpoints: lrjax against mergekit and against `cp`, results and speed.

    python -m benchmarks.merging --mergekit=/tmp/mergekit/bin/mergekit-yaml [--gigabytes=2] [--out=merging.json]

mergekit is run from an environment of its own (`python -m venv /tmp/mergekit && /tmp/mergekit/bin/pip install
mergekit==0.1.5`); without --mergekit its rows are left out, and the output says so. Both get the same YAML and the same
Hugging Face directories of random weights, in float32 computation, bfloat16 out.

* Parity, on a small model: for every method the largest difference in units in the last place of bfloat16 at the
  element's largest operand, how many elements differ at all, and how many by more than one unit of the result itself
  (where operands cancel, what is left of both results is the rounding of float32). Sources in float32, whose
  differences have no ties to speak of, and in bfloat16, which are full of them: which of the tied differences at the
  threshold of TIES are kept is chance in mergekit (an unstable sort), so elements with a tie are counted apart.
* Speed, on `--gigabytes` each: seconds, processor seconds and peak of resident memory of every process, files in the
  page cache, best of `--repeats` taken in turns; `cp` copies both sources. Nobody waits for the disk.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks import contenders

METHODS = {
    "linear": "merge_method: linear",
    "slerp": "merge_method: slerp\nbase_model: {base}",
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: {base}",
    "ties": "merge_method: ties\nbase_model: {base}",
}
PARAMETERS = {
    "linear": ("weight: 0.3", "weight: 0.7"),
    "slerp": ("", ""),
    "task_arithmetic": ("weight: 0.6", "weight: 0.5"),
    "ties": ("weight: 0.6\n      density: 0.3", "weight: 0.5\n      density: 0.5"),
}


def shapes(embed: int, mlp: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama model with head width 64 and half as many key/value heads."""
    found = {"model.embed_tokens.weight": (vocabulary, embed)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        found |= {
            name + "self_attn.q_proj.weight": (embed, embed),
            name + "self_attn.k_proj.weight": (embed // 2, embed),
            name + "self_attn.v_proj.weight": (embed // 2, embed),
            name + "self_attn.o_proj.weight": (embed, embed),
            name + "mlp.gate_proj.weight": (mlp, embed),
            name + "mlp.up_proj.weight": (mlp, embed),
            name + "mlp.down_proj.weight": (embed, mlp),
            name + "input_layernorm.weight": (embed,),
            name + "post_attention_layernorm.weight": (embed,),
        }
    return found | {"model.norm.weight": (embed,), "lm_head.weight": (vocabulary, embed)}


def write_model(folder: pathlib.Path, size: dict, dtype, seed: int, start=None) -> None:
    """A model near `start` (a seed): what fine-tuning makes of one base."""
    folder.mkdir(parents=True)
    rng, base = np.random.default_rng(seed), start is not None and np.random.default_rng(start)
    tensors = {}
    for name, shape in shapes(**size).items():
        values = rng.standard_normal(shape, np.float32)
        if base:
            values = base.standard_normal(shape, np.float32) + np.float32(0.1) * values
        tensors[name] = (0.02 * values).astype(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size["vocabulary"],
        "num_hidden_layers": size["layers"], "hidden_size": size["embed"], "head_dim": 64,
        "num_attention_heads": size["embed"] // 64, "num_key_value_heads": size["embed"] // 128,
        "intermediate_size": size["mlp"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "torch_dtype": np.dtype(dtype).name,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_yaml(path: pathlib.Path, method: str, models, base) -> pathlib.Path:
    lines = [METHODS[method].format(base=base), "dtype: float32", "out_dtype: bfloat16"]
    if method == "slerp":
        lines.append("parameters:\n  t: 0.35")
    lines.append("models:")
    for model, parameters in zip(models, PARAMETERS[method], strict=True):
        lines.append(f"  - model: {model}")
        if parameters:
            lines.append(f"    parameters:\n      {parameters}")
    path.write_text("\n".join(lines) + "\n")
    return path


def timed(command: list[str]) -> dict[str, float]:
    """Seconds, processor seconds and peak memory of a process; its output is shown when it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))}\n{output[-3000:]}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def apart(function, *arguments):
    """Calls a function in a process of its own: a child's peak memory begins with that of its parent."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def commands(mergekit: str | None) -> dict:
    found = {
        "lrjax": lambda yml, out: [
            sys.executable,
            "-m",
            "lrjax.merge",
            f"--config={yml}",
            f"--out={out}",
        ]
    }
    if mergekit:
        found["mergekit"] = lambda yml, out: [mergekit, str(yml), str(out)]
    return found


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of bfloat16 numbers in steps from one to the next."""

    def ordered(x):
        bits = x.view(np.uint16).astype(np.int32)
        return np.where(bits & 0x8000, 0x8000 - bits, bits)

    return np.abs(ordered(a) - ordered(b))


def units(ours: np.ndarray, theirs: np.ndarray, operands) -> np.ndarray:
    """Absolute difference in units in the last place of bfloat16 at the largest operand."""
    largest = np.maximum.reduce([np.abs(x.astype(np.float32)) for x in operands])
    unit = np.exp2(np.floor(np.log2(np.maximum(largest, 1e-30))) - 7)
    return np.abs(ours.astype(np.float32) - theirs.astype(np.float32)) / unit


def tied(sources: dict, name: str, density: dict) -> np.ndarray:
    """Elements whose difference to the base is of the threshold's magnitude in some source."""
    base = sources["base"][name].astype(np.float32)
    found = np.zeros(base.shape, bool)
    for source, share in density.items():
        size = np.abs(sources[source][name].astype(np.float32) - base)
        keep = max(1, int(share * size.size))
        found |= size == np.partition(size.ravel(), size.size - keep)[size.size - keep]
    return found


def parity(folder: pathlib.Path, mergekit: str) -> list[dict]:
    size = {"embed": 256, "mlp": 768, "layers": 4, "vocabulary": 4000}
    rows = []
    for dtype in (np.float32, ml_dtypes.bfloat16):
        where = folder / np.dtype(dtype).name
        for seed, name in enumerate(("base", "a", "b")):
            write_model(where / name, size, dtype, seed, start=0 if seed else None)
        sources = {n: load_file(where / n / "model.safetensors") for n in ("base", "a", "b")}
        for method in METHODS:
            models = [where / "a", where / "b"]
            base = models[0] if method == "slerp" else where / "base"
            yml = write_yaml(where / f"{method}.yml", method, models, base)
            merged = {}
            for tool, command in commands(mergekit).items():
                out = where / f"{method}-{tool}"
                timed(command(yml, out))
                merged[tool] = {}
                for file in out.glob("*.safetensors"):
                    merged[tool] |= load_file(file)
            ours, theirs = merged["lrjax"], merged["mergekit"]
            assert ours.keys() == theirs.keys()
            row = {
                "sources": np.dtype(dtype).name, "method": method, "elements": 0, "differ": 0,
                "max_units": 0.0, "over_1_ulp_of_result": 0, "differ_at_ties": 0,
            }  # fmt: skip
            for name in ours:
                steps = ulps(ours[name], theirs[name])
                apart = units(ours[name], theirs[name], [s[name] for s in sources.values()])
                if method == "ties":
                    ties = tied(sources, name, {"a": 0.3, "b": 0.5})
                    row["differ_at_ties"] += int(((steps > 0) & ties).sum())
                    steps, apart = np.where(ties, 0, steps), np.where(ties, 0, apart)
                row["elements"] += steps.size
                row["differ"] += int((steps > 0).sum())
                row["over_1_ulp_of_result"] += int((steps > 1).sum())
                row["max_units"] = max(row["max_units"], float(apart.max()))
            rows.append(row)
            print(row)
    return rows


def speed(
    folder: pathlib.Path, mergekit: str | None, gigabytes: float, repeats: int, methods
) -> dict:
    # About 0.1 GB in the embedding and the head each, the rest in layers: a 1B model's shape at 2 GB.
    embed, mlp, vocabulary = 2048, 5632, 32000
    layer = 2 * (3 * embed * embed + 3 * embed * mlp)
    layers = max(1, round((gigabytes * 1e9 - 4 * vocabulary * embed) / layer))
    size = {"embed": embed, "mlp": mlp, "layers": layers, "vocabulary": vocabulary}
    for seed, name in enumerate(("base", "a", "b")):
        apart(write_model, folder / name, size, ml_dtypes.bfloat16, seed, 0 if seed else None)
    bytes_each = (folder / "a" / "model.safetensors").stat().st_size
    subprocess.run(["sync"], check=True)
    out = folder / "out"
    both = [str(folder / name / "model.safetensors") for name in ("a", "b")]
    jobs = {
        "cp": lambda: ["sh", "-c", f"mkdir {out} && cp {both[0]} {out}/a && cp {both[1]} {out}/b"]
    }
    for method in methods:
        base = folder / "a" if method == "slerp" else folder / "base"
        yml = write_yaml(folder / f"{method}.yml", method, [folder / "a", folder / "b"], base)
        for tool, command in commands(mergekit).items():
            jobs[f"{method} {tool}"] = lambda c=command, y=yml: c(y, out)
        jobs[f"{method} lrjax, no hashes"] = lambda y=yml: [
            *commands(None)["lrjax"](y, out), "--nohashes",
        ]  # fmt: skip
    results = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            shutil.rmtree(out, ignore_errors=True)
            results[name].append(timed(job()))
            print(name, results[name][-1], flush=True)
    shutil.rmtree(out, ignore_errors=True)
    keys = ("seconds", "cpu_seconds", "peak_bytes")
    best = {
        name: {key: min(run[key] for run in runs) for key in keys} for name, runs in results.items()
    }
    return {"bytes_each": bytes_each, **best}


def show(results: dict) -> None:
    each = results["bytes_each"]
    print(f"\n{'':32}{'seconds':>9}{'cpu s':>8}{'GB read/s':>11}{'peak MB':>9}{'of a model':>12}")
    for name, run in results.items():
        if name == "bytes_each":
            continue
        read = (3 if name.startswith(("task", "ties")) else 2) * each
        rate, share = read / run["seconds"] / 1e9, run["peak_bytes"] / each
        print(
            f"{name:32}{run['seconds']:>9.2f}{run['cpu_seconds']:>8.2f}{rate:>11.2f}"
            f"{run['peak_bytes'] / 1e6:>9.0f}{share:>12.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mergekit", help="the program mergekit-yaml of an environment that has it"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--parts", default="parity,speed")
    parser.add_argument("--folder", help="for the checkpoints; default a temporary one")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
    args = parser.parse_args()
    print(contenders.machine())
    figures = {"machine": contenders.machine()}
    if not args.mergekit:
        print("no --mergekit: its rows are left out, and so is the comparison of results")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if "parity" in args.parts and args.mergekit:
            figures["parity"] = apart(parity, pathlib.Path(folder) / "parity", args.mergekit)
        if "speed" in args.parts:
            figures["speed"] = speed(
                pathlib.Path(folder) / "speed", args.mergekit, args.gigabytes, args.repeats,
                args.methods.split(","),
            )  # fmt: skip
            show(figures["speed"])
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
