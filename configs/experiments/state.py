"""What the state of training costs: the one 80 GB card's choice (configs/llama8b_128k.py:single80gb) on the tiny model.

    python -m lrjax.experiment --config=configs/experiments/state.py --seeds=10-14 --workdir=runs/experiments

Arms: AdamW with its state in float32, and in bfloat16 rounded stochastically; Adafactor likewise. All at the learning
rate 2e-3, whose updates have the size that Muon's have in the other experiments (its 1e-2 times 0.2).
"""

from configs.experiments import setting
from lrjax.config import method

ARMS = ("adamw_float32", "adamw_bfloat16", "adafactor_float32", "adafactor_bfloat16")

CLAIMS = tuple(
    setting.claim(
        f"{arm} is as good as AdamW in float32",
        arm,
        ARMS[0],
        margin=0.05,
        arm=arm,
        worse_arm=ARMS[0],
    )
    for arm in ARMS[1:]
)


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    optimizer, state_dtype = arm.split("_")
    config.extend.update(optimizer=optimizer, state_dtype=state_dtype, learning_rate=2e-3)
    config.methods = {arm: method("anchor", "longrecipe")}
    config.method = arm
