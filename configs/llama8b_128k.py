"""Llama-3-8B-Instruct from 8k to 128k with the settings of the LongRecipe paper (arXiv 2409.00509).

    python -m lrjax.main --config=configs/llama8b_128k.py --workdir=gs://... or /a/shared/disk/run

Needs, beside the checkpoint in checkpoints/Meta-Llama-3-8B-Instruct (safetensors, tokenizer.json):
data/long: long documents of about 128k tokens (the paper: 10,000 of a length-upsampled SlimPajama) and
data/replay: instruction data like the base's (the paper: evol-instruct-70k and Magicoder-OSS-75k), as parquet, jsonl,
txt, ArrayRecord or any TFDS source.

The paper's machine: 2 x H100 for 20 hours. Its results for this setting (NIAH(M) / RULER / LongBench): LongRecipe
82.6 / 76.0 / 25.5, PoSE 80.1 / 75.3 / 26.7, full length 73.2 / 75.8 / 26.4. This config has been compiled for shapes
and never been run at this size by us.
"""

from lrjax import config as lrjax_config
from lrjax.config import method
from lrjax.errors import UserError


def get_config(variant: str = ""):
    config = lrjax_config.paper()
    config.name = "llama8b_128k"
    config.model.source = "checkpoints/Meta-Llama-3-8B-Instruct"
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
    # RoPE base: the paper's rule: 131.5M.
    config.window = 8192
    if variant == "baselines":
        config.methods.update(
            contiguous=method("first", "contiguous"),
            rpes=method("first", "rpes"),
            pose=method("at_positions", "pose"),
            full=method("at_positions", "full"),
        )
    elif variant not in ("", "compare", "single80gb"):
        raise UserError(
            f"configs/llama8b_128k.py: variant {variant!r}; allowed: none, baselines, compare, single80gb"
        )
    if variant == "compare":
        # One sequence a step and MaxText's blocks of attention, as docs/plans.md compares the two; 40,960 tokens.
        config.train_length = 40960
        config.model.attention_block = 512
        config.extend.update(global_batch_size=1, micro_batches=1)
    elif variant == "single80gb":
        # One 80 GB card (docs/plans.md): parameters in bfloat16, stochastically rounded, Adafactor in place of AdamW,
        # whose two moments would take 30 GB more, and what enters each layer in the host's memory.
        config.mesh.update(fsdp=1, context=1)
        config.row_multiple = 128
        config.model.remat = "offload"
        for section in (config.probe, config.extend, config.replay):
            section.update(state_dtype="bfloat16", optimizer="adafactor")
    return config.lock()
