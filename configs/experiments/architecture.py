"""Architectures and position encodings: does what holds for Llama hold for its relatives?

    python -m lrjax.experiment --config=configs/experiments/architecture.py --seeds=10-14 --workdir=runs/experiments

Arms: Llama with the RoPE base raised to 5,000; the same as a Qwen3 (norms of queries and keys), as a Gemma 3 (those
and its other norms, its activation, and a first layer that is local, with window 32 and a RoPE base of its own), and
with half of each head rotated; and Llama with other encodings of the long window: YaRN, linear interpolation, and the
RoPE base by the paper's rule.
"""

from configs.experiments import setting
from configs.experiments.setting import claim
from lrjax.config import method

SHAPES = {
    "llama": {},
    "qk_norm": {"family": "qwen3", "qk_norm": True},
    "local_global": {
        "family": "gemma3_text",
        "qk_norm": True,
        "post_norms": True,
        "unit_offset_norms": True,
        "scale_embedding": True,
        "activation": "gelu_tanh",
        "sliding_window": 32,
        "sliding_layers": (0,),
        "local_rope_theta": 100.0,
    },
    "partial_rotary": {"partial_rotary_factor": 0.5},
}
ENCODINGS = {"yarn": "yarn", "linear": "linear", "paper_theta": ""}  # arm -> rope_type
ARMS = (*SHAPES, *ENCODINGS)

CLAIMS = tuple(
    claim(f"LongRecipe is better than {other}", "longrecipe", other, arm=arm)
    for arm in ARMS
    for other in ("contiguous", "pose")
)


def get_config(variant: str = ""):
    return setting.build(__file__, variant, ARMS, _change)


def _change(config, arm):
    if arm in SHAPES:
        config.model.shape.update(SHAPES[arm])
    else:
        config.rope_theta = 0.0
        config.rope_scaling.rope_type = ENCODINGS[arm]
    config.methods = {
        "raised_theta": method("first", ""),
        "contiguous": method("first", "contiguous"),
        "pose": method("at_positions", "pose"),
        "longrecipe": method("anchor", "longrecipe"),
    }
