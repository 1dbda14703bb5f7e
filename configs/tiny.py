"""LongRecipe from nothing in minutes: a model of 99k parameters learns a window of 64, and is taken to 512.

    python -m lrjax.main --config=configs/tiny.py --workdir=runs/demo        (make demo)

The language is synthetic (`lrjax/data/keyfacts.py`): facts `key NAME NUMBER .` among filler, each asked for once more
later in the document, so that what long range means is known for every token. The base is pretrained on 64 tokens;
every method then gets the same base, the same RoPE base and the same number of tokens (350 steps of about 2,464), and
the needle test asks for a fact anywhere in up to 512 tokens.

Rows of the report: `raised_theta` (nothing trained), `contiguous` (the first 154 tokens at plain positions), `rpes`,
`pose`, `full` (512 tokens), `longrecipe` (sentences with the anchor classes that the analysis finds, at LongRecipe
positions), and the same positions over sentences chosen by score, at random, or the first ones.
"""

from lrjax import config as lrjax_config
from lrjax.config import method, training
from lrjax.data import keyfacts
from lrjax.errors import UserError

WINDOW, TARGET, LENGTH = 64, 512, 154


def get_config(variant: str = ""):
    config = lrjax_config.default()
    config.name = "tiny"
    config.window, config.target_length, config.train_length = WINDOW, TARGET, LENGTH
    config.rope_theta = 5000.0
    config.mesh.fsdp = 1  # a model this small is fastest on one device

    config.data.prepare = "lrjax.data.keyfacts"
    config.data.prepare_args = {"window": WINDOW, "target": TARGET}
    config.data.long = "sources"

    config.model.dtype = "float32"
    config.model.attention = "blockwise"  # the quicker one for many short rows
    config.model.shape = {
        "num_layers": 2,
        "embed_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "mlp_dim": 128,
        "rope_theta": 100.0,
    }

    pretrain = {
        "optimizer": "muon",
        "global_batch_size": 64,
        "learning_rate": 2e-2,
        "weight_decay": 0.0,
        "steps": 500,
        "warmup_steps": 20,
        "b2": 0.99,
        "log_every": 25,
        "checkpoint_every": 250,
    }
    # Without random words that repeat, looking back (induction) does not appear in so few steps.
    config.pretrain.a_periodic = training(**pretrain, mark_weight=10.0, mixture={"periodic": 1.0})
    config.pretrain.b_language = training(
        **pretrain, mark_weight=5.0, mixture={"facts": 0.6, "dialect": 0.2, "copy": 0.2}
    )

    extend = {
        "optimizer": "muon",
        "global_batch_size": 16,
        "learning_rate": 1e-2,
        "schedule": "linear",
        "weight_decay": 0.0,
        "b2": 0.99,
        "warmup_steps": 5,
        "log_every": 10,
        "checkpoint_every": 50,
    }
    config.probe = training(**{**extend, "global_batch_size": 5}, steps=50)
    config.probe.method = method("at_positions", "full")
    config.score.batch_size = 16
    config.extend = training(**extend, steps=350)
    config.methods = {
        "raised_theta": method("first", ""),
        "contiguous": method("first", "contiguous"),
        "rpes": method("first", "rpes"),
        "pose": method("at_positions", "pose"),
        # 5 x 512 tokens a step: as many as 16 x 154 can be had in whole documents.
        "full": method("at_positions", "full", global_batch_size=5),
        "longrecipe": method("anchor", "longrecipe"),
        "longrecipe_score": method("score", "longrecipe"),
        "longrecipe_random": method("random", "longrecipe"),
        "longrecipe_first": method("first", "longrecipe"),
    }
    config.replay = training(
        **{**extend, "learning_rate": 1e-3, "global_batch_size": 32},
        steps=80,
        mixture={"replay_facts": 0.4, "replay_dialect": 0.3, "replay_copy": 0.3},
    )
    config.merge.curve = (0.0, 0.25, 0.5, 0.75, 1.0)

    config.evaluate.niah.update(
        lengths=(64, 128, 256, 512),
        samples_per_cell=40,
        haystack="haystack",
        needle="key {key} {value} .",
        question="key {key}",
        keys=keyfacts.NAMES,
        values=keyfacts.NUMBERS,
        distractors=3,
        fast=True,
        batch_size=50,
    )
    config.evaluate.perplexity.update(
        source="test_sources", length=TARGET, documents=64, buckets=(64, 128, 256, 512)
    )
    config.evaluate.short.sources = {
        "facts": "test_facts",
        "dialect": "test_dialect",
        "copy": "test_copy",
    }
    if variant == "quick":
        _make_quick(config)
    elif variant:
        raise UserError(f"configs/tiny.py: variant {variant!r}; allowed: none, quick")
    return config.lock()


def _make_quick(config):
    """Every stage in seconds, for tests; its figures mean nothing."""
    config.data.prepare_args.counts = {
        "periodic": 100, "facts": 100, "dialect": 50, "copy": 50, "sources": 40, "replay_facts": 40,
        "replay_dialect": 40, "replay_copy": 40, "haystack": 10, "test_sources": 10, "test_facts": 10,
        "test_dialect": 10, "test_copy": 10,
    }  # fmt: skip
    sections = [config.probe, config.extend, config.replay, *config.pretrain.values()]
    for section in sections:
        section.update(steps=6, log_every=1, checkpoint_every=2, warmup_steps=2)
    config.probe.global_batch_size = 4  # the batch may be split over devices
    for section in config.pretrain.values():
        section.global_batch_size = 8
    for name in ("rpes", "pose", "full", "longrecipe_random", "longrecipe_first"):
        del config.methods[name]
    config.merge.curve = (0.5,)
    config.analyse.min_lift = 0.0
    config.evaluate.niah.update(lengths=(64, 512), depths=(0.2, 0.8), samples_per_cell=2)
    config.evaluate.during.update(tasks=("niah",), every=3, stages=("longrecipe",))
    config.evaluate.perplexity.documents = 4
    config.evaluate.perplexity.update(window=64, stride=32, key_context=64)
    config.evaluate.short.documents = 4
