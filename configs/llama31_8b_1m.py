"""Llama-3.1-8B-Instruct from 128k to 1M by LongRecipe (arXiv 2409.00509), which stops at 128k: an open question.

    python -m lrjax.main --config=configs/llama31_8b_1m.py --workdir=gs://... or /a/shared/disk/run

Needs, beside the checkpoint in checkpoints/Llama-3.1-8B-Instruct (safetensors and tokenizer files):
data/long: documents as long as the target window, and data/replay: instruction data like the base's, as parquet,
jsonl, txt, ArrayRecord or any TFDS source.

There is no published result of this recipe at this length: compare with the row `raised_theta` and with the base.
Checked for shapes; never run at this size by us.
"""

from lrjax import config as lrjax_config
from lrjax.errors import UserError


def get_config(variant: str = ""):
    config = lrjax_config.paper()
    config.name = "llama31_8b_1m"
    config.model.source = "checkpoints/Llama-3.1-8B-Instruct"
    config.model.shape = {
        "vocab_size": 128256,
        "num_layers": 32,
        "embed_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "mlp_dim": 14336,
        "rope_theta": 500000.0,
    }
    # RoPE base: the paper's rule, 30.4M, below the base's own llama3 scaling, which stays.
    config.window, config.target_length, config.train_length = 131072, 1048576, 314572
    config.model.context_parallel = "ring"  # the keys and values of a layer are 4 GiB
    if variant:
        raise UserError(f"configs/llama31_8b_1m.py: variant {variant!r}; allowed: none")
    return config.lock()
