"""Stored evaluations of real models as tables: what `lrjax.evaluate` found, without the samples.

store("runs/ruler", "docs/results/evaluations")         # .../ruler/CHECKPOINT.json
section("docs/results/evaluations/ruler")               # Markdown: tasks by checkpoints
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence

from lrjax import workdir as wd
from lrjax.errors import UserError


def store(source, folder) -> None:
    """Copies the results of every checkpoint that `lrjax.evaluate --out=SOURCE` asked, without the samples.

    Raises:
        UserError: there are none.
    """
    source, folder = pathlib.Path(source), pathlib.Path(folder)
    files = sorted(source.glob("*/results.json"))
    if not files:
        raise UserError(
            f"{source}: no CHECKPOINT/results.json there; lrjax.evaluate --out writes it"
        )
    for file in files:
        found = wd.read_json(file)
        for result in itertools.chain(
            *(by_length.values() for by_length in found["results"].values())
        ):
            result.pop("samples", None)
        wd.write_json(folder / source.name / f"{file.parent.name}.json", found)


def section(folder) -> str:
    """The checkpoints of an evaluation side by side: scores with Wilson's 95 % interval, then what was read."""
    folder = pathlib.Path(folder)
    found = {file.stem: wd.read_json(file) for file in sorted(folder.glob("*.json"))}
    head = ["task", "tokens", "samples", *found]
    lines = [
        f"## Evaluation: {folder.name}",
        "",
        *(_asked(name, one) for name, one in found.items()),
        "",
    ]
    lines += [_line(head), "|" + " --- |" * len(head)]
    asked = _unique(
        (length, task)
        for one in found.values()
        for task in one["results"]
        for length in one["results"][task]
    )
    for length in _unique(length for length, _ in asked):
        rows = {
            task: [one["results"].get(task, {}).get(length) for one in found.values()]
            for of, task in asked
            if of == length
        }
        for task, results in rows.items():
            counts = sorted({str(result["count"]) for result in results if result})
            lines.append(_line([task, length, ", ".join(counts), *map(_cell, results)]))
        if len(rows) > 1:
            means = [_mean(results) for results in zip(*rows.values(), strict=True)]
            lines.append(_line(["**mean**", length, "", *means]))
    readings = [
        {name: parts for name, parts in one["summary"].items() if name not in one["results"]}
        for one in found.values()
    ]
    parts = _unique((name, part) for each in readings for name in each for part in each[name])
    for name, part in parts:
        values = [each.get(name, {}).get(part) for each in readings]
        lines.append(_line([name, part, "", *("" if v is None else f"{v:.2f}" for v in values)]))
    return "\n".join([*lines, ""])


def _asked(name: str, one: Mapping) -> str:
    options = one["options"]
    data = [
        f", {key}: {options[key]}" for key in ("squad", "hotpotqa", "ruler_dir") if options[key]
    ]
    commits = ", ".join(note["commit"] for note in one["made_by"])
    machines = _unique(f"{note['machine']}, {note['devices']}" for note in one["made_by"])
    return (
        f"- **{name}**: `{one['checkpoint']}`, window {one['window']:,}, {one['dtype']}; seed {options['seed']}"
        f"{''.join(data)}; commit {commits}; {'; '.join(machines)}"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(result: Mapping | None) -> str:
    if result is None:
        return ""
    low, high = result["interval"]
    return f"{result['score']:.1f} [{low:.1f}, {high:.1f}]"


def _mean(results: Sequence[Mapping | None]) -> str:
    """Of all tasks; nothing where one of them was not asked."""
    if None in results:
        return ""
    return f"**{sum(result['score'] for result in results) / len(results):.1f}**"


def _unique(values) -> list:
    return list(dict.fromkeys(values))
