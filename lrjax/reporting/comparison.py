"""Checkpoints side by side: a table in Markdown.

print(markdown({"base": {"vt": {"4096": 81.2}}, "merged": {"vt": {"4096": 84.0}}}))

A difference is {"mean", "interval" or None}, in points, of what `lrjax.evaluation.questions.difference` pairs.
"""

from collections.abc import Mapping


def markdown(
    figures: Mapping[str, Mapping[str, Mapping[str, float]]], differences: Mapping | None = None
) -> str:
    """A row for each task and length, a column for each checkpoint; what was not asked is a dash.

    Args:
        figures: {checkpoint: {task: {length: score}}}.
        differences: {checkpoint: {task: {length: difference to the first checkpoint}}}: a column for each.
    """
    checkpoints, differences = list(figures), differences or {}
    head = ["task", "length", *checkpoints, *(f"{name} - {checkpoints[0]}" for name in differences)]
    rows = [head, ["---"] * len(head)]
    for task, length in task_lengths(figures):
        scores = [figures[name].get(task, {}).get(length) for name in checkpoints]
        row = [task, length, *("-" if s is None else f"{s:.1f}" for s in scores)]
        found = [each.get(task, {}).get(length) for each in differences.values()]
        rows.append([*row, *("-" if each is None else difference_cell(each) for each in found)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def difference_cell(found: Mapping) -> str:
    """+1.0 [-2.0, +4.0]"""
    if found["interval"] is None:
        return f"{found['mean']:+.1f}"
    low, high = found["interval"]
    return f"{found['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"


def task_lengths(figures: Mapping[str, Mapping[str, Mapping]]) -> list[tuple[str, str]]:
    """Every (task, length) that any checkpoint has, lengths as they come."""
    return list(
        dict.fromkeys(
            (task, length)
            for tasks in figures.values()
            for task, by_length in tasks.items()
            for length in by_length
        )
    )
