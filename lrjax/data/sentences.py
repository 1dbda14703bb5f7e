"""Sentences of a text, and how many tokens of any tokenizer lie in each.

    spans_S2 = sentence_spans(text)
    tokens_L, offsets_L2 = tokenizer.encode_with_offsets(text)
    lengths = segment_lengths(offsets_L2, spans_S2)      # sums to L

Sentences are found in the text, never by token ids, so they are the same for every tokenizer.
Shapes: S sentences, L tokens.
"""

import re

import numpy as np
from jaxtyping import Int32

# A run of stops, with the quotes and brackets that close on it and the white space behind. A stop
# right before a lower-case letter, a digit or "=" is inside a number, a name or an operator: 3.14,
# os.path, a != b. The look-behind takes a run only from its start, which keeps the search linear.
# The escapes are the full-width stops of East Asian text, and the closing ” ’ ».
_ENDS = re.compile(
    r"""
    (?: (?<![.?!])[.?!]++(?![0-9a-z_=]) | [\u3002\uff01\uff1f]+ )
    ["'\u201d\u2019\u00bb)\]}]* \s*
    | \n\s*
    """,
    re.VERBOSE,
)


def sentence_spans(text: str) -> Int32[np.ndarray, "S 2"]:
    """Character spans (start, end) of the sentences: in order, none empty, together the whole text.

    A sentence ends after `.`, `?`, `!` or a line break (LongRecipe's rule, arXiv 2409.00509); what
    closes or separates it (quotes, brackets, white space) stays with it.
    """
    ends = [match.end() for match in _ENDS.finditer(text)]
    if ends and text[: ends[0]].isspace():
        del ends[0]  # white space before the first sentence goes with it
    if text and (not ends or ends[-1] != len(text)):
        ends.append(len(text))
    borders = np.asarray([0, *ends], np.int32)
    return np.stack([borders[:-1], borders[1:]], axis=1)


def segment_lengths(
    offsets_L2: Int32[np.ndarray, "L 2"], spans_S2: Int32[np.ndarray, "S 2"]
) -> Int32[np.ndarray, "S_with_tokens"]:
    """Tokens in each sentence that has any: positive, in order, with sum L.

    A token belongs to the sentence in which it starts. Where a start goes back (special tokens at
    (0, 0)), the token stays in the sentence of the one before it.
    """
    if not len(offsets_L2):
        return np.zeros(0, np.int32)
    starts_L = np.maximum.accumulate(offsets_L2[:, 0])
    sentence_L = np.searchsorted(spans_S2[:, 0], starts_L, side="right") - 1
    counts_S = np.bincount(sentence_L, minlength=len(spans_S2))
    return counts_S[counts_S > 0].astype(np.int32)
