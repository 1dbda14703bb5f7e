"""sentencepiece models (tokenizer.model: Llama 2, Mistral) with the special tokens around them.

    tokenizer = SentencePieceTokenizer(path.read_bytes(), tokenizer_config, str(path))

sentencepiece itself never reads a control token out of a text, knows nothing of the tokens that
tokenizer_config.json adds, and puts a space before whatever it is handed. So the text is cut at the special tokens
first, as transformers does it: at control and user-defined pieces, the unknown token and the added tokens, the longest
first. Where a space goes before what lies between them is transformers' rule, too: before the text's first character
only, with `"legacy": true` also after every special token, with `"add_prefix_space": false` nowhere.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from lrjax.data.tokenizers import SPECIAL_TOKENS, Tokenizer, piece_text, token_text, unreadable
from lrjax.errors import UserError

_Kind = sentencepiece_model_pb2.ModelProto.SentencePiece
_SPECIAL = {_Kind.UNKNOWN, _Kind.CONTROL, _Kind.USER_DEFINED}


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model and the tokens of its tokenizer_config.json.

    Args:
        model: the bytes of a tokenizer.model.
        config: the content of tokenizer_config.json.
        where: the file, for messages.
    """

    def __init__(self, model: bytes, config: dict, where: str):
        self.config, self._model = config, model
        try:
            # What this one encodes begins with a space where the model was trained so; the other one goes on.
            self._first = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise unreadable(where, "a sentencepiece model", error) from error
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        if not proto.pieces:
            raise UserError(f"{where}: cannot be read as a sentencepiece model: it holds no pieces")
        proto.normalizer_spec.add_dummy_prefix = False
        self._next = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        if config.get("add_prefix_space") is False:
            self._first = self._next
        self._after_special = self._first if config.get("legacy") else self._next

        self._special_ids = {
            piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type in _SPECIAL
        }
        options = {}  # of added tokens: whether they take the white space around them along, ...
        for index, token in (config.get("added_tokens_decoder") or {}).items():
            self._special_ids[token["content"]] = int(index)
            options[token["content"]] = token
        for name in SPECIAL_TOKENS:
            content = token_text(config.get(name))
            index = self._first.piece_to_id(content or "")
            if content is not None and not self._first.is_unknown(index):
                self._special_ids.setdefault(content, index)
        self._special_texts = {index: text for text, index in self._special_ids.items()}
        self._pattern = re.compile(
            "|".join(
                _expression(text, options.get(text, {}))
                for text in sorted(filter(None, self._special_ids), key=len, reverse=True)
            )
            or "(?!)"
        )
        self.vocab_size = max(len(proto.pieces), *(1 + i for i in self._special_texts), 1)
        self.eos_id, self.bos_id = (
            self._id_of(token_text(config.get(name)), name, native, where)
            for name, native in (("eos_token", self._first.eos_id()), ("bos_token", self._first.bos_id()))
        )  # fmt: skip

    def _id_of(self, text: str | None, name: str, native: int, where: str) -> int | None:
        """The id of a token that tokenizer_config.json names, or else the model's own (-1: it does without)."""
        if text is None:
            return native if native >= 0 and name not in self.config else None
        if text not in self._special_ids:
            raise UserError(f"{where}: {name} {text!r} is not in the vocabulary")
        return self._special_ids[text]

    @property
    def special_tokens(self):
        own = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        own = {name: self._special_texts[i] for name, i in own.items() if i is not None}
        return own | super().special_tokens

    def _encode(self, text):
        ids, spans = [], []
        for start, end, special in self._pieces(text):
            if special is not None:
                ids.append(special)
                spans.append((start, end))
                continue
            backend = self._first if start == 0 else self._after_special
            found, found_L2 = _encode_plain(backend, text[start:end])
            ids += found
            spans += (found_L2 + start).tolist()
        return ids, spans

    def _pieces(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """The text in parts (start, end, id of the special token or None)."""
        start = 0
        for match in self._pattern.finditer(text):
            if start < match.start():
                yield start, match.start(), None
            # The white space that a token takes along is not part of its text.
            index = self._special_ids.get(
                match.group(), self._special_ids.get(match.group().strip())
            )
            yield match.start(), match.end(), index
            start = match.end()
        if start < len(text):
            yield start, len(text), None

    def _decode(self, ids):
        parts, run, at_start = [], [], True
        for index in [*ids, None]:
            if index is not None and index not in self._special_texts:
                run.append(index)
                continue
            if run:
                # Only the text's first character has lost a space that was put before it.
                parts.append((self._first if at_start else self._next).decode(run))
            if index is not None:
                parts.append(self._special_texts[index])
            run, at_start = [], False
        return "".join(parts)

    def opening_ids(self):
        adds = self.config.get("add_bos_token", True)  # sentencepiece models are used with it
        return [self.bos_id] if adds and self.bos_id is not None else []

    def token_texts(self):
        pieces = self._first.vocab_size()
        return [
            self._special_texts.get(i)
            or (piece_text(self._first.id_to_piece(i)) if i < pieces else "")
            for i in range(self.vocab_size)
        ]

    def save(self, directory):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(self._model)
        self._save_config(directory)


def _expression(text: str, options: dict) -> str:
    """What finds a token in a text, as `tokenizers.AddedToken` means its options."""
    found = re.escape(text)
    if options.get("single_word"):
        found = rf"(?<!\w){found}(?!\w)"
    return r"\s*" * bool(options.get("lstrip")) + found + r"\s*" * bool(options.get("rstrip"))


def _encode_plain(backend, text: str) -> tuple[list[int], np.ndarray]:
    mapping = backend.encode(text, return_type="offset_mapping")
    spans_L2 = np.asarray(mapping["offsets"], np.int64).reshape(-1, 2)
    # Of a character's byte pieces only the last has its span, the others are empty: all get the same end.
    starts_L, ends_L = spans_L2.T
    ends_L = np.where(starts_L < ends_L, ends_L, len(text))
    ends_L = np.minimum.accumulate(ends_L[::-1])[::-1]
    return mapping["ids"], np.stack([starts_L, ends_L], axis=1)
