"""The five families of RULER's tasks (Hsieh et al. 2024, arXiv 2404.06654): a prompt of so many units of filler.

    build = Niah(params, wording, material)
    text = build(rng, 120)                   # Text(input, answer_prefix, outputs) with 120 units of filler
    build.smallest                           # the least that the task can do with

What the families do is the published definition (repetitions, depths, distributions, worked examples); how it is
put in words is data (`wording`). `lrjax.evaluation.ruler` has the 13 tasks and fits the filler to a length.
"""

import itertools
import random
import string
import uuid
from typing import NamedTuple

import numpy as np
from scipy.special import zeta

from lrjax.data.sentences import sentence_spans
from lrjax.errors import UserError
from lrjax.evaluation.ruler_material import Material

DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int).tolist()  # per cent of the essay's sentences


class Text(NamedTuple):
    """What a family makes: see `samples.Sample`."""

    input: str
    answer_prefix: str
    outputs: list[str]


# ------------------------------------------------------------------------------------------ needle in a haystack


class Niah:
    """Values under keys, hidden in noise, in essays, or among needles of the same kind."""

    def __init__(self, params: dict, wording: dict, material: Material):
        self.haystack = params["type_haystack"]
        self.kinds = params["type_needle_k"], params["type_needle_v"]
        self.queries = params["num_needle_q"]
        self.keys = max(params["num_needle_k"], self.queries)
        self.values = params["num_needle_v"]
        self._wording, self._words = wording, wording["niah"]
        self._material = material
        self.smallest = 40 if self.haystack == "essay" else self.keys * self.values

    def _draw(self, kind: str, rng: random.Random) -> str:
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        return f"{rng.choice(self._material.adjectives)}-{rng.choice(self._material.nouns)}"

    def _distinct(self, kind: str, count: int, rng) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[self._draw(kind, rng)] = None
        return list(found)

    def __call__(self, rng: random.Random, units: int, index: int = 0) -> Text:
        key_kind, value_kind = self.kinds
        keys = self._distinct(key_kind, self.keys, rng)
        drawn = self._distinct(value_kind, self.keys * self.values, rng)
        values = {key: drawn[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}

        def needle(key, value):
            return self._wording["needle"].format(type_needle_v=value_kind, key=key, value=value)

        needles = [needle(key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.queries)
        if self.haystack == "essay":
            context = self._essay(needles, units, rng)
        else:
            if self.haystack == "noise":
                lines = [self._wording["noise"]] * units
            else:
                lines = [
                    needle(self._draw(key_kind, rng), self._draw(value_kind, rng))
                    for _ in range(units)
                ]
            for place, each in zip(
                sorted(rng.sample(range(units), len(needles)), reverse=True), needles, strict=True
            ):
                lines.insert(place, each)
            context = "\n".join(lines)
        one = self.queries * self.values == 1
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        words = {
            "type_needle_v": value_kind[:-1] if one else value_kind,
            "context": context,
            "query": query,
        }
        end = "_one" if one else ""
        return Text(
            self._words["template" + end].format(**words),
            self._words["answer_prefix" + end].format(**words),
            [value for key in asked for value in values[key]],
        )

    def _essay(self, needles: list[str], units: int, rng) -> str:
        """The first `units` words of the essays, with a needle at each of as many drawn depths."""
        words = self._material.essay_words
        text = " ".join((words * -(-units // len(words)))[:units])
        sentences = [text[start:stop].strip() for start, stop in sentence_spans(text)]
        depths = rng.sample(DEPTHS, len(needles))
        pieces, last = [], 0
        for place, needle in zip(
            sorted(int(len(sentences) * depth / 100) for depth in depths), needles, strict=True
        ):
            pieces += [*sentences[last:place], needle]
            last = place
        return " ".join([*pieces, *sentences[last:]])


# ------------------------------------------------------------------------------------------- variable tracking


class VariableTracking:
    """Chains of assignments scattered over noise, after one worked example."""

    EXAMPLE_TOKENS = 500  # the worked example is as long as fits into them

    def __init__(self, params: dict, wording: dict, material: Material, count_tokens):
        del material
        self.chains, self.hops = params["num_chains"], params["num_hops"]
        self._noise, self._words = wording["noise"], wording["variable_tracking"]
        self.smallest = self._example_lines = self.hops + 1
        rng = random.Random(0)
        while (
            count_tokens("".join(self._task(rng, self._example_lines + 1, 3)[:2]))
            <= self.EXAMPLE_TOKENS
        ):
            self._example_lines += 1

    def _task(self, rng, units: int, name_length: int) -> tuple[str, str, list[str]]:
        """(template filled in, answer prefix, the variables of the chain that is asked for)."""
        count = self.chains * (self.hops + 1)
        names: dict[str, None] = {}
        while len(names) < count:
            names["".join(rng.choices(string.ascii_uppercase, k=name_length))] = None
        chains = [list(names)[i : i + self.hops + 1] for i in range(0, count, self.hops + 1)]
        values = rng.sample(range(10000, 99999), self.chains)
        lines = [self._noise] * units
        for chain, value in zip(chains, values, strict=True):
            steps = [f"VAR {chain[0]} = {value}"]
            steps += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(chain)]
            places = sorted(rng.sample(range(len(lines)), len(steps)))
            for shift, (place, step) in enumerate(zip(places, steps, strict=True)):
                lines.insert(place + shift, step)
        words = {
            "context": "\n".join(lines).replace(". \n", ".\n"),
            "query": str(values[0]),
            "num_v": self.hops + 1,
        }
        return (
            self._words["template"].format(**words),
            self._words["answer_prefix"].format(**words),
            chains[0],
        )

    def __call__(self, rng: random.Random, units: int, index: int = 0) -> Text:
        example, prefix, names = self._task(rng, self._example_lines, 3)
        shown = f"{example}{prefix} {' '.join(names)}\n\n"
        question, prefix, names = self._task(rng, units, 5)
        return Text(shown + question, prefix, names)


# ------------------------------------------------------------------------------------------- common, frequent words


class CommonWords:
    """A numbered list of words in which ten come up often, after one worked example."""

    def __init__(self, params: dict, wording: dict, material: Material, length: int):
        self.common = params["num_cw"]
        # Below 4,096 tokens the published lists are thinner, or nothing would fit.
        short = length < 4096
        self.often, self.seldom = (6, 1) if short else (params["freq_cw"], params["freq_ucw"])
        self.example = (20, 3, 1) if short else (40, 10, 3)
        self._words, self._material = wording["common_words_extraction"], material
        self.smallest = self.common + 1

    def _list(self, rng, count: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = rng.sample(self._material.many_words(count), count)
        common, others = words[: self.common], words[self.common :]
        entries = common * often + others * seldom
        rng.shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1)), common

    def __call__(self, rng: random.Random, units: int, index: int = 0) -> Text:
        context, words = self._list(rng, *self.example)
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))
        filled = self._words["template"].format(context=context, query="", num_cw=self.common)
        example = f"{filled}{self._words['answer_prefix']} {answer}\n"
        context, words = self._list(rng, units, self.often, self.seldom)
        filled = self._words["template"].format(context=context, query="", num_cw=self.common)
        return Text(example + filled, self._words["answer_prefix"], words)


class FrequentWords:
    """Made-up words whose counts follow a zeta distribution; the commonest is dots, the next three are asked for."""

    WORD_LENGTH = 6

    def __init__(self, params: dict, wording: dict, material: Material, length: int):
        del material
        self._words = wording["freq_words_extraction"]
        self.alpha = params["alpha"]
        self.vocabulary = (length - self._words["tokens_to_generate"]) // 50
        if self.vocabulary < 5:
            least = 250 + self._words["tokens_to_generate"]
            raise UserError(f"ruler fwe: length {length}; allowed: {least} and more")
        # So many that the last word that is asked for comes up more often than the next one.
        third, fourth = np.array([4.0, 5.0]) ** -self.alpha / zeta(self.alpha)
        self.smallest = int(np.ceil(1 / (third - fourth)))

    def __call__(self, rng: random.Random, units: int, index: int = 0) -> Text:
        found: dict[str, None] = {}
        while len(found) < self.vocabulary:
            found["".join(rng.choices(string.ascii_lowercase, k=self.WORD_LENGTH))] = None
        words = ["...", *list(found)[1:]]
        ranks = np.arange(1, len(words) + 1, dtype=np.float64)
        counts = (units * ranks**-self.alpha / zeta(self.alpha)).astype(int)
        text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        rng.shuffle(text)
        filled = self._words["template"].format(context=" ".join(text), query="")
        return Text(filled, self._words["answer_prefix"], words[1:4])


# ------------------------------------------------------------------------------------------- question answering


class QuestionAnswering:
    """Question number `index` of a data set, its documents among others."""

    def __init__(self, params: dict, wording: dict, material: Material):
        self._questions, self._documents = material.questions(params["dataset"])
        self._document, self._words = wording["document"], wording["qa"]
        self.smallest = max(len(question["needed"]) for question in self._questions)
        self.count = len(self._questions)

    def __call__(self, rng: random.Random, units: int, index: int = 0) -> Text:
        question, all_documents = self._questions[index], self._documents
        needed, near = question["needed"], question["near"]
        free = units - len(needed)
        if units >= len(all_documents):
            repeats = -(-units // len(all_documents))
            documents = (all_documents * repeats)[:units]
        else:
            if free > len(near):
                taken = {*needed, *near}
                others = [i for i in range(len(all_documents)) if i not in taken]
                chosen = needed + near + rng.sample(others, min(free - len(near), len(others)))
            else:
                chosen = needed + rng.sample(near, free)
            documents = [all_documents[i] for i in chosen]
        rng.shuffle(documents)
        context = "\n\n".join(
            self._document.format(i=i, document=text) for i, text in enumerate(documents, start=1)
        )
        words = {"context": context, "query": question["query"]}
        return Text(
            self._words["template"].format(**words), self._words["answer_prefix"].format(**words),
            question["outputs"],
        )  # fmt: skip
