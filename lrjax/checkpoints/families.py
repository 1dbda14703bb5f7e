"""Model families: config.json to `LlamaConfig` and back, and the names of a family's tensors, by `model_type`.

    config = read_config(raw)                # raises UserError for what is not known, never ignores it
    raw = write_config(config, dtype)        # read_config(raw) is config again, or UserError
    names = tensor_names(config)             # name in the file -> the slots it holds, one after the other

Another architecture of this kind is an entry in `FAMILIES`.
"""

import dataclasses

from lrjax.checkpoints.tensors import Slot, slots
from lrjax.errors import UserError
from lrjax.models import COMPUTING
from lrjax.models.llama import LlamaConfig
from lrjax.models.rope import ROPE_TYPES, RopeScaling

_WITHOUT_ROPE = {
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "gpt2": "learned positions",
    "gpt_neo": "learned positions",
    "gpt_bigcode": "learned positions",
    "opt": "learned positions",
    "smollm3": "layers without positions (NoPE)",
    "cohere2": "layers without positions (NoPE)",
    "llama4": "layers without positions (NoPE)",
    "exaone4": "layers without positions (NoPE)",
}

_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers/attention_norm": "input_layernorm.weight",
    "layers/q": "self_attn.q_proj.weight",
    "layers/k": "self_attn.k_proj.weight",
    "layers/v": "self_attn.v_proj.weight",
    "layers/q_bias": "self_attn.q_proj.bias",
    "layers/k_bias": "self_attn.k_proj.bias",
    "layers/v_bias": "self_attn.v_proj.bias",
    "layers/q_norm": "self_attn.q_norm.weight",
    "layers/k_norm": "self_attn.k_norm.weight",
    "layers/o": "self_attn.o_proj.weight",
    "layers/mlp_norm": "post_attention_layernorm.weight",
    "layers/gate": "mlp.gate_proj.weight",
    "layers/up": "mlp.up_proj.weight",
    "layers/down": "mlp.down_proj.weight",
}
_GEMMA_NAMES = _NAMES | {
    "layers/post_attention_norm": "post_attention_layernorm.weight",
    "layers/mlp_norm": "pre_feedforward_layernorm.weight",
    "layers/post_mlp_norm": "post_feedforward_layernorm.weight",
}
_PHI3_NAMES = _NAMES | {
    "layers/q": "self_attn.qkv_proj.weight",
    "layers/k": "self_attn.qkv_proj.weight",
    "layers/v": "self_attn.qkv_proj.weight",
    "layers/gate": "mlp.gate_up_proj.weight",
    "layers/up": "mlp.gate_up_proj.weight",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family differs from Llama."""

    architecture: str  # the class in transformers
    names: dict = dataclasses.field(default_factory=lambda: _NAMES)
    fixed: dict = dataclasses.field(default_factory=dict)  # fields of LlamaConfig all members have
    only: tuple = ()  # settings in config.json that have one known value: (key, value), ...
    sliding: str = (
        "none"  # none | all (sliding_window alone) | switched (use_sliding_window) | layers
    )
    rope_types: tuple = tuple(ROPE_TYPES)
    activation_key: str = "hidden_act"
    head_dim: int | None = None  # its default in transformers; None: width / heads
    theta: float = 10000.0
    tied: bool = False
    max_positions: int = 2048


_PLAIN = (("attention_bias", False), ("mlp_bias", False))
_GEMMA3_FIXED = {
    "unit_offset_norms": True,
    "scale_embedding": True,
    "post_norms": True,
    "qk_norm": True,
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", only=_PLAIN),
    "mistral": Family("MistralForCausalLM", sliding="all", max_positions=131072),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        sliding="switched",
        max_positions=32768,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        only=(("attention_bias", False),),
        sliding="switched",
        head_dim=128,
        max_positions=32768,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        names=_GEMMA_NAMES,
        fixed=_GEMMA3_FIXED,
        only=(
            ("attention_bias", False),
            ("final_logit_softcapping", None),
            ("use_bidirectional_attention", False),
        ),
        sliding="layers",
        activation_key="hidden_activation",
        head_dim=256,
        theta=1e6,
        tied=True,
        max_positions=131072,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        names=_PHI3_NAMES,
        sliding="all",
        rope_types=("default", "longrope"),
        max_positions=4096,
    ),
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


# ------------------------------------------------------------------------------------------- tensors


def tensor_names(config: LlamaConfig) -> dict[str, list[Slot]]:
    """Every tensor of a checkpoint by name, with the slots whose rows it holds, in their order."""
    names, found = _family(config.family).names, {}
    for slot in slots(config):
        name = names[slot.leaf]
        if slot.layer is not None:
            name = f"model.layers.{slot.layer}.{name}"
        found.setdefault(name, []).append(slot)
    order = ["layers/q", "layers/k", "layers/v", "layers/gate", "layers/up"]
    for parts in found.values():
        if len(parts) > 1:
            parts.sort(key=lambda slot: order.index(slot.leaf))
    return found


# ------------------------------------------------------------------------------------------- reading


def read_config(raw: dict) -> LlamaConfig:
    """The model that a config.json describes.

    Raises:
        UserError: a model_type or a setting that is not known.
    """
    kind = raw.get("model_type")
    if kind in _WITHOUT_ROPE:
        raise UserError(
            f"model_type is {kind!r}, which has {_WITHOUT_ROPE[kind]}: lrjax extends models whose layers all "
            "have rotary positions (RoPE)"
        )
    family = _family(kind)
    for key, allowed in (*family.only, ("quantization_config", None)):
        if (value := raw.get(key, allowed)) != allowed:
            raise UserError(f"{key} is {value!r}; known is {allowed!r}")
    activation = raw.get(family.activation_key) or next(
        name for name in _ACTIVATIONS if (name == "silu") == (family.activation_key == "hidden_act")
    )
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{family.activation_key} is {activation!r}; known are {', '.join(_ACTIVATIONS)}"
        )

    def size(key: str, default: int | None = None) -> int:
        # transformers writes null for "as by default".
        value = default if raw.get(key) is None else raw[key]
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key} is {value!r}; a positive integer is expected")
        return value

    num_heads, embed_dim, num_layers = (
        size(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
    )
    window, layers = _read_sliding(raw, family, num_layers)
    positions = size("max_position_embeddings", family.max_positions)
    theta, scaling, local_theta, partial = _read_rope(raw, kind, family, positions)
    if scaling.rope_type == "dynamic":
        # Hugging Face's max_position_embeddings is the window that the encoding starts from.
        positions = round(positions * scaling.factor)
    tied = raw.get("tie_word_embeddings")
    return LlamaConfig(
        family=kind,
        vocab_size=size("vocab_size"),
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=size("num_key_value_heads", num_heads),
        head_dim=size("head_dim", family.head_dim or embed_dim // num_heads),
        mlp_dim=size("intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta if layers is not None else None,
        partial_rotary_factor=partial,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=family.tied if tied is None else bool(tied),
        max_position_embeddings=positions,
        sliding_window=window,
        sliding_layers=layers,
        activation=_ACTIVATIONS[activation],
        query_pre_attn_scalar=raw.get("query_pre_attn_scalar"),
        attention_soft_cap=raw.get("attn_logit_softcapping"),
        **family.fixed,
    )


def _family(kind) -> Family:
    if kind not in FAMILIES:
        raise UserError(f"model_type is {kind!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def _read_sliding(raw: dict, family: Family, num_layers: int):
    """(window, layers that have it) in `LlamaConfig`'s terms."""
    window = raw.get("sliding_window")
    if family.sliding == "none" or window is None:
        return None, None
    if family.sliding == "all":
        return window, None
    if family.sliding == "switched" and not raw.get("use_sliding_window", False):
        return None, None
    if kinds := raw.get("layer_types"):
        if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
            raise UserError(
                f"layer_types is {kinds!r}; known are sliding_attention, full_attention"
            )
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    elif family.sliding == "switched":
        layers = tuple(range(raw.get("max_window_layers", 28), num_layers))
    else:
        pattern = raw.get("sliding_window_pattern", 6)
        layers = tuple(i for i in range(num_layers) if (i + 1) % pattern)
    return window, layers


def _read_rope(raw: dict, kind: str, family: Family, positions: int):
    """(theta, RopeScaling, theta of the sliding layers, rotated share of a head)."""
    local = raw.get("rope_local_base_freq", 10000.0) if kind == "gemma3_text" else None
    thetas, found, where = {"rope_theta": raw.get("rope_theta")}, {}, "rope_scaling"
    partial = raw.get("partial_rotary_factor")
    for key in ("rope_scaling", "rope_parameters"):
        entries = dict(raw.get(key) or {})
        if kind == "gemma3_text" and "full_attention" in entries:
            sliding = dict(entries.get("sliding_attention") or {})
            local = sliding.pop("rope_theta", local)
            if sliding.pop("rope_type", "default") != "default" or sliding:
                raise UserError(
                    f"{key}.sliding_attention is {entries['sliding_attention']!r}; known is default"
                )
            entries = dict(entries["full_attention"])
        types = {entries.pop(name) for name in ("rope_type", "type") if name in entries}
        if len(types) > 1:
            raise UserError(
                f"{key} has rope_type and type, and they differ: {', '.join(map(str, types))}"
            )
        rope_type = {"su": "longrope"}.get(*types, *types) if types else "default"
        thetas[f"{key}.rope_theta"] = entries.pop("rope_theta", None)
        partial = entries.pop("partial_rotary_factor", partial)
        entries.pop("finetuned", None)  # a remark, in older YaRN configs
        if rope_type not in family.rope_types:
            raise UserError(
                f"{key}.rope_type is {rope_type!r}; known for {kind} are {', '.join(family.rope_types)}"
            )
        known = (*ROPE_TYPES[rope_type], "original_max_position_embeddings")
        for name, value in entries.items():
            if name not in known:
                raise UserError(
                    f"{key}.{name} is {value!r}; rope_type {rope_type} has no such field"
                )
        entries = {name: value for name, value in entries.items() if value is not None}
        if not raw.get(key):
            continue
        entries["rope_type"] = rope_type
        if found and found != entries:
            raise UserError(f"rope_scaling and rope_parameters differ: {found} and {entries}")
        found, where = entries, key
    given = {key: float(theta) for key, theta in thetas.items() if theta is not None}
    if len(set(given.values())) > 1:
        named = ", ".join(f"{key} {theta}" for key, theta in given.items())
        raise UserError(f"different values of theta: {named}")
    fields = ROPE_TYPES[found.get("rope_type", "default")]
    if found.get("rope_type") == "dynamic":
        found["original_max_position_embeddings"] = positions
    elif "original_max_position_embeddings" in fields:
        outside = raw.get("original_max_position_embeddings")
        window = outside or found.get("original_max_position_embeddings") or positions
        found["original_max_position_embeddings"] = window
        if found["rope_type"] == "longrope":
            found.setdefault("factor", max(1.0, positions / window))
    else:
        found.pop("original_max_position_embeddings", None)
    if "factor" in fields and "factor" not in found:
        raise UserError(f"{where}.factor is missing; rope_type {found['rope_type']} needs it")
    try:
        scaling = RopeScaling(**found)
    except UserError as error:
        raise UserError(f"{where}.{error}") from error
    theta = next(iter(given.values()), family.theta)
    return theta, scaling, local and float(local), 1.0 if partial is None else float(partial)


# ------------------------------------------------------------------------------------------- writing


def write_config(config: LlamaConfig, dtype: str) -> dict:
    """config.json for transformers 4 and 5 (which name theta and the dtype differently) and vLLM.

    Raises:
        UserError: the family cannot say what the model is; nothing is left out silently.
    """
    family = _family(config.family)
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation)
    scaling, positions = config.rope_scaling, config.max_position_embeddings
    if scaling.rope_type == "dynamic":
        positions = scaling.original_max_position_embeddings
    rope = {"rope_type": scaling.rope_type}
    for name in ROPE_TYPES[scaling.rope_type]:
        value = getattr(scaling, name)
        if value is not None and not (
            scaling.rope_type == "dynamic" and name.startswith("original")
        ):
            rope[name] = list(value) if isinstance(value, tuple) else value
    raw = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        family.activation_key: activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling.rope_type != "default" else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "max_position_embeddings": positions,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
        **dict(family.only),
    }
    if config.partial_rotary_factor != 1:
        raw["partial_rotary_factor"] = config.partial_rotary_factor
        raw["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    if config.family == "phi3" and scaling.rope_type == "longrope":
        raw["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if config.family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta or config.rope_theta}
        raw["rope_parameters"] = {
            "full_attention": raw["rope_parameters"],
            "sliding_attention": local,
        }
        raw["rope_local_base_freq"] = local["rope_theta"]
    if config.query_pre_attn_scalar is not None:
        raw["query_pre_attn_scalar"] = config.query_pre_attn_scalar
    if config.attention_soft_cap is not None:
        raw["attn_logit_softcapping"] = config.attention_soft_cap
    if family.sliding != "none":
        raw["sliding_window"] = config.sliding_window
    if family.sliding in ("switched", "layers"):
        layers = () if config.sliding_window is None else config.sliding_layers
        layers = range(config.num_layers) if layers is None else layers
        raw["layer_types"] = [
            "sliding_attention" if i in layers else "full_attention"
            for i in range(config.num_layers)
        ]
        if family.sliding == "switched":
            raw["use_sliding_window"] = config.sliding_window is not None
    _check_nothing_is_lost(config, raw)
    return raw


def _check_nothing_is_lost(config: LlamaConfig, raw: dict) -> None:
    again = read_config(raw)
    lost = [
        f"{field.name} is {getattr(config, field.name)!r}, which would be read as {getattr(again, field.name)!r}"
        for field in dataclasses.fields(LlamaConfig)
        if field.name not in COMPUTING and getattr(config, field.name) != getattr(again, field.name)
    ]
    if lost:
        raise UserError(
            f"a {config.family} config.json cannot say what the model is: {'; '.join(lost)}"
        )
