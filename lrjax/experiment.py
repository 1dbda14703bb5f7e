"""Runs an experiment: every arm of a config on every seed, runs side by side, and one JSON of what came out.

    python -m lrjax.experiment --config=configs/experiments/skips.py --seeds=10-14 --workdir=runs/experiments
    python -m lrjax.experiment --config=configs/experiments/skips.py:smoke ...              every stage in seconds

A file of `configs/experiments/` has ARMS (variants of its config) and CLAIMS (rows to compare) beside `get_config`; the
methods of the config are the rows. An arm with a seed is a run of `lrjax.main` of its own:

    WORKDIR/bases/KEY/               a pretrained base, shared by all runs whose config pretrains alike
    WORKDIR/NAME/ARM/seed-SEED/      a run; the same command goes on with what is not complete
    WORKDIR/NAME/ARM/seed-SEED.log   what it said
    docs/results/NAME.json           what the complete runs found, and config, seeds, commit and machine

Seeds or arms can be run on several machines: with --keep the JSON's other runs stay, each with its commit and machine.

`python -m lrjax.results` makes docs/results.md of these files. They hold the needles found by length and
depth, so that every figure of the page can be counted again.
"""

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from absl import logging

from lrjax import config as config_lib
from lrjax import provenance
from lrjax import workdir as wd
from lrjax.checkpoints import orbax
from lrjax.command import ProgramFlags, run_program
from lrjax.errors import UserError

_FLAGS = ProgramFlags()
_CONFIG = _FLAGS.DEFINE_string(
    "config", None, "The experiment, configs/experiments/NAME.py[:smoke]."
)
_WORKDIR = _FLAGS.DEFINE_string("workdir", None, "Directory of the runs of all experiments.")
_SEEDS = _FLAGS.DEFINE_list("seeds", ["10-14"], "Seeds: 10-14, or 10,12.")
_ARMS = _FLAGS.DEFINE_list("arms", [], "Only these arms.")
_PROCESSES = _FLAGS.DEFINE_integer("processes", 1, "Runs side by side.", lower_bound=1)
_OUT = _FLAGS.DEFINE_string("out", "docs/results", "Directory of the JSON.")
_KEEP = _FLAGS.DEFINE_bool(
    "keep", False, "Keep the runs of the JSON that are not among these: another machine's."
)

STAGES = ("import", "probe", "score", "analyse", "select", "extend", "replay", "merge", "evaluate")
# Of what makes the data, this concerns long documents alone: bases do not depend on it.
_LONG_ARGUMENTS = ("target", "long_facts_share", "long_pairing")


class Run(NamedTuple):
    """An arm with a seed."""

    arm: str
    seed: int
    variant: str  # of the config: the arm, or "ARM,smoke"
    config: object
    workdir: pathlib.Path


class Experiment(NamedTuple):
    name: str
    file: pathlib.Path
    module: object
    smoke: bool


def main(argv) -> None:
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help")
    for flag in ("config", "workdir"):
        if _FLAGS[flag].value is None:
            raise UserError(f"--{flag} is missing; see --help")
    experiment = open_experiment(_CONFIG.value)
    workdir = pathlib.Path(_WORKDIR.value)
    runs_ = plan_runs(experiment, workdir, read_seeds(_SEEDS.value), _ARMS.value)
    out = pathlib.Path(_OUT.value)
    others = stored_runs(experiment, out)
    if _KEEP.value:
        check_stored(experiment, others)
    elif others:
        logging.warning(
            "%s: its %d runs are replaced by these; --keep keeps those of other arms and seeds",
            _json(experiment, out), len(others),
        )  # fmt: skip
        others = []
    failed = run_all(experiment, runs_, workdir, _PROCESSES.value, out, others)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs_)} runs failed: {', '.join(map(str, failed))} say why; the same command "
            "goes on"
        )


# ------------------------------------------------------------------------------------------- what is to run


def open_experiment(spec: str) -> Experiment:
    """`configs/experiments/NAME.py`, or with `:smoke`."""
    path, _, variant = spec.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--config={path}: there is no such file")
    if variant not in ("", "smoke"):
        raise UserError(
            f"--config={spec}: variant {variant!r}; allowed: none, smoke (arms: --arms)"
        )
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    for name in ("ARMS", "CLAIMS", "get_config"):
        if not hasattr(module, name):
            raise UserError(f"--config={path}: it has no {name}, so it is no experiment")
    return Experiment(file.stem, file, module, variant == "smoke")


def read_seeds(parts) -> list[int]:
    """["10-12", "20"] -> [10, 11, 12, 20]."""
    seeds = []
    for part in parts:
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            raise UserError(f"--seeds={','.join(parts)}: allowed: 10-14, or 10,12")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds:
        raise UserError("--seeds: no seed; allowed: 10-14, or 10,12")
    return list(dict.fromkeys(seeds))


def plan_runs(experiment: Experiment, workdir, seeds, arms=()) -> list[Run]:
    """Every arm with every seed, seed after seed, their configs checked."""
    unknown = [arm for arm in arms if arm not in experiment.module.ARMS]
    if unknown:
        allowed = ", ".join(filter(None, experiment.module.ARMS)) or "none, there is one arm"
        raise UserError(f"--arms: {unknown[0]!r}; allowed: {allowed}")
    found = []
    for seed in seeds:
        for arm in arms or experiment.module.ARMS:
            variant = ",".join(filter(None, (arm, "smoke" if experiment.smoke else "")))
            config = experiment.module.get_config(variant).unlock()
            config.seed = seed
            config_lib.check(config)
            if config.pretrain:
                config.model.source = str(_base(workdir, config) / "checkpoints" / "base")
            folder = workdir / experiment.name / (variant or "all") / f"seed-{seed}"
            found.append(Run(arm, seed, variant, config.lock(), folder))
    return found


def _base(workdir, config) -> pathlib.Path:
    """Where the base lives that a config pretrains: one place for all configs that pretrain alike."""
    flat = wd.flatten(config)
    sources = {name for phase in config.pretrain.values() for name in phase.mixture}
    fields = (
        "window",
        "tokenizer",
        "model.dtype",
        "model.attention",
        "model.shape.",
        "pretrain.",
        "data.prepare",
    )
    arguments = "data.prepare_args."

    def matters(name):
        if name.startswith(f"{arguments}counts."):
            return name.rsplit(".", 1)[1] in sources
        return name.removeprefix(arguments) not in _LONG_ARGUMENTS and name.startswith(fields)

    key = _digest({name: value for name, value in flat.items() if matters(name)})
    return pathlib.Path(workdir) / "bases" / key / f"seed-{config.seed}"


def config_digest(config) -> str:
    """Of the config of an arm, without its seed, where its base lies, and splash's blocks, which are of TPUs alone."""
    left_out = ("seed", "model.source", "model.attention_block")
    flat = config_lib.without_added(wd.flatten(config))
    return _digest({name: value for name, value in flat.items() if name not in left_out})


def _digest(flat: dict) -> str:
    return hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------- running


def run_all(experiment, runs_, workdir, processes: int, out, others=()) -> list[pathlib.Path]:
    """Runs what is not complete and writes the JSON whenever a run is; returns the logs of runs that failed.

    `others`: runs as the JSON has them, which it is to keep until one of the same arm and seed is complete here.
    """
    locks = {_base(workdir, run.config): threading.Lock() for run in runs_}
    writing = threading.Lock()
    environment = _environment(workdir / "programs", processes)
    failed = []

    def finish(run: Run):
        base = _base(workdir, run.config)
        with locks[base]:
            log = _make_base(experiment, run, base, environment) if run.config.pretrain else None
        log = log or _call(
            experiment, run, run.workdir, STAGES, run.config.model.source, environment
        )
        with writing:
            if log:
                failed.append(log)
            _write(experiment, runs_, out, others)

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(finish, run) for run in runs_]:
            future.result()
    return failed


def _make_base(experiment, run, base, environment):
    if orbax.is_model(base / "checkpoints" / "base"):
        return None
    return _call(experiment, run, base, ("import",), "", environment)


def _call(experiment, run: Run, workdir, stages, source: str, environment) -> pathlib.Path | None:
    """A run of lrjax.main in a process of its own; its log if it failed."""
    if all(wd.is_complete(workdir, stage) for stage in stages):
        return None
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "lrjax.main", f"--config={experiment.file}:{run.variant}".rstrip(":"),
        f"--workdir={workdir}", f"--config.seed={run.seed}", f"--config.model.source={source}",
        f"--stages={','.join(stages)}",
    ]  # fmt: skip
    logging.info("%s: starting", workdir)
    begun = time.perf_counter()
    log = workdir.with_suffix(".log")
    with open(log, "a", encoding="utf-8") as said:
        code = subprocess.run(
            command, stdout=said, stderr=said, env=environment, check=False
        ).returncode
    if code:
        logging.error("%s: failed, see %s", workdir, log)
        return log
    logging.info("%s: done in %.0f s", workdir, time.perf_counter() - begun)
    return None


def _environment(programs, processes: int) -> dict[str, str]:
    """Runs share the cores (NPROC: threads of XLA's pool) and what they compile, unless the user says otherwise."""
    return {
        "NPROC": str(max(1, (os.cpu_count() or 1) // processes)),
        "JAX_COMPILATION_CACHE_DIR": str(programs.absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    } | os.environ


# ------------------------------------------------------------------------------------------- the JSON


def _json(experiment, out) -> pathlib.Path:
    return out / f"{experiment.name}{'-smoke' * experiment.smoke}.json"


def stored_runs(experiment, out) -> list[dict]:
    """The runs that the JSON has. Raises `UserError` for a file that holds no experiment."""
    file = _json(experiment, out)
    if not file.exists():
        return []
    runs = wd.read_json(file).get("runs", [])
    if not runs or not all({"arm", "seed", "config_digest", "rows"} <= run.keys() for run in runs):
        raise UserError(
            f"{file}: not the runs of an experiment; move it away, or name another --out"
        )
    return runs


def check_stored(experiment, stored) -> None:
    """Raises `UserError` for runs that cannot stand beside this experiment's: of other arms or of other configs."""
    for run in stored:
        arm = run["arm"]
        if arm not in experiment.module.ARMS:
            raise UserError(
                f"--keep: a stored run is of arm {arm!r}, which the experiment does not have"
            )
        variant = ",".join(filter(None, (arm, "smoke" if experiment.smoke else "")))
        digest = config_digest(experiment.module.get_config(variant))
        if run["config_digest"] != digest:
            raise UserError(
                f"--keep: arm {arm or 'all'!r} is another config now ({digest}) than that of the stored run with seed "
                f"{run['seed']} ({run['config_digest']}); run it again, without --keep"
            )


def texts(experiment) -> dict:
    """What the config says of itself: title, what it is about, and the claims."""
    title, _command, about = experiment.module.__doc__.strip().split("\n\n", 2)
    return {"title": title, "about": about, "claims": list(experiment.module.CLAIMS)}


def _write(experiment, runs_, out, others) -> None:
    complete = [run for run in runs_ if wd.is_complete(run.workdir, "evaluate")]
    if not complete:
        return
    known = {(run.arm, run.seed) for run in complete}
    others = [run for run in others if (run["arm"], run["seed"]) not in known]
    file = _json(experiment, out)
    arms = list(experiment.module.ARMS)
    found = [
        {"arm": run.arm, "seed": run.seed, "config_digest": config_digest(run.config)}
        | collect(run.config, run.workdir)
        for run in complete
    ]
    found = sorted([*others, *found], key=lambda run: (run["seed"], arms.index(run["arm"])))
    # Of what is stored. An arm without a name cannot be asked for.
    seeds = sorted({run["seed"] for run in found})
    there = [arm for arm in arms if any(run["arm"] == arm for run in found)]
    command = f"python -m lrjax.experiment --config={experiment.file}{':smoke' * experiment.smoke}"
    if there != arms and all(there):
        command += f" --arms={','.join(there)}"
    results = {
        "name": file.stem,
        "smoke": experiment.smoke,
        **texts(experiment),
        "config": str(experiment.file),
        "command": f"{command} --seeds={','.join(map(str, seeds))} --workdir=DIR",
        "window": complete[0].config.window,
        "arms": arms,
        "runs": [],
    }
    # A run is a line: its hundreds of numbers are not for reading.
    lines = ",\n".join(f"    {json.dumps(run)}" for run in found)
    text = json.dumps(results, indent=2).replace('"runs": []', f'"runs": [\n{lines}\n  ]')
    out.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, file)


def collect(config, workdir) -> dict:
    """What a complete run found: {"made_by", "anchors", "seconds", "target", "rows": {row: {"needles", ...}}}."""
    folder = workdir / "evaluation"
    rows = {
        name: _row({path.stem: wd.read_json(path) for path in (folder / name).glob("*.json")})
        for name in ("base", *config.methods, "replayed", "merged")
        if (folder / name).is_dir()
    }
    trained = wd.read_json(workdir / "stages" / "extend.json")["methods"]
    for name, method in config.methods.items():
        rows[name] |= {"text": method.selection, "positions": method.positions}
        if method.contiguous_share:
            rows[name]["contiguous_share"] = method.contiguous_share
        rows[name] |= {key: trained[name][key] for key in ("tokens", "flops")}
    if (folder / "merge_curve.json").is_file():
        for point in wd.read_json(folder / "merge_curve.json"):
            rows[f"base_{round(100 * point['base_weight'])}"] = _row(point)
    if (folder / "lds.json").is_file():
        for name, score in wd.read_json(folder / "lds.json").items():
            rows[name]["lds"] = score["mean"]
    stages = [
        wd.read_json(path) for path in (workdir / "stages").glob("*.json") if "-" not in path.stem
    ]
    base = pathlib.Path(config.model.source).parent.parent if config.model.source else workdir
    anchors = wd.read_json(workdir / "scores" / "analysis.json")["anchors"]
    uses_them = any(method.selection.startswith("anchor") for method in config.methods.values())
    return {
        "made_by": [
            note for place in dict.fromkeys((base, workdir)) for note in provenance.notes(place)
        ],
        "anchors": anchors if uses_them else None,
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "target": config.target_length,
        "rows": rows,
    }


def _row(tasks: dict) -> dict:
    """{"needles": {length: {depth: [found, asked]}}, "answer_nll": {length: nats},
    "perplexity": {"START-STOP": ...}, "short_loss": {source: nats}}."""
    row = {}
    if "niah" in tasks:
        needles: dict[str, dict] = {}
        for cell in tasks["niah"]["cells"]:
            needles.setdefault(str(cell["length"]), {})[str(cell["depth"])] = [
                cell["correct"],
                cell["count"],
            ]
        row = {"needles": needles, "answer_nll": tasks["niah"]["nll"]}
    if "perplexity" in tasks:
        row["perplexity"] = {
            f"{bucket['start']}-{bucket['stop']}": bucket["perplexity"]
            for bucket in tasks["perplexity"]["buckets"]
        }
    if "short" in tasks:
        row["short_loss"] = {source: result["nll"] for source, result in tasks["short"].items()}
    return row


if __name__ == "__main__":
    run_program(main, _FLAGS)
