"""Model FLOPs in closed form: what the mathematics needs, whatever a machine executes.

A multiply and an add are two FLOPs. Attention is counted causally (each query against the keys up to its own),
so a sequence of length L costs half of the full square, and a sliding window less. Remat and recomputation are
not counted.
"""

from lrjax.models.llama import LlamaConfig


def matmul_parameters(config: LlamaConfig) -> int:
    """Parameters that every token is multiplied with: all but the embedding look-up and the norms."""
    c = config
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.embed_dim * c.mlp_dim) + c.vocab_size * c.embed_dim


def forward_flops(config: LlamaConfig, sequences: int, length: int) -> int:
    """Causal forward pass over `sequences` sequences of `length` tokens, with all logits."""
    c = config
    matmuls = 2 * matmul_parameters(c) * length
    # q k^T and the weighted sum of v: 2 * 2 * head_dim per query-key pair and head.
    sliding = c.num_layers if c.sliding_layers is None else len(c.sliding_layers)
    window = min(length, c.sliding_window or length)
    pairs = (c.num_layers - sliding) * length * (length + 1) // 2
    pairs += sliding * (window * (window + 1) // 2 + (length - window) * window)
    attention = 4 * c.num_heads * c.head_dim * pairs
    return sequences * (matmuls + attention)


def train_flops(config: LlamaConfig, sequences: int, length: int) -> int:
    """Forward and backward: the backward pass costs twice the forward."""
    return 3 * forward_flops(config, sequences, length)
