"""Hugging Face model directories: config.json, safetensors, tokenizer.

    config, params = huggingface.load("dir")
    huggingface.save("new-dir", config, params, tokenizer="dir")    # transformers loads it

Directories on this machine only, and no pickles: weights have to be safetensors. Another architecture is an
entry in `_FAMILIES`.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.numpy

from lrjax.checkpoints.tensors import Stored, gather, scatter
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.models.llama import LlamaConfig

_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers/attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers/q": "model.layers.{}.self_attn.q_proj.weight",
    "layers/k": "model.layers.{}.self_attn.k_proj.weight",
    "layers/v": "model.layers.{}.self_attn.v_proj.weight",
    "layers/o": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/down": "model.layers.{}.mlp.down_proj.weight",
}
_NO_WEIGHT = (
    "rotary_emb.inv_freq"  # a table that old versions of transformers saved with the weights
)
_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
_DTYPES = ("F32", "F16", "BF16")
_SHARD_BYTES = 5 * 10**9


def load(directory: str | Path) -> tuple[LlamaConfig, dict]:
    """A model from a directory with config.json and safetensors, one file or several with an index.

    Returns:
        Its config and its parameter tree (see `models.llama`), float32 numpy.

    Raises:
        UserError: nothing readable there, an architecture or a setting that is not known (never ignored),
            or tensors that do not fit the config (all of them named).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; models are loaded from local directories")
    where = str(directory / "config.json")
    raw = _read_json(directory / "config.json")
    if (family := raw.get("model_type")) not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UserError(f"{where}: model_type is {family!r}; known are {known}")
    try:
        config = _FAMILIES[family](raw)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error

    with contextlib.ExitStack() as files:
        stored = {}
        for path in _weight_files(directory):
            try:
                file = files.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{path}: cannot be read as safetensors: {error}") from error
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                if name.endswith(_NO_WEIGHT):
                    continue
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{path}: {name} is stored as {tensor.get_dtype()}; "
                        f"known are {', '.join(_DTYPES)}"
                    )
                read = functools.partial(file.get_tensor, name)
                stored[name] = Stored(tuple(tensor.get_shape()), read)
        return config, gather(config, _NAMES, stored, str(directory))


def save(
    directory: str | Path,
    config: LlamaConfig,
    params: Mapping,
    tokenizer: str | Path | None = None,
) -> None:
    """Write a directory that `transformers` and `load` read, whole or not at all.

    Args:
        directory: a new or an empty directory.
        config: the model's.
        params: its parameter tree; each tensor is stored in the dtype it has there.
        tokenizer: what `load_tokenizer` takes, written along.

    Raises:
        UserError: the directory holds something, the tree does not fit the config, or the tokenizer
            cannot be loaded.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not empty; save to a new directory")
    # Built beside its place and then renamed, so that nobody meets half of it.
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    raw = _hf_config(config, dtype=str(params["embedding"].dtype))
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        loaded.save(partial)
        raw |= {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id}
    _write_json(partial / "config.json", raw)
    _write_weights(partial, scatter(config, _NAMES, params))
    os.replace(partial, directory)


def _llama_config(raw: dict) -> LlamaConfig:
    for key, allowed in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
    ):
        if (value := raw.get(key, allowed)) != allowed:
            raise UserError(f"{key} is {value!r}; known is {allowed!r}")

    def size(key: str, default: int | None = None) -> int:
        # transformers writes null for "as by default".
        value = default if raw.get(key) is None else raw[key]
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key} is {value!r}; a positive integer is expected")
        return value

    num_heads = size("num_attention_heads")
    embed_dim = size("hidden_size")
    return LlamaConfig(
        vocab_size=size("vocab_size"),
        num_layers=size("num_hidden_layers"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=size("num_key_value_heads", num_heads),
        head_dim=size("head_dim", embed_dim // num_heads),
        mlp_dim=size("intermediate_size"),
        rope_theta=_rope_theta(raw),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=size("max_position_embeddings", 2048),
    )


_FAMILIES = {"llama": _llama_config}


def _rope_theta(raw: dict) -> float:
    """theta, from `rope_theta` (transformers 4) or `rope_parameters` (5); nothing but plain RoPE passes."""
    thetas = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        for name, value in (raw.get(key) or {}).items():
            if name == "rope_theta":
                thetas[f"{key}.rope_theta"] = value
            elif name not in _PLAIN_ROPE or value != _PLAIN_ROPE[name]:
                raise UserError(f"{key}.{name} is {value!r}; only the default rope is known")
    given = {key: float(theta) for key, theta in thetas.items() if theta is not None}
    if len(set(given.values())) > 1:
        named = ", ".join(f"{key} {theta}" for key, theta in given.items())
        raise UserError(f"different values of theta: {named}")
    return next(iter(given.values()), 10000.0)


def _hf_config(config: LlamaConfig, dtype: str) -> dict:
    """config.json for transformers 4 and 5, which name theta and the dtype differently."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{directory}: neither {single.name} nor {index.name} in this directory")
    paths = sorted({directory / name for name in _read_json(index).get("weight_map", {}).values()})
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UserError(f"{index}: names files that are not there: {', '.join(missing)}")
    return paths


def _write_weights(directory: Path, tensors) -> None:
    """safetensors of at most `_SHARD_BYTES` each, so that no second copy of the model is in memory."""
    shards, shard, size, total = [], {}, 0, 0

    def write():
        path = directory / f"shard-{len(shards)}"
        # transformers refuses files that do not say what wrote them.
        safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
        shards.append((path, list(shard)))

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            write()
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        shards[0][0].rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(directory / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
