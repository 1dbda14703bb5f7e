"""Makes docs/results.md and its pictures of the stored runs: nothing on that page is typed by hand.

    python -m lrjax.results                      docs/results/*.json -> docs/results.md, docs/pictures/results_*.png
    python -m lrjax.results --store=DIR          the same, and keeps the evaluations that lrjax.evaluate --out=DIR wrote

First what became of the paper's claims: those of all experiments that name its figures. Of every experiment what was
asked, a table of its rows (mean over the seeds with Student's 95 % interval), the claims with the interval of the
paired differences and what follows from it, a picture, and config, seeds, commit, machine and command. An experiment of
configs/experiments/ that has no stored runs is listed with the command that makes them. Then the evaluations of real
models, docs/results/evaluations/NAME/CHECKPOINT.json, a table for every NAME: what `--store` keeps of them are
the results without what concerns single samples.
"""

import ast
import os
import pathlib
from collections.abc import Mapping, Sequence

from absl import logging

from lrjax import experiment, findings
from lrjax import workdir as wd
from lrjax.command import ProgramFlags, run_program
from lrjax.errors import UserError
from lrjax.evaluation import suite
from lrjax.evaluation.statistics import t_interval, wilson_interval
from lrjax.reporting import evaluations, plots

_FLAGS = ProgramFlags()
_RESULTS = _FLAGS.DEFINE_string("results", "docs/results", "Directory of the stored runs.")
_CONFIGS = _FLAGS.DEFINE_string("configs", "configs/experiments", "Directory of the experiments.")
_STORE = _FLAGS.DEFINE_string("store", "", "Keep these evaluations, --out of lrjax.evaluate.")
_OUT = _FLAGS.DEFINE_string(
    "out", "docs/results.md", "The page; its pictures go to pictures/ beside it."
)

INTRO = """# Results

Made by `python -m lrjax.results` from `docs/results/*.json`, the stored runs of `configs/experiments/`, and from
`docs/results/evaluations/`, what `lrjax.evaluate` found of real models; do not edit.

- **Needles**: share of the facts asked for that are found, in %, by the length of the text. *Near*: asked for within
  the window that the base was trained for; *far*: four windows away or more; both in texts of the target length.
- **Answer**: nats per token of the right answer at the target length; **short**: loss in the base's window, nats, mean
  over its sources (what is forgotten). Of both, less is better.
- A cell is the mean over the seeds and [Student's 95 % interval over the seeds]; *pooled* is Wilson's 95 % interval of
  all needles of the row at the target, as if no seed differed from another: the smaller of the two errors.
- **Claims** are judged by the 95 % interval of the paired difference, seed by seed: *confirmed* where all of it is on
  the side of the claim, *refuted* where all of it is on the other, else *not separable here*. That two rows are alike
  (a margin is named) is confirmed where all of the interval is within the margin, refuted where all is outside. p is
  Student's paired test and the exact test of signs (with 5 seeds it cannot be below 0.0625); where the seeds all differ
  by the same number, the interval has no width: then that test decides, and nothing of a margin. Nothing is corrected
  for the number of claims.
- A seed is a base of its own with documents of its own; all methods of a seed share its base. (SmolLM2's rows all
  start from the published weights, and a seed is the order of the text, the positions and the needles alone: intervals
  over its seeds say nothing of other models or texts.)
- A table that is not complete has a column of seeds; a claim is about the seeds that have both rows.
- **Perplexity** is of held-out long documents, by the position of the token.
- TFLOP is training alone: the probe and the scoring that LongRecipe's selections go by are in no row.
- One rule was made after some of these runs had been seen: a class in more than 90 % of the sentences is no anchor
  beside another (`impact.EVERYWHERE`). All runs that it concerns were made again; docs/log.md has the figures and
  verdicts before it. `fresh_seeds` is the main table on seeds that were run after it.
"""


def main(argv) -> None:
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help")
    out = pathlib.Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(_RESULTS.value)
    if _STORE.value:
        store(pathlib.Path(_STORE.value), folder / "evaluations")
    if not folder.is_dir():
        raise UserError(f"--results={folder}: there is no such directory")
    files = sorted(folder.glob("*.json"))
    stored = [findings.joined(as_the_config_says(wd.read_json(file))) for file in files]
    parts = [INTRO, paper_claims(stored)]
    for results in stored:
        (out.parent / "pictures").mkdir(exist_ok=True)
        picture = out.parent / "pictures" / f"results_{results['name']}.png"
        _write(
            picture,
            plots.seed_dots(
                findings.panels(results), "needles found at the target, %; a grey dot is a seed"
            ),
        )
        pictures = [f"pictures/{picture.name}"]
        if surface := findings.merge_surface(results):
            picture = picture.with_name(f"results_{results['name']}_surface.png")
            _write(picture, plots.surfaces(*surface, "weight of the base in the merge, %"))
            pictures.append(f"pictures/{picture.name}")
        parts.append(section(results, pictures))
    parts.append(_not_run(pathlib.Path(_CONFIGS.value), {results["name"] for results in stored}))
    for each in sorted((folder / "evaluations").glob("*/")):
        found = {file.stem: wd.read_json(file) for file in sorted(each.glob("*.json"))}
        parts.append(evaluations.section(each.name, found))
    _write(out, "\n".join(filter(None, parts)).encode())


def as_the_config_says(results: Mapping) -> Mapping:
    """Stored runs with the texts and claims that their config has now, if they are of the config as it is now."""
    file = pathlib.Path(results["config"])
    if not file.is_file():
        return results
    config = experiment.open_experiment(f"{file}{':smoke' * results['smoke']}")
    try:
        experiment.check_stored(config, results["runs"])
    except UserError as error:
        logging.warning("%s: texts and claims are those of its runs: %s", results["name"], error)
        return results
    return {**results, **experiment.texts(config)}


def paper_claims(stored: Sequence[Mapping]) -> str:
    """The claims beside which the paper has figures, in Markdown."""
    lines = [
        "| the paper's claim | there | here: difference | verdict | experiment |",
        "| --- | --- | --- | --- | --- |",
    ]
    for results in (each for each in stored if not each["smoke"]):
        for claim in results["claims"]:
            found = findings.compare(results, claim) if "paper" in claim else None
            if found:
                cells = [
                    _where(claim) + claim["text"] + _margin(claim),
                    claim["paper"],
                    _difference(claim, found),
                ]
                cells += [f"**{found['verdict']}**", results["name"]]
                lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        return ""
    return "\n".join(["## What became of the paper's claims", "", *lines, ""])


# ------------------------------------------------------------------------------------------- a page's section


def section(results: Mapping, pictures: Sequence[str]) -> str:
    """One experiment in Markdown."""
    lines = [f"## {results['title']}", ""]
    if results["smoke"]:
        lines += ["**A smoke run: its figures mean nothing.**", ""]
    lines += [results["about"], "", *_table(results), "", *_claims(results)]
    for picture in pictures:
        lines += [f"![]({picture})", ""]
    return "\n".join([*lines, *_origin(results)]) + "\n"


def _table(results) -> list[str]:
    many = len(results["arms"]) > 1
    lines = []
    for arm, rows in findings.by_arm(results).items():
        runs = [run for run in results["runs"] if run["arm"] == arm]
        target = runs[0]["target"]
        lengths = sorted(
            {int(n) for row in rows.values() for run in row for n in run.get("needles", ())}
        )
        head = [
            "row",
            *(f"{n}" for n in lengths),
            "pooled",
            "near",
            "far",
            "answer",
            "short",
            "tokens",
            "TFLOP",
        ]
        partly = len({tuple(findings.row_of(results, arm, name)) for name in rows}) > 1
        head += ["seeds"] * partly
        scored = any("lds" in found[0] for found in rows.values())
        head += ["LDS"] * scored
        # Where the base breaks: from the last bucket in its window on.
        read = {
            bucket for row in rows.values() for run in row for bucket in run.get("perplexity", ())
        }
        ends = {bucket: int(bucket.partition("-")[2]) for bucket in read}
        buckets = sorted((b for b in read if ends[b] >= results["window"]), key=ends.get)
        head += [f"perplexity {bucket}" for bucket in buckets]
        if many:
            lines += [f"**{arm}**", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for name, found in rows.items():
            cells = [name]
            cells += [_percent([findings.needles(row, n) for row in found]) for n in lengths]
            cells.append(_pooled(found, target))
            cells += [
                _percent([findings.distant(row, target, *ends) for row in found])
                for ends in findings.near_and_far(results, target)
            ]
            cells.append(_number([findings.measure(row, "answer_nll", target) for row in found], 2))
            cells.append(_number([findings.measure(row, "short_loss", target) for row in found], 2))
            cells.append(f"{found[0]['tokens']:,}" if "tokens" in found[0] else "")
            cells.append(f"{found[0]['flops'] / 1e12:.3g}" if "flops" in found[0] else "")
            cells += [", ".join(map(str, findings.row_of(results, arm, name)))] * partly
            cells += [_number([row.get("lds") for row in found], 2)] * scored
            cells += [
                _number([row.get("perplexity", {}).get(bucket) for row in found], 1)
                for bucket in buckets
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        used = [run["anchors"] for run in runs if run["anchors"] is not None]
        if anchors := sorted({", ".join(each) or "none" for each in used}):
            lines += [f"Anchor classes that the analysis found: {'; '.join(anchors)}.", ""]
    return lines


def _claims(results) -> list[str]:
    lines = [
        "| claim | rows | paper | difference | p (t; signs) | here | by the answer's nats |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for claim in results["claims"]:
        found = findings.compare(results, claim)
        if found is None:
            continue
        p_t = "-" if findings.equal(found) else f"{found['p_t']:.3f}"
        p_values = f"{p_t}; {found['p_sign']:.3f}" if found["count"] > 1 else ""
        second = ""
        if claim["measure"] == "needles" and "margin" not in claim:
            nats = findings.compare(results, claim | {"measure": "answer_nll"})
            second = f"{nats['mean']:+.3f}{_interval(nats['interval'], 1, 3)}: {nats['verdict']}"
        lines.append(
            f"| {_where(claim)}{claim['text']}{_margin(claim)} | {claim['better']}, {claim['worse']} "
            f"| {claim.get('paper', '')} | {_difference(claim, found)} "
            f"| {p_values} | **{found['verdict']}** | {second} |"
        )
    return [*lines, ""] if len(lines) > 2 else []


def _difference(claim: Mapping, found: Mapping) -> str:
    scale, digits = _scale(claim)
    interval = _interval(found["interval"], scale, digits)
    return f"{scale * found['mean']:+.{digits}f}{interval} ({claim['measure']})"


def _where(claim: Mapping) -> str:
    return f"{claim['arm']}: " if claim.get("arm") and "worse_arm" not in claim else ""


def _margin(claim: Mapping) -> str:
    return f" (margin {_scale(claim)[0] * claim['margin']:g})" if "margin" in claim else ""


def _scale(claim: Mapping) -> tuple[int, int]:
    """Of a measure as it is shown: its factor and its digits."""
    return (100, 1) if claim["measure"] == "needles" else (1, 3)


def _origin(results) -> list[str]:
    """Config, seeds, commit, machine, command."""
    runs = results["runs"]
    digests = {}
    for run in runs:
        of_arms = run["digests"] if "digests" in run else {run["arm"]: run["config_digest"]}
        for arm, digest in of_arms.items():
            digests.setdefault(digest, arm or "the config")
    seeds = {arm: findings.seeds_of(results, arm) for arm in results["arms"]}
    texts = [
        f"{arm + ': ' if arm else ''}{', '.join(map(str, found)) or 'none'}"
        for arm, found in seeds.items()
    ]
    if len(set(map(tuple, seeds.values()))) == 1:
        texts = [", ".join(map(str, next(iter(seeds.values()))))]
    made_by = [note for run in runs for note in run["made_by"]]
    return [
        f"Config `{results['config']}` ("
        + ", ".join(f"{arm} {digest}" for digest, arm in digests.items())
        + "); "
        f"seeds {'; '.join(texts)}; "
        f"commit {', '.join(dict.fromkeys(note['commit'] for note in made_by))}; "
        f"{'; '.join(dict.fromkeys(note['machine'] + ', ' + note['devices'] for note in made_by))}; "
        f"{sum(run['seconds'] for run in runs):,.0f} s of runs (bases not counted), side by side with others. "
        f"`{results['command']}`",
    ]


def store(evaluation: pathlib.Path, folder: pathlib.Path) -> None:
    """Keeps what `lrjax.evaluate --out=EVALUATION` found of every checkpoint, in place of what was there.

    It becomes FOLDER/EVALUATION/CHECKPOINT.json. Samples are left out, and of absolute paths all but the name.

    Raises:
        UserError: there is nothing, or not all of it.
    """
    files = sorted(evaluation.glob("*/results.json"))
    if not files:
        raise UserError(
            f"--store={evaluation}: no CHECKPOINT/results.json; lrjax.evaluate --out writes it"
        )
    kept = {}
    for file in files:
        found = wd.read_json(file)
        if not found.get("complete") or "made_by" not in found:
            raise UserError(
                f"{file}: not complete; the same call of lrjax.evaluate goes on with it"
            )
        for result in (
            result for by_length in found["results"].values() for result in by_length.values()
        ):
            result["invented"] = suite.invented(result)
            for of_samples in ("samples", "scores", "questions"):
                result.pop(of_samples, None)
        found["checkpoint"] = _without_folders(found["checkpoint"])
        if "longppl" in found:
            found["longppl"]["evaluator"] = _without_folders(found["longppl"]["evaluator"])
        for given in {"options", "flags"} & found.keys():
            found[given] = {
                key: _without_folders(value) if isinstance(value, str) else value
                for key, value in found[given].items()
            }
        kept[file.parent.name] = found
    target = folder / evaluation.resolve().name
    for old in target.glob("*.json"):
        old.unlink()
    for name, found in kept.items():
        wd.write_json(target / f"{name}.json", found)


def _without_folders(path: str) -> str:
    return pathlib.PurePath(path).name if pathlib.PurePath(path).is_absolute() else path


def _not_run(configs: pathlib.Path, known: set[str]) -> str:
    """The experiments without stored runs."""
    lines = []
    for file in sorted(configs.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        if (
            f"lrjax.experiment --config={configs}/{file.name}" in docstring
            and file.stem not in known
        ):
            command = next(
                line.strip() for line in docstring.splitlines() if "lrjax.experiment" in line
            )
            title = docstring.partition("\n")[0]
            lines.append(f"- {title}\n  `{command}`")
    return "\n".join(["## Not run yet", "", *lines, ""]) if lines else ""


# ------------------------------------------------------------------------------------------- as text


def _percent(shares) -> str:
    return _number(None if None in shares else [100 * share for share in shares], 1, 0.0, 100.0)


def _number(values, digits: int, least: float | None = None, most: float | None = None) -> str:
    if not values or None in values:
        return ""
    mean, interval = t_interval(values)
    if interval and least is not None:
        interval = tuple(min(max(end, least), most) for end in interval)
    return f"{mean:.{digits}f}{_interval(interval, 1, digits, sign='')}"


def _pooled(found, target: int) -> str:
    cells = [cell for row in found for cell in row.get("needles", {}).get(str(target), {}).values()]
    if not cells:
        return ""
    asked = sum(count for _, count in cells)
    low, high = wilson_interval(sum(correct for correct, _ in cells), asked)
    return f"[{100 * low:.1f}, {100 * high:.1f}] of {asked:,}"


def _interval(interval, scale: float, digits: int, sign: str = "+") -> str:
    if interval is None:
        return ""
    return " [" + ", ".join(f"{scale * end:{sign}.{digits}f}" for end in interval) + "]"


def _write(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


if __name__ == "__main__":
    run_program(main, _FLAGS)
