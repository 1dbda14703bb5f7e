"""Text to token ids and back, whatever the model's tokenizer is stored in.

    tokenizer = load_tokenizer("bytes")  # or a directory, tokenizer.json, .model or .gguf file
    ids_L, spans_L2 = tokenizer.encode_with_offsets(text)

Nothing outside this module knows a token id: sentences are mapped to tokens by character spans,
token classes are read off `token_texts()`. Byte and Hugging Face tokenizers, and GGUF's byte-pair ones, are a
`tokenizers.Tokenizer` (`JsonTokenizer`); sentencepiece, GGUF's included, keeps its own library
(`sentencepiece_tokenizer.py`).
"""

import abc
import functools
import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from lrjax.data import chat
from lrjax.data.generation import GENERATION_FILE, read_generation
from lrjax.errors import UserError

_KNOWN_DECODERS = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
_WORD_START = "\u2581"  # sentencepiece writes a space as this character
SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


class Tokenizer(abc.ABC):
    """What every tokenizer can do."""

    vocab_size: int  # ids are 0 .. vocab_size - 1
    eos_id: int | None  # None where the tokenizer names no such token
    bos_id: int | None
    config: dict  # the content of tokenizer_config.json
    generation: dict = {}  # noqa: RUF012 - what generation_config.json beside it says; never changed in place

    @property
    def chat_templates(self) -> dict[str, str]:
        """The Jinja chat templates by name; the only one, or the usual one, is "default"."""
        return chat.named(self.config.get("chat_template"), "tokenizer_config.json")

    @property
    def chat_template(self) -> str | None:
        """The template named "default", or None."""
        return self.chat_templates.get(chat.DEFAULT)

    def chat(
        self, messages, add_generation_prompt: bool = True, *, template: str = chat.DEFAULT,
        tools=None, **variables,
    ) -> str:  # fmt: skip
        """A conversation as the text that the model was trained on, its own bos included where it writes one.

        `encode` takes it as it is; nothing is to be put before it. Arguments as `data.chat.render` takes them.

        Args:
            template: the name of one of `chat_templates`.

        Raises:
            UserError: there is no such template, or it refuses the messages.
        """
        if template not in self.chat_templates:
            have = ", ".join(self.chat_templates) or "none"
            raise UserError(
                f"the tokenizer has no chat template {template!r}; it has: {have} (looked for in "
                "tokenizer_config.json, chat_template.jinja, chat_template.json, a GGUF's metadata)"
            )
        return chat.render(
            self.chat_templates[template], messages, self.special_tokens,
            add_generation_prompt=add_generation_prompt, tools=tools, **variables,
        )  # fmt: skip

    @property
    def special_tokens(self) -> dict[str, str]:
        """ "bos_token", "eos_token", "pad_token", ... with their texts, where the tokenizer names them."""
        named = {name: token_text(self.config.get(name)) for name in SPECIAL_TOKENS}
        return {name: text for name, text in named.items() if text is not None}

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [L]; nothing is added to the text's own tokens."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int32 [L], and the characters each stands for, int32 [L, 2] as (start, end).

        White space before a token's first other character is left out of its span, so that " The"
        starts with its T whatever the tokenizer does with spaces. Tokens that share a character
        all span it.

        Raises:
            UserError: the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"text holds the lone surrogate {text[error.start]!r} at character {error.start}: "
                "only whole Unicode characters can be tokenised"
            ) from None
        ids, spans = self._encode(text)
        ids_L = np.asarray(ids, np.int32)
        return ids_L, _trim(text, np.asarray(spans, np.int32).reshape(-1, 2))

    def decode(self, ids) -> str:
        """The text of the ids; special tokens by their names, broken UTF-8 as U+FFFD.

        Raises:
            UserError: an id outside of the vocabulary.
        """
        ids_L = np.asarray(ids, np.int64).reshape(-1)
        check_ids(ids_L, self.vocab_size, "decode")
        return self._decode(ids_L.tolist())

    def opening_ids(self) -> list[int]:
        """What the tokenizer's own files say comes before every text: [bos_id] or nothing.

        `encode` leaves it out; a prompt that a model shall take as it was trained begins with it.
        """
        return []

    @abc.abstractmethod
    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def token_texts(self) -> list[str]:
        """The text of each id alone, its leading space kept; parts of a character as U+FFFD."""

    @abc.abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the files that `load_tokenizer(directory)` makes the same tokenizer of."""

    @property
    def end_ids(self) -> list[int]:
        """Every token that ends an answer: those of generation_config.json, and the tokenizer's own."""
        listed = self.generation.get("eos_token_id")
        listed = listed if isinstance(listed, list) else [listed]
        return [i for i in dict.fromkeys([*listed, self.eos_id]) if i is not None]

    def _save_config(self, directory: Path) -> None:
        for name, content in (
            ("tokenizer_config.json", self.config),
            (GENERATION_FILE, self.generation),
        ):
            if content or content is self.config:
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (directory / name).write_text(text, encoding="utf-8")


class JsonTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library, which stores it as tokenizer.json."""

    def __init__(self, backend: tokenizers.Tokenizer, config: dict, where: str):
        # Some published files were saved with the truncation or the padding of a training script.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.config = config
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_id, self.bos_id = (
            self._id_of(config.get(name), name, where) for name in ("eos_token", "bos_token")
        )

    def _id_of(self, token: str | dict | None, name: str, where: str) -> int | None:
        if (content := token_text(token)) is None:
            return None
        if (index := self._backend.token_to_id(content)) is None:
            raise UserError(f"{where}: {name} {content!r} is not in the vocabulary")
        return index

    def _encode(self, text):
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _decode(self, ids):
        return self._backend.decode(ids, skip_special_tokens=False)

    def opening_ids(self):
        ids = self._backend.encode("", add_special_tokens=True).ids
        return [self.bos_id] if self.bos_id is not None and self.bos_id in ids[:1] else []

    def token_texts(self):
        decoder = json.loads(self._backend.to_str())["decoder"]
        kinds = {part["type"] for part in (decoder or {}).get("decoders", [decoder]) if part}
        if unknown := kinds - _KNOWN_DECODERS:
            raise UserError(
                f"token texts of the decoder {', '.join(sorted(unknown))} are not known; "
                f"known are {', '.join(sorted(_KNOWN_DECODERS))}"
            )
        surface = _byte_level_text if "ByteLevel" in kinds else piece_text
        added = self._backend.get_added_tokens_decoder()
        texts = [""] * self.vocab_size
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            texts[index] = token if index in added else surface(token)
        return texts

    def save(self, directory):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        self._save_config(directory)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer of "bytes", a directory, or a .json, .model (sentencepiece) or .gguf file.

    Special tokens and chat templates come from tokenizer_config.json and the files that transformers writes beside
    it, or from the GGUF itself; the settings for generation from a directory's generation_config.json.

    Raises:
        UserError: nothing of the kind there, or it cannot be read.
    """
    if spec == "bytes":
        return byte_tokenizer()
    path = Path(spec)
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                tokenizer = load_tokenizer(path / name)
                tokenizer.generation = read_generation(path)
                return tokenizer
        raise UserError(
            f"tokenizer {path}: neither tokenizer.json nor tokenizer.model in this directory"
        )
    if not path.is_file():
        raise UserError(
            f'tokenizer {path}: no such file or directory; allowed are "bytes", a directory, '
            "or a .json, .model or .gguf file"
        )
    if path.suffix == ".json":
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise unreadable(path, "a tokenizer", error) from error
        return JsonTokenizer(backend, _read_config(path.parent), str(path))
    if path.suffix == ".model":
        from lrjax.data.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(path.read_bytes(), _read_config(path.parent), str(path))
    if path.suffix == ".gguf":
        from lrjax.data.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(path)
    raise UserError(f"tokenizer {path}: the file must end with .json, .model or .gguf")


def byte_tokenizer() -> JsonTokenizer:
    """The 256 bytes of UTF-8, each with its own value as the id, and 256 for the end of a document.

    No text encodes to the end token: it is in the vocabulary, but no merge leads to it.
    """
    vocab = {**_byte_level_alphabet(), "<eos>": 256}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return JsonTokenizer(backend, new_config({"eos_token": "<eos>"}), "bytes")


def check_ids(ids, vocab_size: int, where: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        ids: integers of any shape.
        vocab_size: the model's; ids are 0 .. vocab_size - 1.
        where: what the ids are of (a document's id, a file), for the message.

    Raises:
        UserError: naming the first such id, its position and `where`.
    """
    ids = np.asarray(ids)
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        index = np.unravel_index(bad[0], ids.shape)
        position = ", ".join(str(int(i)) for i in index)
        raise UserError(
            f"{where}: token id {ids[index]} at position {position} is outside of the vocabulary, "
            f"0 to {vocab_size - 1}"
        )


def new_config(entries: dict) -> dict:
    """A tokenizer_config.json that transformers takes tokenizer.json as it stands with."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return config | {name: value for name, value in entries.items() if value is not None}


def token_text(token: str | dict | None) -> str | None:
    """A special token as tokenizer_config.json has it, a text or {"content", ...}, as a text."""
    return token["content"] if isinstance(token, dict) else token


def _read_config(directory: Path) -> dict:
    """tokenizer_config.json with what older and newer versions of transformers keep in files beside it."""
    config = _read_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # as transformers 4.33 and before wrote them
        for name, token in _read_object(directory / "special_tokens_map.json").items():
            config.setdefault(name, token)
        if added := _read_object(directory / "added_tokens.json"):
            config["added_tokens_decoder"] = {
                str(index): {"content": text} for text, index in added.items()
            }
    if templates := chat.read_templates(directory, config):
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
        if list(templates) == [chat.DEFAULT]:
            config["chat_template"] = templates[chat.DEFAULT]
    return config


def _read_object(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise unreadable(path, "JSON", error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def unreadable(path: Path | str, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path}: cannot be read as {what}: {reason}")


def _trim(text: str, spans_L2: np.ndarray) -> np.ndarray:
    """Spans without the white space they begin with; a span of nothing else stays as it is."""
    chars = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    values, inverse = np.unique(chars, return_inverse=True)
    is_space = np.array([chr(value).isspace() for value in values], bool)[inverse]
    # next_char[i]: the first index from i on that is not white space.
    index = np.where(is_space, len(text), np.arange(len(text)))
    next_char = np.append(np.minimum.accumulate(index[::-1])[::-1], len(text)).astype(np.int32)
    starts_L, ends_L = spans_L2.T
    trimmed_L = next_char[starts_L]
    return np.stack([np.where(trimmed_L < ends_L, trimmed_L, starts_L), ends_L], axis=1)


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where that prints, else 256, 257, ..."""
    prints = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    chars = [*prints, *range(256, 256 + len(others))]
    return dict(zip(map(chr, chars), prints + others, strict=True))


def _byte_level_text(token: str) -> str:
    return bytes(map(_byte_level_alphabet().__getitem__, token)).decode("utf-8", errors="replace")


def piece_text(piece: str) -> str:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)]).decode("utf-8", errors="replace")
    return piece.replace(_WORD_START, " ")
