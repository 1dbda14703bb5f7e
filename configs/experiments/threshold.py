"""The threshold: which share of the tokens counts as impactful, 5 to 100 %, on models of two sizes.

    python -m lrjax.experiment --config=configs/experiments/threshold.py --seeds=10-14 --workdir=runs/experiments

A row `top_N` keeps the sentences that hold a token whose change of logit is among the largest N % at its place, as many
as fit the budget, at random where more are wanted, in the order of the text; at 100 % that is every sentence, at
random.
`anchor` keeps sentences with a token of the over-represented classes (at 20 %). All at LongRecipe positions.
The paper uses 20 % and leaves the threshold open.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("width64", "width96")
TOP = (5, 10, 20, 40, 100)

CLAIMS = tuple(
    claim(f"20 % is better than {top} %", "top_20", f"top_{top}", arm=arm)
    for arm in ARMS for top in TOP if top != 20
) + tuple(
    claim("Classes are better than the tokens themselves", "anchor", "top_20", arm=arm) for arm in ARMS
)  # fmt: skip


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    if arm == "width96":
        config.model.shape.update(embed_dim=96, num_heads=6, mlp_dim=192)
    config.methods = {
        f"top_{top}": method("top", "longrecipe", top_fraction=top / 100) for top in TOP
    } | {"anchor": method("anchor", "longrecipe")}
    config.method = "anchor"
