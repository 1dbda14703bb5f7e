"""The model card (README.md) of an exported model: what it is, which recipe made it, with what figures.

    text = model_card(config, origin)                  # origin: the path that the model was read from

Everything in it is read off the files: model.json, a run's config.json, stages and report/summary.json, a merge's
merge.json. What they do not say is not in the card, and the card says so.
"""

import json
from pathlib import Path

import lrjax
from lrjax.checkpoints.families import FAMILIES
from lrjax.models.llama import LlamaConfig

# Of a run's config, what one asks first; the whole is in the run's config.json.
_SETTINGS = (
    "seed",
    "model.source",
    "window",
    "target_length",
    "train_length",
    "data.long",
    "method",
    "extend.steps",
    "extend.global_batch_size",
    "extend.learning_rate",
    "extend.optimizer",
    "replay.steps",
    "replay.learning_rate",
    "merge.method",
    "merge.base_weight",
)


def model_card(config: LlamaConfig, origin=None) -> str:
    """Markdown with the metadata block that model hubs read.

    Args:
        config: the model's.
        origin: the checkpoint or run that it was read from; None: it came from no file.
    """
    parts = [_header(config)]
    path = None if origin is None else Path(origin)
    run = None if path is None else _run_of(path)
    if path is None:
        parts.append("How the weights came about is not recorded: they were handed over in memory.")
    elif run is not None:
        name = None if path == run else path.name
        parts += _recipe(run, name)
    else:
        parts += _origin(path)
    return "\n\n".join(parts) + "\n"


def _header(config: LlamaConfig) -> str:
    scaling, encoding = config.rope_scaling, "plain"
    if scaling.rope_type != "default":
        encoding = f"{scaling.rope_type}, factor {scaling.factor:g}"
        if scaling.original_max_position_embeddings:
            encoding += f", from a window of {scaling.original_max_position_embeddings:,} tokens"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lrjax\n- long-context\n---\n\n"
        f"# A {FAMILIES[config.family].architecture} for {config.max_position_embeddings:,} tokens\n\n"
        f"Written by lrjax {lrjax.__version__}. RoPE: theta {config.rope_theta:,.10g}, {encoding}. "
        f"{config.num_layers} layers of width {config.embed_dim:,}, {config.num_heads} heads, "
        f"{config.num_kv_heads} for keys and values, vocabulary {config.vocab_size:,}."
    )


def _run_of(path: Path) -> Path | None:
    """The workdir that a path is or lies in (WORKDIR/checkpoints/NAME)."""
    for folder in (path, path.absolute().parent.parent):
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def _recipe(run: Path, name: str | None) -> list[str]:
    settings = _read(run / "config.json")
    name = name or _newest(run)
    stages = {
        file.stem: _read(file)
        for file in sorted((run / "stages").glob("*.json"), key=lambda file: file.stat().st_mtime)
    }
    parts = [
        "## How it was made\n\n"
        f"Checkpoint `{name}` of a run of the config `{settings.get('name') or 'without a name'}`, whose window of "
        f"{settings.get('window', 0):,} tokens was extended to {settings.get('target_length', 0):,} with LongRecipe "
        "(arXiv 2409.00509). Key settings:\n\n| setting | value |\n|---|---|\n"
        + "\n".join(f"| {key} | {settings[key]} |" for key in _SETTINGS if key in settings)
    ]
    if stages:
        rows = [
            f"| {stage} | {facts.get('tokens', 0):,} | {facts.get('seconds', 0):,.0f} |"
            for stage, facts in stages.items()
        ]
        parts.append("Stages:\n\n| stage | tokens | seconds |\n|---|---|---|\n" + "\n".join(rows))
    evaluation = _read(run / "report" / "summary.json").get("evaluation", {})
    return [*parts, _figures(evaluation, name)]


def _newest(run: Path) -> str:
    from lrjax.checkpoints.loading import FINISHED

    for name in FINISHED:
        if (run / "checkpoints" / name / "model.json").is_file():
            return name
    return "unknown"


def _figures(evaluation: dict, name: str) -> str:
    """A table of the model's figures beside the base's."""
    mine, base = evaluation.get(name), evaluation.get("base", {}) if name != "base" else {}
    if not mine:
        return "## Figures\n\nNo evaluation of this checkpoint is in the run's report."
    rows = []
    for task, figures in mine.items():
        for metric, value in figures.items() if isinstance(figures, dict) else [("", figures)]:
            before = base.get(task, {})
            before = before.get(metric) if isinstance(before, dict) else before
            rows.append(f"| {task} | {metric} | {_number(before)} | {_number(value)} |")
    head = "| task | length or metric | base | this model |\n|---|---|---|---|\n"
    return "## Figures\n\nAs the run's report/summary.json has them:\n\n" + head + "\n".join(rows)


def _number(value) -> str:
    return (
        f"{value:.4g}" if isinstance(value, int | float) else "-" if value is None else str(value)
    )


def _origin(path: Path) -> list[str]:
    about = _read(path / "model.json").get("about", {}) if path.is_dir() else {}
    merged = _read(path / "merge.json") if path.is_dir() else {}
    if merged:
        names = [Path(source["path"]).name for source in merged.get("sources", [])]
        return [
            f"## How it was made\n\nMerged by `{merged.get('method')}` from {', '.join(names)}; merge.json of "
            f"{path.name} has every setting."
        ]
    text = f"## How it was made\n\nRead from `{path.name}` and written by lrjax."
    if path.suffix == ".gguf":
        text += " A GGUF's quantised weights were made full numbers again; what quantising lost is lost."
    if about:
        listed = ", ".join(f"{key}: {value}" for key, value in about.items())
        text += f" What the source says about itself: {listed}."
    return [text + " Its figures are not known here."]


def _read(file: Path) -> dict:
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8"))
