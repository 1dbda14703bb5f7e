"""Qwen2-7B-Instruct from 32k to 128k with the settings of the LongRecipe paper (arXiv 2409.00509).

    python -m lrjax.main --config=configs/qwen2_7b_128k.py --workdir=gs://... or /a/shared/disk/run

Needs, beside the checkpoint in checkpoints/Qwen2-7B-Instruct (safetensors and tokenizer files):
data/long: documents as long as the target window, and data/replay: instruction data like the base's, as parquet,
jsonl, txt, ArrayRecord or any TFDS source.

The paper's machine: 2 x H100 for 28 hours. Its results for this setting (NIAH(M) / RULER / LongBench): LongRecipe
65.8 / 64.8 / 26.2, RPES 64.6 / 64.6 / 26.8, PoSE 58.5 / 60.1 / 27.7.
Checked for shapes; never run at this size by us.
"""

from lrjax import config as lrjax_config
from lrjax.config import method, training
from lrjax.errors import UserError


def get_config(variant: str = ""):
    config = lrjax_config.default()
    config.name = "qwen2_7b_128k"
    config.model.source = "checkpoints/Qwen2-7B-Instruct"
    config.model.remat = "full"
    config.model.shape = {
        "vocab_size": 152064,
        "num_layers": 28,
        "embed_dim": 3584,
        "num_heads": 28,
        "num_kv_heads": 4,
        "head_dim": 128,
        "mlp_dim": 18944,
        "rope_theta": 1000000.0,
        "qkv_bias": True,
    }
    config.window, config.target_length, config.train_length = 32768, 131072, 39321
    config.rope_theta = 0.0  # the paper's rule: 13.5M

    config.data.sources = {"long": "data/long/*.parquet", "replay": "data/replay/*.jsonl"}
    config.data.bad_document = "skip"

    paper = {"global_batch_size": 96, "learning_rate": 5e-5, "weight_decay": 0.1, "b2": 0.999}
    config.probe = training(**paper, steps=10)
    config.probe.method = method("random", "longrecipe")
    config.score.samples = 1000
    config.extend = training(**paper, steps=104, checkpoint_every=20, log_every=1)
    config.methods = {
        "raised_theta": method("first", ""),
        "longrecipe": method("anchor", "longrecipe"),
    }
    if variant:
        raise UserError(f"configs/qwen2_7b_128k.py: variant {variant!r}; allowed: none")
    config.replay = training(
        **{**paper, "learning_rate": 5e-6}, steps=86, mixture={"replay": 1.0}, log_every=1
    )
    config.merge.base_weight = 0.5
    return config.lock()
