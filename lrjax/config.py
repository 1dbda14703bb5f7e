"""Every field of a config, with its default and its meaning; an experiment (`configs/*.py`) changes what it needs.

from lrjax import config as lrjax_config

def get_config(variant=""):
    config = lrjax_config.default()
    config.window, config.target_length, config.train_length = 8192, 131072, 39321
    ...
    return config.lock()
"""

import dataclasses
import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from lrjax.errors import UserError
from lrjax.longrecipe import classing, impact
from lrjax.longrecipe.merge_methods import METHODS
from lrjax.models.llama import LlamaConfig
from lrjax.models.rope import PLAIN, ROPE_TYPES, RopeScaling, paper_theta

WEIGHTINGS = ("", "longce")

# Fields that came after there were runs, with the value that changes nothing: at it, a config is the one that runs
# begun before and stored runs have.
ADDED = {
    r"(methods\.[^.]+|probe\.method)\.contiguous_share": 0.0,
    r"evaluate\.suite\.num_(keys|values|queries)": 1,
    r"evaluate\.perplexity\.key_evaluator": "",
    r"evaluate\.suite\.(nltk_data|bertscore_model)": "",
    r"evaluate\.suite\.bertscore_layer": 17,
}


def training(**changes) -> ConfigDict:
    """The section of a training stage (a pretraining phase, probe, extend, replay)."""
    section = ConfigDict(
        {
            "steps": 100,
            "global_batch_size": 8,
            "length": 0,  # tokens in a row of pretraining and replay; 0: the window
            "micro_batches": 1,  # gradient accumulation: parts that a global batch is worked off in
            "optimizer": "adamw",  # adamw | muon | adafactor
            "learning_rate": 5e-5,
            "schedule": "constant",  # constant | cosine | linear
            "warmup_steps": 0,
            "weight_decay": 0.1,
            "b1": 0.9,
            "b2": 0.999,
            "clip_norm": 1.0,  # 0: no clipping
            "mark_weight": 1.0,  # loss weight of the tokens that a document marks as known answers
            # Of parameters and optimizer state, float32 | bfloat16 (stochastically rounded); and whether the
            # optimizer's state lies in the host's memory (training/state.py).
            "state_dtype": "float32",
            "offload": False,
            "checkpoint_every": 100,
            # The last steps that stay when the stage is done (`lrjax.merge --last=K` averages them); 0: none
            "keep_checkpoints": 0,
            "ema_decay": 0.0,  # above 0: the stage's model is the moving average of its parameters
            # Above 0: attention sees blocks of so many tokens at first, which grow with the steps to the whole
            # row at half of them (the idea of SkyLadder, arXiv 2503.15450); positions stay as they are.
            "grow_from": 0,
            "log_every": 10,
            # Data sources (names in config.data.sources) -> share of the examples, packed to rows at plain
            # positions. In probe and extend they come beside the long documents, whose share is the rest.
            "mixture": ConfigDict(),
        }
    )
    for name, value in changes.items():
        section[name] = ConfigDict(value) if name == "mixture" else value
    return section


def method(selection: str, positions: str, **changes) -> ConfigDict:
    """A way to extend: which text of a long document, at which positions.

    selection: anchor | anchor_spread | digits | score | linked | weighted | random | first
        (`longrecipe/selection.py`); `top`: sentences that hold a token whose score is in the top fraction at its place;
        or `at_positions`: the text that lies at the positions drawn (PoSE as published, full length).
    positions: a name in `longrecipe.positions.TRANSFORMS`, or "" to change the RoPE base and train nothing.
    """
    section = ConfigDict(
        {
            "selection": selection,
            "positions": positions,
            "steps": -1,  # -1: as config.extend
            "global_batch_size": -1,
            "grow_from": -1,
            "train_length": 0,  # tokens of an example; 0: config.train_length
            "top_fraction": 0.0,  # of selection top; 0: config.analyse.top_fraction
            "shuffle": False,  # the kept sentences in random order, not the text's: what is coherence worth?
            # Share of the long examples that are the start of a sample at contiguous positions instead.
            "contiguous_share": 0.0,
            # Loss weights of the kept tokens: "" (all alike) | longce: min(exp(change of log-probability), 5), the
            # weight of LongCE (arXiv 2410.23771) from the base against the probe.
            "weighting": "",
        }
    )
    section.update(changes)
    return section


def default() -> ConfigDict:
    """The config that every experiment starts from."""
    config = ConfigDict()
    config.name = ""
    config.seed = 0
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})  # -1: all the rest
    # Changes to the table of which logical axis is split over which mesh axes, sharding.RULES: "context",
    # "fsdp,tensor", "".
    config.rules = ConfigDict()
    config.row_multiple = (
        1  # training rows are padded to a multiple of it (a split sequence needs whole blocks)
    )

    # The base: a checkpoint (HF directory, GGUF file, lrjax model, "smollm2" for the packaged one), or "" to
    # pretrain one with the phases in config.pretrain. `shape` holds fields of models.llama.LlamaConfig: those of
    # the model to pretrain, or what a checkpoint has to have.
    config.model = ConfigDict(
        {
            "source": "",
            "dtype": "bfloat16",  # of the computation; parameters are float32
            "remat": "none",  # models.llama.REMAT_POLICIES
            "attention": "auto",  # models.attention.IMPLEMENTATIONS
            "attention_block": 1024,  # of splash: queries and keys at a time, a multiple of 128
            "context_parallel": "gather",  # gather | ring | ulysses: how devices share a sequence (models/context.py)
            "shape": ConfigDict(),
        }
    )
    config.tokenizer = (
        ""  # "": the one that comes with the model; else see data.tokenizers.load_tokenizer
    )

    # Windows, in tokens: what the base was trained for, the target, and the length trained at (30 % of it).
    config.window = 8192
    config.target_length = 131072
    config.train_length = 39321
    config.rope_theta = (
        0.0  # of every extended model; 0: the paper's rule from the base and the two windows
    )
    # RoPE scaling of every extended model, fields of models.rope.RopeScaling. rope_type "" keeps the base's and
    # changes theta alone; any other takes config.rope_theta, or else the base's theta unchanged.
    config.rope_scaling = ConfigDict(
        {
            "rope_type": "",  # "" | default | linear | dynamic | yarn | llama3 | longrope
            "factor": 0.0,  # 0: target_length / window
            "original_max_position_embeddings": 0,  # 0: window
            "attention_factor": 0.0,  # 0: the encoding's own
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.0,  # yarn, both: attention factor of DeepSeek's form; 0: not
            "mscale_all_dim": 0.0,
            "truncate": True,  # yarn: the ramp begins and ends at whole dimensions
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "short_factor": (),  # longrope: a number for each pair of rotated dimensions
            "long_factor": (),
        }
    )

    config.data = ConfigDict(
        {
            "prepare": "",  # module with prepare(out_dir, seed=..., **prepare_args) -> {name: path}, or ""
            "prepare_args": ConfigDict(),
            "sources": ConfigDict(),  # name -> source (data.sources.open_source), beside what prepare makes
            "long": "long",  # the source of long documents: scored, selected from, trained on
            "source_length": 0,  # long documents are cut to samples of so many tokens; 0: target_length
            "samples": 0,  # use so many samples; 0: all
            # A document that cannot serve (no sentence end, shorter than the budget): error | skip (logged)
            "bad_document": "error",
        }
    )

    config.pretrain = ConfigDict()  # phases by name, run in alphabetical order; each with a length
    config.probe = training(steps=20)  # the short extension that scoring compares the base with
    config.probe.method = method("first", "longrecipe")
    config.score = ConfigDict(
        {
            "samples": 0,  # 0: all
            "length": 0,  # 0: source_length
            "batch_size": 1,
            "kl": False,  # also how far the whole distribution moves
            # Also the probe's log-probability with the long context less that with the last so many tokens
            # (longrecipe/contrast.py), a quarter of them at a time; 0: not
            "short_context": 0,
            "part": 64,  # batches that are on disk together: a stopped stage goes on behind the last part
        }
    )
    config.analyse = ConfigDict(
        {
            "score": "logit",  # longrecipe.impact.SCORES: what ranks the tokens, also for selections by score
            "top": "position",  # position | overall: where the top fraction is taken
            "top_fraction": 0.2,
            "min_lift": 1.2,
            "classes": "text",  # longrecipe.classing.KINDS; copied: from config.window tokens back
        }
    )
    config.methods = ConfigDict()  # name -> method(...), all extended at equal tokens
    config.method = "longrecipe"  # the one that replay and merge go on with
    config.extend = training(steps=104, global_batch_size=96)
    # With 0 steps there is neither a replayed nor a merged model.
    config.replay = training(steps=50, global_batch_size=96, learning_rate=5e-6)
    config.merge = ConfigDict(
        {
            # longrecipe.merge_methods.METHODS; those with a base take the replayed model's difference to it
            "method": "linear",
            "base_weight": 0.5,  # the replayed model has the rest
            "density": 1.0,  # ties, dare: share of the difference that is kept
            "curve": (),  # base weights to evaluate: needles against short loss
        }
    )

    config.evaluate = ConfigDict(
        {
            "checkpoints": (),  # names; () is every one there is
            "niah": ConfigDict(
                {
                    "lengths": (),  # () leaves the task out
                    "depths": (0.1, 0.3, 0.5, 0.7, 0.9),
                    "samples_per_cell": 1,
                    "haystack": "",  # a data source
                    "needle": "The pass key is {value}. Remember it. {value} is the pass key.",
                    "question": "What is the pass key? The pass key is ",
                    "keys": (),
                    "values": (),  # () draws five-digit numbers
                    "distractors": 0,
                    "fast": False,  # one forward pass instead of generation through the cache
                    "batch_size": 1,
                }
            ),
            # Benchmarks by name (evaluation/suite.py): RULER's, LongBench's and LooGLE's tasks, needles; () is none.
            "suite": ConfigDict(
                {
                    "tasks": (),
                    "lengths": (),
                    "samples": 20,  # of each task and length
                    "seed": 42,
                    "depths": (0.1, 0.3, 0.5, 0.7, 0.9),  # of niah, passkey, number
                    "together": False,  # the needles of all depths in one haystack
                    "num_keys": 1,  # of niah_custom
                    "num_values": 1,
                    "num_queries": 1,
                    "ruler_dir": "",  # a checkout of RULER: its wording
                    "squad": "",
                    "hotpotqa": "",
                    "longbench_dir": "",
                    "longbench_wording": "",
                    "loogle_dir": "",
                    "loogle_wording": "",
                    "nltk_data": "",  # of LooGLE: a folder with corpora/wordnet, for METEOR
                    "bertscore_model": "",  # of LooGLE: a Hugging Face model, for BERTScore
                    "bertscore_layer": 17,
                    "humaneval": "",
                    "run_code": False,  # may programs of the model be run: evaluation/sandbox.py
                    "limit": 0,  # tokens of prompt and budget; 0: the length asked for, or the target length
                    "chat": False,  # in the tokenizer's chat template
                    "batch_size": 1,
                }
            ),
            "perplexity": ConfigDict(
                {
                    "source": "",
                    "length": 0,
                    "documents": 8,
                    "buckets": (),
                    "window": 0,  # also perplexity with a sliding window of so many tokens; 0: not
                    "stride": 256,
                    "key_context": 0,  # also LongPPL, key tokens by a short context of so many tokens; 0: not
                    "key_evaluator": "",  # a checkpoint of the run that chooses them for all, "base"; "": each its own
                }
            ),
            # Long Dependency Score of what every method keeps, read by the base in chunks of so many tokens; of so many
            # documents, 0: not
            "lds": ConfigDict({"documents": 0, "chunk": 128}),
            # Tasks to run during training (names as below evaluation/CHECKPOINT/), every `every` steps.
            "during": ConfigDict({"tasks": (), "every": 0, "stages": ()}),  # stages: () is all
            # Loss in the original window on data sources, to see what was forgotten: name -> source
            "short": ConfigDict(
                {"sources": ConfigDict(), "documents": 64, "length": 0}
            ),  # 0: window
        }
    )
    return config


def without_added(flat: Mapping) -> dict:
    """A flat config without the fields of `ADDED` that change nothing."""

    def changes(name, value):
        return not any(re.fullmatch(n, name) and value == neutral for n, neutral in ADDED.items())

    return {name: value for name, value in flat.items() if changes(name, value)}


def paper() -> ConfigDict:
    """`default` with what all models of the paper share (arXiv 2409.00509): batch, steps, rates, replay, merge.

    96 x 104 examples; a sequence is split over all devices, one at a time. Where the paper states nothing (how H' is
    trained, how many documents are scored), the values are ours.
    """
    config = default()
    config.model.remat = "full"
    # Rows have whole blocks: 16 devices x 2 chunks x 128 tokens.
    config.mesh.update(fsdp=1, context=-1)
    config.row_multiple = 4096
    config.target_length = 131072
    config.train_length = 39321  # 30 %
    config.data.sources = {"long": "data/long/*.parquet", "replay": "data/replay/*.jsonl"}
    config.data.bad_document = "skip"
    shared = {"global_batch_size": 96, "micro_batches": 96, "weight_decay": 0.1, "b2": 0.999}
    extend = {**shared, "learning_rate": 5e-5}
    config.probe = training(**extend, steps=10)
    config.probe.method = method("random", "longrecipe")
    config.score.samples = 1000
    config.extend = training(**extend, steps=104, checkpoint_every=20, log_every=1)
    config.methods = {
        "raised_theta": method("first", ""),
        "longrecipe": method("anchor", "longrecipe"),
    }
    config.replay = training(
        **shared, learning_rate=5e-6, steps=86, mixture={"replay": 1.0}, log_every=1
    )
    config.merge.base_weight = 0.5
    return config


def extended_theta(config, base_theta: float, head_dim: int) -> float:
    """The RoPE base of the extended models: config.rope_theta, or the paper's rule with f = target / window."""
    if config.rope_theta:
        return config.rope_theta
    return paper_theta(base_theta, config.target_length / config.window, head_dim)


def extended_model(config, base: LlamaConfig) -> LlamaConfig:
    """The config of the extended models: the base's with the theta, the RoPE scaling and the window of the target.

    Raises `UserError` for a scaling that does not fit the model.
    """
    theta, scaling = base.rope_theta, base.rope_scaling
    if config.rope_scaling.rope_type in ("", "default"):
        theta = extended_theta(config, theta, base.rotary_dim)
        if config.rope_scaling.rope_type:
            scaling = PLAIN
    else:
        theta, scaling = config.rope_theta or theta, target_scaling(config)
    return dataclasses.replace(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=config.target_length,
    )


def target_scaling(config) -> RopeScaling:
    """What config.rope_scaling asks for, with its zeros filled in. Raises `UserError` naming the field."""
    given = dict(config.rope_scaling)
    if given["rope_type"] not in ROPE_TYPES:
        allowed = ", ".join(ROPE_TYPES)
        raise UserError(
            f"config.rope_scaling.rope_type {given['rope_type']!r}: allowed: {allowed}, or empty for the base's"
        )
    given["factor"] = given["factor"] or config.target_length / config.window
    given["original_max_position_embeddings"] = (
        given["original_max_position_embeddings"] or config.window
    )
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        given[name] = given[name] or None
    read = ROPE_TYPES[given["rope_type"]]
    try:
        return RopeScaling(
            given["rope_type"], **{name: given[name] for name in read if name in given}
        )
    except UserError as error:
        raise UserError(f"config.rope_scaling.{error}") from error


def check(config) -> None:
    """Raises `UserError` for values that cannot work together, before anything is computed."""
    if config.train_length > config.target_length:
        raise UserError(
            f"config.train_length {config.train_length} is over config.target_length {config.target_length}; "
            "allowed: at most the target"
        )
    if config.window > config.target_length:
        raise UserError(
            f"config.window {config.window} is over config.target_length {config.target_length}; "
            "allowed: at most the target"
        )
    for field in ("window", "target_length", "train_length"):
        if config[field] < 2:
            raise UserError(f"config.{field} {config[field]}: allowed: 2 tokens and more")
    # These are read after pretraining and scoring, which would be too late to learn of a mistake.
    for field, allowed in (
        ("score", impact.SCORES),
        ("top", impact.TOPS),
        ("classes", classing.KINDS),
    ):
        if config.analyse[field] not in allowed:
            raise UserError(
                f"config.analyse.{field} {config.analyse[field]!r}: allowed: {', '.join(allowed)}"
            )
    if config.rope_scaling.rope_type:
        target_scaling(config)
    if config.data.bad_document not in ("error", "skip"):
        raise UserError(
            f"config.data.bad_document {config.data.bad_document!r}: allowed: error, skip"
        )
    if config.methods and config.method not in config.methods:
        raise UserError(
            f"config.method {config.method!r} is none of config.methods: {', '.join(config.methods)}"
        )
    for name, entry in config.methods.items():
        if not 0 <= entry.train_length <= config.target_length:
            raise UserError(
                f"config.methods.{name}.train_length {entry.train_length}: allowed: 0 (config.train_length) to "
                f"config.target_length {config.target_length}"
            )
        if not 0 <= entry.top_fraction <= 1:
            raise UserError(
                f"config.methods.{name}.top_fraction {entry.top_fraction}: allowed: from 0 to 1"
            )
        if not 0 <= entry.contiguous_share < 1:
            raise UserError(
                f"config.methods.{name}.contiguous_share {entry.contiguous_share}: allowed: from 0 to below 1"
            )
        if entry.weighting not in WEIGHTINGS:
            raise UserError(
                f"config.methods.{name}.weighting {entry.weighting!r}: allowed: "
                f"{', '.join(map(repr, WEIGHTINGS))}"
            )
        if entry.selection == "at_positions" and (entry.shuffle or entry.weighting):
            raise UserError(
                f"config.methods.{name}: shuffle and weighting need a selection; 'at_positions' selects nothing"
            )
    if config.merge.method not in METHODS:
        raise UserError(
            f"config.merge.method {config.merge.method!r}: allowed: {', '.join(METHODS)}"
        )
    if not 0 < config.merge.density <= 1:
        raise UserError(f"config.merge.density {config.merge.density}: allowed: above 0, to 1")
    during = config.evaluate.during
    if during.every < 0 or (during.tasks and not during.every):
        raise UserError(
            f"config.evaluate.during.every {during.every}: allowed: 1 and more where tasks are named"
        )
    evaluators = ["", "base", "probe", *config.methods]
    evaluators += ["replayed", "merged"] if config.replay.steps else []
    if config.evaluate.perplexity.key_evaluator not in evaluators:
        raise UserError(
            f"config.evaluate.perplexity.key_evaluator {config.evaluate.perplexity.key_evaluator!r}: allowed: "
            f"{', '.join(map(repr, evaluators))}"
        )
    if not 0 <= config.merge.base_weight <= 1:
        raise UserError(
            f"config.merge.base_weight {config.merge.base_weight}: allowed: from 0 to 1"
        )
