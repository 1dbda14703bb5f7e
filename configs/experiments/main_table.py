"""The main table: LongRecipe and its baselines at equal tokens and at equal FLOPs, forgetting, replay and merge.

    python -m lrjax.experiment --config=configs/experiments/main_table.py --seeds=10-14 --workdir=runs/experiments

Every method starts from the same base with the same raised RoPE base and trains on as many tokens; `full_equal_flops`
trains at full length for as many FLOPs of training. The probe and the scoring are not counted: LongRecipe's selections
share them, and in an experiment as small as this they cost twice as much as one extension. `raised_theta` trains
nothing. `pose` and `full` take the text that lies at their positions, `contiguous`, `rpes` and `longrecipe_first` (the
paper's "positions only") the first 30 % of a document, the other LongRecipe rows sentences by anchor class
(`longrecipe`), largest change of logit, digits, or at random. `replayed` and `merged` go on from `longrecipe`. So
methods differ in their text as well as in their positions; the experiments `skips` and `same_text` compare positions on
one text.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("",)

CLAIMS = (
    claim("Positions alone are better than PoSE", "longrecipe_first", "pose", paper="71.9 / 68.8"),
    claim("Random sentences are about as good as PoSE", "longrecipe_random", "pose", paper="70.1 / 68.8",
          margin=0.05),
    claim("Analysis and positions are better than positions alone", "longrecipe", "longrecipe_first",
          paper="78.9 / 71.9"),
    claim("Analysis and positions are better than random sentences", "longrecipe", "longrecipe_random",
          paper="78.9 / 70.1"),
    claim("LongRecipe is better than PoSE", "longrecipe", "pose", paper="78.9 / 68.8"),
    claim("LongRecipe is better than RPES", "longrecipe", "rpes", paper="78.9 / 71.8"),
    claim("Full length is better at equal tokens", "full", "longrecipe", paper="82.3 / 78.9"),
    claim("LongRecipe is better than full length at equal FLOPs", "longrecipe", "full_equal_flops"),
    claim("LongRecipe is better than contiguous text", "longrecipe", "contiguous"),
    claim("Anchor classes are better than the largest change of logit", "longrecipe", "longrecipe_score"),
    claim("Replay repairs what extension forgot", "replayed", "longrecipe", "short_loss", paper="MMLU 62.1 / 58.6"),
    claim("The merge restores more of it", "merged", "replayed", "short_loss", paper="MMLU 63.0 / 62.1"),
    claim("The merge keeps the needles", "merged", "longrecipe", margin=0.05),
)  # fmt: skip


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, change)


def change(config, arm):
    full_steps = setting.equal_flops_steps(config)
    config.methods = {
        "raised_theta": method("first", ""),
        "contiguous": method("first", "contiguous"),
        "rpes": method("first", "rpes"),
        "pose": method("at_positions", "pose"),
        "full": method("at_positions", "full", global_batch_size=5),
        "full_equal_flops": method("at_positions", "full", global_batch_size=5, steps=full_steps),
        "longrecipe": method("anchor", "longrecipe"),
        "longrecipe_score": method("score", "longrecipe"),
        "longrecipe_digits": method("digits", "longrecipe"),
        "longrecipe_random": method("random", "longrecipe"),
        "longrecipe_first": method("first", "longrecipe"),
    }
    config.replay.steps = 80
