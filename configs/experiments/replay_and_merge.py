"""Replay and merge: needles and short loss over the length of the replay and the weight of the base.

    python -m lrjax.experiment --config=configs/experiments/replay_and_merge.py --seeds=10-14 --workdir=runs/experiments

Arms: 20, 40, 80 and 160 steps of replay (32 rows of 64 tokens each) after LongRecipe. Rows `base_N`: the base with N %
of the weight in the merge, the replayed model with the rest.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("replay20", "replay40", "replay80", "replay160")

CLAIMS = tuple(
    claim("Half of each loses less short text than replay alone", "base_50", "base_0", "short_loss", arm=arm)
    for arm in ARMS
) + tuple(
    claim("Half of each keeps the needles", "base_50", "base_0", margin=0.05, arm=arm) for arm in ARMS
)  # fmt: skip


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    config.replay.steps = int(arm.removeprefix("replay"))
    config.merge.curve = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
    config.methods = {"longrecipe": method("anchor", "longrecipe")}
