"""Weighting instead of selection: LongCE weights of the loss from the same scores; and a window that grows.

    python -m lrjax.experiment --config=configs/experiments/weighting.py --seeds=10-14 --workdir=runs/experiments

`_weighted` rows weight the loss of a token by min(exp(change of log-probability), 5), the base against the probe
(LongCE, arXiv 2410.23771, has one model and two contexts). `_growing` rows begin with attention inside blocks of 32
tokens, which grow to the whole row in half of the steps (SkyLadder, arXiv 2503.15450). All at equal tokens.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("",)

CLAIMS = (
    claim("Weights help random sentences", "random_weighted", "random"),
    claim("Weights help the first sentences", "first_weighted", "first"),
    claim("Weights help selected sentences", "selected_weighted", "selected"),
    claim("Selection is better than weights", "selected", "random_weighted"),
    claim("A growing window helps LongRecipe", "selected_growing", "selected"),
    claim("A growing window helps at full length", "full_growing", "full"),
)


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    config.methods = {
        "selected": method("anchor", "longrecipe"),
        "selected_weighted": method("anchor", "longrecipe", weighting="longce"),
        "selected_growing": method("anchor", "longrecipe", grow_from=32),
        "random": method("random", "longrecipe"),
        "random_weighted": method("random", "longrecipe", weighting="longce"),
        "first": method("first", "longrecipe"),
        "first_weighted": method("first", "longrecipe", weighting="longce"),
        "full": method("at_positions", "full", global_batch_size=5),
        "full_growing": method("at_positions", "full", global_batch_size=5, grow_from=32),
    }
    config.method = "selected"
