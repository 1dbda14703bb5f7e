"""Evaluations of real models as a table: tasks by checkpoints.

section("ruler", {"base": results, "extended": results})         # Markdown; results as `lrjax.results` keeps them
"""

from collections.abc import Iterable, Mapping, Sequence

from lrjax.reporting.comparison import difference_cell

_KEPT = ("tasks", "lengths", "samples", "seed", "squad", "hotpotqa", "ruler_dir")


def section(title: str, found: Mapping[str, Mapping]) -> str:
    """Checkpoints side by side: scores with Wilson's 95 % interval and how many answers were empty, the paired
    differences to the checkpoint that was named first, then means and what was read (perplexity, ...)."""
    against = {name: one["against"] for name, one in found.items() if "against" in one}
    head = ["task", "tokens", "samples", *found]
    head += [f"{name} - {each['checkpoint']}" for name, each in against.items()]
    lines = [f"## Evaluation: {title}", "", *(_asked(name, one) for name, one in found.items()), ""]
    lines += [*_unique(map(_command, found.values())), "", *_how_asked(found.values())]
    lines += [_line(head), "|" + " --- |" * len(head)]
    asked = _unique(
        (length, task)
        for one in found.values()
        for task, by_length in one["results"].items()
        for length in by_length
    )
    for length in _unique(length for length, _ in asked):
        for task in (task for of, task in asked if of == length):
            results = [one["results"].get(task, {}).get(length) for one in found.values()]
            counts = _unique(str(result["count"]) for result in results if result)
            invented = any(result and result["invented"] for result in results)
            name = f"{task} (invented questions)" if invented else task
            cells = [name, length, ", ".join(counts), *map(_cell, results)]
            for each in against.values():
                pair = each["differences"].get(task, {}).get(length)
                cells.append(difference_cell(pair) if pair else "")
            lines.append(_line(cells))
    figures = [
        {name: parts for name, parts in one["summary"].items() if name not in one["results"]}
        for one in found.values()
    ]
    parts = _unique((name, part) for each in figures for name in each for part in each[name])
    for name, part in parts:
        values = [each.get(name, {}).get(part) for each in figures]
        cells = [name, part, "", *("" if v is None else f"{v:.2f}" for v in values)]
        lines.append(_line([*cells, *("" for _ in against)]))
    return "\n".join([*lines, ""])


def _asked(name: str, one: Mapping) -> str:
    trained = ""
    if run := one.get("trained"):  # evaluations stored before November 2026 do not say
        trained = (
            f" of config {run['config']}, seed {run['seed']}, commit {_commits(run['made_by'])}"
        )
    machines = "; ".join(
        _unique(f"{note['machine']}, {note['devices']}" for note in one["made_by"])
    )
    return (
        f"- **{name}**: `{one['checkpoint']}`{trained}, window {one['window']:,}, {one['dtype']}; evaluated by commit "
        f"{_commits(one['made_by'])}; {machines}"
    )


def _commits(notes: Sequence[Mapping]) -> str:
    return ", ".join(_unique(note["commit"] for note in notes))


def _command(one: Mapping) -> str:
    """The command with every flag that was given; evaluations stored before November 2026 have their options only."""
    flags = one.get("flags")
    if flags is None:
        flags = {name: value for name, value in one["options"].items() if value and name in _KEPT}
    given = " ".join(f"--{name}={_text(value)}" for name, value in flags.items())
    return f"`python -m lrjax.evaluate CHECKPOINT ... {given} --out=DIR`"


def _how_asked(found: Iterable[Mapping]) -> list[str]:
    """Whether the questions stood in a chat template."""
    plain = _unique(
        result["chat_template"] == "plain"
        for one in found
        for by_length in one["results"].values()
        for result in by_length.values()
        if "chat_template" in result
    )
    ways = ["as plain text" if each else "in the tokenizer's chat template" for each in plain]
    return [f"Asked {' and '.join(ways)}.", ""] if ways else []


def _text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(result: Mapping | None) -> str:
    if result is None:
        return ""
    low, high = result["interval"]
    empty = f" ({result['empty']} empty)" if result.get("empty") else ""
    return f"{result['score']:.1f} [{low:.1f}, {high:.1f}]{empty}"


def _unique(values) -> list:
    return list(dict.fromkeys(values))
