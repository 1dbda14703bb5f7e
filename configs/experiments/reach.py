"""The reach: from 64 tokens to 4, 8, 16 and 32 times as many.

    python -m lrjax.experiment --config=configs/experiments/reach.py --seeds=10-14 --workdir=runs/experiments

Everywhere training sees 30 % of the target and as many tokens in all, so at 32 x a quarter of the rows of 8 x. The
RoPE base follows the paper's rule (1.9k, 10k, 53k, 266k), the same for all methods of an arm. Methods differ in their
text as well as in their positions: `same_text` holds the text alike.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("4x", "8x", "16x", "32x")

CLAIMS = tuple(
    claim(f"LongRecipe is better than {other}", "longrecipe", other, arm=arm)
    for arm in ARMS
    for other in ("contiguous", "pose", "longrecipe_random")
)


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def at_reach(config, times: int) -> None:
    """Makes `times` windows the target, and all that goes with it."""
    target = config.window * times
    config.target_length = target
    config.train_length = round(0.3 * target)
    config.rope_theta = 0.0  # the paper's rule
    config.data.prepare_args.update(target=target)
    config.data.prepare_args.counts.update(
        sources=setting.LONG_DOCUMENTS * 8 // times, haystack=200 * 8 // times
    )
    config.extend.global_batch_size = setting.batch_of(config.train_length)
    config.probe.global_batch_size = setting.batch_of(target)
    config.score.batch_size = max(1, 128 // times)
    config.evaluate.niah.lengths = (config.window, target // 2, target)
    config.evaluate.niah.batch_size = max(1, 400 // times)


def _change(config, arm):
    at_reach(config, int(arm[:-1]))
    config.methods = {
        "raised_theta": method("first", ""),
        "contiguous": method("first", "contiguous"),
        "pose": method("at_positions", "pose"),
        "longrecipe": method("anchor", "longrecipe"),
        "longrecipe_random": method("random", "longrecipe"),
    }
