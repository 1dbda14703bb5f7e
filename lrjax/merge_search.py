"""Which weights? Merges are evaluated with the tasks of a recipe: a frontier of needles against short loss, or a soup.

    search(["base", "replayed"], 4, "configs/tiny.py", "runs/demo", "runs/demo-search", rope_from="replayed")
    soup(["run-a", "run-b", "run-c"], "short", "configs/tiny.py", "runs/demo", "soup")

Models are merged in memory to be evaluated; what a soup has chosen is then merged from the files. A point that is
evaluated is kept in OUT/search.json, so a search that was stopped goes on.
"""

import importlib.util
import itertools
import pathlib

import numpy as np
from absl import logging

from lrjax import assessment
from lrjax import workdir as wd
from lrjax.checkpoints import loading, streaming
from lrjax.errors import UserError
from lrjax.longrecipe import merge_checks, merging
from lrjax.longrecipe.merge_trees import merge_trees
from lrjax.reporting import plots, tables
from lrjax.run import run_config

METRICS = {  # name -> a number of a point that is better when larger
    "needle": lambda point: tables.needle_share(point["niah"])[0],
    "short": lambda point: -tables.mean_loss(point["short"]),
}


def search(
    paths, steps: int, recipe: str, workdir, out, *, method: str = "linear", rope_from=None
) -> list[dict]:
    """Evaluates every merge whose weights are multiples of 1 / steps and sum to 1, and plots the frontier.

    Args:
        paths: models, as for `merging.merge`; two give a line, more a grid.
        steps: 4 gives 0, 1/4, 1/2, 3/4, 1.
        recipe: configs/NAME.py[:variant], whose evaluate section says what is asked.
        workdir: the run of that config, which has the tokenizer and the data.
        out: directory for search.json and frontier.png; what is in search.json already is not evaluated again.
        method: linear or slerp.
        rope_from: the model whose RoPE and window the merges have.

    Returns:
        [{"weights": [one a model], "niah": ..., "short": ..., "frontier": no other is better in both}, ...]

    Raises:
        UserError: models that do not fit, a config without needles and short loss, a run without its data.
    """
    if steps < 1:
        raise UserError(f"--search={steps}: allowed: 1 and more")
    if method not in ("linear", "slerp"):
        raise UserError(f"--search with method {method!r}; allowed: linear, slerp")
    evaluate = _evaluation(paths, recipe, workdir, rope_from)
    out = pathlib.Path(out)
    file = out / "search.json"
    about = {"models": [str(path) for path in paths], "recipe": recipe, "method": method}
    content = wd.read_json(file) if file.is_file() else {**about, "points": []}
    if any(content.get(key) != value for key, value in about.items()):
        raise UserError(f"{file}: is of another search; choose another --out")
    known = {tuple(point["weights"]): point for point in content["points"]}
    for weights in _simplex(len(paths), steps):
        if weights not in known:
            known[weights] = {"weights": list(weights), **evaluate(weights, method)}
            if not {"niah", "short"} <= set(known[weights]):
                raise UserError(f"{recipe}: a frontier needs both evaluate.niah and evaluate.short")
            wd.write_json(file, {**about, "points": list(known.values())})
        logging.info("weights %s: %s", weights, _told(known[weights]))
    points = [known[weights] for weights in sorted(known)]
    marked = tables.frontier_points(points)
    for point, mark in zip(points, marked, strict=True):
        point["frontier"] = mark["best"]
    wd.write_json(file, {**about, "points": points})
    (out / "frontier.png").write_bytes(plots.merge_frontier(marked))
    return points


def soup(paths, metric: str, recipe: str, workdir, out, *, rope_from=None) -> list[str]:
    """A greedy soup (Wortsman et al. 2022, arXiv 2203.05482): best model first, each next one stays if it helps.

    Args: as for `search`; `metric` is needle (accuracy at the longest length) or short (loss in the window).

    Returns:
        The paths whose plain average is written to `out`; OUT/merge.json says so too.
    """
    evaluate = _evaluation(paths, recipe, workdir, rope_from)

    def score(chosen) -> float:
        weights = tuple(1 / len(chosen) if path in chosen else 0.0 for path in paths)
        point = evaluate(weights, "linear")
        if {"needle": "niah", "short": "short"}[metric] not in point:
            raise UserError(f"--soup={metric}: {recipe} has no such evaluation")
        logging.info("soup of %s: %s", ", ".join(map(str, chosen)), _told(point))
        return METRICS[metric](point)

    chosen = greedy(list(paths), score)
    rope_from = rope_from if rope_from in chosen else None
    weights = {path: 1 / len(chosen) for path in chosen}
    merging.merge(weights, out, rope_from=rope_from)
    return chosen


def greedy(candidates: list, score) -> list:
    """The greedy soup's choice; `score(list of candidates)` is better when larger."""
    alone = {candidate: score([candidate]) for candidate in candidates}
    ranked = sorted(candidates, key=alone.get, reverse=True)
    chosen, best = ranked[:1], alone[ranked[0]]
    for candidate in ranked[1:]:
        if (new := score([*chosen, candidate])) >= best:
            chosen, best = [*chosen, candidate], new
    return chosen


def _simplex(count: int, steps: int):
    """All weights that are multiples of 1 / steps and sum to 1, the first model's from 0 upwards."""
    for parts in itertools.product(range(steps + 1), repeat=count - 1):
        if sum(parts) <= steps:
            yield tuple(part / steps for part in (*parts, steps - sum(parts)))


def _evaluation(paths, recipe: str, workdir, rope_from):
    """function(weights, method) -> {"niah": ..., "short": ...} of the models at `paths`."""
    sources = [streaming.open_source(path) for path in paths]
    try:
        merge_checks.check(sources, rope_from)
    finally:
        for source in sources:
            source.close()
    config = _config(recipe)
    workdir = pathlib.Path(workdir)
    if not (workdir / "tokenizer").is_dir():
        raise UserError(
            f"--workdir={workdir}: no tokenizer there; run the stage import of {recipe} first"
        )
    tasks = assessment.merge_tasks(config, workdir, assessment.make_tasks(config, workdir))
    if not tasks:
        raise UserError(f"{recipe}: neither evaluate.niah nor evaluate.short asks anything")
    models = {str(path): loading.load(path)[:2] for path in paths}
    carrier = models[str(rope_from if rope_from is not None else paths[0])][0]
    model_config = run_config(config, carrier)

    def evaluate(weights, method):
        weighted = [(w, params) for w, (_, params) in zip(weights, models.values(), strict=True)]
        params = merge_trees(weighted, list(models), method)
        return {name: function(model_config, params)[0] for name, function in tasks.items()}

    return evaluate


def _config(recipe: str):
    file, _, variant = recipe.partition(":")
    if not pathlib.Path(file).is_file():
        raise UserError(f"--recipe={recipe}: there is no such file")
    spec = importlib.util.spec_from_file_location("recipe_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def _told(point: dict) -> str:
    told = []
    if "niah" in point:
        told.append(f"needles {np.round(tables.needle_share(point['niah'])[0], 3)}")
    if "short" in point:
        told.append(f"short loss {tables.mean_loss(point['short']):.4f}")
    return ", ".join(told)
