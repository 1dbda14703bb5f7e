"""LooGLE (Li et al. 2024, arXiv 2311.04939) from local files: QA, summaries and clozes over documents of 20k words.

    task = make("longdep_qa", "/data/LooGLE-testdata", prompter, wording.loogle())

The files are the published NAME.jsonl: {"input", "qa_pairs" (a Python literal or "none"), "output", "title"}. Scored
are BLEU-1, BLEU-4, ROUGE-1, -2 and -L (recall, as published), METEOR and BERTScore where their data are given
(`metrics_with_data`); clozes by exact and partial match. The judgements by GPT-4 are left out.
"""

import ast
import functools
import pathlib
from collections.abc import Callable, Mapping

from lrjax.data.jsonl import read_jsonl
from lrjax.errors import UserError
from lrjax.evaluation import text_metrics as metrics
from lrjax.evaluation.questions import Task
from lrjax.evaluation.samples import Prompter, Sample

SUBSETS = ("shortdep_qa", "longdep_qa", "longdep_summarization", "shortdep_cloze")
_WHERE = (
    "github.com/bigai-nlco/LooGLE (LooGLE-testdata) or huggingface.co/datasets/bigainlco/LooGLE"
)


def make(
    name: str,
    folder,
    prompter: Prompter,
    wording: Mapping,
    *,
    count: int = 0,
    metrics_with_data: Mapping[str, Callable[[str, str], float]] | None = None,
) -> Task:
    """The questions of a subset, several to a document; too long a prompt is cut in the middle.

    Args:
      metrics_with_data: name -> metric of (answer, reference) to score by as well, not of clozes.

    Raises:
      UserError: an unknown subset, no file, a row without what is needed (file and line number).
    """
    if name not in SUBSETS:
        raise UserError(f"loogle: unknown subset {name!r}; allowed: {', '.join(SUBSETS)}")
    if not folder:
        raise UserError(f"loogle {name}: --loogle_dir= is missing; {name}.jsonl is at {_WHERE}")
    path = pathlib.Path(folder) / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"loogle: {path} is not there; it is at {_WHERE}")
    template = wording["prompts"][name]
    cloze = name == "shortdep_cloze"
    samples: list[Sample] = []
    for number, row in read_jsonl(path):
        try:
            asked = _questions(row)
            for question, answer in asked:
                text = template.format(input=row["input"], Q=question)
                extra = {"masks": answer, "weight": len(answer)} if cloze else {}
                samples.append(Sample(len(samples), text, "", (str(answer),), extra=extra))
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise UserError(f"{path}, line {number}: not a row of LooGLE: {error!r}") from error
    more = {
        "bleu_1": functools.partial(_against, functools.partial(metrics.bleu, n=1)),
        "bleu_4": functools.partial(_against, functools.partial(metrics.bleu, n=4)),
        "rouge_1": functools.partial(_against, functools.partial(metrics.rouge_n, n=1, part="r")),
        "rouge_2": functools.partial(_against, functools.partial(metrics.rouge_n, n=2, part="r")),
    }
    for each, metric in (metrics_with_data or {}).items():
        more[each] = functools.partial(_against_lines, metric)
    return Task(
        name=name,
        samples=samples[: count or None],
        max_new_tokens=int(wording["max_new_tokens"][name]),
        score=_exact_match if cloze else functools.partial(_against, functools.partial(metrics.rouge_l, part="r")),
        more={"partial_match": _partial_match} if cloze else more,
        about={
            "benchmark": "loogle", "template": template, "wording": wording["source"], "file": path.name,
            "of": sum(s.extra.get("weight", 1) for s in samples), "seed": None,
            "metric": "exact match of masks" if cloze else "ROUGE-L recall",
        },
        cut=True,
    )  # fmt: skip


def _questions(row: dict) -> list[tuple[str, object]]:
    if row["qa_pairs"] == "none":
        return [("", row["output"])]
    pairs = row["qa_pairs"]
    pairs = ast.literal_eval(pairs) if isinstance(pairs, str) else pairs
    return [(pair["Q"], pair["A"]) for pair in pairs]


def _against(metric, answer: str, sample: Sample) -> float:
    return metric(answer.replace("\n", " "), sample.outputs[0].replace("\n", " "))


def _against_lines(metric, answer: str, sample: Sample) -> float:
    return metric(answer, sample.outputs[0])


def _masks(answer: str) -> dict:
    """The answer as a dict of masks; what is none scores as an empty one."""
    try:
        found = ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _exact_match(answer: str, sample: Sample) -> float:
    given, wanted = _masks(answer), sample.extra["masks"]
    return sum(given.get(mask) == entity for mask, entity in wanted.items()) / len(wanted)


def _partial_match(answer: str, sample: Sample) -> float:
    """A mask counts when it shares a word with the right one."""
    given, wanted = _masks(answer), sample.extra["masks"]
    return sum(
        bool({*str(given.get(mask, "")).split()} & {*entity.split()})
        for mask, entity in wanted.items()
    ) / len(wanted)
