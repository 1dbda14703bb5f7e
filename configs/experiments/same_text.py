"""The same text at other positions: at 8, 16 and 32 times the window every row trains on the anchor sentences.

    python -m lrjax.experiment --config=configs/experiments/same_text.py --seeds=10-14 --workdir=runs/experiments

In `reach` and in the main table a method is its text and its positions together: contiguous text is the start of a
document, PoSE's lies at its positions, LongRecipe's are the anchor sentences. Here only the positions differ, so that
what the sentences do and what the positions do can be told apart.
"""

from configs.experiments import reach, setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("8x", "16x", "32x")
POSITIONS = ("contiguous", "pose", "uniform_slots")

CLAIMS = tuple(
    claim(f"On the same text LongRecipe's positions are better than {other}", "longrecipe", other, arm=arm)
    for arm in ARMS
    for other in POSITIONS
)  # fmt: skip


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    reach.at_reach(config, int(arm[:-1]))
    config.methods = {name: method("anchor", name) for name in ("longrecipe", *POSITIONS)}
