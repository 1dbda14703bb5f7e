"""Mistral-7B-Instruct-v0.3 from 32k to 128k with the settings of the LongRecipe paper (arXiv 2409.00509).

    python -m lrjax.main --config=configs/mistral7b_128k.py --workdir=gs://... or /a/shared/disk/run

Needs, beside the checkpoint in checkpoints/Mistral-7B-Instruct-v0.3 (safetensors and tokenizer files):
data/long: documents as long as the target window, and data/replay: instruction data like the base's, as parquet,
jsonl, txt, ArrayRecord or any TFDS source.

The paper's results for this setting (NIAH(M) / RULER / LongBench): LongRecipe 53.4 / 58.2 / 23.7, RPES
41.9 / 52.5 / 21.8, PoSE 35.9 / 46.3 / 22.3.
Checked for shapes; never run at this size by us.
"""

from lrjax import config as lrjax_config
from lrjax.errors import UserError


def get_config(variant: str = ""):
    config = lrjax_config.paper()
    config.name = "mistral7b_128k"
    config.model.source = "checkpoints/Mistral-7B-Instruct-v0.3"
    config.model.shape = {
        "vocab_size": 32768,
        "num_layers": 32,
        "embed_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "mlp_dim": 14336,
        "rope_theta": 1000000.0,
    }
    # RoPE base: the paper's rule: 13.5M; the paper does not state Mistral's.
    config.window = 32768
    if variant:
        raise UserError(f"configs/mistral7b_128k.py: variant {variant!r}; allowed: none")
    return config.lock()
