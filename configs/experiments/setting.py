"""What the experiments share: the language and the model of configs/tiny.py in a harder and a broader test.

Harder: 150 steps of extension, not the 350 of the demonstration, at which most methods find nearly every needle.
Broader: 80 needles at each of five depths, 400 for each length. Both were fixed before any of the reported runs. These
take the seeds 10 to 14 (`fresh_seeds` 15 to 19), which nobody looked at while settings were chosen (0, 1, 2 and 100 to
102 were looked at). One rule came later, from what some of these runs showed: that a class in nearly every sentence is
no anchor beside another (`impact.EVERYWHERE`).

A file of this folder has

    ARMS         the variants of its config that are run side by side, each with the methods as rows; arms whose names
                 agree up to a "-" are the rows of one table, made apart
    CLAIMS       pairs of rows that are compared over the seeds (`claim`)
    get_config   the config of an arm, "ARM" or "ARM,smoke"

    python -m lrjax.experiment --config=configs/experiments/NAME.py --seeds=10-14 --workdir=runs/experiments
    python -m lrjax.main --config=configs/experiments/NAME.py:ARM --workdir=DIR          (one arm, one seed)
"""

import pathlib

from configs import tiny
from lrjax.data import keyfacts
from lrjax.errors import UserError
from lrjax.models.flops import train_flops
from lrjax.models.llama import LlamaConfig

STEPS = 150
TOKENS = 16 * tiny.LENGTH  # of a step
LONG_DOCUMENTS = 1200


def build(file, variant: str, arms: tuple[str, ...], change):
    """The locked config of "ARM", "ARM,smoke" or "smoke" (of the first arm); `change(config, arm)` makes it."""
    name = pathlib.Path(file).stem
    parts = variant.split(",") if variant else []
    smoke = parts[-1:] == ["smoke"]
    arm = "".join(parts[: len(parts) - smoke]) or arms[0]
    if arm not in arms:
        allowed = ", ".join([*filter(None, arms), "smoke"])
        raise UserError(
            f"configs/experiments/{name}.py: variant {variant!r}; allowed: none, {allowed}"
        )
    config = tiny.get_config().unlock()
    config.name = name
    config.data.prepare_args.counts = {"sources": LONG_DOCUMENTS, "test_sources": 0}
    for section in (config.probe, config.extend, config.replay):
        section.checkpoint_every = 10**6  # a method is seconds: a stopped one starts again
    config.extend.steps = STEPS
    config.replay.steps = 0
    config.merge.curve = ()
    config.evaluate.niah.samples_per_cell = 80
    config.evaluate.niah.lengths = (64, 256, 512)
    config.evaluate.perplexity.source = ""
    change(config, arm)
    if smoke:
        _make_small(config)
    return config.lock()


def claim(text: str, better: str, worse: str, measure: str = "needles", **more) -> dict:
    """A statement about two rows, judged by the interval of their difference over the seeds.

    Args:
        text: what is claimed.
        better, worse: names of rows.
        measure: needles (share found at the target), answer_nll, short_loss; of the last two less is better.
        more: paper: the paper's figures; margin: above 0, the claim is that they differ by no more; arm, or table;
            worse_arm: where the row `worse` is of another arm, whose runs have the same seeds and so the same bases.
    """
    return {"text": text, "better": better, "worse": worse, "measure": measure} | more


def model(config) -> LlamaConfig:
    return LlamaConfig(**config.model.shape, vocab_size=len(keyfacts.vocabulary()))


def batch_of(length: int) -> int:
    """Rows of `length` tokens in a step of about as many tokens as 16 rows of 154."""
    return max(1, round(TOKENS / length))


def equal_flops_steps(config) -> int:
    """Steps at full length, five rows each, that cost what config.extend does at the training length."""
    short = train_flops(model(config), 16, config.train_length)
    full = train_flops(model(config), batch_of(config.target_length), config.target_length)
    return round(config.extend.steps * short / full)


def _make_small(config) -> None:
    """Seconds; the figures mean nothing."""
    config.data.prepare_args.counts = dict.fromkeys(keyfacts.SPLITS, 20) | {"sources": 30}
    for section in (config.probe, config.extend, *config.pretrain.values()):
        section.update(steps=2, warmup_steps=0)
    if config.replay.steps:
        config.replay.steps = 2
    for entry in config.methods.values():
        entry.steps = min(entry.steps, 2)
    config.analyse.min_lift = 0.0
    for section in config.pretrain.values():
        section.global_batch_size = 8
    lengths = (config.window, config.target_length)
    config.evaluate.niah.update(lengths=lengths, depths=(0.2, 0.8), samples_per_cell=2)
    config.evaluate.short.documents = 4
    config.evaluate.lds.documents = min(config.evaluate.lds.documents, 2)
