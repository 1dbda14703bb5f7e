"""The report of a run: one page that works offline, its pictures, and the summary for machines.

    write_report(workdir, {"title": "tiny", "command": "make demo", "summary": {...}, "niah": {...}, ...})

writes `report/index.html` (pictures, style and all inside), `report/*.png` and `report/summary.json`. What the
dict may hold is said at `write_report`; the tables are made in `tables.py`, the pictures in `plots.py`. The page
depends on the dict and on `metrics.jsonl` alone: the same input gives the same bytes.
"""

import base64
import json
import math
import os
import pathlib
from collections.abc import Mapping

import jinja2
import numpy as np

from lrjax.errors import UserError
from lrjax.reporting import plots, tables
from lrjax.reporting.metrics import METRICS_FILE, read_rows

REQUIRED = ("title", "command", "summary")
OPTIONAL = {
    "intro": "", "date": "", "facts": {}, "window": None, "target": None, "chain": (), "checkpoints": {},
    "niah": {}, "benchmarks": {}, "perplexity": {}, "short": {}, "positions": {}, "impact": {}, "merge_curve": (),
    "loss_panels": None,
}  # fmt: skip
SUMMARY = ("config", "devices", "stages", "evaluation", "impact", "positions")
PICTURES = (
    "methods", "needle", "perplexity", "positions", "classes", "losses", "merge", "frontier", "stages",
)  # fmt: skip


def write_report(workdir, content: Mapping) -> pathlib.Path:
    """Writes the report and returns the path of its page.

    Args:
        workdir: of the run; its metrics.jsonl is read for the loss curves.
        content: plain dicts, lists, numbers, text and numpy arrays. Required:
            "title": name of the experiment.
            "command": what a reader types to get the same.
            "summary": goes to summary.json as it is, NaN and infinity as null: {"config", "devices", "stages":
                {name: {"seconds", "tokens", "flops"}}, "evaluation": {checkpoint: {task: {metric: value}}},
                "impact": {name: value}, "positions": {transform: {statistic: value}}}.
          Optional; the page says of a part that is missing that its stage was not run:
            "intro": a paragraph under the title. "date": when it was run, as text.
            "facts": {label: value}, shown on top beside seed, devices and time.
            "window", "target": tokens of the base's and of the extended window.
            "chain": the checkpoints of the recipe in order, the base first, the result last
                (those of base, extended, replayed, merged that there are).
            "checkpoints": {name: {"label", "group" (rows of one group stand together), "note"}}, each optional.
            "niah": {checkpoint: {"cells": [{"length", "depth", "correct", "count", "nll"}], "interval":
                {length: [low, high]}, "samples": [{"length", "depth", "needle", "expected", "generated"}]}},
                the last two optional.
            "benchmarks": {checkpoint: {task: {length: {"score", "interval": [low, high] (0 to 100), "count", "cut"}}}}.
            "perplexity": {checkpoint: {"buckets": [{"start", "stop", "nll"}]}}.
            "short": {checkpoint: {source: {"nll", "interval": [low, high] or None}}}: losses in the window of
                the base, which show what was forgotten.
            "positions": {transform: [int array [L], ...]}: samples to draw.
            "impact": {"classes": [{"name", "share_all", "share_top", "lift", "interval", "anchor"}], and of a class
                perhaps "sentences", the share of the sentences that hold it; "documents":
                [{"id", "tokens": texts [L], "scores": [L] (None or NaN: not predicted), "top": bools [L],
                "classes": names [L], "marks": bools [L], "separator": text between tokens}]}; in a document
                only tokens and scores are needed; "frequency", as `frequency.class_frequency` returns it.
            "merge_curve": [{"base_weight", "niah": as above, "short": {source: {"nll"}}}].
            "loss_panels": {title: {label: stage in metrics.jsonl}}; without it each stage has a panel.

    Raises:
        UserError: a required key is missing or a key is unknown.
    """
    _check(content)
    folder = pathlib.Path(workdir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    content = {**OPTIONAL, **content}
    content["chain"] = tables.chain(content)
    pictures = {}
    for name, draw in _drawings(content, read_rows(pathlib.Path(workdir) / METRICS_FILE)).items():
        pictures[name] = {theme: draw(theme=theme) for theme in plots.THEMES}
    for name in PICTURES:
        for theme, suffix in (("light", ""), ("dark", "-dark")):
            path = folder / f"{name}{suffix}.png"
            if name in pictures:
                _write(path, pictures[name][theme])
            else:  # of an earlier report
                path.unlink(missing_ok=True)
    _write(
        folder / "summary.json", (json.dumps(plain(content["summary"]), indent=2) + "\n").encode()
    )
    page = _template().render(
        content=content,
        summary=content["summary"],
        pictures={name: _embedded(themes) for name, themes in pictures.items()},
        tables=tables,
    )
    _write(folder / "index.html", page.encode())
    return folder / "index.html"


def _check(content: Mapping) -> None:
    for where, keys, required, allowed in (
        ("report content", content, REQUIRED, (*REQUIRED, *OPTIONAL)),
        ("report content.summary", content.get("summary", {}), SUMMARY, SUMMARY),
    ):
        if missing := [key for key in required if key not in keys]:
            raise UserError(f"{where}: {missing[0]!r} is missing; needed: {', '.join(required)}")
        if unknown := [key for key in keys if key not in allowed]:
            raise UserError(f"{where}: {unknown[0]!r} is unknown; allowed: {', '.join(allowed)}")


def _drawings(content: Mapping, loss_rows: list[dict]) -> dict:
    """Name of a picture -> function(theme=...) -> PNG, for the parts that are there."""
    window = content["window"]
    drawings = {}

    def add(name, function, *args, **kwargs):
        drawings[name] = lambda theme: function(*args, theme=theme, **kwargs)

    def by_label(part):
        return {tables.label(content, name): part[name] for name in tables.ordered(content, part)}

    if content["niah"]:
        found = {name: tables.accuracies(result) for name, result in content["niah"].items()}
        cells = {name: result["cells"] for name, result in content["niah"].items()}
        add("methods", plots.method_bars, by_label(found), window)
        add("needle", plots.needle_heat_map, by_label(cells), window)
    if content["perplexity"]:
        buckets = {name: result["buckets"] for name, result in content["perplexity"].items()}
        add("perplexity", plots.perplexity_by_position, by_label(buckets), window)
    if content["positions"]:
        samples = content["positions"]
        target = content["target"] or 1 + max(
            int(max(s)) for drawn in samples.values() for s in drawn
        )
        add("positions", plots.position_plots, samples, window, target)
    if frequency := content["impact"].get("frequency"):
        add("classes", plots.class_frequency, frequency)
    if panels := tables.loss_panels(loss_rows, content["loss_panels"]):
        add("losses", plots.loss_curves, panels)
    if content["merge_curve"]:
        add("merge", plots.merge_curve, *tables.merge_points(content["merge_curve"]))
        if points := tables.frontier_points(content["merge_curve"]):
            add("frontier", plots.merge_frontier, points)
    if seconds := {name: stage["seconds"] for name, stage in content["summary"]["stages"].items()}:
        add("stages", plots.stage_times, seconds)
    return drawings


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": plots.duration,
        "figure": tables.figure,
        "large": tables.large,
        "percent": tables.percent,
    }
    return environment.get_template("report.html.jinja")


def _embedded(themes: Mapping[str, bytes]) -> dict:
    """{"light", "dark": data URLs, "width", "height": in pixels of the page} of a picture."""
    # Width and height stand right behind the name of a PNG's first chunk.
    size = [int.from_bytes(themes["light"][at : at + 4], "big") // 2 for at in (16, 20)]
    urls = {
        theme: f"data:image/png;base64,{base64.b64encode(png).decode()}"
        for theme, png in themes.items()
    }
    return urls | {"width": size[0], "height": size[1]}


def plain(value):
    """As JSON knows it: arrays become lists, other keys text, NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
