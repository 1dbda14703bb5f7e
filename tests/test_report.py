"""The report: one closed page with its pictures inside, inert whatever a token says, the same for the same run."""

import base64
import html.parser
import io
import json

import numpy as np
import PIL.Image
import pytest

from lrjax.errors import UserError
from lrjax.reporting import plots, tables
from lrjax.reporting.metrics import MetricWriter
from lrjax.reporting.report import write_report

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}
HOSTILE = '<script>alert("1")</script>'


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
            if self.rows and "tr" in self.open:
                self.rows[-1] += data

    def images(self):
        for tag, attrs in self.tags:
            if tag in ("img", "source"):
                yield attrs.get("src") or attrs["srcset"]


def niah(share_inside, share_beyond):
    cells = [
        {"length": length, "depth": depth, "correct": round(10 * share), "count": 10, "nll": 0.5}
        for length, share in ((64, share_inside), (512, share_beyond))
        for depth in (0.1, 0.9)
    ]
    return {
        "cells": cells,
        "interval": {"64": [0.8, 1.0], "512": [share_beyond - 0.05, share_beyond + 0.04]},
        "samples": [
            {"length": 512, "depth": 0.1, "needle": "key", "expected": "7", "generated": HOSTILE}
        ],
    }


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """Drawn at an eighth of the density, for speed."""
    monkeypatch.setattr(plots, "DENSITY", 25)


@pytest.fixture
def content():
    checkpoints = ("longrecipe", "contiguous", "raised_theta", "base", "merged")
    stages = {"import": {"seconds": 65.0, "tokens": 1200, "flops": 3e9}}
    stages["extend"] = {"seconds": 1.25, "tokens": 0, "flops": 0}
    return {
        "title": "tiny & small",
        "intro": "An experiment.",
        "command": "make demo",
        "facts": {"model": "2 layers"},
        "summary": {
            "config": {"seed": 3, "methods": {"longrecipe": {"selection": "anchor"}}},
            "devices": {"platform": "cpu", "count": 1},
            "stages": stages,
            "evaluation": {"base": {"niah": {64: 1.0, 512: np.float32(0.5)}}},
            "impact": {"auc": 0.98, "recall": float("nan")},
            "positions": {"pose": {"mean_distance": 12.5, "mean_max": np.int64(300)}},
        },
        "window": 64,
        "target": 512,
        "chain": ["base", "longrecipe", "merged"],
        "checkpoints": {"longrecipe": {"label": "LongRecipe", "group": "Methods"}},
        "niah": {name: niah(1.0, 0.1 * i) for i, name in enumerate(checkpoints, start=1)},
        "perplexity": {
            "base": {
                "buckets": [
                    {"start": 0, "stop": 64, "nll": 1.5},
                    {"start": 64, "stop": 512, "nll": None},
                ]
            }
        },
        "short": {
            "base": {"dialect": {"nll": 1.95, "interval": None}},
            "merged": {"dialect": {"nll": 2.1, "interval": [2.0, 2.2]}},
        },
        "positions": {"pose": [np.r_[0:30, 200:250], np.r_[0:80]], "full": [np.arange(512)]},
        "impact": {
            "classes": [
                {
                    "name": "number", "share_all": 0.1, "share_top": 0.4, "lift": 4.0,
                    "interval": [3.5, 4.5], "anchor": True, "sentences": 0.258,
                },
                {
                    "name": "word", "share_all": 0.9, "share_top": 0.6, "lift": 0.67,
                    "interval": None, "anchor": False,
                },
            ],
            "documents": [
                {
                    "id": "doc-1",
                    "tokens": ["key", HOSTILE, " 17", "."],
                    "scores": [None, -1.0, 4.0, 0.0],
                    "top": [False, False, True, False],
                    "classes": ["word", "symbol", "number", "symbol"],
                    "marks": [False, False, True, False],
                }
            ],
            "frequency": {
                "start": [1, 129, 257],
                "classes": {
                    name: {"share": [share, share, None], "low": [0.1, 0.1, None], "high": [0.9, 0.9, None]}
                    for name, share in (("number", 0.4), ("word", 0.6))
                },
            },
        },
        "merge_curve": [
            {"base_weight": weight, "niah": niah(1.0, 1 - weight), "short": {"a": {"nll": 2.0}}}
            for weight in (0.75, 0.25)
        ],
        "loss_panels": {"Extension": {"LongRecipe": "longrecipe"}, "Never run": {"x": "x"}},
    }  # fmt: skip


def make_workdir(path):
    with MetricWriter(path, "longrecipe") as writer:
        for step in (10, 20):
            writer.write(step, {"loss": 4.0 / step})
    return path


def test_page_is_closed_and_brings_everything_with_it(tmp_path, content):
    path = write_report(make_workdir(tmp_path), content)
    assert path == tmp_path / "report" / "index.html"
    page = Page(path.read_text())
    sources = list(page.images())
    assert len(sources) == 2 * 9  # every picture, light and dark
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            assert image.width == round(plots.WIDTH * plots.DENSITY)
    for _, attrs in page.tags:
        assert attrs.get("href", "#").startswith("#")
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    for name in (
        "methods",
        "needle",
        "perplexity",
        "positions",
        "classes",
        "losses",
        "merge",
        "frontier",
        "stages",
    ):
        with PIL.Image.open(tmp_path / "report" / f"{name}.png") as image:
            image.verify()
    assert not list((tmp_path / "report").glob("*.tmp"))


def test_summary_has_the_contract_and_is_strict_json(tmp_path, content):
    def refuse(constant):
        raise AssertionError(constant)

    write_report(make_workdir(tmp_path), content)
    text = (tmp_path / "report" / "summary.json").read_text()
    summary = json.loads(text, parse_constant=refuse)
    assert list(summary) == ["config", "devices", "stages", "evaluation", "impact", "positions"]
    assert summary["evaluation"] == {"base": {"niah": {"64": 1.0, "512": 0.5}}}
    assert summary["impact"] == {"auc": 0.98, "recall": None}
    assert summary["positions"]["pose"]["mean_max"] == 300
    assert summary["stages"] == content["summary"]["stages"]


def test_hostile_text_is_inert(tmp_path, content):
    for key in ("title", "intro", "command"):
        content[key] = HOSTILE
    content["checkpoints"]["merged"] = {"label": HOSTILE, "group": HOSTILE, "note": HOSTILE}
    content["impact"]["documents"][0]["classes"][2] = '" onmouseover="alert(1)'
    content["summary"]["config"]["x"] = HOSTILE
    page = Page(write_report(make_workdir(tmp_path), content).read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(HOSTILE) >= 8


def test_base_and_controls_come_first_and_every_checkpoint_is_there(tmp_path, content):
    page = Page(write_report(make_workdir(tmp_path), content).read_text())
    rows = [" ".join(row.split()) for row in page.rows]
    heads = ("base", "raised theta", "contiguous", "LongRecipe", "merged")
    found = [next(i for i, row in enumerate(rows) if row.startswith(head)) for head in heads]
    assert found == sorted(found)
    assert rows[found[0]] == "base 100 80 to 100 40 35 to 44"
    assert "40 % → 50 %" in page.text and "needles found at 512 tokens, 8 x the window" in page.text
    assert "1.95 → 2.10" in page.text


def test_tokens_carry_shade_and_number(tmp_path, content):
    shown = tables.impact_tokens(content["impact"]["documents"][0])["tokens"]
    assert shown[0] == {"text": "key", "css": "", "tip": "word"}
    assert shown[2]["css"] == f"p{tables.LEVELS} top mark"
    assert shown[2]["tip"] == "+4.00 · number · top · known answer"
    assert shown[1]["css"].startswith("n") and shown[3]["css"] == ""


def test_classes_say_how_many_sentences_hold_them(tmp_path, content):
    """Where the analysis has counted them: runs from before it did have a dash."""
    html = write_report(make_workdir(tmp_path), content).read_text()
    number, word = (
        html.split(f"<tr><th>{name}</th>")[1].split("</tr>")[0] for name in ("number", "word")
    )
    assert "<td>26</td>" in number and ">yes<" in number
    assert number.count("<td>") == word.count("<td>") and word.count("<td>-</td>") == 2


def test_long_documents_are_cut_and_the_page_says_so(tmp_path, content):
    count = tables.MOST_TOKENS + 1234
    content["impact"]["documents"] = [{"tokens": ["a"] * count, "scores": np.zeros(count)}]
    page = Page(write_report(tmp_path, content).read_text())
    assert "1,234 more tokens of this document are left out" in page.text


def test_missing_parts_are_named_and_have_no_picture(tmp_path, content):
    make_workdir(tmp_path)
    write_report(tmp_path, content)
    (tmp_path / "metrics.jsonl").unlink()
    empty = {key: {} for key in content["summary"]}
    bare = {"title": "nothing", "command": "make demo", "summary": empty}
    page = Page(write_report(tmp_path, bare).read_text())
    assert not list(page.images())
    assert not list((tmp_path / "report").glob("*.png"))  # those of the earlier report are gone
    for stage in ("evaluate", "extend", "analyse", "merge"):
        assert f"the {stage} stage was not run" in page.text


def test_same_run_gives_the_same_bytes(tmp_path, content):
    for name in ("a", "b"):
        write_report(make_workdir(tmp_path / name), content)
    files = sorted(path.name for path in (tmp_path / "a" / "report").iterdir())
    assert len(files) == 2 + 2 * 9
    for name in files:
        one, other = ((tmp_path / run / "report" / name).read_bytes() for run in "ab")
        assert one == other, name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"command": None}, "report content: 'command' is missing"),
        ({"nih": {}}, "report content: 'nih' is unknown; allowed: title"),
    ],
)
def test_wrong_keys_are_named(tmp_path, content, change, message):
    content |= change
    if content["command"] is None:
        del content["command"]
    with pytest.raises(UserError, match=message):
        write_report(tmp_path, content)
    assert not (tmp_path / "report").exists()


def test_summary_without_a_part_of_the_contract_is_named(tmp_path, content):
    del content["summary"]["devices"]
    with pytest.raises(UserError, match="'devices' is missing"):
        write_report(tmp_path, content)


def test_page_says_what_ran_where(tmp_path, content):
    content["summary"]["impact"] = {"anchors": ["number"], "classes": {"number": 4.0}}
    text = " ".join(Page(write_report(tmp_path, content).read_text()).text.split())
    assert "model2 layers" in text and "seed3" in text and "devices1 x cpu" in text
    assert "time of all stages1 min 6 s" in text
    assert "anchorsnumber" in text


def test_loss_panels_without_a_plan_are_the_stages():
    rows = [{"stage": "a", "step": 1, "loss": 2.0}, {"stage": "b", "step": 1, "grad_norm": 1.0}]
    assert tables.loss_panels(rows, None) == {"a": {"a": [(1, 2.0)]}}


@pytest.mark.parametrize(
    "value, text", [(0.0, "0"), (0.0173, "1.7"), (0.0949, "9.5"), (0.5, "50"), (1.0, "100")]
)
def test_percent(value, text):
    assert tables.percent(value) == text


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (9999, "9,999"), (12345, "12.3 k"), (999_999, "1 M"), (1.5e12, "1.5 T")],
)
def test_large(value, text):
    assert tables.large(value) == text


@pytest.mark.parametrize(
    "value, text", [(0.25, "0.2 s"), (59.97, "1 min 0 s"), (125, "2 min 5 s"), (7300, "2 h 2 min")]
)
def test_duration(value, text):
    assert plots.duration(value) == text
