"""Searching for weights: grid, frontier, greedy choice; and the curve of the recipe, which reuses what is known."""

import json

import pytest

from lrjax import assessment
from lrjax import config as config_lib
from lrjax import merge_search as ms
from lrjax.errors import UserError
from lrjax.reporting import plots, tables


def test_grid_of_weights():
    assert list(ms._simplex(2, 4)) == [(0, 1), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1, 0)]
    three = list(ms._simplex(3, 2))
    assert len(three) == 6 and all(sum(weights) == 1 for weights in three)
    assert (0.5, 0, 0.5) in three


def point(found, loss, **more):
    cells = [{"length": 512, "depth": 0.5, "correct": found, "count": 10}]
    return {"niah": {"cells": cells}, "short": {"a": {"nll": loss}, "b": {"nll": loss + 1}}, **more}


def test_frontier_holds_what_no_other_beats():
    curve = [point(9, 3.0), point(8, 2.0), point(7, 2.5), point(9, 3.5), point(8, 2.0)]
    curve = [{"weights": [index, 0.5], **each} for index, each in enumerate(curve)]
    points = tables.frontier_points(curve)
    assert [p["best"] for p in points] == [True, True, False, False, True]
    assert points[0]["label"] == "0, 0.5" and points[0]["loss"] == 3.5
    assert tables.frontier_points([{"base_weight": 0.5, "short": {"a": {"nll": 1.0}}}]) == []
    assert plots.merge_frontier(points).startswith(b"\x89PNG")


def test_greedy_soup_keeps_what_helps():
    """Of Wortsman et al.: by descending score; a model stays only if the average does not get worse."""
    value = {"a": 1.0, "b": 3.0, "c": 2.0, "d": -5.0}
    tried = []

    def score(chosen):
        tried.append(tuple(chosen))
        return sum(value[name] for name in chosen) / len(chosen) + 0.9 * (
            "c" in chosen and "b" in chosen
        )

    assert ms.greedy(list("abcd"), score) == ["b", "c"]
    assert tried[4:] == [("b", "c"), ("b", "c", "a"), ("b", "c", "d")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--search=0"),
        ({"method": "ties"}, "method 'ties'; allowed: linear, slerp"),
        ({"paths": ["/nowhere"]}, "/nowhere: no checkpoint there"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    arguments = {"paths": ["a"], "steps": 2, "method": "linear"} | changes
    with pytest.raises(UserError, match=message):
        ms.search(
            arguments["paths"], arguments["steps"], "configs/tiny.py", tmp_path, tmp_path / "out",
            method=arguments["method"],
        )  # fmt: skip


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_linear"])
def test_settings_of_the_recipe(method):
    section = config_lib.default().merge
    section.method, section.density = method, 0.5
    weighted, settings = assessment.merge_settings(section, 0.3, "base", "replayed")
    if method in ("linear", "slerp"):
        assert weighted == [(0.3, "base"), (0.7, "replayed")] and settings == {"method": method}
    else:
        assert weighted == [(0.7, "replayed")]
        expected = {"method": method, "base": "base", "density": 0.5, "normalize": False}
        assert settings == expected


def test_curve_takes_what_is_evaluated_already(tmp_path):
    config = config_lib.default()
    config.methods = {"raised_theta": config_lib.method("first", "")}
    config.evaluate.niah.lengths = (64, 512)
    niah = {
        "accuracy": {"64": 1.0, "512": 0.5}, "interval": {"64": [0, 1], "512": [0, 1]},
        "nll": {"64": 0.1, "512": 0.2}, "cells": [{"length": 64}, {"length": 512}], "samples": [],
    }  # fmt: skip
    for name in ("replayed", "merged", "raised_theta"):
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        (tmp_path / "evaluation" / name / "niah.json").write_text(
            json.dumps({**niah, "nll": {"64": 0, "512": name}})
        )
    found = [
        assessment._known_merge(config, tmp_path, weight, {"niah": None})
        for weight in (0.0, 0.5, 1.0, 0.25)
    ]
    assert [point and point["niah"]["nll"]["512"] for point in found] == [
        "replayed", "merged", "raised_theta", None,
    ]  # fmt: skip
    assert found[0]["niah"]["cells"] == [{"length": 512}]
    assert assessment._known_merge(config, tmp_path, 0.5, {"niah": None, "short": None}) is None


def test_search_and_soup_end_to_end_but_for_the_models(tmp_path, monkeypatch):
    """What is evaluated is kept, and not evaluated again; the soup hands its choice to the merge of files."""
    asked = []

    def evaluate(weights, method):
        asked.append(weights)
        return point(round(10 * weights[1]), 2.0 + weights[1] ** 2)

    monkeypatch.setattr(ms, "_evaluation", lambda *args: evaluate)
    out = tmp_path / "out"
    points = ms.search(["a", "b"], 2, "configs/tiny.py", tmp_path, out)
    assert asked == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert all(point["frontier"] for point in points)
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert ms.search(["a", "b"], 2, "configs/tiny.py", tmp_path, out) == points
    assert len(asked) == 3
    ms.search(["a", "b"], 4, "configs/tiny.py", tmp_path, out)
    assert len(asked) == 5  # only the new points
    with pytest.raises(UserError, match="is of another search"):
        ms.search(["a", "c"], 2, "configs/tiny.py", tmp_path, out)

    merged = []
    monkeypatch.setattr(ms.merging, "merge", lambda *args, **how: merged.append((args, how)))
    assert ms.soup(["a", "b"], "needle", "configs/tiny.py", tmp_path, "soup", rope_from="a") == [
        "b"
    ]
    assert merged == [(({"b": 1.0}, "soup"), {"rope_from": None})]
