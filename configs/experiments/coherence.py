"""Coherence: selected sentences in the order of the text, the same shuffled, and whole pieces of documents.

    python -m lrjax.experiment --config=configs/experiments/coherence.py --seeds=10-14 --workdir=runs/experiments

All at equal tokens and LongRecipe positions, except `full` (whole documents of 512 tokens at plain positions). `whole`
keeps the first 154 tokens as they are. Shuffled sentences may ask for a fact before it is told. LDS is
the Long Dependency Score of the text that a row keeps, in chunks of 16 tokens read by the base.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

ARMS = ("",)

CLAIMS = (
    claim("Selected sentences in order are better than shuffled ones", "selected", "selected_shuffled"),
    claim("Random sentences in order are better than shuffled ones", "random", "random_shuffled"),
    claim("Selected sentences are better than whole pieces", "selected", "whole"),
    claim("Whole documents are better than selected sentences", "full", "selected"),
)  # fmt: skip


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    config.methods = {
        "selected": method("anchor", "longrecipe"),
        "selected_shuffled": method("anchor", "longrecipe", shuffle=True),
        "random": method("random", "longrecipe"),
        "random_shuffled": method("random", "longrecipe", shuffle=True),
        "whole": method("first", "longrecipe"),
        "full": method("at_positions", "full", global_batch_size=5),
    }
    config.method = "selected"
    # Two chunks fit the base's window; of 100 documents.
    config.evaluate.lds.update(documents=100, chunk=16)
