"""Questions with their reference answers, as a benchmark makes them, and the jsonl files that they live in.

    sample = Sample(0, "… long text … What is the number?", " The number is", ("417",), length=4096)
    write_jsonl(path, [sample.row()])
    samples = read_samples(path)

The format is RULER's: {"index", "input", "outputs", "length", "answer_prefix", …}, so that its scripts read ours and
ours theirs. `Prompter` turns a sample into the tokens that a model gets.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from absl import logging

from lrjax.data.jsonl import read_jsonl
from lrjax.errors import UserError


class Sample(NamedTuple):
    """One question: the prompt is `input` (in the chat template if one is used), then `answer_prefix`."""

    index: int
    input: str
    answer_prefix: str
    outputs: tuple[str, ...]  # reference answers
    length: int = -1  # tokens of the prompt and the answer's budget; -1: not counted yet
    extra: dict = {}  # noqa: RUF012 - what else a benchmark notes or scores by; never changed

    def row(self) -> dict:
        """As a line of RULER's jsonl."""
        return {
            "index": self.index, "input": self.input, "outputs": list(self.outputs), "length": self.length,
            "length_w_model_temp": self.length, "answer_prefix": self.answer_prefix,
        } | self.extra  # fmt: skip


_FIELDS = ("index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix")


def read_samples(path) -> list[Sample]:
    """The samples of a jsonl file of RULER's or ours, numbered by their line.

    RULER's own "index" may come twice (its niah.py writes the place of the answer there); it is kept as others.id,
    where its scripts look for it.

    Raises:
      UserError: no such file, a line that is not JSON or lacks index, input or outputs (file and line number).
    """
    samples = []
    for number, row in read_jsonl(path):
        for name, kind in (("index", int), ("input", str), ("outputs", list)):
            if not isinstance(row.get(name), kind):
                raise UserError(f"{path}, line {number}: {name!r} has to be there, as {kind}")
        extra = {name: value for name, value in row.items() if name not in _FIELDS}
        if row["index"] != len(samples):
            extra["others"] = {"id": row["index"]} | extra.get("others", {})
        samples.append(
            Sample(
                len(samples), row["input"], row.get("answer_prefix", ""), tuple(row["outputs"]),
                row.get("length", -1), extra,
            )
        )  # fmt: skip
    return samples


@dataclasses.dataclass(frozen=True)
class Prompter:
    """How a text becomes a prompt: plainly, after the tokenizer's own opening (bos), or in its chat template.

    Raises:
      UserError: chat is asked for and the tokenizer has no chat template.
    """

    tokenizer: object
    chat: bool = False

    def __post_init__(self):
        if self.chat and self.tokenizer.chat_template is None:
            raise UserError(
                "--chat: the tokenizer has no chat template; allowed: a checkpoint with one "
                "(tokenizer_config.json or chat_template.jinja), or no --chat"
            )

    def tell_what_is_left_out(self, of: str, how: str) -> None:
        """Warns where questions are asked without the chat template that there is; `how` they are asked in it."""
        if self.tokenizer.chat_template is not None and not self.chat:
            logging.warning(
                "%s: the tokenizer has a chat template, and the questions are asked without it; %s asks in it",
                of, how,
            )  # fmt: skip

    def text(self, sample: Sample) -> str:
        """The whole prompt as text; a chat template's own bos is part of it."""
        question = sample.input
        if self.chat:
            messages = [{"role": "user", "content": question}]
            question = self.tokenizer.chat(messages, add_generation_prompt=True)
        return question + sample.answer_prefix

    def tokens(self, sample: Sample) -> np.ndarray:
        """Token ids, int32 [L]: what the model gets, exactly."""
        ids = self.tokenizer.encode(self.text(sample))
        return ids if self.chat else np.concatenate([self.opening, ids]).astype(np.int32)

    @functools.cached_property
    def opening(self) -> np.ndarray:
        """What the tokenizer puts before every text by itself: bos or nothing."""
        return np.asarray(self.tokenizer.opening_ids(), np.int32)

    @property
    def template(self) -> str:
        """The chat template, or "plain"."""
        return self.tokenizer.chat_template if self.chat else "plain"
