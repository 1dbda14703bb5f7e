"""Impactful tokens: whose logit rises when the window grows, and which classes of tokens they belong to.

    delta_NL     per-token score, N long samples by L positions: SCORES says which there are
    top_NL   =   top_fraction_per_position(delta_NL)          the top 20 % of the samples at each position
    table_V  =   token_classes(tokenizer.token_texts())       a class for every token id, by its text alone
    lifts    =   class_lift(table_V[tokens_NL], top_NL)       is a class more frequent in the top than elsewhere?
    anchors  =   anchor_classes(lifts)                        the classes that selection holds on to

Classes by text need no tagger; `classing.py` has others (parts of speech, copied from afar). How often a class is in
the top at each position, and whether the change is flat, say `frequency.py`.

`analyse` does it all and returns what `scores/analysis.json` holds. Samples of different lengths are stacked with
`stack` and `stack_classes`; class -1 marks what is not there. The paper (arXiv 2409.00509, section 3) counts
parts of speech and does not say how its anchor types were chosen; here they are tested against chance.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int8

from lrjax.errors import UserError
from lrjax.longrecipe import frequency

# How tokens are ranked, from a record of scores ({delta_logit [L-1], ...}, of `scoring.py` and `contrast.py`).
SCORES = {
    "logit": lambda record: record["delta_logit"],  # the paper's: raw, signed
    "absolute": lambda record: np.abs(record["delta_logit"]),
    "centred": lambda record: record["delta_centred"],
    "logprob": lambda record: record["delta_logprob"],
    "kl": lambda record: record["kl"],
    "contrast": lambda record: record["contrast"],  # one model, long context against short
}
CLASS_NAMES = (
    "number",  # holds a digit
    "capitalised",  # a word, or the start of one, with a capital letter first
    "word",  # any other word, or its start
    "continuation",  # lower-case letters that go on with a word, where the vocabulary tells them apart
    "punctuation",  # of ordinary prose
    "symbol",  # any other printable sign
    "space",  # white space only
    "other",  # control tokens, parts of a character, nothing at all
)
_PUNCTUATION = frozenset(
    ".,;:!?'\"()[]-\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u3002\uff01\uff1f"
)
_CONTROL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")  # <s>, <|im_end|>, [PAD]
_REPLICATES = 2000
# White space, control tokens, what a tagger left over (SPACE, X), text that is not copied.
NO_CONTENT = ("space", "other", "SPACE", "X", "new")
# A class that more than this share of the sentences hold, as all hold punctuation, does not tell them apart.
EVERYWHERE = 0.9


# ------------------------------------------------------------------------------------------------------- the top


def score_of(record, name: str) -> Float[np.ndarray, "L-1"]:
    """The score `name` of `SCORES` of a record. Raises `UserError` for an unknown one, or one that was not computed."""
    if name not in SCORES:
        raise UserError(f"analyse.score {name!r}: allowed: {', '.join(SCORES)}")
    try:
        return SCORES[name](record)
    except KeyError as error:
        remedy = {"kl": "score.kl=True", "contrast": "score.short_context"}[name]
        raise UserError(
            f"analyse.score {name!r}: sample {record.get('id')!r} was scored without it; set config.{remedy}"
        ) from error


def unscored(name: str, short_context: int) -> int:
    """How many changes at a sample's start say nothing: of `contrast` those whose short context is the whole."""
    return max(short_context - 1, 0) if name == "contrast" else 0


def significance(
    delta_NL: Float[np.ndarray, "N L"], statistic: str = "sum"
) -> Float[np.ndarray, "L"]:
    """Equation 3: the change of logit over the samples at each position; NaN is no token there.

    Args:
        statistic: "sum" (the paper's, signed), "mean" over the samples that have a token there, "absolute" (the mean
            size, either sign).
    """
    if statistic == "sum":
        return np.nansum(delta_NL, axis=0, dtype=np.float64)
    if statistic not in ("mean", "absolute"):
        raise UserError(f"significance {statistic!r}: allowed: sum, mean, absolute")
    values_NL = np.abs(delta_NL) if statistic == "absolute" else delta_NL
    count_L = np.maximum(np.count_nonzero(~np.isnan(delta_NL), axis=0), 1)
    return np.nansum(values_NL, axis=0, dtype=np.float64) / count_L


def top_fraction_overall(
    delta_NL: Float[np.ndarray, "N L"], fraction: float = 0.2, valid_NL=None
) -> Bool[np.ndarray, "N L"]:
    """The ceil(fraction * n) largest of all n changes, wherever they stand; ties go to the earlier token.

    Raises as `top_fraction_per_position`.
    """
    flat = np.ravel(np.asarray(delta_NL))[:, None]
    valid = None if valid_NL is None else np.ravel(valid_NL)[:, None]
    return top_fraction_per_position(flat, fraction, valid).reshape(np.shape(delta_NL))


def top_fraction_per_position(
    delta_NL: Float[np.ndarray, "N L"], fraction: float = 0.2, valid_NL=None
) -> Bool[np.ndarray, "N L"]:
    """The ceil(fraction * n) largest changes among the n samples that have a token at the position.

    Ties go to the earlier sample. With fewer than 1/fraction samples the share is above `fraction`; with one,
    everything is top and nothing stands out.

    Raises:
        UserError: the fraction is not between 0 and 1, or a valid change is NaN.
    """
    if not 0 < fraction < 1:
        raise UserError(f"top fraction is {fraction}; it must be between 0 and 1")
    delta_NL = np.asarray(delta_NL)
    valid_NL = np.ones(delta_NL.shape, bool) if valid_NL is None else np.asarray(valid_NL, bool)
    _refuse_nan(np.where(valid_NL, delta_NL, 0), "the change of logit")
    order_NL = np.argsort(np.where(valid_NL, -delta_NL, np.inf), axis=0, kind="stable")
    rank_NL = np.empty_like(order_NL)
    np.put_along_axis(rank_NL, order_NL, np.arange(len(delta_NL))[:, None], axis=0)
    # The small number takes back what rounding adds: 0.07 * 100 is a little over 7.
    count_L = np.ceil(fraction * valid_NL.sum(axis=0) - 1e-9)
    return (rank_NL < count_L) & valid_NL


TOPS = {"position": top_fraction_per_position, "overall": top_fraction_overall}

# --------------------------------------------------------------------------------------------------- the classes


def token_classes(token_texts: Sequence[str]) -> Int8[np.ndarray, "V"]:
    """The class (an index into `CLASS_NAMES`) of every token id, from its text with its leading space.

    "continuation" needs a vocabulary that writes the space before a word into its first token; where none does (bytes,
    whole words) every piece is a word.
    """
    marks_starts = any(text[:1].isspace() and text[1:2].islower() for text in token_texts)
    names = [_class_of(text, marks_starts) for text in token_texts]
    return np.array([CLASS_NAMES.index(name) for name in names], np.int8)


def _class_of(text: str, marks_starts: bool) -> str:
    core = text.strip()
    if text and not core:
        return "space"
    if not core or "\ufffd" in core or not core.isprintable() or _CONTROL.fullmatch(core):
        return "other"
    if any(c.isdigit() for c in core):
        return "number"
    letters = [c for c in core if c.isalpha()]
    if not letters:
        return "punctuation" if all(c in _PUNCTUATION for c in core) else "symbol"
    if letters[0].isupper():
        return "capitalised"
    return "continuation" if marks_starts and text[0].islower() else "word"


def stack(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Rows of up to `length` values as one array [N, length], filled up with NaN (floats) or zeros (others)."""
    filling = np.nan if np.issubdtype(np.asarray(rows[0]).dtype, np.floating) else 0
    stacked = np.full((len(rows), length), filling, np.asarray(rows[0]).dtype)
    for index, row in enumerate(rows):
        _refuse_nan(row, f"sample {index}")
        stacked[index, : min(len(row), length)] = row[:length]
    return stacked


def stack_rows(rows: Sequence[np.ndarray], length: int) -> Int8[np.ndarray, "N L"]:
    """Rows of classes, [N, length]; -1 where a row has no more tokens."""
    classes_NL = np.full((len(rows), length), -1, np.int8)
    for index, row in enumerate(rows):
        classes_NL[index, : min(len(row), length)] = row[:length]
    return classes_NL


def stack_classes(
    token_rows: Sequence[np.ndarray], token_texts: Sequence[str], length: int
) -> Int8[np.ndarray, "N L"]:
    """The class by text of every token, [N, length]; -1 where a row has no more tokens."""
    table_V = token_classes(token_texts)
    for index, tokens in enumerate(token_rows):
        if len(tokens) and max(tokens) >= len(table_V):
            raise UserError(
                f"sample {index}: token id {max(tokens)}; the tokenizer has ids 0 to {len(table_V) - 1}"
            )
    return stack_rows([table_V[tokens] for tokens in token_rows], length)


# ------------------------------------------------------------------------------------------- over-representation


@dataclasses.dataclass(frozen=True)
class ClassLift:
    """One class: its share of all tokens, of the top ones, their ratio, and an interval for that ratio; the share of
    the sentences that hold one of its tokens, None where nobody counted."""

    name: str
    count: int
    share_all: float
    share_top: float
    lift: float
    low: float
    high: float
    sentences: float | None = None


def class_lift(
    classes_NL: Int8[np.ndarray, "N L"],
    top_NL: Bool[np.ndarray, "N L"],
    *,
    names: Sequence[str] = CLASS_NAMES,
    sentences_C: Float[np.ndarray, "C"] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[ClassLift]:
    """How much more frequent each class is among the top tokens than among all; classes that occur only.

    The interval is the wider of two: a bootstrap over samples, because the tokens of one document are not
    independent, and Wilson's for the top rate within the class, because resampling sees no doubt in a class
    that a few tokens make up. Both hold for all classes at once with `confidence` (Bonferroni). A class that
    occurs in one sample only gets the widest interval there is. `sentences_C` is as `sentence_shares` makes it.

    Raises:
        UserError: there is no token at all.
    """
    valid_NL = classes_NL >= 0
    top_NL = top_NL & valid_NL
    one_hot = [(classes_NL == index) for index in range(len(names))]
    all_NC = np.stack([member_NL.sum(axis=1) for member_NL in one_hot], axis=1)
    top_NC = np.stack([(member_NL & top_NL).sum(axis=1) for member_NL in one_hot], axis=1)
    if not top_NC.sum():
        raise UserError("the analysis has no scored tokens; score at least one sample")
    present = np.flatnonzero(all_NC.sum(axis=0))
    tail = (1 - confidence) / 2 / len(present)

    samples = len(classes_NL)
    draws_RN = np.random.default_rng(seed).multinomial(
        samples, np.full(samples, 1 / samples), _REPLICATES
    )
    draws_RN[0] = 1  # the samples as they are, so that the rarest class has a value too
    lift_RC = _ratio(draws_RN @ top_NC[:, present], draws_RN @ all_NC[:, present])
    low_C, high_C = np.nanquantile(lift_RC, [tail, 1 - tail], axis=0)

    all_C, top_C = all_NC.sum(axis=0), top_NC.sum(axis=0)
    top_rate = top_C.sum() / all_C.sum()
    found = []
    for column, index in enumerate(present):
        rate_low, rate_high = _wilson(top_C[index], all_C[index], tail)
        low = min(low_C[column], rate_low / top_rate)
        high = max(high_C[column], rate_high / top_rate)
        if np.count_nonzero(all_NC[:, index]) < 2:  # one document says nothing about others
            low, high = 0.0, 1 / top_rate
        share_all, share_top = all_C[index] / all_C.sum(), top_C[index] / top_C.sum()
        found.append(
            ClassLift(
                name=names[index],
                count=int(all_C[index]),
                share_all=float(share_all),
                share_top=float(share_top),
                lift=float(share_top / share_all),
                low=float(low),
                high=float(high),
                sentences=None if sentences_C is None else float(sentences_C[index]),
            )
        )
    return found


def _ratio(top_RC, all_RC):
    """Share among the top over share among all; NaN where a replicate has none of the class."""
    top_R1, all_R1 = top_RC.sum(axis=1, keepdims=True), all_RC.sum(axis=1, keepdims=True)
    share_all_RC = np.where(all_RC > 0, all_RC / all_R1, np.nan)
    return top_RC / np.maximum(top_R1, 1) / share_all_RC


def _wilson(successes, trials, tail):
    """Wilson's interval of a proportion with probability `tail` on either side."""
    z = statistics.NormalDist().inv_cdf(1 - tail)
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials)) / (1 + spread)
    return centre - half, centre + half


def sentence_shares(class_rows, segment_rows, names: Sequence[str]) -> Float[np.ndarray, "C"]:
    """For each class the share of the sentences that hold one of its tokens.

    Args:
        class_rows, segment_rows: of each document the classes of its tokens [L] and the lengths of its sentences [S].
    """
    holding_C, sentences = np.zeros(len(names), int), 0
    for classes_L, lengths_S in zip(class_rows, segment_rows, strict=True):
        starts_S = np.cumsum(lengths_S) - lengths_S
        holds_CL = np.asarray(classes_L) == np.arange(len(names))[:, None]
        holding_C += np.logical_or.reduceat(holds_CL, starts_S, axis=1).sum(axis=1)
        sentences += len(starts_S)
    return holding_C / sentences


def anchor_classes(lifts: Sequence[ClassLift], min_lift: float = 1.2) -> list[str]:
    """The classes whose lift is above `min_lift` and whose interval is above 1; [] if the change is flat.

    Those of `NO_CONTENT` are never anchors: they are no content of a sentence. Those in more than
    `EVERYWHERE` of the sentences are anchors only if no other class is: beside another, they would keep every sentence.
    """
    found = [
        lift
        for lift in lifts
        if lift.lift > min_lift and lift.low > 1 and lift.name not in NO_CONTENT
    ]
    telling = [lift for lift in found if lift.sentences is None or lift.sentences <= EVERYWHERE]
    return [lift.name for lift in telling or found]


def flat_message(lifts: Sequence[ClassLift], min_lift: float = 1.2) -> str:
    """One line for a `UserError` when `anchor_classes` finds none."""
    best = max(lifts, key=lambda lift: lift.lift)
    return (
        f"no token class is over-represented among the most changed tokens: the largest lift is {best.lift:.2f} "
        f"('{best.name}', interval {best.low:.2f} to {best.high:.2f}), needed is more than {min_lift} with an "
        "interval above 1; score more samples, train the probe longer, or select by score, digits or random"
    )


# --------------------------------------------------------------------------------------------------- validation


def auc(scores, labels) -> float:
    """Probability that a labelled token scores above an unlabelled one, ties half (Mann-Whitney)."""
    scores, labels = np.ravel(scores), np.ravel(labels).astype(bool)
    positives = int(labels.sum())
    if positives in (0, labels.size):
        raise UserError(f"auc: {positives} of {labels.size} labels are set; both kinds are needed")
    _refuse_nan(scores, "auc")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1, the mean rank for equal scores
    above = rank[labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (labels.size - positives)))


def recall_in_top(top, labels) -> float:
    """The share of labelled tokens that are in the top."""
    labels = np.asarray(labels, bool)
    if not labels.any():
        raise UserError("recall: no label is set; at least one is needed")
    return float(np.asarray(top, bool)[labels].mean())


def analyse(
    delta_NL: Float[np.ndarray, "N L"],
    classes_NL: Int8[np.ndarray, "N L"],
    marks_NL=None,
    *,
    names: Sequence[str] = CLASS_NAMES,
    sentences_C: Float[np.ndarray, "C"] | None = None,
    top: str = "position",
    top_fraction: float = 0.2,
    min_lift: float = 1.2,
    buckets: int = 32,
    unscored: int = 0,
) -> dict:
    """The whole analysis as a JSON-able dict.

    Args:
        delta_NL, classes_NL: as `stack` and `stack_classes` make them.
        names: of the classes.
        sentences_C: as `sentence_shares` makes it; None: a class may be an anchor however many sentences hold it.
        top: "position": the top fraction of the samples at each position (the paper's); "overall": of all tokens.
        marks_NL: known long-range answers, to validate the scorer; none set: no `validation`.
        buckets: position ranges over which `significance` and `frequency` are averaged.
        unscored: changes at the start of each sample that are left out, see the function of this name.

    Returns:
        samples, tokens, top_fraction, top_share (of the tokens that are top: of few samples at a position the top
        fraction is rounded up), min_lift; classes: rows of `ClassLift` with interval and anchor; anchors: their
        names; flat: None, or the line that says why there are none; significance: equation 3 by range of positions;
        frequency: share of each class in the top by range (`frequency.class_frequency`); flatness:
        `frequency.flatness`; validation: AUC of the change for the marks, their recall in the top, their number.
    """
    if top not in TOPS:
        raise UserError(f"analyse.top {top!r}: allowed: {', '.join(TOPS)}")
    classes_NL = np.array(classes_NL)
    classes_NL[:, :unscored] = -1
    valid_NL = classes_NL >= 0
    top_NL = TOPS[top](delta_NL, top_fraction, valid_NL)
    lifts = class_lift(classes_NL, top_NL, names=names, sentences_C=sentences_C)
    anchors = anchor_classes(lifts, min_lift)
    rows = []
    for lift in lifts:
        row = dataclasses.asdict(lift)
        row["interval"] = [row.pop("low"), row.pop("high")]
        rows.append(row | {"anchor": lift.name in anchors})
    delta_L = significance(np.where(valid_NL, delta_NL, 0))
    ranges = np.array_split(np.arange(len(delta_L)), min(buckets, len(delta_L)))
    analysis = {
        "samples": len(delta_NL),
        "tokens": int(valid_NL.sum()),
        "top_fraction": top_fraction,
        "top_share": float(top_NL.sum() / valid_NL.sum()),
        "min_lift": min_lift,
        "classes": rows,
        "anchors": anchors,
        "flat": None if anchors else flat_message(lifts, min_lift),
        "significance": {
            # Index t - 1 of delta is about token t.
            "start": [int(r[0]) + 1 for r in ranges],
            "mean": [float(delta_L[r].mean()) for r in ranges],
        },
        "frequency": frequency.class_frequency(classes_NL, top_NL, names, buckets=buckets),
        "flatness": frequency.flatness(delta_NL, classes_NL, top_NL),
    }
    marks_NL = np.zeros(valid_NL.shape, bool) if marks_NL is None else marks_NL.astype(bool)
    if (marks_NL & valid_NL).any():
        marks = marks_NL[valid_NL]
        analysis["validation"] = {
            "auc": auc(delta_NL[valid_NL], marks),
            "recall_in_top": recall_in_top(top_NL[valid_NL], marks),
            "marks": int(marks.sum()),
        }
    return analysis


def _refuse_nan(values, where: str) -> None:
    if np.issubdtype(np.asarray(values).dtype, np.floating) and np.isnan(values).any():
        index = tuple(int(i) for i in np.argwhere(np.isnan(values))[0])
        raise UserError(
            f"{where}: NaN at index {index}; one of the models gives no finite logit there"
        )
