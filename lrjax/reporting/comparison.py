"""Checkpoints side by side: a table in Markdown.

print(markdown({"base": {"vt": {"4096": 81.2}}, "merged": {"vt": {"4096": 84.0}}}))
"""

from collections.abc import Mapping


def markdown(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row for each task and length, a column for each checkpoint; what was not asked is a dash.

    Args:
        figures: {checkpoint: {task: {length: score}}}.
    """
    checkpoints = list(figures)
    rows = [["task", "length", *checkpoints], ["---"] * (2 + len(checkpoints))]
    for task, length in task_lengths(figures):
        scores = [figures[name].get(task, {}).get(length) for name in checkpoints]
        rows.append([task, length, *("-" if s is None else f"{s:.1f}" for s in scores)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


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
