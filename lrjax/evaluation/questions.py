"""Asks a model the questions of a task and writes down what it said: resumable by sample, scored, summed up.

    result = ask(task, answer, prompter, limit=8192, predictions="out/niah_single_1.jsonl")
    result["score"], result["interval"], result["count"], result["samples"]

`answer` is anything that continues prompts: `lrjax_answerer(config, params, tokenizer)`, or a function that a test
gives. Every answer is appended to the predictions file as it comes, in the format of RULER's; the same call after a
stop asks only what is not there yet.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging

from lrjax.data.jsonl import appender, read_appended
from lrjax.data.loader import stable_hash
from lrjax.errors import UserError
from lrjax.evaluation.reader import answers
from lrjax.evaluation.samples import Prompter, Sample
from lrjax.evaluation.statistics import t_interval, wilson_interval

SHOWN = 3  # samples that a result holds in full


@dataclasses.dataclass(frozen=True)
class Task:
    """Samples of one kind and how their answers are scored, from 0 to 1."""

    name: str
    samples: Sequence[Sample]
    max_new_tokens: int
    score: Callable[[str, Sample], float]
    about: Mapping  # goes into the result: benchmark, length, seed, template, wording
    stop: tuple[str, ...] = ()  # an answer ends before the first of these
    more: Mapping[str, Callable[[str, Sample], float]] = dataclasses.field(
        default_factory=dict
    )  # other scores
    groups: Callable[[Sample], str] | None = None  # scores are also given for each group
    # Too long a prompt is cut in the middle, as the benchmark does, and counted; otherwise it is an error.
    cut: bool = False
    chat: bool = True  # whether the chat template, if one is used, is used here, too


# Continues prompts: (token ids, max_new_tokens, stop strings) -> (index, text) of each, in any order.
Answerer = Callable[[Sequence[np.ndarray], int, Sequence[str]], Iterable[tuple[int, str]]]


def lrjax_answerer(
    config, params, tokenizer, *, batch_size: int = 1, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Answerer:  # fmt: skip
    """A model as `ask` takes it: answers end at one of the checkpoint's end tokens or a stop string.

    Where they are drawn (`temperature` above 0), seed and prompt make the key: up to rounding it does not matter what
    else is asked, and equal prompts draw alike.
    """

    def keys(prompts):
        hashes = [stable_hash(seed, np.asarray(prompt).tolist()) % 2**32 for prompt in prompts]
        return jax.vmap(jax.random.key)(np.array(hashes, np.uint32))

    def answer(prompts, max_new_tokens, stop):
        def stopped(ids):
            text = tokenizer.decode(ids)
            return any(word in text for word in stop)

        rows = answers(
            config, params, prompts, max_new_tokens, batch_size=batch_size, temperature=temperature,
            top_p=top_p, eos_id=tokenizer.end_ids or None, stop=stopped if stop else None,
            rng=keys(prompts) if temperature and len(prompts) else None,
        )  # fmt: skip
        for index, row in rows:
            if len(row) and row[-1] in tokenizer.end_ids:
                row = row[:-1]
            yield index, before_stop(tokenizer.decode(row), stop)

    return answer


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string."""
    found = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(found)] if found else text


def ask(
    task: Task,
    answer: Answerer,
    prompter: Prompter,
    *,
    limit: int | None = None,
    predictions=None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Asks every question that has no answer yet and sums up.

    Args:
      limit: most tokens of prompt and budget that the model takes.
      predictions: jsonl of the answers; None keeps them in memory. They are of one model and one way of asking: of
        those the caller keeps watch, here only prompts and references are compared.
      progress: called with (answers there, questions).

    Returns:
      {"task", "score" (0 to 100), "interval" (95 %, Wilson), "count", "empty" (answers without text), "cut" (prompts
      cut in the middle), "tokens" (of the prompts), "max_new_tokens", "limit", "chat_template", "samples": [{"prompt"
      (as the model got it), "cut", "answer", "outputs", "score"}] and what the task says about itself}.

    Raises:
      UserError: a prompt with its budget over the limit in a task that does not cut; a predictions file of other
        samples, or with a broken line.
    """
    asker = prompter if task.chat else dataclasses.replace(prompter, chat=False)
    prompts, texts, inputs, cut = {}, {}, {}, set()
    for sample in task.samples:
        asked, tokens = sample, asker.tokens(sample)
        if limit is not None and len(tokens) + task.max_new_tokens > limit:
            if not task.cut:
                raise UserError(
                    f"{task.name}: sample {sample.index} has {len(tokens)} tokens and a budget of "
                    f"{task.max_new_tokens}; the limit is {limit}"
                )
            asked, tokens = cut_middle(sample, asker, limit - task.max_new_tokens)
            cut.add(sample.index)
        prompts[sample.index], texts[sample.index] = tokens, asker.text(asked)
        inputs[sample.index] = asked.input
    if len(prompts) < len(task.samples):
        raise UserError(f"{task.name}: two samples have the same index")

    done = _read_done(predictions, task, inputs) if predictions else {}
    missing = [sample for sample in task.samples if sample.index not in done]
    if done:
        logging.info("%s: %d of %d answers are there", task.name, len(done), len(task.samples))
    with appender(predictions) as append:
        given = answer([prompts[s.index] for s in missing], task.max_new_tokens, task.stop)
        for place, text in given:
            sample = missing[place]
            done[sample.index] = text
            append(
                {
                    "index": sample.index, "pred": text, "input": texts[sample.index],
                    "outputs": list(sample.outputs), "others": sample.extra.get("others", {}),
                    "truncation": int(sample.index in cut) or -1, "length": sample.length,
                }
            )  # fmt: skip
            if progress:
                progress(len(done), len(task.samples))
    about = {
        "tokens": sum(map(len, prompts.values())), "limit": limit, "chat_template": asker.template,
    }  # fmt: skip
    return summed_up(task, done, texts, cut) | about


def summed_up(
    task, done: Mapping[int, str], texts: Mapping[int, str], cut: Collection[int]
) -> dict:
    """The result of `ask` out of answers and prompts by index, but for what it says of the asking."""
    samples = task.samples
    scores = {s.index: task.score(done[s.index], s) for s in samples}
    weights = {s.index: s.extra.get("weight", 1) for s in samples}

    def mean(values: Mapping[int, float]) -> float:
        return sum(values[i] * weights[i] for i in values) / sum(weights[i] for i in values)

    count = len(samples)
    total = mean(scores) * count
    result = {
        "task": task.name,
        "score": 100 * mean(scores),
        # For scores between 0 and 1 the interval is wider than need be, never narrower.
        "interval": [100 * end for end in wilson_interval(total, count)],
        "count": count,
        "empty": sum(not done[sample.index].strip() for sample in samples),
        "cut": len(cut),
        "max_new_tokens": task.max_new_tokens,
        "stop": list(task.stop),
        **task.about,
    }
    if not any("weight" in sample.extra for sample in samples):
        result["scores"] = [scores[sample.index] for sample in samples]
        result["questions"] = f"{stable_hash([(s.input, s.outputs) for s in samples]) % 2**64:016x}"
    if task.more:
        result["more"] = {
            name: 100 * mean({s.index: score(done[s.index], s) for s in samples})
            for name, score in task.more.items()
        }
    if task.groups:
        members: dict[str, list[int]] = {}
        for sample in samples:
            members.setdefault(task.groups(sample), []).append(sample.index)
        result["groups"] = {
            name: {
                "score": 100 * mean({i: scores[i] for i in indices}),
                "interval": [100 * e for e in wilson_interval(sum(scores[i] for i in indices), len(indices))],
                "count": len(indices),
            }
            for name, indices in members.items()
        }  # fmt: skip
    return result | {
        "samples": [
            {
                "prompt": texts[sample.index], "cut": sample.index in cut, "answer": done[sample.index],
                "outputs": list(sample.outputs), "score": scores[sample.index],
            }
            for sample in samples[:SHOWN]
        ],
    }  # fmt: skip


def difference(result: Mapping, first: Mapping) -> dict | None:
    """How much better a checkpoint does than a first one on the same questions, in points.

    Pairs of answers differ less by chance than two scores do: both models have had the easy and the hard questions.

    Returns:
      {"mean", "interval": Student's 95 % interval of the mean of the questions' differences}; None where other
      questions were asked, one alone, or such with weights. The interval is None where all differences are the same:
      they do not say how far apart others would be.
    """
    same = "scores" in result and result.get("questions") == first.get("questions")
    if not same or result["count"] < 2:
        return None
    mean, interval = t_interval(100 * (np.array(result["scores"]) - np.array(first["scores"])))
    return {"mean": mean, "interval": None if interval[0] == interval[1] else list(interval)}


def cut_middle(sample: Sample, prompter: Prompter, room: int) -> tuple[Sample, np.ndarray]:
    """The sample with the middle of its input left out, and its prompt of `room` tokens at most.

    As LongBench does it: the first and the last half of the room, as text, then in the chat template.
    """
    tokenizer = prompter.tokenizer
    ids = tokenizer.encode(sample.input)
    frame = len(prompter.tokens(sample)) - len(ids)
    half = (room - frame) // 2
    while half > 0:
        text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[len(ids) - half :])
        shorter = sample._replace(input=text)
        tokens = prompter.tokens(shorter)
        if len(tokens) <= room:
            return shorter, tokens
        half -= 1  # the seam may take a token more than the two halves
    raise UserError(f"sample {sample.index}: {room} tokens are fewer than what is around its text")


def _read_done(path, task: Task, inputs: Mapping[int, str]) -> dict[int, str]:
    """Answers that are there: {index: text}."""
    known = {sample.index: sample for sample in task.samples}
    done = {}
    for number, row in read_appended(path):
        sample = known.get(row.get("index"))
        same = sample is not None and list(sample.outputs) == row.get("outputs")
        # Not the whole prompt: a chat template may hold the date, and may take off white space at the ends.
        if not same or inputs[sample.index].strip() not in row.get("input", ""):
            raise UserError(
                f"{path}, line {number}: an answer to another question than {task.name} asks now; "
                "remove the file or choose another --out"
            )
        done[row["index"]] = str(row.get("pred", ""))
    return done


def progress_log(name: str) -> Callable[[int, int], None]:
    """Logs how far a task is, every 20 seconds at most."""

    def progress(done, total):
        logging.log_every_n_seconds(logging.INFO, "%s: %d of %d answers", 20, name, done, total)

    return progress


def rows_of(task: Task) -> Iterator[dict]:
    """The samples as lines of RULER's jsonl."""
    return (sample.row() for sample in task.samples)
