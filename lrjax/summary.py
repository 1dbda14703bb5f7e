"""The report stage: gathers what the stages left in the workdir and hands it to `reporting.report`."""

import jax
import numpy as np

from lrjax import examples
from lrjax import workdir as wd
from lrjax.assessment import checkpoints_to_evaluate
from lrjax.checkpoints import orbax
from lrjax.choosing import open_classes
from lrjax.evaluation import suite
from lrjax.longrecipe import impact, positions
from lrjax.reporting.report import write_report
from lrjax.run import checkpoint, open_tokenizer

SAMPLES = 200  # drawn for the statistics of a transform; the report draws a few of them
SHOWN_TOKENS = 600  # of each document on the impact page


def write(config, workdir) -> None:
    """Writes report/index.html and report/summary.json."""
    results = _results(config, workdir)
    drawn = _positions(config, workdir)
    analysis = _optional(workdir / "scores" / "analysis.json") or {}
    summary = {
        "config": wd.flatten(config),
        "devices": {"platform": jax.default_backend(), "count": jax.device_count()},
        "stages": _stages(workdir),
        "evaluation": {name: _figures(tasks) for name, tasks in results.items()},
        "impact": {
            "anchors": analysis.get("anchors", []),
            "classes": {row["name"]: row["lift"] for row in analysis.get("classes", [])},
        }
        | analysis.get("validation", {}),
        "positions": {name: positions.describe(samples) for name, samples in drawn.items()},
    }
    content = {
        "title": f"lrjax: {config.name}",
        "command": f"python -m lrjax.main --config=configs/{config.name}.py --workdir=RUN --config.seed={config.seed}",
        "intro": (
            f"A window of {config.window:,} tokens extended to {config.target_length:,}, trained on "
            f"{config.train_length:,} tokens at a time "
            f"({config.train_length / config.target_length:.0%} of the target)."
        ),
        "summary": summary,
        "window": config.window,
        "target": config.target_length,
        "chain": [
            name
            for name in ("base", config.method, "replayed", "merged")
            if orbax.is_model(checkpoint(workdir, name))
        ],
        "checkpoints": {name: _about(config, name) for name in results},
        "positions": {name: samples[:8] for name, samples in drawn.items()},
        "loss_panels": _loss_panels(config),
        "facts": {"anchor classes": ", ".join(analysis["anchors"]) or "none"} if analysis else {},
    }
    for task in ("niah", "perplexity", "short"):
        found = {name: tasks[task] for name, tasks in results.items() if task in tasks}
        if found:
            content[task] = found
    if benchmarks := {
        name: found for name, tasks in results.items() if (found := _benchmarks(tasks))
    }:
        content["benchmarks"] = benchmarks
    if analysis:
        content["impact"] = {
            "classes": analysis["classes"],
            "documents": _impact_documents(config, workdir),
            "frequency": analysis["frequency"],
        }
    if curve := _optional(workdir / "evaluation" / "merge_curve.json"):
        content["merge_curve"] = curve
    write_report(workdir, content)


def _optional(path):
    return wd.read_json(path) if path.is_file() else None


def _stages(workdir) -> dict:
    """{stage: {"seconds", "tokens", "flops"}} in the order of the recipe."""
    found = {path.stem: wd.read_json(path) for path in (workdir / "stages").glob("*.json")}
    order = [
        "import",
        "probe",
        "score",
        "analyse",
        "select",
        "extend",
        "replay",
        "merge",
        "evaluate",
    ]
    return {
        name: {key: found[name][key] for key in ("seconds", "tokens", "flops")}
        for name in order
        if name in found
    }


def _results(config, workdir) -> dict:
    """{checkpoint: {task: result}} of what has been evaluated."""
    results = {}
    for name in checkpoints_to_evaluate(config, workdir):
        folder = workdir / "evaluation" / name
        if tasks := {path.stem: wd.read_json(path) for path in sorted(folder.glob("*.json"))}:
            results[name] = tasks
    return results


def _figures(tasks: dict) -> dict:
    """{task: {metric or length: value}} of one checkpoint."""
    figures = {}
    if "niah" in tasks:
        figures["niah"] = tasks["niah"]["accuracy"]
        figures["niah_nll"] = tasks["niah"]["nll"]
    if "perplexity" in tasks:
        figures["perplexity"] = {
            f"{bucket['start']}-{bucket['stop']}": bucket["perplexity"]
            for bucket in tasks["perplexity"]["buckets"]
        }
    if "short" in tasks:
        figures["short"] = {source: result["nll"] for source, result in tasks["short"].items()}
    return figures | suite.summary(_benchmarks(tasks))


def _benchmarks(tasks: dict) -> dict:
    """{task: {length: result}} of the tasks of config.evaluate.suite."""
    return {
        name: result
        for name, result in tasks.items()
        if name not in ("niah", "perplexity", "short")
    }


def _about(config, name: str) -> dict:
    """How the report names a checkpoint."""
    if name == "base":
        return {"note": "before extension"}
    if name in ("replayed", "merged"):
        return {"group": "LongRecipe, the whole recipe"}
    method = config.methods[name]
    if not method.positions:
        return {"note": "RoPE base raised, nothing trained"}
    group = (
        "LongRecipe and its controls" if method.positions.startswith("longrecipe") else "Baselines"
    )
    note = f"text: {method.selection}, positions: {method.positions}"
    if method.contiguous_share:
        note += f"; {100 * method.contiguous_share:.0f} % of the examples: the start of a sample, contiguous"
    return {"group": group, "note": note}


def _positions(config, workdir) -> dict:
    """{transform: position arrays} as training drew them, of every transform of the config, without the contiguous
    examples that a method has a share of."""
    drawn = {}
    for name, method in config.methods.items():
        if not method.positions or method.positions in drawn:
            continue
        rng = np.random.default_rng(config.seed)
        if method.selection == "at_positions":
            segments = [np.asarray([examples.example_length(config, method)])]
        else:
            file = workdir / "selected" / f"{name}.array_record"
            if not file.is_file():
                continue
            records = examples.open_records(file)
            segments = [records[i]["segment_lengths"] for i in range(min(len(records), SAMPLES))]
        transform = positions.TRANSFORMS[method.positions]
        drawn[method.positions] = [
            transform(segments[index % len(segments)], config.target_length, rng)
            for index in range(SAMPLES)
        ]
    return drawn


def _loss_panels(config) -> dict:
    """Which curves share a panel."""
    panels = {}
    if config.pretrain:
        panels["Pretraining"] = {name: f"pretrain_{name}" for name in config.pretrain}
    panels["Extension"] = {"probe": "probe"} | {
        name: name for name in config.methods if config.methods[name].positions
    }
    panels["Replay"] = {"replay": "replayed"}
    return panels


def _impact_documents(config, workdir) -> list[dict]:
    """The first scored documents, their tokens with their change of logit."""
    texts = open_tokenizer(workdir).token_texts()
    classes = open_classes(config, workdir)
    scores = examples.open_records(workdir / "scores" / "long.array_record")
    documents = examples.open_records(workdir / "documents" / "long.array_record")
    rows = [scores[index] for index in range(len(scores))]
    changes = [impact.score_of(row, config.analyse.score) for row in rows]
    length = max(map(len, changes))
    delta_NL = impact.stack(changes, length)
    valid_NL = np.arange(length) < np.asarray([len(change) for change in changes])[:, None]
    valid_NL[:, : impact.unscored(config.analyse.score, config.score.short_context)] = False
    top_NL = impact.TOPS[config.analyse.top](delta_NL, config.analyse.top_fraction, valid_NL)
    shown = []
    for index in range(min(3, len(rows))):
        record = documents.by_id(rows[index]["id"])
        ids = record["tokens"][:SHOWN_TOKENS]
        count = len(ids)
        surface = [texts[token] for token in ids]
        shown.append(
            {
                "id": record["id"],
                "tokens": surface,
                # The first token is predicted by nothing.
                "scores": [None, *map(float, changes[index][: count - 1])],
                "top": [False, *map(bool, top_NL[index, : count - 1])],
                "classes": [classes.names[c] for c in classes.of(record)[:count]],
                "marks": [bool(mark) for mark in record["marks"][:count]],
                # A vocabulary of whole words keeps no spaces of its own.
                "separator": "" if any(text.startswith(" ") for text in texts) else " ",
            }
        )
    return shown
