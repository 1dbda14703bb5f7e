"""The real model: SmolLM2-135M-Instruct to 16k and 32k on 0.5M tokens, LongRecipe and its baselines on real text.

    python -m lrjax.experiment --config=configs/experiments/smollm2.py --seeds=0-2 --workdir=runs/experiments --keep

The main rows of configs/smollm2_135m.py (`make showcase`) at thirteen times its training: every method starts from the
published weights with the same raised RoPE base and sees as many tokens of the King James Bible (selections of its
books, about twice over); needles are hidden in essays, 15 for each length. `longrecipe_spread` takes its anchor
sentences from everywhere, because nearly every sentence of this text is one (docs/analysis.md); in `longrecipe_mixed`
half of the examples are the start of a sample at contiguous positions. A run is one method (at 16k one to two minutes
on an H100 with four others beside it, `--processes=5`; two hours and more of a CPU core), so that the rows of a table
can be left over night in pieces or made on several machines: `--arms=16k-pose,16k-longrecipe` makes two, `--keep`
leaves those that are there.
"""

from configs import smollm2_135m
from configs.experiments.setting import claim
from lrjax.config import method
from lrjax.errors import UserError

WINDOWS = ("16k", "32k")
TOKENS = 525_000  # that every method trains on
METHODS = {
    "raised_theta": method("first", ""),
    "contiguous": method("first", "contiguous"),
    "rpes": method("first", "rpes"),
    "pose": method("at_positions", "pose"),
    "longrecipe": method("anchor", "longrecipe"),
    "longrecipe_mixed": method("anchor", "longrecipe", contiguous_share=0.5),
    "longrecipe_spread": method("anchor_spread", "longrecipe"),
    "longrecipe_code": method("anchor", "longrecipe_code"),
    "longrecipe_random": method("random", "longrecipe"),
    # What LongRecipe costs or brings by its text alone, and by its gaps alone.
    "anchor_contiguous": method("anchor", "contiguous"),
    "first_longrecipe": method("first", "longrecipe"),
}
ARMS = tuple(f"{window}-{name}" for window in WINDOWS for name in METHODS)

CLAIMS = tuple(
    claim(text, better, worse, measure, arm=window)
    for window in WINDOWS
    for measure in ("needles", "answer_nll")
    for text, better, worse in (
        ("Training is better than the raised RoPE base alone", "longrecipe", "raised_theta"),
        ("LongRecipe is better than contiguous text", "longrecipe", "contiguous"),
        ("LongRecipe is better than PoSE", "longrecipe", "pose"),
        ("LongRecipe is better than RPES", "longrecipe", "rpes"),
        ("Anchor sentences are better than random ones", "longrecipe", "longrecipe_random"),
        ("Half of the examples contiguous is better than none", "longrecipe_mixed", "longrecipe"),
        ("Anchors from everywhere are better than the first ones", "longrecipe_spread", "longrecipe"),
        ("The paper's positions are better than its code's", "longrecipe", "longrecipe_code"),
        ("LongRecipe's positions are better than none on its text", "longrecipe", "anchor_contiguous"),
        ("LongRecipe's text is better than plain text at its positions", "longrecipe", "first_longrecipe"),
    )
)  # fmt: skip


def get_config(variant: str = ""):
    parts = variant.split(",") if variant else []
    smoke = parts[-1:] == ["smoke"]
    arm = "".join(parts[: len(parts) - smoke]) or ARMS[0]
    if arm not in ARMS:
        raise UserError(
            f"configs/experiments/smollm2.py: variant {variant!r}; allowed: none, {', '.join(ARMS)}, smoke"
        )
    window, name = arm.split("-")
    config = smollm2_135m.get_config().unlock()
    config.name = "smollm2"
    target = 1024 * int(window[:-1])
    config.target_length, config.train_length = target, round(0.3 * target)
    config.data.samples = {"16k": 48, "32k": 30}[window]  # all that the text makes
    config.extend.update(
        steps=round(TOKENS / config.train_length), warmup_steps=10, log_every=5, checkpoint_every=25
    )
    config.methods = {name: METHODS[name].copy_and_resolve_references()}
    config.method = name
    if METHODS[name].selection.startswith("anchor"):
        config.score.samples = 16
    else:  # nothing is chosen by the scores
        config.probe.steps = 1
        config.score.update(samples=1, length=1024)
        config.analyse.min_lift = 0.0
    config.replay.steps = 16 if name == "longrecipe" else 0
    config.merge.curve = ()
    config.evaluate.checkpoints = {
        "raised_theta": ("base", name),
        "longrecipe": (name, "replayed", "merged"),
    }.get(name, (name,))
    config.evaluate.niah.update(
        lengths=(8192, target),
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),
        samples_per_cell=3,
        batch_size=5,
    )
    buckets = [size for size in (2048, 4096, 8192, 12288, 16384, 24576, 32768) if size <= target]
    config.evaluate.perplexity.update(length=target, documents=4, buckets=tuple(buckets))
    config.evaluate.short.documents = 16
    if smoke:
        rows, steps = config.evaluate.checkpoints, min(config.replay.steps, 1)
        smollm2_135m.make_quick(config)
        config.evaluate.checkpoints, config.replay.steps = rows, steps
    return config.lock()
