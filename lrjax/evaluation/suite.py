"""Every task that is asked by its name and length: what the command and the recipe share.

    suite = Suite(Options(tasks=("ruler",), lengths=(4096,), samples=5), prompter)
    for task in suite.tasks(): ...                        # questions.Task, in order

Names: those of RULER's tasks, LongBench's and LooGLE's subsets, niah, passkey, number, and the groups of `GROUPS`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from absl import logging

from lrjax.data import pypi_texts
from lrjax.errors import UserError
from lrjax.evaluation import (
    depths,
    humaneval,
    longbench,
    loogle,
    metrics_with_data,
    readings,
    ruler,
    ruler_tasks,
    wording,
)
from lrjax.evaluation.questions import Task
from lrjax.evaluation.ruler_material import Material
from lrjax.evaluation.samples import Prompter, Sample
from lrjax.evaluation.statistics import wilson_interval

GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(ruler.TASKS),
    "niah_m": tuple(name for kind in ruler.NIAH_M for name in kind),
    "longbench": tuple(f"longbench:{name}" for name in longbench.SUBSETS),
    "longbench_e": tuple(f"longbench_e:{name}" for name in longbench.SUBSETS_E),
    "loogle": tuple(f"loogle:{name}" for name in loogle.SUBSETS),
    "needles": depths.KINDS,
}
MEASURED = 100  # samples of a task that is made to a length, unless a number is given
NEEDLES = len(ruler_tasks.DEPTHS)  # that fit one haystack
NAMES = tuple(
    dict.fromkeys(
        [
            *GROUPS,
            *(name for names in GROUPS.values() for name in names),
            "niah_custom",
            "humaneval",
            *readings.NAMES,
        ]
    )
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked. Raises `UserError` for an unknown task (with the list) or values that make no sense."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = ()  # tokens, for the tasks that are made to measure
    # Of each task and length (needles: of each depth), of benchmarks from files the first so many; 0: 100, and all of
    # the files.
    samples: int = 0
    seed: int = 42
    depths: tuple[float, ...] = depths.DEPTHS
    together: bool = False  # the needles of all depths in one haystack
    num_keys: int = 1  # of niah_custom
    num_values: int = 1
    num_queries: int = 1
    ruler_dir: str = ""  # a checkout of RULER: its wording and word lists
    squad: str = ""
    hotpotqa: str = ""
    longbench_dir: str = ""  # NAME.jsonl
    longbench_wording: str = ""  # a checkout of LongBench
    loogle_dir: str = ""
    loogle_wording: str = ""
    nltk_data: str = ""  # of LooGLE: a folder with corpora/wordnet, for METEOR
    bertscore_model: str = ""  # of LooGLE: a Hugging Face model, for BERTScore
    bertscore_layer: int = 17  # of that model; roberta-large's, as published
    humaneval: str = ""  # HumanEval.jsonl
    run_code: bool = False  # whether programs of the model may be run (evaluation/sandbox.py)

    def __post_init__(self):
        for name in self.tasks:
            if name not in NAMES:
                raise UserError(f"tasks: unknown task {name!r}; allowed: {', '.join(NAMES)}")
        if not self.tasks:
            raise UserError(f"tasks: none; allowed: {', '.join(NAMES)}")
        if self.samples < 0:
            raise UserError(
                f"samples: {self.samples}; allowed: 1 and more, or 0: {MEASURED}, and all of a benchmark from files"
            )
        counts = self.num_keys, self.num_values, self.num_queries
        if min(counts) < 1 or max(self.num_keys, self.num_queries) * self.num_values > NEEDLES:
            raise UserError(
                f"num_keys, num_values, num_queries: {counts}; allowed: 1 and more, the larger of keys and queries "
                f"times values at most {NEEDLES}"
            )
        if any(length < 1 for length in self.lengths):
            raise UserError(f"lengths: {self.lengths}; allowed: 1 token and more")
        measured = [name for name in self.names() if is_measured(name)] + self.readings()
        if measured and not self.lengths:
            raise UserError(f"lengths: none; {measured[0]} needs one and more")

    @property
    def measured(self) -> int:
        """Samples of a task that is made to a length."""
        return self.samples or MEASURED

    def names(self) -> list[str]:
        """The tasks with the groups written out, each once."""
        return list(
            dict.fromkeys(name for task in self.tasks for name in GROUPS.get(task, (task,)))
        )

    def pairs(self) -> list[tuple[str, int | None]]:
        """(task, length) of what is asked, in order; length None for benchmarks from files."""
        return [
            (name, length)
            for length in (*self.lengths, None)
            for name in self.names()
            if is_measured(name) == (length is not None) and name not in readings.NAMES
        ]

    def readings(self) -> list[str]:
        """What is not asked but read: perplexity, longppl (`evaluation/readings.py`)."""
        return [name for name in self.tasks if name in readings.NAMES]


def is_measured(name: str) -> bool:
    """Whether a task is made to a length, or comes from a file with the lengths it has."""
    return ":" not in name and name not in ("humaneval", *readings.NAMES)


class Suite:
    """Makes the tasks of some options for a tokenizer; each is made when it is asked for."""

    def __init__(self, options: Options, prompter: Prompter):
        self.options, self._prompter = options, prompter
        data = {"squad": options.squad, "hotpotqa": options.hotpotqa}
        for task, dataset in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
            # All of RULER can be had without its question files; naming qa_1 itself asks for them.
            if "ruler" in options.tasks and task not in options.tasks and not data[dataset]:
                logging.warning(
                    "ruler %s: --%s= is not given; asked are invented questions in its place, and no mean over the "
                    "13 tasks is made", task, dataset,
                )  # fmt: skip
                data[dataset] = "sample"
        self._material = Material(
            pypi_texts.essays, options.ruler_dir, data["squad"] or None, data["hotpotqa"] or None
        )
        self._wording: dict[str, Mapping] = {}
        self._metrics_with_data = {}
        if any(name.startswith("loogle:") for name in options.names()):
            if options.nltk_data:
                self._metrics_with_data["meteor"] = metrics_with_data.meteor(options.nltk_data)
            if model := options.bertscore_model:
                metric = metrics_with_data.bert_score(model, options.bertscore_layer)
                self._metrics_with_data["bert_score"] = metric

    def tasks(self) -> Iterator[Task]:
        for name, length in self.options.pairs():
            yield self.make(name, length)

    def make(self, name: str, length: int | None) -> Task:
        """One task; see `ruler.make`, `depths.make`, `longbench.make`, `loogle.make` for what may go wrong."""
        o = self.options
        if name in depths.KINDS:
            return depths.make(
                name, length, self._prompter, pypi_texts.essays(), count=o.measured, depths=o.depths,
                together=o.together, seed=o.seed,
            )  # fmt: skip
        benchmark, _, subset = name.partition(":")
        if benchmark in ("longbench", "longbench_e"):
            words = self._words("longbench", wording.longbench, o.longbench_wording)
            return longbench.make(
                subset,
                o.longbench_dir,
                self._prompter,
                words,
                count=o.samples,
                e=benchmark == "longbench_e",
            )
        if benchmark == "loogle":
            words = self._words("loogle", wording.loogle, o.loogle_wording)
            return loogle.make(
                subset, o.loogle_dir, self._prompter, words,
                count=o.samples, metrics_with_data=self._metrics_with_data,
            )  # fmt: skip
        if name == "humaneval":
            return humaneval.make(o.humaneval, run_code=o.run_code, count=o.samples)
        params = None
        if name == "niah_custom":
            params = {
                "num_needle_k": o.num_keys, "num_needle_v": o.num_values, "num_needle_q": o.num_queries,
            }  # fmt: skip
            name = "niah_single_2"
        words = self._words("ruler", wording.ruler, o.ruler_dir)
        return ruler.make(
            name,
            length,
            self._prompter,
            self._material,
            words,
            count=o.measured,
            seed=o.seed,
            params=params,
        )

    def _words(self, benchmark, read, checkout) -> Mapping:
        if benchmark not in self._wording:
            self._wording[benchmark] = read(checkout)
        return self._wording[benchmark]


def summary(results: Mapping[str, Mapping[str, Mapping]]) -> dict:
    """{task: {length: score}} and the benchmarks' means, of {task: {length: result of questions.ask}}.

    A length is text; benchmarks from files have "all". The mean of RULER is made of the real question files only, those
    of the others of whole files.
    """
    figures = {
        task: {length: result["score"] for length, result in by_length.items()}
        for task, by_length in results.items()
    }
    lengths = list(dict.fromkeys(length for by_length in figures.values() for length in by_length))
    for length in lengths:
        at = {
            task: by_length[length]
            for task, by_length in results.items()
            if length in by_length
            and not (invented(by_length[length]) or partial(by_length[length]))
        }
        scores = {task: result["score"] for task, result in at.items()}
        for name, value in ruler.averages(scores).items():
            figures.setdefault(name, {})[length] = value
        for benchmark, names in (
            ("longbench", tuple(longbench.SUBSETS)),
            ("longbench_e", longbench.SUBSETS_E),
        ):
            own = {
                name: scores[f"{benchmark}:{name}"]
                for name in names
                if f"{benchmark}:{name}" in scores
            }
            for part, value in longbench.averages(own, names).items():
                if isinstance(value, float):
                    figures.setdefault(f"{benchmark} {part}".replace(" mean", ""), {})[length] = (
                        value
                    )
    return figures


def invented(result: Mapping) -> bool:
    """Whether the questions are of `qa_sample`, not of the data set that the task is known for."""
    sources = result.get("sources", {})
    dataset = result.get("parameters", {}).get("dataset")
    return dataset is not None and sources.get(dataset, "").startswith("invented")


def partial(result: Mapping) -> bool:
    """Whether only the first questions of a file were asked."""
    return result["count"] < result.get("of", 0)


def best_limit(task: Task, window: int, limit: int | None) -> int:
    """Most tokens of prompt and budget: what is asked for, else the task's own length or the model's window."""
    return limit or task.about.get("length") or window


def score_rows(name: str, rows: Iterable[tuple[int, Mapping]], path) -> dict:
    """Scores answers in RULER's format, {"pred", "outputs"} a line, whoever wrote them.

    Args:
      rows: (line number, row).
      path: for the message.

    Raises:
      UserError: a task that is none of RULER's, a row without pred or outputs, no row.
    """
    if name not in ruler.TASKS:
        raise UserError(f"score_only: {name!r}; allowed: {', '.join(ruler.TASKS)}")
    metric = ruler.string_match_part if name.startswith("qa") else ruler.string_match_all
    scores = []
    for number, row in rows:
        if not isinstance(row.get("pred"), str) or not isinstance(row.get("outputs"), list):
            raise UserError(f"{path}, line {number}: 'pred' and 'outputs' have to be there")
        scores.append(metric(row["pred"], Sample(number, "", "", tuple(row["outputs"]))))
    if not scores:
        raise UserError(f"{path}: there is no answer")
    return {
        "score": 100 * sum(scores) / len(scores),
        "interval": [100 * end for end in wilson_interval(sum(scores), len(scores))],
        "count": len(scores),
    }
