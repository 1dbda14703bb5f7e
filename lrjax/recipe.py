"""LongRecipe from end to end: the stages in order, what each reads and writes, and how a run goes on.

    import   tokenizer/, documents/long.array_record, checkpoints/base    the base, read or pretrained
    probe    checkpoints/probe                                           H': the base after a short extension
    score    scores/long.array_record                                    logit change of every token, base -> H'
    analyse  scores/analysis.json                                        significance, top 20 %, anchor classes
    select   selected/METHOD.array_record                                the sentences that a method keeps
    extend   checkpoints/METHOD                                          every method, at equal tokens
    replay   checkpoints/replayed                                        pretraining-like data, plain positions
    merge    checkpoints/merged                                          average with the base
    evaluate evaluation/CHECKPOINT/TASK.json
    report   report/index.html, report/summary.json

score, analyse and select are in `choosing.py`. Each stage is a function `stage(config, workdir)` and is skipped when
it is complete (`workdir.py`), so the same call goes on after a stop.
"""

import importlib
import pathlib
import time

import jax
from absl import logging

from lrjax import assessment, choosing, examples, provenance, sharding, summary
from lrjax import config as config_lib
from lrjax import workdir as wd
from lrjax.checkpoints import families, loading, orbax
from lrjax.data.loader import Component
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.longrecipe import merging
from lrjax.models.llama import LlamaConfig, abstract_params, init_params
from lrjax.run import (
    checkpoint,
    data_paths,
    load_checkpoint,
    mixture,
    on_first_process,
    open_data,
    open_mesh,
    open_tokenizer,
    run_config,
)
from lrjax.training.loop import train
from lrjax.training.state import shardings_of

# ------------------------------------------------------------------------------------------- running


def run(config, workdir, only=()) -> None:
    """Runs the stages (all, or those named) that are not complete yet.

    Raises `UserError` for a config that cannot work, a workdir of another config, an unknown stage.
    """
    unknown = [name for name in only if name not in STAGES]
    if unknown:
        raise UserError(f"--stages: unknown stage {unknown[0]!r}; allowed: {', '.join(STAGES)}")
    config_lib.check(config)
    workdir = pathlib.Path(workdir)
    wd.claim(workdir, config)
    if not all(wd.is_complete(workdir, name) for name in only or STAGES):
        provenance.note(workdir)
    with sharding.layout(open_mesh(config), config.rules):
        for name in only or STAGES:
            _run_stage(config, workdir, name)


def _run_stage(config, workdir, name) -> None:
    if wd.is_complete(workdir, name):
        logging.info("%s: complete", name)
        return
    sharding.barrier(f"start {name}")
    logging.info("%s: starting", name)
    start = time.perf_counter()
    facts = STAGES[name](config, workdir) or {}
    facts = {"seconds": round(time.perf_counter() - start, 3), "tokens": 0, "flops": 0} | facts
    wd.mark_complete(workdir, name, facts)
    logging.info("%s: done in %.1f s", name, facts["seconds"])


# ------------------------------------------------------------------------------------------- import


def import_base(config, workdir):
    """Prepares the texts and the tokenizer, and reads or pretrains the base."""
    loaded = _load_source(config) if config.model.source else None
    _import_data(config, workdir, loaded[2] if loaded else None)
    tokenizer = open_tokenizer(workdir)
    if orbax.is_model(checkpoint(workdir, "base")):
        return None
    if loaded:
        model_config, params, _ = loaded
        if tokenizer.vocab_size > model_config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.model.source!r} "
                f"{model_config.vocab_size}; allowed: at most the model's"
            )
        # What a config.json of the family cannot say is to be known now, not when the model is exported.
        families.write_config(config_lib.extended_model(config, model_config), "float32")
        orbax.save_model(checkpoint(workdir, "base"), model_config, params)
        return None
    return _pretrain(config, workdir, tokenizer)


@on_first_process
def _import_data(config, workdir, tokenizer_of_model):
    """data/, tokenizer/ and documents/."""
    if config.data.prepare and not (workdir / "data" / "sources.json").exists():
        module = importlib.import_module(config.data.prepare)
        paths = module.prepare(workdir / "data", seed=config.seed, **config.data.prepare_args)
        relative = {
            name: str(pathlib.Path(path).relative_to(workdir)) for name, path in paths.items()
        }
        wd.write_json(workdir / "data" / "sources.json", relative)

    _import_tokenizer(config, workdir, tokenizer_of_model)
    tokenizer = open_tokenizer(workdir)

    documents_file = workdir / "documents" / "long.array_record"
    if not documents_file.exists():
        count = examples.write_long_documents(
            documents_file, open_data(config, workdir, config.data.long), tokenizer,
            source_length=config.data.source_length or config.target_length,
            samples=config.data.samples, budget=config.train_length, bad=config.data.bad_document,
        )  # fmt: skip
        logging.info("import: %d long samples", count)


def _load_source(config):
    """The checkpoint that the config names, after a look at its shape."""
    mesh = open_mesh(config)
    loaded = loading.load(
        config.model.source, shardings=lambda model: shardings_of(abstract_params(model), mesh)
    )
    for field, expected in config.model.shape.items():
        if (found := getattr(loaded[0], field)) != expected:
            raise UserError(
                f"config.model.source {config.model.source!r} has {field} {found}, "
                f"config.model.shape.{field} says {expected}"
            )
    return loaded


def _import_tokenizer(config, workdir, of_model) -> None:
    folder = workdir / "tokenizer"
    if folder.exists():
        return
    # A prepare module may bring the tokenizer of its texts: the source named "tokenizer".
    own = data_paths(config, workdir).get("tokenizer")
    spec = config.tokenizer or of_model or own
    if not spec:
        raise UserError(
            "config.tokenizer is empty and the model brings none; allowed: a path, or bytes"
        )
    load_tokenizer(spec).save(folder)


def _pretrain(config, workdir, tokenizer):
    """A base from nothing: the phases of config.pretrain, one after the other."""
    if not config.pretrain:
        raise UserError(
            "config.model.source is empty and config.pretrain has no phase; set one of them"
        )
    model_config = LlamaConfig(
        **config.model.shape,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=config.window,
    )
    params = init_params(model_config, jax.random.key(config.seed), shardings_of)
    total = {"tokens": 0, "flops": 0}
    for name in sorted(config.pretrain):
        phase = config.pretrain[name]
        stage, length = f"pretrain_{name}", phase.length or config.window
        if orbax.is_model(checkpoint(workdir, stage)):
            model_config, params = orbax.load_model(checkpoint(workdir, stage))
            continue
        params, facts = _train(
            config, workdir, stage, (model_config, params), phase,
            mixture(config, workdir, phase, length), length,
        )  # fmt: skip
        total = {key: total[key] + facts[key] for key in total}
    orbax.save_model(checkpoint(workdir, "base"), model_config, params)
    return total


# ------------------------------------------------------------------------------------------- training stages


def _train(config, workdir, stage, model, section, components, length):
    """Trains with the run's numerics and saves the model of a stage."""
    model_config, params = model
    params, facts = train(
        section, workdir, stage=stage, model=(run_config(config, model_config), params),
        components=components, seed=config.seed, mesh=open_mesh(config), length=length,
        row_multiple=config.row_multiple, hook=assessment.during_training(config, workdir, stage),
        hook_every=config.evaluate.during.every,
    )  # fmt: skip
    orbax.save_model(checkpoint(workdir, stage), model_config, params, about={"stage": stage})
    if not section.keep_checkpoints:
        orbax.remove_steps(checkpoint(workdir, stage))
    return params, facts


def _extend(config, workdir, stage, method, section):
    """The base with the raised RoPE base, trained with one method: `probe` and every entry of `methods`."""
    model_config, params = load_checkpoint(config, workdir, "base")
    extended = config_lib.extended_model(config, model_config)
    if not method.positions:
        orbax.save_model(checkpoint(workdir, stage), extended, params, about={"stage": stage})
        return {"tokens": 0, "flops": 0}
    section = section.copy_and_resolve_references()
    with section.unlocked():
        for field in ("steps", "global_batch_size", "grow_from"):
            if method[field] >= 0:
                section[field] = method[field]
    length = examples.example_length(config, method)
    components = long_examples(
        config, workdir, stage, method, weight=1.0 - sum(section.mixture.values())
    )
    components += mixture(config, workdir, section, length)
    _, facts = _train(config, workdir, stage, (extended, params), section, components, length)
    return facts


def long_examples(config, workdir, stage, method, *, weight: float) -> list[Component]:
    """The long documents as a method has them, and as contiguous text where it takes a share of that; `weight` is of
    both together."""

    def placed(positions, from_source, share):
        file = "documents/long" if from_source else f"selected/{stage}"
        return examples.placed_component(
            examples.open_records(workdir / f"{file}.array_record"), positions, config.target_length,
            train_length=examples.example_length(config, method), from_source=from_source, weight=share * weight,
        )  # fmt: skip

    share = method.contiguous_share
    components = [placed(method.positions, method.selection == "at_positions", 1 - share)]
    if share:
        components.append(placed("contiguous", from_source=True, share=share))
    return components


def probe(config, workdir):
    """H': the base after a short extension, on text chosen without scores."""
    on_first_process(choosing.write_selection)(
        config, workdir, "probe", config.probe.method, analysis=None
    )
    return _extend(config, workdir, "probe", config.probe.method, config.probe)


def extend(config, workdir):
    """Every method of the config, from the same base."""
    total = {"tokens": 0, "flops": 0, "methods": {}}
    for name in config.methods:
        if wd.is_complete(workdir, f"extend-{name}"):
            facts = wd.read_json(workdir / "stages" / f"extend-{name}.json")
        else:
            start = time.perf_counter()
            facts = _extend(config, workdir, name, config.methods[name], config.extend)
            facts["seconds"] = round(time.perf_counter() - start, 3)
            wd.mark_complete(workdir, f"extend-{name}", facts)
        total["methods"][name] = facts
        for key in ("tokens", "flops"):
            total[key] += facts[key]
    return total


def replay(config, workdir):
    """Pretraining-like data at plain positions on the extended model; nothing with 0 steps."""
    if not config.replay.steps:
        return None
    model = load_checkpoint(config, workdir, config.method)
    length = config.replay.length or config.window
    components = mixture(config, workdir, config.replay, length)
    _, facts = _train(config, workdir, "replayed", model, config.replay, components, length)
    return facts


def merge(config, workdir):
    """The replayed model merged with the base; the result carries the extended RoPE base."""
    if not config.replay.steps:
        return
    base, replayed = checkpoint(workdir, "base"), checkpoint(workdir, "replayed")
    weighted, settings = assessment.merge_settings(
        config.merge, config.merge.base_weight, base, replayed
    )
    merging.merge(
        {path: weight for weight, path in weighted}, out=checkpoint(workdir, "merged"), rope_from=replayed,
        overwrite=True, **settings,
        share=merging.Share(jax.process_index(), jax.process_count(), wd.barrier),
    )  # fmt: skip


STAGES = {
    "import": import_base,
    "probe": probe,
    "score": choosing.score,
    "analyse": choosing.analyse,
    "select": choosing.select,
    "extend": extend,
    "replay": replay,
    "merge": merge,
    "evaluate": assessment.evaluate,
    "report": on_first_process(summary.write),
}
