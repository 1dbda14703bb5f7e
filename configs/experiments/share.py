"""The share of the window that is trained at: 10, 20, 30, 40 and 100 % of 512 tokens, at equal tokens.

    python -m lrjax.experiment --config=configs/experiments/share.py --seeds=10-14 --workdir=runs/experiments

Rows of fewer tokens come in larger batches. `longrecipe_N` keeps anchor sentences, `first_N` the start of the document;
both at LongRecipe positions. At 100 % there is nothing to leave out, and both are training at full length.
The paper's single runs: 65.3, 70.9, 78.9, 72.0, 82.3 (needles), not monotone.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("",)
SHARES = (10, 20, 30, 40, 100)

CLAIMS = (
    claim("30 % is better than 10 %", "longrecipe_30", "longrecipe_10", paper="78.9 / 65.3"),
    claim("30 % is better than 20 %", "longrecipe_30", "longrecipe_20", paper="78.9 / 70.9"),
    claim("30 % is better than 40 %", "longrecipe_30", "longrecipe_40", paper="78.9 / 72.0"),
    claim("The full window is better than 30 %", "longrecipe_100", "longrecipe_30", paper="82.3 / 78.9"),
)  # fmt: skip


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    config.methods = {}
    for share in SHARES:
        length = round(config.target_length * share / 100)
        size = {"train_length": length, "global_batch_size": setting.batch_of(length)}
        config.methods[f"longrecipe_{share}"] = method("anchor", "longrecipe", **size)
        if share < 100:
            config.methods[f"first_{share}"] = method("first", "longrecipe", **size)
    config.method = "longrecipe_30"
