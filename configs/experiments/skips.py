"""The distribution of the skips: the same sentences at the positions of every transform.

    python -m lrjax.experiment --config=configs/experiments/skips.py --seeds=10-14 --workdir=runs/experiments

Every row trains on the same text (anchor sentences, 154 tokens) and differs only in where the gaps are and how large.
Needles are told apart by how far back they lie: within the window of 64 tokens, or four windows and more.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("",)
POSITIONS = (
    "contiguous", "longrecipe", "longrecipe_code", "pose", "pose_code", "cream", "rpes", "geometric", "power_law",
    "few_gaps", "fixed_segments", "paragraphs", "inside_gaps",
)  # fmt: skip

CLAIMS = tuple(
    claim(f"On the same text LongRecipe's positions are better than those of {name}", "longrecipe", name,
          **({"paper": "71.9 / 68.8"} if name == "pose" else {}))
    for name in POSITIONS
    if name != "longrecipe"
)  # fmt: skip


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    config.methods = {name: method("anchor", name) for name in POSITIONS}
