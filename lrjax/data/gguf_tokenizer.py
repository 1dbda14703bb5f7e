"""The tokenizer in a GGUF's metadata: byte-pair ("gpt2") and sentencepiece ("llama") vocabularies.

    tokenizer = gguf_tokenizer(Path("model.gguf"))

A GGUF holds the vocabulary, and of what happens to a text before it only a name. Byte-pair vocabularies become a
`tokenizers.Tokenizer`, cut as that name says; those of sentencepiece become a sentencepiece model again: pieces, scores
and kinds are all that a BPE model of it has.
"""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lrjax.data import chat
from lrjax.data.tokenizers import JsonTokenizer, Tokenizer, check_ids, new_config, unreadable
from lrjax.errors import UserError

# How text is cut before byte-pair merging, by `tokenizer.ggml.pre` as llama.cpp reads it.
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# The expressions of the published tokenizer.json; numbers in parts of up to three digits, and digit by digit.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _split(_WORDS % "1,3"),
    "qwen2": _split(_WORDS % "1"),
}
_CONTROL, _USER_DEFINED = 3, 4


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        UserError: the file or its vocabulary cannot be read, or is of a kind that is not known.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise unreadable(path, "a GGUF", error) from error

    def field(name: str, default=None):
        found = reader.get_field(name)
        return default if found is None else found.contents()

    makers = {"gpt2": _byte_pair, "llama": _sentencepiece}
    if (kind := field("tokenizer.ggml.model")) not in makers:
        raise UserError(f"{path}: tokenizer.ggml.model is {kind!r}; known are {', '.join(makers)}")
    tokens = field("tokenizer.ggml.tokens", [])
    templates = {chat.DEFAULT: field("tokenizer.chat_template")}
    for name in field("tokenizer.chat_templates", []):
        templates[name] = field(f"tokenizer.chat_template.{name}")
    templates = {name: text for name, text in templates.items() if text is not None}
    config = {
        "chat_template": [{"name": name, "template": text} for name, text in templates.items()]
    }
    if list(templates) in ([], [chat.DEFAULT]):
        config["chat_template"] = templates.get(chat.DEFAULT)
    for name, short in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (index := field(f"tokenizer.ggml.{name}_token_id")) is not None:
            check_ids([index], len(tokens), f"{path}: tokenizer.ggml.{name}_token_id")
            config[f"{short}_token"] = tokens[index]
    return makers[kind](path, field, tokens, config)


def _byte_pair(path: Path, field, tokens: list[str], config: dict) -> JsonTokenizer:
    if (pre := field("tokenizer.ggml.pre")) not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise UserError(f"{path}: tokenizer.ggml.pre is {pre!r}; known are {known}")
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges", [])],
            # llama.cpp's and the published tokenizer of Llama 3: a whole word of the vocabulary is not merged up.
            ignore_merges=pre == "llama-bpe",
        )
    except Exception as error:  # the library raises plain Exception
        raise unreadable(path, "a byte-pair vocabulary", error) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, field("tokenizer.ggml.token_type", []), strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            added = tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
            backend.add_tokens([added])
    if field("tokenizer.ggml.add_bos_token", False) and (bos := config.get("bos_token")):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    return JsonTokenizer(backend, new_config(config), str(path))


def _sentencepiece(path: Path, field, tokens: list[str], config: dict) -> Tokenizer:
    """Merges by the score of what comes out, bytes for what has no piece: llama.cpp's own reading of "llama"."""
    from sentencepiece import sentencepiece_model_pb2

    from lrjax.data.sentencepiece_tokenizer import SentencePieceTokenizer

    scores, kinds = (field(f"tokenizer.ggml.{name}", []) for name in ("scores", "token_type"))
    if not len(tokens) == len(scores) == len(kinds) > 0:
        raise UserError(
            f"{path}: tokenizer.ggml.model 'llama' has {len(tokens)} tokens, {len(scores)} scores and "
            f"{len(kinds)} kinds; as many of each are needed"
        )
    proto = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(tokens, scores, kinds, strict=True):
        # GGUF's kinds of tokens are sentencepiece's numbers.
        proto.pieces.add(piece=text, score=score, type=int(kind))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size, trainer.byte_fallback = len(tokens), "<0x00>" in tokens
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        setattr(trainer, f"{name}_id", -1 if token is None else tokens.index(token))
        if token is not None:
            setattr(trainer, f"{name}_piece", token)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = field("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = field("tokenizer.ggml.remove_extra_whitespaces", False)
    normalizer.escape_whitespaces = True
    config = {name: value for name, value in config.items() if value is not None}
    config |= {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,  # llama.cpp puts the space after every special token, too
        "add_prefix_space": normalizer.add_dummy_prefix,
        "add_bos_token": field("tokenizer.ggml.add_bos_token", True),
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    return SentencePieceTokenizer(proto.SerializeToString(), config, str(path))
