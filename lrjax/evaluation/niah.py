"""A needle in a haystack: can the model repeat a value that stands somewhere in a long text?

    task = NiahTask(lengths=(4096, 8192), depths=(0.1, 0.5, 0.9), samples_per_cell=2)
    result = evaluate(task, config, params, tokenizer, essays, seed=0)
    result["accuracy"]["8192"], result["interval"]["8192"], result["cells"], result["samples"]

A prompt is filler text with the needle at a sentence boundary near the depth, then the question; prompt and answer
together have exactly `length` tokens, counted on the final text. Prompts depend on the task, the texts, the
tokenizer and the seed alone, so all checkpoints of a model get the same ones. An answer is right when greedy
generation gives exactly its tokens. Small models take `fast=True`: one forward pass over prompt and answer, right when
the likeliest token is the answer's everywhere, which is the same thing; large ones read the prompt through the cache.
"""

import dataclasses
import functools
import hashlib
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lrjax.data.jsonl import appender, read_appended
from lrjax.errors import UserError
from lrjax.evaluation.generate import PREFILL_CHUNK, AnswerScore, check_tokens, prefill
from lrjax.evaluation.haystack import Haystack
from lrjax.evaluation.statistics import wilson_interval
from lrjax.models.head import token_stats
from lrjax.models.llama import Llama, LlamaConfig


@dataclasses.dataclass(frozen=True)
class NiahTask:
    """What is hidden and asked for, and where. Raises `UserError` for what cannot be asked.

    `needle` and `question` may name {key}; the needle must name {value}. The answer is the value; a space is put
    before it unless the question ends with white space. Which of the two is right depends on the tokenizer: one
    that has tokens for numbers without a space wants the question to end with that space.
    """

    lengths: tuple[int, ...]  # tokens of prompt and answer
    # 0: the start of the text, 1: right before the question.
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples_per_cell: int = 1
    needle: str = "The pass key is {value}. Remember it. {value} is the pass key."
    question: str = "What is the pass key? The pass key is "
    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()  # none: numbers of `digits` digits
    digits: tuple[int, int] = (5, 5)  # the fewest and the most
    distractors: int = 0  # needles with other keys and values at random places
    add_bos: bool = False  # begin with the tokenizer's bos token

    def __post_init__(self):
        for field in ("lengths", "depths", "keys", "values", "digits"):  # lists are welcome, too
            object.__setattr__(self, field, tuple(getattr(self, field)))
        few, many = self.digits
        needed = self.distractors + 1
        needle_names, question_names = _names(self.needle), _names(self.question)
        keyed = "key" in needle_names and "key" in question_names
        depths = all(0 <= depth <= 1 for depth in self.depths)
        numbers = 10**many - 10 ** (few - 1) if 1 <= few <= many <= 15 else 0
        for field, good, allowed in (
            ("lengths", _distinct(self.lengths) and min(self.lengths) > 0, "different positive lengths"),
            ("depths", _distinct(self.depths) and depths, "different depths from 0 to 1"),
            ("samples_per_cell", self.samples_per_cell > 0, "1 and more"),
            ("needle", {"value"} <= needle_names <= {"key", "value"}, "a text with {value}, maybe {key}"),
            ("question", question_names <= needle_names - {"value"}, "{key} at most, if the needle has it"),
            ("distractors", self.distractors >= 0, "0 and more"),
            ("distractors", keyed or not self.distractors, "0 unless needle and question have a {key}"),
            ("keys", not keyed or _distinct(self.keys, needed), f"{needed} different ones and more"),
            ("values", not self.values or _distinct(self.values, needed), f"{needed} different ones and more"),
            ("digits", numbers >= needed, f"two numbers from 1 to 15 that make {needed} values and more"),
        ):  # fmt: skip
            if not good:
                raise UserError(f"niah.{field}: {getattr(self, field)!r}; allowed: {allowed}")


def _names(template: str) -> set[str]:
    """What a template names in braces."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _distinct(items: Sequence, at_least: int = 1) -> bool:
    return len(set(items)) == len(items) >= at_least


class Prompt(NamedTuple):
    """One question: the tokens of prompt and answer, the last `answer_length` of them being the answer."""

    length: int
    depth: float
    tokens: np.ndarray  # int32 [length]
    answer_length: int
    text: str  # of the prompt
    needle: str
    answer: str


def evaluate(
    task: NiahTask,
    config: LlamaConfig,
    params,
    tokenizer,
    texts: Sequence[str],
    *,
    seed: int = 0,
    fast: bool = False,
    batch_size: int = 1,
    prefill_chunk: int = PREFILL_CHUNK,
    kept=None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Asks every prompt of the task.

    Args:
      tokenizer: has `encode`, `encode_with_offsets`, `decode` and `bos_id` of `lrjax.data.tokenizers`.
      texts: the haystack; put in random order and repeated as the length needs it.
      fast: judge by one forward pass over prompt and answer instead of generating through the cache.
      batch_size: prompts of one length that are worked on together.
      prefill_chunk: tokens read at a time when `fast` is off.
      kept: jsonl of what the model said to every prompt, written as it goes; a prompt that is there is not asked
        again. It is of one model: to ask another one, name another file or remove it.
      progress: called with (prompts done, prompts in all) after every batch.

    Returns:
      {"accuracy": {length: share}, "interval": {length: [low, high]} (95 %, Wilson), "overall",
      "overall_interval", "nll": {length: nats}, "cells": [{"length", "depth", "correct", "count", "nll"}],
      "samples": [{"length", "depth", "needle", "prompt", "expected", "generated", "nll"}] (three), "template",
      "seed", "tokens", "bos" (`add_bos`)}: ready for JSON, lengths as text. nll is a mean over the answers' tokens.
      A sample's "generated" goes as far as the answer; with `fast`, what follows a wrong token is conditioned
      on the right one.

    Raises:
      UserError: no text, a length too short for needle and question, a question whose tokens change when the
        answer is put after it, a token id beyond the vocabulary, a `kept` that is broken or of other prompts.
    """
    total = len(task.lengths) * len(task.depths) * task.samples_per_cell
    asked: list[tuple[Prompt, AnswerScore, np.ndarray]] = []
    judge = _judge_fast if fast else functools.partial(_judge, chunk=prefill_chunk)
    params = jax.tree.map(jax.numpy.asarray, params)
    said = _read_kept(kept) if kept else {}
    with appender(kept) as append:
        for length in task.lengths:
            prompts = make_prompts(task, tokenizer, tuple(texts), length, seed)
            check_tokens(config, [p.tokens for p in prompts], f"niah length {length}, prompt")
            width = max(prompt.answer_length for prompt in prompts)
            places = [_place(prompt) for prompt in prompts]
            if strange := [at for at in said if at[0] == length and at not in {*places}]:
                raise UserError(
                    f"{kept}: answers to other prompts of {length} tokens than are asked now ({len(strange)}); "
                    "remove the file"
                )
            missing = [p for p, at in zip(prompts, places, strict=True) if at not in said]
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                # The last batch is filled up: every batch has the shape that is compiled already.
                short = min(batch_size, len(prompts)) - len(batch)
                answers = judge(config, params, [*batch, *batch[:1] * short], width)
                for prompt, answer in zip(batch, answers, strict=False):
                    said[_place(prompt)] = answer
                    append(_kept_row(prompt, *answer))
                if progress:
                    progress(len(asked) + len(prompts) - len(missing) + start + len(batch), total)
            asked += [(p, *said[at]) for p, at in zip(prompts, places, strict=True)]
    return _summary(task, asked, tokenizer, seed)


def _place(prompt: Prompt) -> tuple[int, str]:
    """Length and a name that the prompt's tokens alone have."""
    return prompt.length, hashlib.blake2b(prompt.tokens.tobytes(), digest_size=8).hexdigest()


def _kept_row(prompt: Prompt, score: AnswerScore, generated) -> dict:
    length, name = _place(prompt)
    return {
        "length": length, "prompt": name, "depth": prompt.depth, "expected": prompt.answer,
        "nll": score.nll.tolist(), "argmax": score.argmax.tolist(), "generated": generated.tolist(),
    }  # fmt: skip


def _read_kept(path) -> dict[tuple[int, str], tuple[AnswerScore, np.ndarray]]:
    """(length, name) of every prompt that has been asked -> what the model said."""
    said = {}
    for number, row in read_appended(path):
        try:
            score = AnswerScore(np.float32(row["nll"]), np.int32(row["argmax"]))
            said[row["length"], row["prompt"]] = score, np.int32(row["generated"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {number}: not what a needle's answer is kept as"
            ) from error
    return said


@functools.lru_cache(maxsize=16)  # every checkpoint of a run is asked the same
def make_prompts(
    task: NiahTask, tokenizer, texts: tuple[str, ...], length: int, seed: int = 0
) -> list[Prompt]:
    """The prompts of one length, depth after depth; each depends on (seed, length, depth, sample) alone."""
    if task.add_bos and tokenizer.bos_id is None:
        raise UserError("niah.add_bos: True, but the tokenizer has no bos token; allowed: False")
    bos = [tokenizer.bos_id] if task.add_bos else []
    haystack = Haystack(texts, tokenizer)
    prompts = []
    for depth in task.depths:
        for sample in range(task.samples_per_cell):
            rng = np.random.default_rng([seed, length, round(depth * 1e6), sample])
            needles, question, answer = _facts(task, rng)
            text, tokens, answer_length = haystack.hide(
                needles, question, answer, length=length, depth=depth, rng=rng, bos=bos
            )
            prompts.append(Prompt(length, depth, tokens, answer_length, text, needles[0], answer))
    return prompts


def _facts(task: NiahTask, rng) -> tuple[list[str], str, str]:
    """(the needle and its distractors, the question, the answer as it stands after the question)."""
    count = task.distractors + 1
    keys = rng.choice(task.keys, count, replace=False).tolist() if task.keys else [""] * count
    values: list[str] = []
    if task.values:
        values = rng.choice(task.values, count, replace=False).tolist()
    while len(values) < count:
        digits = int(rng.integers(task.digits[0], task.digits[1] + 1))
        value = str(rng.integers(10 ** (digits - 1), 10**digits))
        values += [value] if value not in values else []
    needles = [task.needle.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    question = task.question.format(key=keys[0])
    return needles, question, values[0] if question[-1:].isspace() else " " + values[0]


def _judge(config, params, prompts, width, chunk) -> list[tuple[AnswerScore, np.ndarray]]:
    """For each prompt how the model rates the answer, and its own tokens, as many as the answer has."""
    questions = [prompt.tokens[: -prompt.answer_length] for prompt in prompts]
    filled = prefill(config, params, questions, room=width, chunk=chunk)
    scores = filled.score([prompt.tokens[-prompt.answer_length :] for prompt in prompts])
    generated = filled.generate(width)
    return [
        (score, row[: prompt.answer_length])
        for prompt, score, row in zip(prompts, scores, generated, strict=True)
    ]


def _judge_fast(config, params, prompts, width) -> list[tuple[AnswerScore, np.ndarray]]:
    """The same without the cache: all prompts have one length, and their answers stand at its end."""
    tokens_BL = np.stack([prompt.tokens for prompt in prompts])
    stats = _last_stats(config, width, params, tokens_BL)
    logprob_BA, argmax_BA = np.asarray(stats["logprob"]), np.asarray(stats["argmax"])
    answers = []
    for prompt, logprob_A, argmax_A in zip(prompts, logprob_BA, argmax_BA, strict=True):
        score = AnswerScore(-logprob_A[-prompt.answer_length :], argmax_A[-prompt.answer_length :])
        answers.append((score, score.argmax))
    return answers


@functools.partial(jax.jit, static_argnums=(0, 1))
def _last_stats(config, width, params, tokens_BL):
    """`token_stats` of the last `width` tokens."""
    x_BLD = Llama(config).apply({"params": params}, tokens_BL)
    return token_stats(params, x_BLD[:, -width - 1 : -1], tokens_BL[:, -width:])


def _summary(task, asked, tokenizer, seed) -> dict:
    def judged(length, depth=None):
        """(number right, number asked, mean NLL) of a length or a cell."""
        chosen = [
            (np.array_equal(generated, prompt.tokens[-prompt.answer_length :]), score.nll)
            for prompt, score, generated in asked
            if length in (None, prompt.length) and depth in (None, prompt.depth)
        ]
        nll = float(np.mean(np.concatenate([nll for _, nll in chosen]), dtype=np.float64))
        return sum(right for right, _ in chosen), len(chosen), nll

    by_length = {str(length): judged(length) for length in task.lengths}
    cells = []
    for length in task.lengths:
        for depth in task.depths:
            correct, count, nll = judged(length, depth)
            cell = {
                "length": length,
                "depth": depth,
                "correct": correct,
                "count": count,
                "nll": nll,
            }
            cells.append(cell)
    correct, count, _ = judged(None)
    shown = [asked[index] for index in sorted({0, len(asked) // 2, len(asked) - 1})]
    return {
        "accuracy": {length: right / n for length, (right, n, _) in by_length.items()},
        "interval": {
            length: wilson_interval(right, n) for length, (right, n, _) in by_length.items()
        },
        "overall": correct / count,
        "overall_interval": wilson_interval(correct, count),
        "nll": {length: nll for length, (_, _, nll) in by_length.items()},
        "cells": cells,
        "samples": [
            {
                "length": prompt.length,
                "depth": prompt.depth,
                "needle": prompt.needle,
                "prompt": prompt.text,
                "expected": prompt.answer,
                "generated": tokenizer.decode(generated),
                "nll": float(score.nll.mean()),
            }
            for prompt, score, generated in shown
        ],
        "template": {"needle": task.needle, "question": task.question},
        "seed": seed,
        "tokens": sum(prompt.length for prompt, _, _ in asked),
        "bos": task.add_bos,
    }
