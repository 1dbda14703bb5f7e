"""What the report's page shows in tables: rows of plain values out of the `content` of `report.write_report`."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lrjax.reporting.comparison import task_lengths

# Without these two rows a position transform would take credit for what the raised RoPE base does.
CONTROLS = ("raised_theta", "contiguous")
COMPARISON = "For comparison"
LEVELS = 8  # shades of an impact
MOST_TOKENS = 3000  # of a document on the page

# ----------------------------------------------------------------------------------- checkpoints and their order


def chain(content: Mapping) -> list[str]:
    """The checkpoints of the recipe's main line, the base first."""
    if content["chain"]:
        return list(content["chain"])
    known = {*content["summary"]["evaluation"], *content["niah"], *content["short"]}
    return [name for name in ("base", "extended", "replayed", "merged") if name in known]


def label(content: Mapping, name: str) -> str:
    return content["checkpoints"].get(name, {}).get("label") or name.replace("_", " ")


def ordered(content: Mapping, names: Iterable[str]) -> list[str]:
    """The base, the controls, then the others as they come."""
    first = [*content["chain"][:1], *CONTROLS]
    return sorted(names, key=lambda name: first.index(name) if name in first else len(first))


def groups(content: Mapping, names: Iterable[str]) -> dict[str, list[str]]:
    """Heading -> checkpoints: base and controls first, then the groups in the order of their first rows."""
    found: dict[str, list[str]] = {}
    for name in ordered(content, names):
        heading = content["checkpoints"].get(name, {}).get("group", "")
        if name in (*content["chain"][:1], *CONTROLS):
            heading = COMPARISON
        found.setdefault(heading, []).append(name)
    return found


# ----------------------------------------------------------------------------------------------------- needles


def accuracies(result: Mapping) -> dict[int, tuple[float, float, float]]:
    """{length: (share, low, high)} of a needle result; without its intervals low and high are the share."""
    counts: dict[int, list[int]] = {}
    for cell in result["cells"]:
        total = counts.setdefault(int(cell["length"]), [0, 0])
        total[0] += cell["correct"]
        total[1] += cell["count"]
    intervals = {int(length): ends for length, ends in result.get("interval", {}).items()}
    found = {}
    for length, (correct, count) in sorted(counts.items()):
        if count:
            share = correct / count
            found[length] = (share, *intervals.get(length, (share, share)))
    return found


def headline(content: Mapping) -> dict:
    """{"lengths", "groups": {heading: [{"label", "note", "cells": [(share, low, high) or None]}]}}."""
    found = {name: accuracies(result) for name, result in content["niah"].items()}
    lengths = sorted({length for row in found.values() for length in row})
    rows = {}
    for heading, names in groups(content, found).items():
        rows[heading] = [
            {
                "label": label(content, name),
                "note": content["checkpoints"].get(name, {}).get("note", ""),
                "cells": [found[name].get(length) for length in lengths],
                "result": name == content["chain"][-1] if content["chain"] else False,
            }
            for name in names
        ]
    return {"lengths": lengths, "groups": rows}


def times_window(content: Mapping, length: int) -> str:
    """ "8 x" for a length beyond the window, else nothing."""
    window = content["window"]
    return f"{length / window:.3g} x" if window and length > window else ""


def headline_figures(content: Mapping) -> list[dict]:
    """[{"what", "before", "after"}] of the first and the last checkpoint of the chain."""
    if len(content["chain"]) < 2:
        return []
    first, last = content["chain"][0], content["chain"][-1]
    figures = []
    niah = content["niah"]
    if first in niah and last in niah:
        before, after = accuracies(niah[first]), accuracies(niah[last])
        for length in sorted(before.keys() & after.keys(), reverse=True)[:1]:
            times = times_window(content, length)
            figures.append(
                {
                    "what": f"needles found at {length:,} tokens"
                    + (f", {times} the window" if times else ""),
                    "before": f"{percent(before[length][0])} %",
                    "after": f"{percent(after[length][0])} %",
                }
            )
    short = content["short"]
    for source in list(short.get(first, {}))[:2]:
        if source in short.get(last, {}):
            figures.append(
                {
                    "what": f"loss in the short window, {source}",
                    "before": f"{short[first][source]['nll']:.2f}",
                    "after": f"{short[last][source]['nll']:.2f}",
                }
            )
    return figures


def answers(content: Mapping) -> list[dict]:
    """Questions and answers of the chain's ends, the same prompts side by side."""
    rows = []
    for name in dict.fromkeys([*content["chain"][:1], *content["chain"][-1:]]):
        for sample in content["niah"].get(name, {}).get("samples", ()):
            rows.append({"label": label(content, name), **sample})
    return sorted(rows, key=lambda row: (row["length"], row["depth"]))


def benchmarks(content: Mapping) -> dict:
    """{"checkpoints": labels, "rows": [{"task", "length", "count", "cut", "cells": [(score, low, high) or None]}]}."""
    found = content["benchmarks"]
    names = ordered(content, found)
    rows = []
    for task, length in task_lengths({name: found[name] for name in names}):
        results = [found[name].get(task, {}).get(length) for name in names]
        known = [result for result in results if result]
        rows.append(
            {
                "task": task,
                "length": length,
                "count": max(result["count"] for result in known),
                "cut": max(result.get("cut", 0) for result in known),
                "cells": [result and (result["score"], *result["interval"]) for result in results],
            }
        )
    return {"checkpoints": [label(content, name) for name in names], "rows": rows}


# -------------------------------------------------------------------------------- forgetting, losses, merge


def forgetting(content: Mapping) -> dict:
    """{"sources", "rows": [{"label", "main", "cells": [{"nll", "interval", "change"} or None]}]}; chain first."""
    short = content["short"]
    names = [name for name in content["chain"] if name in short]
    names += [name for name in ordered(content, short) if name not in names]
    sources = list(dict.fromkeys(source for name in names for source in short[name]))
    base = short.get(names[0], {})
    rows = []
    for name in names:
        cells = []
        for source in sources:
            cell = short[name].get(source)
            if cell is not None:
                known = name != names[0] and source in base
                change = cell["nll"] - base[source]["nll"] if known else None
                cell = {"nll": cell["nll"], "interval": cell.get("interval"), "change": change}
            cells.append(cell)
        main = name in content["chain"]
        rows.append({"label": label(content, name), "main": main, "cells": cells})
    return {"sources": sources, "rows": rows}


def loss_panels(rows: Sequence[Mapping], panels: Mapping | None) -> dict:
    """{title: {label: [(step, loss)]}} out of the rows of metrics.jsonl."""
    points: dict[str, list] = {}
    for row in rows:
        if "loss" in row:
            points.setdefault(row["stage"], []).append((row["step"], row["loss"]))
    if panels is None:
        panels = {stage: {stage: stage} for stage in points}
    chosen = {
        title: {name: points[stage] for name, stage in lines.items() if stage in points}
        for title, lines in panels.items()
    }
    return {title: lines for title, lines in chosen.items() if lines}


def merge_points(curve: Sequence[Mapping]) -> tuple[list[dict], int | None]:
    """The points of `plots.merge_curve`, and the length of their needle prompts."""
    points, length = [], None
    for row in curve:
        point = {"weight": row["base_weight"]}
        if "niah" in row:
            found = accuracies(row["niah"])
            length = max(found)
            point["needle"] = found[length]
        if "short" in row:
            point["losses"] = {source: result["nll"] for source, result in row["short"].items()}
        points.append(point)
    return points, length


def needle_share(result: Mapping) -> tuple[float, float, float]:
    """(share, low, high) of a needle result at its longest length."""
    found = accuracies(result)
    return found[max(found)]


def mean_loss(short: Mapping) -> float:
    """Nats a token, the mean over the sources."""
    return sum(result["nll"] for result in short.values()) / len(short)


def frontier_points(curve: Sequence[Mapping]) -> list[dict]:
    """The points of `plots.merge_frontier`, of the merges that have both needles and short losses.

    A merge is on the frontier ("best") when no other finds more needles at no more loss, or as many at less.
    """
    points = []
    for row in curve:
        if "niah" in row and "short" in row:
            weights = row.get("weights") or [row["base_weight"]]
            text = ", ".join(f"{weight:.3g}" for weight in weights)
            points.append(
                {
                    "label": text,
                    "needle": needle_share(row["niah"]),
                    "loss": mean_loss(row["short"]),
                }
            )
    for point in points:
        share, loss = point["needle"][0], point["loss"]
        point["best"] = not any(
            other["needle"][0] >= share
            and other["loss"] <= loss
            and (other["needle"][0], other["loss"]) != (share, loss)
            for other in points
        )
    return points


# ----------------------------------------------------------------------------------------------------- impact


def impact_tokens(document: Mapping) -> dict:
    """A document to print: {"id", "left_out", "separator", "scale", "tokens": [{"text", "css", "tip"}]}.

    A token's class is p or n (the extended model finds it likelier, or less likely) and its shade of 1 to
    LEVELS, full at the 98th percentile of the sizes in the document.
    """
    tokens = document["tokens"][:MOST_TOKENS]
    scores = [math.nan if score is None else float(score) for score in document["scores"]]
    sizes = np.abs([score for score in scores if math.isfinite(score)])
    scale = float(np.percentile(sizes, 98)) if sizes.size else 0.0
    top, marks, classes = (document.get(name) for name in ("top", "marks", "classes"))
    shown = []
    for index, text in enumerate(tokens):
        score, css, tip = scores[index], [], []
        if math.isfinite(score):
            shade = math.ceil(LEVELS * min(abs(score) / scale, 1.0)) if scale else 0
            css += [f"{'p' if score > 0 else 'n'}{shade}"] if shade else []
            tip.append(f"{score:+.2f}")
        if classes is not None:
            tip.append(str(classes[index]))
        if top is not None and top[index]:
            css.append("top")
            tip.append("top")
        if marks is not None and marks[index]:
            css.append("mark")
            tip.append("known answer")
        shown.append({"text": str(text), "css": " ".join(css), "tip": " · ".join(tip)})
    return {
        "id": document.get("id", ""),
        "left_out": len(document["tokens"]) - len(tokens),
        "separator": document.get("separator", ""),
        "scale": scale,
        "tokens": shown,
    }


# ----------------------------------------------------------------------------------------------- plain values


def flat(value: Mapping, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    rows = {}
    for key, each in value.items():
        if isinstance(each, Mapping) and each:
            rows |= flat(each, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = each
    return rows


def top_values(values: Mapping) -> dict[str, object]:
    """The single values and the lists (as text) among `values`; tables have places of their own."""
    return {
        key: (", ".join(map(str, each)) or "none") if isinstance(each, list | tuple) else each
        for key, each in values.items()
        if not isinstance(each, Mapping)
    }


def devices(value) -> str:
    """{"platform": "cpu", "count": 2, "memory": "8 GiB"} -> "2 x cpu, memory 8 GiB"; text as it is."""
    if not isinstance(value, Mapping):
        return str(value)
    rest, parts = dict(value), []
    if {"platform", "count"} <= rest.keys():
        parts.append(f"{rest.pop('count')} x {rest.pop('platform')}")
    return ", ".join(parts + [f"{key.replace('_', ' ')} {each}" for key, each in rest.items()])


def percent(share: float) -> str:
    """.973 -> "97", .0173 -> "1.7"."""
    return f"{100 * share:.1f}" if 0 < share < 0.095 else f"{100 * share:.0f}"


def figure(value) -> str:
    """A number to four digits, with thousands separators; other values as they are."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def large(value: float) -> str:
    """1.5e12 -> "1.5 T"; up to 9,999 as it is."""
    if value < 1e4:
        return f"{value:,.0f}"
    value = float(f"{value:.3g}")  # before the unit is chosen: 999,999 is 1 M
    power = min(int(math.log10(value)) // 3, 6)
    return f"{value / 10 ** (3 * power):.3g} {' kMGTPE'[power]}"
