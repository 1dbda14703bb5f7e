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
from lrjax.errors import UserError


def get_config(variant: str = ""):
    config = lrjax_config.paper()
    config.name = "qwen2_7b_128k"
    config.model.source = "checkpoints/Qwen2-7B-Instruct"
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
        "family": "qwen2",
    }
    # RoPE base: the paper's rule: 13.5M.
    config.window = 32768
    if variant:
        raise UserError(f"configs/qwen2_7b_128k.py: variant {variant!r}; allowed: none")
    return config.lock()
