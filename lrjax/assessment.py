"""The evaluate stage: every task on every checkpoint of a run, a file each, found again after a stop.

`evaluation/CHECKPOINT/TASK.json` for needle in a haystack (niah), perplexity by position and short-window loss, and
`evaluation/merge_curve.json`: the merged model at other weights.
"""

import numpy as np
from absl import logging

from lrjax import workdir as wd
from lrjax.checkpoints import orbax
from lrjax.errors import UserError
from lrjax.evaluation import niah, perplexity
from lrjax.longrecipe.merge_methods import METHODS
from lrjax.longrecipe.merge_trees import merge_trees
from lrjax.models.flops import forward_flops
from lrjax.run import checkpoint, load_checkpoint, open_data, open_tokenizer


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
            model = load_checkpoint(config, workdir, name)
        for task, function in missing.items():
            logging.info("evaluate: %s of %s", task, name)
            result, sequences, length = function(*model)
            wd.write_json(workdir / "evaluation" / name / f"{task}.json", result)
            used["tokens"] += sequences * length
            used["flops"] += forward_flops(model[0], sequences, length)
    if config.merge.curve and not (workdir / "evaluation" / "merge_curve.json").exists():
        _merge_curve(config, workdir, tasks)
    return used


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
    """Task name -> function(model_config, params) -> (result, sequences, length), for the tasks that are asked for."""
    tokenizer = open_tokenizer(workdir)
    section = config.evaluate
    tasks = {}
    if section.niah.lengths:
        tasks["niah"] = _niah_task(config, workdir, tokenizer)
    if section.perplexity.source:
        documents = _joined(
            config, workdir, tokenizer, section.perplexity.source, section.perplexity
        )

        def by_position(model_config, params):
            result = perplexity.perplexity_by_position(
                model_config, params, documents, section.perplexity.buckets
            )
            return result, len(documents), section.perplexity.length

        tasks["perplexity"] = by_position
    if section.short.sources:
        tasks["short"] = _short_task(config, workdir, tokenizer)
    return tasks


def _niah_task(config, workdir, tokenizer, lengths=()):
    section = config.evaluate.niah
    task = niah.NiahTask(
        lengths=tuple(lengths or section.lengths), depths=tuple(section.depths),
        samples_per_cell=section.samples_per_cell, needle=section.needle, question=section.question,
        keys=tuple(section["keys"]), values=tuple(section["values"]), distractors=section.distractors,
    )  # fmt: skip
    texts = [document.text for document in open_data(config, workdir, section.haystack)]

    def ask(model_config, params):
        result = niah.evaluate(
            task, model_config, params, tokenizer, texts, seed=config.seed, fast=section.fast,
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
    sources = {
        name: _joined(config, workdir, tokenizer, source, section, length)
        for name, source in section.sources.items()
    }

    def losses(model_config, params):
        result = {
            name: perplexity.short_loss(model_config, params, documents, length)
            for name, documents in sources.items()
        }
        return result, sum(map(len, sources.values())), length

    return losses


def _joined(config, workdir, tokenizer, source, section, length=0):
    """Token arrays [length]: documents of a source, one after the other where one is too short."""
    length = length or section.length or config.target_length
    documents, joined, room = [], [], length
    for document in open_data(config, workdir, source):
        tokens = tokenizer.encode(document.text)[:room]
        joined.append(tokens)
        room -= len(tokens)
        if not room:
            documents.append(np.concatenate(joined))
            joined, room = [], length
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
