"""What the stored runs of an experiment found: the rows of its seeds, their figures, and what becomes of its claims.

    results = joined(workdir.read_json("docs/results/reach.json"))      # as `lrjax.experiment` stores it
    by_arm(results)["x16"]["longrecipe"]                                # what each seed found
    compare(results, results["claims"][0])["verdict"]                   # confirmed, refuted, not separable here

`lrjax.results` makes the page of it.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation.statistics import paired, t_interval

ALPHA = 0.05  # of a verdict
_NO_WIDTH = 1e-9


def joined(results: Mapping) -> Mapping:
    """Stored runs with the arms of one table, `TABLE-ROW`, as one: a seed's runs become a run with the rows of all."""
    if not any("-" in arm for arm in results["arms"]):
        return results
    runs: dict[tuple, dict] = {}
    for run in results["runs"]:
        table = run["arm"].partition("-")[0]
        whole = runs.setdefault(
            (run["seed"], table),
            {"arm": table, "seed": run["seed"], "target": run["target"], "seconds": 0.0}
            | {"rows": {}, "anchors": None, "made_by": [], "digests": {}},
        )
        if twice := whole["rows"].keys() & run["rows"].keys():
            raise UserError(
                f"{results['name']}: two arms of table {table!r} have the row {min(twice)!r}"
            )
        whole["rows"] |= run["rows"]
        if run["anchors"] is not None:
            whole["anchors"] = sorted({*(whole["anchors"] or ()), *run["anchors"]})
        whole["made_by"] += run["made_by"]
        whole["digests"][run["arm"]] = run["config_digest"]
        whole["seconds"] += run["seconds"]
    tables = list(dict.fromkeys(arm.partition("-")[0] for arm in results["arms"]))
    return {**results, "arms": tables, "runs": list(runs.values())}


def by_arm(results) -> dict[str, dict[str, list[dict]]]:
    """arm -> row -> what each seed that has it found, seeds in order."""
    found = {}
    for arm in results["arms"]:
        names = {name for run in results["runs"] if run["arm"] == arm for name in run["rows"]}
        if names:
            found[arm] = {
                name: [*row_of(results, arm, name).values()] for name in sorted(names, key=_order)
            }
    return found


def row_of(results, arm: str, name: str) -> dict[int, dict]:
    """{seed: what it found in a row of an arm}, seeds in order."""
    runs = sorted((run["seed"], run["rows"]) for run in results["runs"] if run["arm"] == arm)
    return {seed: rows[name] for seed, rows in runs if name in rows}


def _order(name: str) -> tuple:
    """Controls first, what comes after extension last, the others by name and number."""
    places = {"base": 0, "raised_theta": 1, "contiguous": 2, "replayed": 4, "merged": 5}
    parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return places.get(name, 3), parts


def measure(row: Mapping, name: str, target: int) -> float | None:
    """needles, answer_nll (both at the target length) or short_loss of a row of one seed; None: not measured."""
    if name == "needles":
        return needles(row, target)
    if name == "answer_nll":
        return row.get("answer_nll", {}).get(str(target))
    if name == "short_loss":
        losses = row.get("short_loss")
        return sum(losses.values()) / len(losses) if losses else None
    raise UserError(f"claim: measure {name!r}; allowed: needles, answer_nll, short_loss")


def needles(row: Mapping, length: int) -> float | None:
    """Share of the needles of a length that a row of one seed found; None: not asked."""
    cells = row.get("needles", {}).get(str(length))
    return _share(cells.values()) if cells else None


def distant(row: Mapping, target: int, near: float, far: float) -> float | None:
    """Share of the needles of the target length that lie `near` to `far` tokens before the question."""
    cells = row.get("needles", {}).get(str(target), {})
    chosen = [cell for depth, cell in cells.items() if near <= (1 - float(depth)) * target <= far]
    return _share(chosen) if chosen else None


def compare(results: Mapping, claim: Mapping) -> dict | None:
    """`statistics.paired` of the claim's rows over the seeds that have both, and its "verdict"; None without one."""
    arm = claim.get("arm", results["arms"][0])
    target = target_of(results, arm)
    better = row_of(results, arm, claim["better"])
    worse = row_of(results, claim.get("worse_arm", arm), claim["worse"])
    pairs = [
        [measure(row[seed], claim["measure"], target) for seed in better if seed in worse]
        for row in (better, worse)
    ]
    if not all(pairs) or None in pairs[0] + pairs[1]:
        return None
    found = paired(*pairs)
    sign = 1 if claim["measure"] == "needles" else -1
    if equal(found) and (claim.get("margin") is not None or found["p_sign"] > ALPHA):
        # Of few seeds that all differ by the same number (by one needle, say) Student's interval has no width.
        return found | {"verdict": f"not separable here ({found['count']} equal differences)"}
    return found | {"verdict": verdict(found["interval"], sign, claim.get("margin"))}


def equal(found: Mapping) -> bool:
    """Whether all differences of a comparison are the same number: its interval has no width."""
    return found["interval"] is not None and np.ptp(found["interval"]) < _NO_WIDTH


def verdict(interval: Sequence[float] | None, sign: int = 1, margin: float | None = None) -> str:
    """What an interval of a difference says of a claim: that it has this sign, or is within a margin of 0."""
    if interval is None:
        return "not separable here (one seed)"
    low, high = interval
    if margin is not None:
        if -margin <= low and high <= margin:
            return "confirmed"
        return "refuted" if low > margin or high < -margin else "not separable here"
    if sign < 0:
        low, high = -high, -low
    return "confirmed" if low > 0 else "refuted" if high < 0 else "not separable here"


def panels(results) -> dict[str, dict[str, dict]]:
    """What `plots.seed_dots` draws."""
    drawn = {}
    for arm, rows in by_arm(results).items():
        drawn[arm] = {}
        for name, found in rows.items():
            shares = [needles(row, target_of(results, arm)) for row in found]
            if None not in shares:
                mean, interval = t_interval(shares)
                drawn[arm][name] = {"seeds": shares, "mean": mean, "interval": interval}
    return drawn


def merge_surface(results) -> tuple[dict[str, list[list[float]]], list[str], list[str]] | None:
    """Needles at the target and loss of short text over arms and the base's weight (rows base_N, means over the
    seeds), what `plots.surfaces` draws; None where there are no such rows or arms."""
    arms = by_arm(results)
    of_all = [name for name in next(iter(arms.values())) if re.fullmatch(r"base_\d+", name)]
    if len(arms) < 2 or not of_all or not all(set(of_all) <= rows.keys() for rows in arms.values()):
        return None

    def means(name: str, scale: float):
        found = [
            [[measure(run, name, target_of(results, arm)) for run in rows[row]] for row in of_all]
            for arm, rows in arms.items()
        ]
        if any(value is None for rows in found for values in rows for value in values):
            return None
        return [[scale * float(np.mean(values)) for values in rows] for rows in found]

    panels_ = {}
    for title, name, scale in (
        ("Needles found at the target, %", "needles", 100),
        ("Loss of short text, nats", "short_loss", 1),
    ):
        values = means(name, scale)
        if values is not None:
            panels_[title] = values
    if not panels_:
        return None
    return panels_, list(arms), [row.removeprefix("base_") for row in of_all]


def seeds_of(results, arm: str) -> list[int]:
    """The seeds of an arm's runs, in order."""
    return sorted(run["seed"] for run in results["runs"] if run["arm"] == arm)


def target_of(results, arm: str) -> int:
    """The length that an arm's runs extend to, in tokens; 0 without a run."""
    return next((run["target"] for run in results["runs"] if run["arm"] == arm), 0)


FAR = 4  # windows between a fact and its question


def near_and_far(results, target: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Distances of fact and question, in tokens: within the base's window, and `FAR` windows or more."""
    return (0, results["window"]), (FAR * results["window"], target)


def _share(cells) -> float:
    cells = list(cells)
    return sum(found for found, _ in cells) / sum(asked for _, asked in cells)
