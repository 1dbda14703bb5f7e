"""Long texts with something hidden in them, of an exact number of tokens.

    haystack = Haystack(essays, tokenizer)
    text, tokens, answer_length = haystack.hide(
        ["The pass key is 73914."], "What is the pass key? The pass key is ", "73914",
        length=8192, depth=0.3, rng=np.random.default_rng(0))

`tokens` are those of the text and the answer as they are written one after the other, exactly `length` of them.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lrjax.errors import UserError

# A single line break is none: prose often comes in lines of a fixed width.
_SENTENCE_END = re.compile(r"[.?!][\"')\]\u2019\u201d]*\s+|\s*\n\s*\n\s*")
_BREAK = "\n\n"  # between texts, and before the question
_SLACK = 64  # tokens of filler to spare when a prompt is fitted


class Haystack:
    """Filler texts, put in random order and repeated as a prompt's length needs it.

    Args:
      texts: white space around them and empty ones are left out.
      tokenizer: has `encode` and `encode_with_offsets` of `lrjax.data.tokenizers`.

    Raises:
      UserError: there is no text.
    """

    def __init__(self, texts: Sequence[str], tokenizer):
        self._texts = [text.strip() for text in texts if text.strip()]
        if not self._texts:
            raise UserError("niah: the haystack has no text")
        self._tokenizer = tokenizer
        self._counts = [len(tokenizer.encode(text)) for text in self._texts]

    def hide(
        self,
        needles: Sequence[str],
        question: str,
        answer: str,
        *,
        length: int,
        depth: float,
        rng: np.random.Generator,
        bos: Sequence[int] = (),
    ) -> tuple[str, np.ndarray, int]:
        """A prompt with the first needle near `depth`, the others anywhere, all between sentences.

        Args:
          needles: texts to hide.
          question: ends the prompt, after an empty line.
          answer: what follows the question, with the space that it may need.
          length: tokens of `bos`, prompt and answer.
          depth: 0 is the start of the filler, 1 right before the question.

        Returns:
          (text of the prompt, tokens of prompt and answer: int32 [length], how many of them are the answer's).

        Raises:
          UserError: no room for needles and question, or a question whose tokens change when the answer follows.
        """
        ending = _BREAK + question
        taken = len(bos) + len(self._tokenizer.encode(" ".join(needles) + ending + answer))
        room = length - taken  # tokens of filler, as near as can be told from the parts
        if room < 1:
            raise UserError(
                f"niah.lengths: {length}; needles, question and answer alone take {taken} tokens"
            )
        hay = self._draw(room, rng)
        front = max(0, hay.end - room)
        spots = [np.argmin(np.abs(hay.boundary_tokens - (front + depth * room)))]
        spots += rng.choice(np.flatnonzero(hay.boundary_tokens > front), len(needles) - 1).tolist()
        placed = sorted(zip(hay.boundaries[spots].tolist(), needles, strict=True))

        def text_from(start: int) -> str:
            """The prompt when the filler begins at this character."""
            pieces, last = [], start
            for place, needle in placed:
                place = max(place, start)
                pieces += [hay.text[last:place], needle + " "]
                last = place
            return "".join([*pieces, hay.text[last:]]).rstrip() + ending

        def tokens_of(text: str) -> np.ndarray:
            return np.concatenate([bos, self._tokenizer.encode(text)]).astype(np.int32)

        def excess(start: int) -> int:
            return len(tokens_of(text_from(start) + answer)) - length

        start = _fit(hay.starts[: hay.end], front, excess)
        if start is None:
            raise UserError(
                f"niah.lengths: {length}; no cut of the filler gives a prompt of exactly so many tokens"
            )
        text = text_from(start)
        prompt_tokens, tokens = tokens_of(text), tokens_of(text + answer)
        count = len(prompt_tokens)
        if count >= length or not np.array_equal(prompt_tokens, tokens[:count]):
            raise UserError(
                f"niah.question: {question!r}; its tokens change when the answer {answer!r} follows; "
                "allowed: one that keeps them, by ending with a space or without it"
            )
        return text, tokens, length - count

    def _draw(self, room: int, rng) -> "_Hay":
        """Filler up to a random sentence end that leaves at least `room` tokens before it."""
        drawn, tokens = [], 0
        while tokens < room + _SLACK:
            for index in rng.permutation(len(self._texts)).tolist():
                if tokens < room + _SLACK:
                    drawn.append(self._texts[index])
                    tokens += self._counts[index]
        text = _BREAK.join(drawn) + _BREAK  # so that a needle may follow the last sentence, too
        starts = self._tokenizer.encode_with_offsets(text)[1][:, 0]
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        boundaries = np.unique([0, *ends, len(text)])
        boundary_tokens = np.searchsorted(starts, boundaries)
        enough = np.flatnonzero(boundary_tokens >= min(room + _SLACK, boundary_tokens[-1]))
        last = int(rng.choice(enough))
        return _Hay(
            text[: boundaries[last]], starts, boundaries[: last + 1], boundary_tokens[: last + 1]
        )


class _Hay(NamedTuple):
    """A stretch of filler, whose front is yet to be cut."""

    text: str
    starts: np.ndarray  # first character of each token, maybe beyond the text
    boundaries: (
        np.ndarray
    )  # characters at which a sentence may begin, rising, the end of the text the last
    boundary_tokens: np.ndarray  # the same in tokens

    @property
    def end(self) -> int:
        return int(self.boundary_tokens[-1])


def _fit(starts: np.ndarray, first: int, excess: Callable[[int], int]) -> int | None:
    """The character to begin at for an excess of 0; the front is where half a sentence harms nobody.

    Tokens at the seams may join or part, so the cut by whole tokens is corrected until it holds; where that only
    goes back and forth around the length, single characters are tried.
    """
    tried: set[int] = set()
    start = int(starts[first])
    while 0 <= first < len(starts) and first not in tried:
        tried.add(first)
        start = int(starts[first])
        if not (over := excess(start)):
            return start
        first += over
    for distance in range(1, 200):
        for candidate in (start - distance, start + distance):
            if 0 <= candidate <= starts[-1] and not excess(candidate):
                return candidate
    return None
