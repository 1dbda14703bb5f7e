"""How like a reference an answer is: F1 of words, ROUGE-L, BLEU, edit similarity, and LongBench's counts and classes.

Each takes (answer, reference) and gives 0 to 1. They follow what LongBench (Bai et al. 2024) and LooGLE (Li et al.
2024) score with, to the digit: rouge 1.0.1 for ROUGE, difflib for edit similarity, jieba for words of Chinese.
"""

import collections
import difflib
import math
import re
import string
from collections.abc import Callable, Sequence

from lrjax.errors import UserError

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"  # noqa: RUF001
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def overlap_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of words."""
    same = sum((collections.Counter(answer) & collections.Counter(reference)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(answer: str, reference: str) -> float:
    """F1 of the words, without case, punctuation and articles (as SQuAD scores)."""

    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    return overlap_f1(words(answer), words(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """F1 of Chinese words without punctuation."""
    marks = {*string.punctuation, *_CHINESE_PUNCTUATION}

    def words(text):
        cut = (re.sub(r"\s", "", word.lower()) for word in chinese_words(text))
        cleaned = ("".join(c for c in word if c not in marks) for word in cut)
        return [word for word in cleaned if word]

    return overlap_f1(words(answer), words(reference))


def chinese_words(text: str) -> list[str]:
    try:
        import jieba
    except ModuleNotFoundError as error:
        raise UserError(
            "Chinese answers are cut into words by jieba, which is not installed; "
            "allowed: pip install -r requirements-eval.txt, or tasks in English"
        ) from error
    jieba.setLogLevel("WARNING")
    return jieba.lcut(text)


# ------------------------------------------------------------------------------------------------- ROUGE, BLEU


def rouge_l(answer: str, reference: str, part: str = "f") -> float:
    """ROUGE-L of summaries: longest common subsequences of every pair of sentences, their words united.

    Counts different words, sentences end at every full stop. part: "f", "p" or "r".
    """
    answers, references = _sentences(answer), _sentences(reference)
    if not answers or not references:
        return 0.0
    common = {
        word for ours in references for theirs in answers for word in _common_words(ours, theirs)
    }
    return _f_p_r(
        len(common), len({*_flat(answers)}), len({*_flat(references)}), part, epsilon=1e-8
    )


def rouge_n(answer: str, reference: str, n: int, part: str = "f") -> float:
    """ROUGE-N over the different n-grams of words."""
    answers, references = _flat(_sentences(answer)), _flat(_sentences(reference))
    if not answers or not references:
        return 0.0
    ours, theirs = (
        {*zip(*(words[i:] for i in range(n)), strict=False)} for words in (answers, references)
    )
    if not ours or not theirs:
        return 0.0
    return _f_p_r(len(ours & theirs), len(ours), len(theirs), part, epsilon=1e-8)


def rouge_l_zh(answer: str, reference: str) -> float:
    """ROUGE-L of Chinese words."""
    return rouge_l(" ".join(chinese_words(answer)), " ".join(chinese_words(reference)))


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _flat(sentences: list[list[str]]) -> list[str]:
    return [word for sentence in sentences for word in sentence]


def _f_p_r(same: int, answers: int, references: int, part: str, epsilon: float) -> float:
    precision, recall = same / answers, same / references
    f = 2.0 * (precision * recall / (precision + recall + epsilon))
    return {"f": f, "p": precision, "r": recall}[part]


def _common_words(x: list[str], y: list[str]) -> list[str]:
    """The words of a longest common subsequence (of several, the one that rouge 1.0.1 finds)."""
    rows = [[0] * (len(y) + 1)]
    for word in x:
        above, row = rows[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    i, j, words = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.append(x[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def bleu(answer: str, reference: str, n: int) -> float:
    """Clipped precision of the n-grams of words of this one order, times the brevity penalty."""
    ours, theirs = answer.split(), reference.split()
    if not ours:
        return 0.0
    counts = [
        collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))
        for words in (ours, theirs)
    ]
    precision = sum((counts[0] & counts[1]).values()) / max(sum(counts[0].values()), 1)
    return precision * min(1.0, math.exp(1 - len(theirs) / len(ours)))


# ------------------------------------------------------------------------------------------- LongBench's others


def number_share(answer: str, number: str) -> float:
    """Of the numbers in the answer, how many are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def counting(answer: str, reference: str) -> float:
    return number_share(answer, str(reference))


def retrieval(pattern: str) -> Callable[[str, str], float]:
    """Whether the paragraph that the reference names (`pattern`, its number in a group) is the one given."""

    def score(answer, reference):
        return number_share(answer, re.findall(pattern, reference)[0])

    return score


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the answer names, if the right one is among them.

    Classes whose name is part of the right one's do not count, as in LongBench, which however passes over the class
    that follows one it leaves out; so does this.
    """
    named = [name for name in classes if name in answer]
    for name in named:
        if name in reference and name != reference:
            named.remove(
                name
            )  # the published loop, which skips the next one, too: scores have to agree
    return 1.0 / len(named) if reference in named else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """Edit similarity of the first line that is no comment and no fence."""
    lines = answer.lstrip("\n").split("\n")
    line = next((s for s in lines if "`" not in s and "#" not in s and "//" not in s), "")
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100
