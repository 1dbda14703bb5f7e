"""The main table once more, on seeds that no rule had seen.

    python -m lrjax.experiment --config=configs/experiments/fresh_seeds.py --seeds=15-19 --workdir=runs/experiments

One rule, that a class in nearly every sentence is no anchor beside another (`impact.EVERYWHERE`), was made after a look
at runs of the seeds 10 to 14, and those it changed were made again. Rows and claims here are the main table's, the
seeds 15 to 19; they were chosen, and the claims fixed, before any of these runs.
"""

from configs.experiments import main_table, setting

ARMS = main_table.ARMS
CLAIMS = main_table.CLAIMS


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, main_table.change)
