"""Reading a checkpoint into arrays against reading its files: seconds and memory.

    python -m benchmarks.import_speed [--gigabytes=2.2] [--repeats=3] [--dir=DIR] [--out=import_speed.json]

Makes a Llama checkpoint of random bfloat16 weights in shards of 0.5 GB below `--dir` (default: a temporary folder), and
takes turns, each a process of its own:

* `cat`: `cat FILES > /dev/null`.
* `lrjax`: `huggingface.load` in the dtype of the file, its start-up (imports, the first array on the device)
  left out, its compilations not. The programs are those of any import: of the few shapes that a model has.
* `lrjax_float32`: the same to float32, what `lrjax.load` does: twice the bytes to write.

warm: the files are in the page cache. cold: their pages are dropped before each run (posix_fadvise DONTNEED, after an
fsync; no root needed), so the disk is read. The best of `--repeats` counts: other work on the machine only adds;
processor seconds (all threads) hardly depend on it.

Memory on a CPU: the arrays live in the host's memory, too, so their bytes are part of what the process grows by.
`extra` is the most that anonymous memory grew by, less the arrays' own bytes: buffers on the way. The aim: at most the
largest tensor and 2 GB. `mapped` is the same with pages of files, which the kernel takes back when it
needs them. On a GPU or TPU the arrays are elsewhere, and `extra` is what stays on the host.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import subprocess
import tempfile
import threading
import time

from benchmarks import contenders

SHARD_BYTES = 500_000_000
SIZE = {
    "embed": 2048,
    "mlp": 5632,
    "vocabulary": 32000,
}  # of TinyLlama, with as many layers as fill the file
CONTENDERS = {"lrjax": "stored", "lrjax_float32": "float32"}


def make_checkpoint(folder: pathlib.Path, gigabytes: float) -> None:
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from benchmarks.merging import shapes

    per_layer = sum(map(np.prod, shapes(layers=1, **SIZE).values())) - sum(
        map(np.prod, shapes(layers=0, **SIZE).values())
    )
    fixed = sum(map(np.prod, shapes(layers=0, **SIZE).values()))
    layers = -int(-(gigabytes * 1e9 / 2 - fixed) // per_layer)
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 24, np.float32).astype(ml_dtypes.bfloat16)
    shards: list[dict] = [{}]
    for name, shape in shapes(layers=layers, **SIZE).items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        start = rng.integers(len(block))
        shards[-1][name] = np.resize(np.roll(block, start), shape)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama", "vocab_size": SIZE["vocabulary"], "num_hidden_layers": layers,
        "hidden_size": SIZE["embed"], "head_dim": 64, "num_attention_heads": SIZE["embed"] // 64,
        "num_key_value_heads": SIZE["embed"] // 128, "intermediate_size": SIZE["mlp"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_from_cache(files) -> None:
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cat(files) -> dict[str, float]:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, files)], stdout=nowhere, check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "processor": processor(after) - processor(before)}


def processor(usage) -> float:
    return usage.ru_utime + usage.ru_stime


def resident() -> tuple[int, int]:
    """Bytes of anonymous memory, and of all resident memory, of this process (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    anonymous, everything = (
        int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024 for field in ("RssAnon", "VmRSS")
    )  # fmt: skip
    return anonymous, everything


class Watch(threading.Thread):
    """The most memory since it was started, looked at every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = resident()
        self._done = threading.Event()

    def run(self):
        while not self._done.wait(0.002):
            self.most = tuple(map(max, self.most, resident()))

    def grown(self) -> tuple[int, int]:
        self._done.set()
        self.join()
        return tuple(most - before for most, before in zip(self.most, self.before, strict=True))


def run(folder: pathlib.Path, dtype: str) -> None:
    import jax

    from lrjax.checkpoints import huggingface
    from lrjax.command import keep_freed_memory

    keep_freed_memory()  # as the programs do
    jax.block_until_ready(jax.numpy.zeros(8))
    watch = Watch()
    watch.start()
    start, before = time.perf_counter(), processor(resource.getrusage(resource.RUSAGE_SELF))
    _, params = huggingface.load(folder, dtype=dtype)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    busy = processor(resource.getrusage(resource.RUSAGE_SELF)) - before
    anonymous, everything = watch.grown()
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    contenders.report(
        seconds=seconds,
        processor=busy,
        arrays=arrays,
        extra=anonymous - arrays,
        mapped=everything - arrays,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--dir", type=pathlib.Path, help="Where to make the checkpoint; kept there."
    )
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.contender:
        return run(flags.dir, CONTENDERS[flags.contender])
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.dir or pathlib.Path(temporary)
        if not files_of(folder):
            make_checkpoint(folder, flags.gigabytes)
        files = files_of(folder)
        size = sum(file.stat().st_size for file in files)
        found: dict = {"bytes": size, "warm": {}, "cold": {}}
        for _ in range(flags.repeats):
            for kind, best in ((k, found[k]) for k in ("warm", "cold")):
                for name in ("cat", *CONTENDERS):
                    cat(files) if kind == "warm" else drop_from_cache(files)
                    if name == "cat":
                        result = cat(files)
                    else:
                        result = contenders.run(
                            "benchmarks.import_speed", [name], [f"--dir={folder}"]
                        )[name]
                    if name not in best or result["seconds"] < best[name]["seconds"]:
                        best[name] = result
        print(table(found))
        if flags.out:
            flags.out.write_text(json.dumps(found, indent=2) + "\n")


def table(found: dict) -> str:
    names = ["cat", *CONTENDERS]
    size = f"{found['bytes'] / 1e9:.2f} GB in bfloat16"
    heads = [
        size,
        "warm, s",
        "cat / it",
        "cold, s",
        "cat / it",
        "processor, s",
        "extra",
        "extra and mapped",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in names:
        row = [name]
        for kind in ("warm", "cold"):
            seconds = found[kind][name]["seconds"]
            row += [f"{seconds:.2f}", f"{found[kind]['cat']['seconds'] / seconds:.2f}"]
        row.append(f"{min(found[kind][name]['processor'] for kind in ('warm', 'cold')):.1f}")
        for field in ("extra", "mapped"):
            most = max(found[kind][name].get(field, 0) for kind in ("warm", "cold"))
            row.append("" if name == "cat" else f"{most / 1e9:.2f} GB")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
