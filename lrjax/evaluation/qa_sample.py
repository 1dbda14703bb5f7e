"""Invented questions in the formats of SQuAD and HotpotQA, for tests and for a first look without downloads.

    data = squad()            # as dev-v2.0.json: 60 articles on towns that do not exist, 240 questions
    data = hotpotqa()         # as hotpot_dev_distractor_v1.json: 120 questions over two paragraphs each, eight beside

They are easier and far more alike than the real ones: a score on them is no RULER score, and the result says so.
"""

import random

_FIRST = (
    "Al",
    "Bren",
    "Cor",
    "Dun",
    "El",
    "Far",
    "Gil",
    "Hol",
    "Ir",
    "Kel",
    "Lor",
    "Mar",
    "Nor",
    "Or",
    "Pel",
)
_LAST = ("bury", "dale", "ford", "ham", "mouth", "stead", "ton", "wick")
_NAMES = (
    "Ada", "Bruno", "Clara", "David", "Edith", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Karla", "Leo", "Mona",
    "Nils", "Olga", "Paul", "Rosa", "Simon", "Tilda", "Viktor",
)  # fmt: skip
_TRADES = (
    "baker",
    "carpenter",
    "doctor",
    "fisher",
    "gardener",
    "miller",
    "printer",
    "sailor",
    "tailor",
    "weaver",
)
_GOODS = (
    "apples",
    "bells",
    "candles",
    "clocks",
    "glass",
    "honey",
    "lace",
    "paper",
    "pottery",
    "rope",
    "salt",
    "wool",
)
_RIVERS = ("Arle", "Bask", "Cend", "Dorr", "Elve", "Fenn", "Gask", "Hule", "Isk", "Jarr")


def _towns(count: int, rng: random.Random) -> list[dict]:
    names = [first + last for first in _FIRST for last in _LAST]
    people = [
        f"{name} {first}{last}" for name in _NAMES for first in _FIRST[:8] for last in ("er", "man")
    ]
    return [
        {
            "town": town,
            "river": rng.choice(_RIVERS),
            "year": str(rng.randint(1100, 1900)),
            "goods": rng.choice(_GOODS),
            "founder": founder,
            "trade": rng.choice(_TRADES),
            "number": str(rng.randint(2, 99)),
        }
        for town, founder in zip(rng.sample(names, count), rng.sample(people, count), strict=True)
    ]  # fmt: skip


def squad(seed: int = 0) -> dict:
    """Two paragraphs a town, two questions a paragraph."""
    articles = []
    for facts in _towns(60, random.Random(seed)):
        about = [
            (
                "{town} lies on the river {river}. It was founded in {year} by {founder}, who had come there "
                "as a {trade}.",
                (("Who founded {town}?", "founder"), ("In which year was {town} founded?", "year")),
            ),
            (
                "The people of {town} live on {goods}, which they sell at a market of {number} stalls. The market "
                "is held every week.",
                (("What do the people of {town} live on?", "goods"),
                 ("How many stalls does the market of {town} have?", "number")),
            ),
        ]  # fmt: skip
        paragraphs = []
        for text, questions in about:
            context = text.format(**facts)
            qas = [
                {
                    "question": question.format(**facts),
                    "id": f"{facts['town']} {field}",
                    "answers": [
                        {"text": facts[field], "answer_start": context.index(facts[field])}
                    ],
                    "is_impossible": False,
                }
                for question, field in questions
            ]
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": facts["town"], "paragraphs": paragraphs})
    return {"version": "invented", "data": articles}


def hotpotqa(seed: int = 0) -> list[dict]:
    """For each question the paragraph of a town, that of its founder, and eight others."""
    rng = random.Random(seed)
    towns = _towns(120, rng)

    def paragraphs(facts):
        return [
            [
                facts["town"],
                [f"{facts['town']} lies on the river {facts['river']}.", f" {facts['founder']} founded it."],
            ],
            [
                facts["founder"],
                [f"{facts['founder']} was a {facts['trade']}.", f" The year of birth is {facts['year']}."],
            ],
        ]  # fmt: skip

    questions = []
    for index, facts in enumerate(towns):
        others = [towns[i] for i in rng.sample([i for i in range(len(towns)) if i != index], 4)]
        context = paragraphs(facts) + [p for other in others for p in paragraphs(other)]
        rng.shuffle(context)
        questions.append(
            {
                "_id": f"invented {index}",
                "question": f"What was the trade of the person who founded {facts['town']}?",
                "answer": facts["trade"],
                "context": context,
            }
        )
    return questions


MAKERS = {"squad": squad, "hotpotqa": hotpotqa}
