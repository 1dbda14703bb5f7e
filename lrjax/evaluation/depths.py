"""A needle at every depth of a haystack of essays, for a heat map of lengths by depths.

    task = make("passkey", 8192, prompter, essays, count=1, depths=DEPTHS)
    result = ask(task, answer, prompter); result["cells"] = cells(result_rows)

Kinds: "niah" (a fact about a city), "passkey" (a number of five digits) and "number" (seven digits under a key).
A sample's prompts differ in nothing but the needle's place, so what stands before it is read once for all of them.
`together` puts the needles of all depths, each with its own key, into one haystack and asks for them one by one: the
document is read once.

The haystack and the map follow G. Kamradt's test (github.com/gkamradt/LLMTest_NeedleInAHaystack): the same essays,
needles between sentences; answers are scored by the text, not by a judge.
"""

import random
from collections.abc import Sequence

import numpy as np

from lrjax.data.sentences import sentence_spans
from lrjax.errors import UserError
from lrjax.evaluation import ruler, wording
from lrjax.evaluation.questions import Task
from lrjax.evaluation.ruler_tasks import Text
from lrjax.evaluation.samples import Prompter, Sample

DEPTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_CITIES = (
    "Lisbon", "Kyoto", "Oslo", "Quito", "Dakar", "Riga", "Perth", "Lima", "Cairo", "Hanoi", "Bergen", "Tunis",
    "Porto", "Sapporo", "Tallinn", "Cusco", "Muscat", "Tromso", "Hobart", "Bern",
)  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
KINDS = ("niah", "passkey", "number")


def make(
    kind: str,
    length: int,
    prompter: Prompter,
    texts: Sequence[str],
    *,
    count: int,
    depths: Sequence[float] = DEPTHS,
    together: bool = False,
    seed: int = 42,
) -> Task:
    """`count` samples for each depth.

    Args:
      length: tokens of the prompt and the answer's budget, filled as nearly as words of the haystack allow.
      texts: the haystack, in an order drawn for every sample, repeated as needed.
      depths: 0 is the start of the haystack, 1 right before the question.
      together: all needles in one haystack.

    Raises:
      UserError: an unknown kind, depths beyond 0 to 1, `together` without keys, a length too short.
    """
    if kind not in KINDS:
        raise UserError(f"needle {kind!r}: allowed: {', '.join(KINDS)}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths {tuple(depths)}: allowed: from 0 to 1")
    words = wording.own("depths")[kind]
    if together and "{key}" not in words["needle"]:
        raise UserError(f"{kind}: its needle has no key, so several in one haystack cannot be told apart; "
                        "allowed: niah, number")  # fmt: skip
    if together and len(depths) > len(_CITIES):
        raise UserError(f"depths: {len(depths)} in one haystack; allowed: up to {len(_CITIES)}")
    budget = words["tokens_to_generate"]
    samples: list[Sample] = []
    guess = None
    for number in range(count):
        rng = random.Random(f"{seed} {kind} {length} {number}")
        order = rng.sample(range(len(texts)), len(texts))
        filler = " ".join(texts[index] for index in order).split()
        keys, values = rng.sample(_CITIES, len(_CITIES)), _values(kind, rng)
        pairs = list(zip(keys, values, strict=False))
        pairs = pairs[: len(depths)] if together else pairs[:1] * len(depths)
        needles = [words["needle"].format(key=key, value=value) for key, value in pairs]

        def texts_of(units: int, filler=filler, pairs=pairs, needles=needles) -> list[Text]:
            """The prompt of each depth with `units` words of filler."""
            every = list(zip(depths, needles, strict=True))
            found = []
            for at, (key, value) in enumerate(pairs):
                context = _hide(filler, units, every if together else every[at : at + 1])
                filled = {"context": context, "key": key}
                prefix = words["answer_prefix"].format(**filled)
                found.append(Text(words["template"].format(**filled), prefix, [value]))
            return found

        def longest(texts: list[Text]) -> int:
            return max(_tokens(text, prompter) for text in texts)

        found, _, guess = ruler.fit(
            texts_of, longest, length - budget, 40, guess, f"{kind}: length {length}"
        )
        for text, depth in zip(found, depths, strict=True):
            used = _tokens(text, prompter) + budget
            place = len(samples)
            samples.append(Sample(place, *text[:2], tuple(text.outputs), used, {"depth": depth}))
    return Task(
        name=kind,
        samples=samples,
        max_new_tokens=budget,
        score=ruler.string_match_all,
        about={
            "benchmark": "needle", "length": length, "seed": seed, "wording": "lrjax", "template": words,
            "depths": list(depths), "together": together,
        },
        groups=lambda sample: str(sample.extra["depth"]),
        stop=("\n",),
    )  # fmt: skip


def cells(results: Sequence[dict]) -> list[dict]:
    """[{"length", "depth", "correct", "count"}] out of the results of one kind at several lengths: the heat map."""
    return [
        {
            "length": result["length"],
            "depth": float(depth),
            "correct": round(group["score"] * group["count"] / 100),
            "count": group["count"],
        }
        for result in results
        for depth, group in result["groups"].items()
    ]


def _tokens(text: Text, prompter: Prompter) -> int:
    return len(prompter.tokens(Sample(0, text.input, text.answer_prefix, ())))


def _values(kind: str, rng: random.Random) -> list[str]:
    if kind == "niah":
        return [rng.choice(_MONTHS) for _ in _CITIES]
    digits = 5 if kind == "passkey" else 7
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), len(_CITIES))]


def _hide(filler: Sequence[str], units: int, placed: Sequence[tuple[float, str]]) -> str:
    """`units` words of filler with each needle between two sentences, near its depth."""
    repeats = -(-units // len(filler))
    text = " ".join((list(filler) * repeats)[:units])
    ends = sentence_spans(text)[:, 1]
    borders = np.concatenate([[0], ends])
    spots = [
        (int(borders[np.argmin(np.abs(borders - depth * len(text)))]), needle)
        for depth, needle in placed
    ]
    pieces, last = [], 0
    for spot, needle in sorted(spots):
        pieces += [text[last:spot].strip(), needle]
        last = spot
    return " ".join(piece for piece in [*pieces, text[last:].strip()] if piece)
