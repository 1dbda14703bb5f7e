"""HumanEval (Chen et al. 2021, arXiv 2107.03374) from its local file: functions to write, and run against their tests.

    task = make("HumanEval.jsonl", prompter, run_code=True)

Programs that a model wrote are run, in `lrjax.evaluation.sandbox`, only where `run_code` says so.
"""

import pathlib

from lrjax.data.jsonl import read_jsonl
from lrjax.errors import UserError
from lrjax.evaluation import sandbox
from lrjax.evaluation.questions import Task
from lrjax.evaluation.samples import Sample

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_NEW_TOKENS = 512


def make(path, *, run_code: bool, count: int = 0) -> Task:
    """The problems of HumanEval.jsonl; scored is pass@1.

    Raises:
      UserError: code may not be run, no file, a row without what is needed (file and line number).
    """
    if not run_code:
        raise UserError("humaneval runs programs that the model wrote; allowed: with --run_code")
    if not path:
        raise UserError(
            "humaneval: --humaneval= is missing; the file is HumanEval.jsonl from github.com/openai/human-eval"
        )
    sandbox.check_available()
    if pathlib.Path(path).suffix == ".gz":
        raise UserError(f"{path}: is compressed; allowed: unpacked (gunzip)")
    samples = []
    for number, row in read_jsonl(path):
        for field in ("prompt", "test", "entry_point", "canonical_solution"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{path}, line {number}: {field!r} has to be there, as text")
        tests = f"{row['test']}\ncheck({row['entry_point']})\n"
        samples.append(
            Sample(
                len(samples),
                row["prompt"],
                "",
                (row["canonical_solution"],),
                extra={"tests": tests},
            )
        )
    return Task(
        name="humaneval",
        samples=samples[: count or None],
        max_new_tokens=MAX_NEW_TOKENS,
        score=passes,
        about={
            "benchmark": "humaneval", "file": pathlib.Path(path).name, "of": len(samples), "seed": None,
            "template": "the prompt",
        },
        stop=STOP,
        chat=False,
    )  # fmt: skip


def passes(answer: str, sample: Sample) -> float:
    """1 if the prompt with the answer passes the problem's tests."""
    return float(sandbox.run_program(f"{sample.input}{answer}\n\n{sample.extra['tests']}"))
