"""LongBench (Bai et al. 2024, arXiv 2308.14508): 21 subsets and the 13 of LongBench-E, from local files.

    task = make("hotpotqa", "/data/LongBench/data", prompter, wording.longbench())
    result = ask(task, answer, prompter, limit=8192)          # too long a prompt is cut in the middle, and counted

The files are those of the published data.zip: NAME.jsonl and NAME_e.jsonl, rows {"input", "context", "answers",
"length", "all_classes", ...}.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from lrjax.data.jsonl import read_jsonl
from lrjax.errors import UserError
from lrjax.evaluation import text_metrics as metrics
from lrjax.evaluation.questions import Task
from lrjax.evaluation.samples import Prompter, Sample

# Subset -> (metric, category of the paper's tables)
SUBSETS = {
    "narrativeqa": (metrics.qa_f1, "single-document QA"),
    "qasper": (metrics.qa_f1, "single-document QA"),
    "multifieldqa_en": (metrics.qa_f1, "single-document QA"),
    "multifieldqa_zh": (metrics.qa_f1_zh, "single-document QA"),
    "hotpotqa": (metrics.qa_f1, "multi-document QA"),
    "2wikimqa": (metrics.qa_f1, "multi-document QA"),
    "musique": (metrics.qa_f1, "multi-document QA"),
    "dureader": (metrics.rouge_l_zh, "multi-document QA"),
    "gov_report": (metrics.rouge_l, "summarization"),
    "qmsum": (metrics.rouge_l, "summarization"),
    "multi_news": (metrics.rouge_l, "summarization"),
    "vcsum": (metrics.rouge_l_zh, "summarization"),
    "trec": (metrics.classification, "few-shot"),
    "triviaqa": (metrics.qa_f1, "few-shot"),
    "samsum": (metrics.rouge_l, "few-shot"),
    "lsht": (metrics.classification, "few-shot"),
    "passage_count": (metrics.counting, "synthetic"),
    "passage_retrieval_en": (metrics.retrieval(r"Paragraph (\d+)"), "synthetic"),
    "passage_retrieval_zh": (metrics.retrieval(r"段落(\d+)"), "synthetic"),
    "lcc": (metrics.code_similarity, "code"),
    "repobench-p": (metrics.code_similarity, "code"),
}
SUBSETS_E = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa",
    "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # only the answer's first line is scored
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")  # asked without a chat template, as published
BUCKETS = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, float("inf"))}  # words, of E


def make(
    name: str, folder, prompter: Prompter, wording: Mapping, *, count: int = 0, e: bool = False
) -> Task:
    """The questions of a subset.

    Args:
      folder: where NAME.jsonl (or NAME_e.jsonl) lies.
      wording: of `wording.longbench`.
      count: only the first so many; 0: all.
      e: LongBench-E.

    Raises:
      UserError: an unknown subset, no file, a row without what is needed (file and line number).
    """
    allowed = SUBSETS_E if e else tuple(SUBSETS)
    if name not in allowed:
        raise UserError(
            f"longbench{'_e' if e else ''}: unknown subset {name!r}; allowed: {', '.join(allowed)}"
        )
    if not folder:
        raise UserError(
            f"longbench {name}: --longbench_dir= is missing; allowed: the folder with {name}.jsonl of data.zip "
            "from huggingface.co/datasets/THUDM/LongBench"
        )
    path = pathlib.Path(folder) / f"{name}{'_e' if e else ''}.jsonl"
    if not path.is_file():
        raise UserError(
            f"longbench: {path} is not there; it is in data.zip of huggingface.co/datasets/THUDM/LongBench"
        )
    template = wording["prompts"][name]
    budget = int(wording["max_new_tokens"][name])
    samples = []
    for number, row in read_jsonl(path):
        for field, kind in (("input", str), ("context", str), ("answers", list)):
            if not isinstance(row.get(field), kind):
                raise UserError(
                    f"{path}, line {number}: {field!r} has to be there, as {kind.__name__}"
                )
        text = template.format(input=row["input"], context=row["context"])
        extra = {"words": row.get("length", 0), "classes": row.get("all_classes") or []}
        samples.append(Sample(len(samples), text, "", tuple(map(str, row["answers"])), extra=extra))
    if not samples:
        raise UserError(f"{path}: there is no row")
    return Task(
        name=name + ("_e" if e else ""),
        samples=samples[: count or None],
        max_new_tokens=budget,
        score=functools.partial(_score, name),
        about={
            "benchmark": "longbench_e" if e else "longbench", "template": template, "wording": wording["source"],
            "file": path.name, "of": len(samples), "seed": None,
        },
        groups=_buckets if e else None,
        cut=True,
        chat=name not in NO_CHAT,
    )  # fmt: skip


def _score(name: str, answer: str, sample: Sample) -> float:
    """The best score over the references."""
    metric, _ = SUBSETS[name]
    if name in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    if metric is metrics.classification:
        metric = functools.partial(metric, classes=sample.extra["classes"])
    return max((metric(answer, reference) for reference in sample.outputs), default=0.0)


def _buckets(sample: Sample) -> str:
    """The length bucket of LongBench-E that a sample is in."""
    return next(
        name for name, (low, high) in BUCKETS.items() if low <= sample.extra["words"] < high
    )


def averages(scores: Mapping[str, float], names: Sequence[str] = tuple(SUBSETS)) -> dict:
    """{"mean" over all the subsets (LongRecipe's figure), "categories": {name: mean}, "category_mean"}.

    `category_mean`, the mean over the six categories, is LongBench's own. Empty unless every subset is there.
    """
    if not set(names) <= set(scores):
        return {}
    categories: dict[str, list[float]] = {}
    for name in names:
        categories.setdefault(SUBSETS[name][1], []).append(scores[name])
    means = {name: float(np.mean(values)) for name, values in categories.items()}
    return {
        "mean": float(np.mean([scores[name] for name in names])),
        "categories": means,
        "category_mean": float(np.mean(list(means.values()))),
    }
