"""The evaluate stage: every task on every checkpoint of a run, a file each, found again after a stop.

`evaluation/CHECKPOINT/TASK.json` for needle in a haystack (niah), perplexity by position, short-window loss and the
benchmarks of `config.evaluate.suite` ({length: result of questions.ask}), whose answers are kept one by one in
`evaluation/CHECKPOINT/answers/`, as the needles' are (a checkpoint that is made again is asked again when
`evaluation/CHECKPOINT` is removed); `evaluation/merge_curve.json`: the merged model at other weights;
`evaluation/lds.json`: how much the parts of each method's text depend on each other. The same tasks run during training
(`during_training`): `evaluation/STAGE/steps/STEP/TASK.json` and a row of the metrics.

Documents and needle prompts begin with what the tokenizer puts before a text (bos, or nothing), within their length;
"bos" in a result says whether there is something.
"""

import dataclasses
import functools

import numpy as np
from absl import logging

from lrjax import workdir as wd
from lrjax.checkpoints import orbax
from lrjax.data.records import RecordFile
from lrjax.errors import UserError
from lrjax.evaluation import longppl, niah, perplexity, questions, suite
from lrjax.evaluation.samples import Prompter
from lrjax.longrecipe import dependency
from lrjax.longrecipe.merge_methods import METHODS
from lrjax.longrecipe.merge_trees import merge_trees
from lrjax.models.bits import ready
from lrjax.models.flops import forward_flops
from lrjax.run import (
    checkpoint,
    load_checkpoint,
    load_for_reading,
    open_data,
    open_tokenizer,
)


def evaluate(config, workdir):
    """Runs the tasks of config.evaluate; returns the stage's tokens and model FLOPs."""
    tasks = make_tasks(config, workdir)
    used = {"tokens": 0, "flops": 0}
    for name in checkpoints_to_evaluate(config, workdir):
        missing = {
            task: function
            for task, function in tasks.items()
            if not (workdir / "evaluation" / name / f"{task}.json").exists()
        }
        if missing:
            _evaluate_checkpoint(config, workdir, name, missing, used)
    if config.evaluate.lds.documents and not (workdir / "evaluation" / "lds.json").exists():
        _long_dependency(config, workdir)
    if config.merge.curve and not (workdir / "evaluation" / "merge_curve.json").exists():
        _merge_curve(config, workdir, tasks)
    return used


def _evaluate_checkpoint(config, workdir, name, tasks, used) -> None:
    """Runs tasks of one checkpoint, adding to what is used; it is let go of before the next one is read."""
    model = load_for_reading(config, workdir, name)
    for task, function in tasks.items():
        logging.info("evaluate: %s of %s", task, name)
        result, sequences, length = function(*model, workdir / "evaluation" / name)
        wd.write_json(workdir / "evaluation" / name / f"{task}.json", result)
        used["tokens"] += sequences * length
        used["flops"] += forward_flops(model[0], sequences, length)


def _long_dependency(config, workdir) -> None:
    """evaluation/lds.json: {method: {"mean", "documents"}} of the text of every method that selects."""
    section, reader, found = config.evaluate.lds, load_for_reading(config, workdir, "base"), {}
    for name in config.methods:
        file = workdir / "selected" / f"{name}.array_record"
        if file.is_file():
            scores = [
                dependency.long_dependency(reader, record["tokens"], chunk=section.chunk)["lds"]
                for record in RecordFile(file)[: section.documents]
            ]
            found[name] = {"mean": float(np.mean(scores)), "documents": len(scores)}
    wd.write_json(workdir / "evaluation" / "lds.json", found)


def checkpoints_to_evaluate(config, workdir) -> list[str]:
    """The base, every method, replayed and merged: those that exist, in this order."""
    names = ["base", *config.methods, "replayed", "merged"]
    if config.evaluate.checkpoints:
        unknown = [name for name in config.evaluate.checkpoints if name not in names]
        if unknown:
            raise UserError(
                f"config.evaluate.checkpoints: {unknown[0]!r} is none of {', '.join(names)}"
            )
        names = [name for name in names if name in config.evaluate.checkpoints]
    return [name for name in names if orbax.is_model(checkpoint(workdir, name))]


def make_tasks(config, workdir) -> dict:
    """Task name -> function(model_config, params, folder=None) -> (result, sequences, length), of those asked for.

    `folder` is the checkpoint's below evaluation/: a task may keep there what it has done so far.
    """
    tokenizer = open_tokenizer(workdir)
    opening = tokenizer.opening_ids()
    section = config.evaluate
    tasks = {}
    if section.niah.lengths:
        tasks["niah"] = _niah_task(config, workdir, tokenizer)
    if section.perplexity.source:
        documents = _joined(
            config, workdir, tokenizer, section.perplexity.source, section.perplexity
        )

        @functools.cache  # one for all checkpoints
        def chooser():
            return load_for_reading(config, workdir, section.perplexity.key_evaluator)

        def by_position(model_config, params, folder=None):
            del folder
            part = section.perplexity
            result = perplexity.perplexity_by_position(
                model_config, params, documents, part.buckets
            )
            result["bos"] = len(opening) > 0
            if part.window:
                result["sliding_window"] = perplexity.sliding_window(
                    model_config, params, documents, part.window, part.stride, opening=opening
                )
            if part.key_context:
                judge = part.key_evaluator and chooser()
                result["longppl"] = longppl.longppl(
                    model_config, params, documents, context=part.key_context, opening=opening, evaluator=judge or None
                ) | {"evaluator": part.key_evaluator or "itself"}  # fmt: skip
            return result, len(documents), part.length

        tasks["perplexity"] = by_position
    if section.short.sources:
        tasks["short"] = _short_task(config, workdir, tokenizer)
    if section.suite.tasks:
        tasks |= _suite_tasks(config, tokenizer)
    return tasks


def _suite_tasks(config, tokenizer) -> dict:
    """The benchmarks, each at all its lengths."""
    section = config.evaluate.suite
    names = {field.name for field in dataclasses.fields(suite.Options)}
    options = suite.Options(
        **{
            name: tuple(value) if isinstance(value, tuple | list) else value
            for name, value in section.items()
            if name in names
        }
    )
    if options.readings():
        raise UserError(
            f"config.evaluate.suite.tasks: {options.readings()[0]!r}; allowed: config.evaluate.perplexity, which has it"
        )
    prompter = Prompter(tokenizer, section.chat)
    makers = suite.Suite(options, prompter)
    lengths: dict[str, list] = {}
    for name, length in options.pairs():
        lengths.setdefault(name, []).append(length)

    def task_of(name):
        made = {}  # the questions are the same for every checkpoint

        def run(model_config, params, folder=None):
            if not made:
                prompter.tell_what_is_left_out(f"evaluate: {name}", "config.evaluate.suite.chat")
            answer = questions.lrjax_answerer(
                model_config, ready(model_config, params), tokenizer, batch_size=section.batch_size
            )
            found = {}
            for length in lengths[name]:
                if length not in made:
                    made[length] = makers.make(name, length)
                task, key = made[length], str(length or "all")
                found[key] = questions.ask(
                    task, answer, prompter,
                    limit=suite.best_limit(task, config.target_length, section.limit),
                    predictions=folder and folder / "answers" / key / f"{name.replace(':', '-')}.jsonl",
                    progress=questions.progress_log(f"{name} {key}"),
                )  # fmt: skip
            count = sum(result["count"] for result in found.values())
            return found, count, sum(result["tokens"] for result in found.values()) // count

        return run

    return {name.replace(":", "-"): task_of(name) for name in lengths}


def during_training(config, workdir, stage: str):
    """A function(step, model_config, params) -> {metric: value} for `training.loop.train`, or None.

    It runs the tasks of config.evaluate.during on the parameters as they are, writes
    evaluation/STAGE/steps/STEP/TASK.json, and gives the loop one number for each task and length.
    """
    section = config.evaluate.during
    if not section.every or not section.tasks or (section.stages and stage not in section.stages):
        return None
    tasks = make_tasks(config, workdir)
    judge = config.evaluate.perplexity.key_evaluator
    if "perplexity" in section.tasks and judge and not orbax.is_model(checkpoint(workdir, judge)):
        raise UserError(
            f"config.evaluate.perplexity.key_evaluator {judge!r}: it is not there while {stage!r} is trained; allowed: "
            "another one, or config.evaluate.during.stages without this stage"
        )
    unknown = [name for name in section.tasks if name not in tasks]
    if unknown:
        raise UserError(
            f"config.evaluate.during.tasks: {unknown[0]!r} is none of {', '.join(tasks) or 'no tasks'}"
        )

    def run(step: int, model_config, params) -> dict[str, float]:
        metrics = {}
        folder = workdir / "evaluation" / stage / "steps" / str(step)
        for name in section.tasks:
            file = folder / f"{name}.json"
            if (
                file.exists()
            ):  # the run was stopped after this step's evaluation and before its checkpoint
                result = wd.read_json(file)
            else:
                result, _, _ = tasks[name](model_config, params, folder)
                wd.write_json(file, result)
            for part, value in task_figures(name, result).items():
                metrics[f"evaluation/{part}"] = value
        return metrics

    return run


def task_figures(name: str, result) -> dict[str, float]:
    """{"TASK/LENGTH or metric": value} of one task's result: what a curve or a table shows."""
    if name == "niah":
        return {f"niah/{length}": share for length, share in result["accuracy"].items()}
    if name == "perplexity":
        return {
            f"perplexity/{bucket['start']}-{bucket['stop']}": bucket["perplexity"]
            for bucket in result["buckets"]
            if bucket["perplexity"] is not None
        }
    if name == "short":
        return {f"short/{source}": each["nll"] for source, each in result.items()}
    return {f"{name}/{length}": each["score"] for length, each in result.items()}


def _niah_task(config, workdir, tokenizer, lengths=()):
    section = config.evaluate.niah
    task = niah.NiahTask(
        lengths=tuple(lengths or section.lengths), depths=tuple(section.depths),
        samples_per_cell=section.samples_per_cell, needle=section.needle, question=section.question,
        keys=tuple(section["keys"]), values=tuple(section["values"]), distractors=section.distractors,
        add_bos=bool(tokenizer.opening_ids()),
    )  # fmt: skip
    texts = [document.text for document in open_data(config, workdir, section.haystack)]

    def ask(model_config, params, folder=None):
        result = niah.evaluate(
            task, model_config, params, tokenizer, texts, seed=config.seed, fast=section.fast,
            # What is asked in one pass takes seconds.
            kept=None if section.fast else folder and folder / "answers" / "niah.jsonl",
            batch_size=section.batch_size, progress=lambda done, total: logging.log_every_n_seconds(
                logging.INFO, "niah: %d of %d prompts", 20, done, total
            ),
        )  # fmt: skip
        prompts = len(task.lengths) * len(task.depths) * task.samples_per_cell
        return result, prompts, result["tokens"] // prompts

    return ask


def _short_task(config, workdir, tokenizer):
    """Mean loss in the original window, for each source: what an extension forgets."""
    section = config.evaluate.short
    length = section.length or config.window
    bos = bool(tokenizer.opening_ids())
    sources = {
        name: _joined(config, workdir, tokenizer, source, section, length)
        for name, source in section.sources.items()
    }

    def losses(model_config, params, folder=None):
        del folder
        result = {
            name: perplexity.short_loss(model_config, params, documents, length) | {"bos": bos}
            for name, documents in sources.items()
        }
        return result, sum(map(len, sources.values())), length

    return losses


def _joined(config, workdir, tokenizer, source, section, length=0):
    """Token arrays [length]: documents of a source, one after the other where one is too short.

    Each begins with the tokenizer's opening, within the length.
    """
    length = length or section.length or config.target_length
    opening = tokenizer.opening_ids()
    documents, joined, room = [], [], length - len(opening)
    for document in open_data(config, workdir, source):
        tokens = tokenizer.encode(document.text)[:room]
        joined.append(tokens)
        room -= len(tokens)
        if not room:
            documents.append(perplexity.opened(np.concatenate(joined), opening))
            joined, room = [], length - len(opening)
        if len(documents) == section.documents:
            return documents
    if not documents:
        raise UserError(
            f"data source {source!r}: fewer than the {length} tokens that an evaluation takes"
        )
    logging.warning(
        "data source %r: %d documents of %d tokens, not %d",
        source,
        len(documents),
        length,
        section.documents,
    )
    return documents


# ------------------------------------------------------------------------------------------- merges


def merge_settings(section, base_weight: float, base, replayed) -> tuple[list, dict]:
    """([(weight, source), ...], settings) of a merge of the base with the replayed model, by config.merge.

    Methods that add differences to the base add `1 - base_weight` of the replayed model's.
    """
    if not METHODS[section.method].base or section.method == "slerp":
        weighted = [(base_weight, base), (1 - base_weight, replayed)]
        return weighted, {"method": section.method}
    # Divided by its own weight, a single difference would always count whole.
    settings = {"base": base, "density": section.density, "normalize": False}
    return [(1 - base_weight, replayed)], {"method": section.method, **settings}


def merge_tasks(config, workdir, tasks) -> dict:
    """Of the evaluation's tasks, those that a merge is judged by: needles at the longest length, short loss."""
    found = {name: tasks[name] for name in ("short",) if name in tasks}
    if "niah" in tasks:
        longest = [max(config.evaluate.niah.lengths)]
        found["niah"] = _niah_task(config, workdir, open_tokenizer(workdir), longest)
    return found


def _merge_curve(config, workdir, tasks) -> None:
    """Needle accuracy at the target and short loss of the base and the replayed model at other weights."""
    if not orbax.is_model(checkpoint(workdir, "replayed")):
        return
    tasks = merge_tasks(config, workdir, tasks)
    models = {}
    points = []
    for weight in config.merge.curve:
        point = {"base_weight": weight}
        known = _known_merge(config, workdir, weight, tasks)
        if known is None:
            if not models:
                models["base"] = load_checkpoint(config, workdir, "base")
                models["replayed"] = load_checkpoint(config, workdir, "replayed")
            weighted, settings = merge_settings(
                config.merge, weight, models["base"][1], models["replayed"][1]
            )
            params = merge_trees(weighted, **settings)
            known = {
                name: function(models["replayed"][0], params)[0] for name, function in tasks.items()
            }
        points.append(point | known)
    wd.write_json(workdir / "evaluation" / "merge_curve.json", points)


def _known_merge(config, workdir, weight: float, tasks) -> dict | None:
    """What is evaluated already: the merged model; at 0 the replayed one, at 1 the base with a raised RoPE base."""
    raised = [name for name, method in config.methods.items() if not method.positions]
    name = {config.merge.base_weight: "merged", 0: "replayed", 1: raised[0] if raised else None}
    files = {
        task: workdir / "evaluation" / str(name.get(weight)) / f"{task}.json" for task in tasks
    }
    if not all(file.is_file() for file in files.values()):
        return None
    known = {task: wd.read_json(file) for task, file in files.items()}
    if "niah" in known:
        known["niah"] = _at_length(known["niah"], max(config.evaluate.niah.lengths))
    return known


def _at_length(result: dict, length: int) -> dict:
    """The figures of one length of a needle result; its prompts are the same as if only they had been asked."""
    figures = {
        name: {str(length): result[name][str(length)]} for name in ("accuracy", "interval", "nll")
    }
    return figures | {"cells": [cell for cell in result["cells"] if cell["length"] == length]}
