"""Can these checkpoints be merged? Every difference is named; whose RoPE and tokenizer it shall be, the user says.

    notes = check(sources, rope_from=None, tokenizer_from=None)        # UserError, or differences that do not matter

Configs are compared as plain values, so that neither an architecture nor a field has to be known here.
"""

import json
import pathlib
from collections.abc import Sequence

from lrjax.errors import UserError
from lrjax.models import COMPUTING

# How a model is computed or loaded, not what it is.
_FREE = {
    *COMPUTING,
    "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "architectures",
    "attn_implementation", "_attn_implementation", "attention_dropout", "initializer_range", "pretraining_tp",
    "auto_map",
}  # fmt: skip
# What a chat format changes: told, not refused. Compared as token ids of one vocabulary.
_NOTED = {"bos_token_id", "eos_token_id", "pad_token_id"}
_WINDOW = {"max_position_embeddings", "original_max_position_embeddings", "sliding_window"}
_PLAIN_ROPE = {"rope_type": "default", "partial_rotary_factor": 1.0}
_HEAD = ("lm_head.weight", "head")


def check(sources: Sequence, rope_from=None, tokenizer_from=None) -> list[str]:
    """What differs and does not matter, as text.

    Args:
        sources: `checkpoints.streaming` sources.
        rope_from: the path whose RoPE and window the result is to have, or None.
        tokenizer_from: the same for the tokenizer.

    Raises:
        UserError: formats, configs, tensors, vocabularies or RoPE that do not fit, all of them named.
    """
    kinds = {source.kind for source in sources}
    if len(kinds) > 1:
        named = ", ".join(f"{source.path} is {source.kind}" for source in sources)
        raise UserError(f"the sources are of two formats: {named}; convert one of them first")
    problems, notes = _configs(sources, rope_from)
    problems += _tensors(sources)
    vocabularies = _vocabularies(sources)
    if vocabularies and tokenizer_from is None:
        problems += [
            f"{difference} (name the source to take the tokenizer from with tokenizer_from)"
            for difference in vocabularies
        ]
    else:
        notes += vocabularies
    if problems:
        raise UserError(f"the sources cannot be merged: {'; '.join(problems)}")
    return notes


def tensor_names(sources: Sequence) -> list[str]:
    """The tensors of the result, in the order of the first source.

    A tied model may store its head or not; the result has it where all sources have it.
    """
    return [name for name in sources[0].tensors if all(name in s.tensors for s in sources)]


# ------------------------------------------------------------------------------------------- configs


def _configs(sources, rope_from) -> tuple[list[str], list[str]]:
    first = sources[0]
    ours, our_rope = _split_rope(first.config)
    problems, notes = [], []
    for source in sources[1:]:
        theirs, their_rope = _split_rope(source.config)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) == theirs.get(key) or key in _FREE:
                continue
            text = _difference(key, ours.get(key), theirs.get(key), first, source)
            (notes if key in _NOTED else problems).append(text)
        for key in sorted(our_rope.keys() | their_rope.keys()):
            if our_rope.get(key) == their_rope.get(key):
                continue
            text = _difference(key, our_rope.get(key), their_rope.get(key), first, source)
            if rope_from is None:
                problems.append(f"{text} (name the source to take it from with rope_from)")
            else:
                notes.append(text)
    return problems, notes


def _difference(key, ours, theirs, first, second) -> str:
    return f"{key} is {_shown(ours)} in {first.path}, {_shown(theirs)} in {second.path}"


def _shown(value) -> str:
    return "absent" if value is None else str(value)


def _split_rope(config: dict) -> tuple[dict, dict]:
    """A config without, and with nothing but, its rotary embedding and window, in one spelling.

    transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters; null is the same as absent.
    """
    rope, rest = {}, {}
    for key, value in config.items():
        if value is None:
            continue
        if key in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
            scaling = {("rope_type" if name == "type" else name): v for name, v in value.items()}
            for name, v in scaling.items():
                if v is None or _PLAIN_ROPE.get(name) == v:
                    continue
                rope["rope_theta" if name == "rope_theta" else f"rope_scaling.{name}"] = v
        elif key.startswith("rope") or key in _WINDOW:
            rope[key] = value
        else:
            rest[key] = value
    return rest, rope


# ------------------------------------------------------------------------------------------- tensors


def _tensors(sources) -> list[str]:
    first = sources[0]
    tied = any(first.config.get(key) for key in ("tie_word_embeddings", "tie_embeddings"))
    problems = []
    for source in sources[1:]:
        for here, there in ((first, source), (source, first)):
            only = [name for name in here.tensors if name not in there.tensors]
            only = [name for name in only if not (tied and name in _HEAD)]
            problems += [f"{name} is only in {here.path}" for name in only[:5]]
            if len(only) > 5:
                problems.append(f"and {len(only) - 5} more are only in {here.path}")
        problems += [
            f"{name} is {tensor.shape} in {first.path}, {source.tensors[name].shape} in {source.path}"
            for name, tensor in first.tensors.items()
            if name in source.tensors and source.tensors[name].shape != tensor.shape
        ]
    return problems


# ------------------------------------------------------------------------------------------- tokenizers


def tokenizer_folder(source) -> pathlib.Path | None:
    """Where a checkpoint's tokenizer is: an HF directory itself, TOKENIZER beside a model, or that of its run."""
    if source.kind == "safetensors":
        return source.path
    model = source.described_by
    for folder in (model / "tokenizer", model.parent.parent / "tokenizer"):
        if folder.is_dir():
            return folder
    return None


def _vocabularies(sources) -> list[str]:
    """How the tokenizers differ in the ids that they give to tokens; where one has none, nothing can be said."""
    found = [(source, tokenizer_folder(source)) for source in sources]
    found = [(source, folder) for source, folder in found if folder is not None]
    problems = []
    for source, folder in found[1:]:
        first, first_folder = found[0]
        for file in ("tokenizer.json", "tokenizer.model"):
            paths = [first_folder / file, folder / file]
            if folder == first_folder or not all(path.is_file() for path in paths):
                continue
            ours, theirs = (path.read_bytes() for path in paths)
            if ours == theirs:
                break
            where = f"in {first.path} and {source.path}"
            if file == "tokenizer.model":
                problems.append(f"{file} is not the same {where}")
                break
            ours, theirs = _vocabulary(ours), _vocabulary(theirs)
            tokens = [
                t for t in sorted(ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t)
            ]
            if tokens:
                shown = ", ".join(
                    f"{token!r} ({_shown(ours.get(token))}, {_shown(theirs.get(token))})"
                    for token in tokens[:3]
                )
                problems.append(f"the tokenizers differ in {len(tokens)} tokens {where}: {shown}")
            break
    return problems


def _vocabulary(content: bytes) -> dict[str, int]:
    tokenizer = json.loads(content)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of the ids
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    return {**vocabulary, **added}
