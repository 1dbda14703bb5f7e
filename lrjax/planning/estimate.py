"""From a compiled step to time: the roofline, and the hours of a recipe.

The roofline is the longest of three times, none of which a real run reaches: products at the chip's peak, memory
traffic at its bandwidth, and bytes over the slowest mesh axis at that of two links. Runs at 40 to 60 % of the first are
usual.
"""

from lrjax.models.blockwise import KEY_BLOCK
from lrjax.models.context import devices_along_length
from lrjax.models.flops import forward_flops, matmul_parameters
from lrjax.models.gpu_attention import TRITON_BLOCK
from lrjax.models.splash import block_size
from lrjax.planning.chips import Chip
from lrjax.planning.counting import attention_flops, dot_flops


def flops(program, implementation: str, *, train: bool) -> dict:
    """FLOPs of a step over all devices, by three accountings.

    model_causal: what the mathematics needs, a query against the keys up to its own (`lrjax.models.flops`).
    model_full_square: the same with all pairs, as many papers and the 6 N D + 12 L d T rule count.
    executed: products in the program, remat and masked parts of blocks among them, and what several devices do alike.
    """
    c, B, L = program.model, program.sequences, program.length
    passes = (3 if train else 1) * program.forwards
    causal = passes * forward_flops(c, B, L)
    pairs = 4 * c.num_layers * c.num_heads * c.head_dim
    square = causal + passes * B * pairs * (L * L - L * (L + 1) // 2)
    # A ring's kernels get a chunk at a time.
    devices = devices_along_length()
    chunk = L // (2 * devices) if c.context_parallel == "ring" and devices > 1 else L
    block = min(KEY_BLOCK, chunk)
    if implementation == "splash":
        block = block_size(chunk, c.attention_block)
    elif implementation == "triton":
        block = TRITON_BLOCK
    blocks = (block, block) if implementation != "reference" else (L, L)
    executed = dot_flops(program.traced.jaxpr.jaxpr)
    if implementation != "reference":  # whose products the jaxpr has
        executed += program.forwards * attention_flops(
            c, B, L, implementation, train=train, blocks=blocks
        )
    return {"model_causal": causal, "model_full_square": square, "executed": executed}


def memory_traffic(program, devices: int, tensor: int, micro_batches: int, *, train: bool) -> float:
    """Bytes that a device moves between its memory and its cores, by a rule: weights in bfloat16 once a pass, the
    state of training read and written, and 16 D + 6 F numbers of bfloat16 a token, layer and pass."""
    c = program.model
    weights = 2 * matmul_parameters(c) / tensor
    passes = (4 if c.remat in ("full", "dots", "offload") else 3) if train else 1
    passes *= program.forwards
    tokens = program.sequences * program.length / devices
    activations = 2 * tokens * c.num_layers * (16 * c.embed_dim + 6 * c.mlp_dim) * passes
    state = 2 * 12 * matmul_parameters(c) / devices if train else 0
    return weights * passes * (micro_batches if train else 1) + activations + state


def roofline(executed: float, traffic: float, per_axis: dict, chip: Chip, devices: int) -> dict:
    """Seconds of a step: {"compute", "memory", "network", "total"}, the last being the longest."""
    times = {
        "compute": executed / devices / (chip.flops / chip.devices),
        "memory": traffic / (chip.memory_bandwidth / chip.devices),
        "network": max(per_axis.values(), default=0) / (chip.axis_bandwidth / chip.devices),
    }
    return times | {"total": max(times.values())}


def recipe(config, steps: dict, chip: Chip, devices: int) -> dict:
    """Hours and cost of a whole recipe at the roofline, beside training the same examples at full length.

    LongRecipe: probe, scores of the samples, one extension (config.method) and replay. Full length: as many examples,
    each of config.target_length tokens, and the same replay.

    Returns:
        {"hours", "cost" (None where a price or a step is missing), "hours_full_length",
        "hours_at_half_of_peak", "ratio_to_full_length": {accounting: full-length FLOPs of extending / ours}}.
    """
    train, full, score = (steps.get(name, {}) for name in ("train", "full_length_train", "score"))
    ratio = {}
    if train.get("flops") and full.get("flops"):
        ratio = {name: full["flops"][name] / train["flops"][name] for name in train["flops"]}
    result = {"hours": None, "cost": None, "hours_full_length": None, "hours_at_half_of_peak": None}
    if train.get("accepted"):
        # A replay row is shorter; a step of it takes its share of tokens.
        replayed = (config.replay.length or config.window) * config.replay.global_batch_size
        replay = (
            config.replay.steps * replayed / (config.train_length * config.extend.global_batch_size)
        )
        batches = config.score.samples / config.score.batch_size
        scoring = batches * score["roofline_seconds"] if score.get("accepted") else 0
        seconds = scoring + train["roofline_seconds"] * (
            config.probe.steps * config.probe.global_batch_size / config.extend.global_batch_size
            + config.extend.steps
            + replay
        )
        result["hours"] = seconds / 3600
        result["hours_at_half_of_peak"] = 2 * seconds / 3600
        if chip.price is not None:
            result["cost"] = 2 * seconds / 3600 * devices / chip.devices * chip.price
        if full.get("accepted"):
            result["hours_full_length"] = (
                full["roofline_seconds"] * config.extend.steps + train["roofline_seconds"] * replay
            ) / 3600
    return result | {"ratio_to_full_length": ratio}
