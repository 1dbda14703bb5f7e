"""From texts to training examples: tokenised samples on disk, and the transforms that place them.

`documents/NAME.array_record` holds samples {id, tokens, segment_lengths, marks}: long documents cut to
`source_length` tokens, with their sentences. `selected/METHOD.array_record` holds what a method keeps of each:
{id, tokens, segment_lengths, marks}. `packed` turns short documents into rows for plain training.
"""

import pathlib

import numpy as np
from absl import logging

from lrjax.data import packing, sentences
from lrjax.data.loader import Component, stable_hash
from lrjax.data.records import RecordFile, write_records
from lrjax.data.tokenizers import check_ids
from lrjax.errors import UserError
from lrjax.longrecipe.positions import TRANSFORMS


def tokenise(document, tokenizer) -> dict:
    """A document as {id, tokens [L], segment_lengths [S], marks [L]} (marks: 1 on tokens of known answers)."""
    tokens, offsets = tokenizer.encode_with_offsets(document.text)
    if not len(tokens):
        raise UserError(f"document {document.id!r}: it has no tokens")
    check_ids(tokens, tokenizer.vocab_size, f"document {document.id!r}")
    lengths = sentences.segment_lengths(offsets, sentences.sentence_spans(document.text))
    marks = np.zeros(len(tokens), np.int32)
    for start, stop in document.marks:
        marks[(offsets[:, 0] >= start) & (offsets[:, 1] <= stop)] = 1
    return {"id": document.id, "tokens": tokens, "segment_lengths": lengths, "marks": marks}


def cut(record: dict, length: int) -> list[dict]:
    """The whole pieces of `length` tokens of a tokenised document; what is left at its end is not used."""
    ends = np.cumsum(record["segment_lengths"])
    pieces = []
    for start in range(0, len(record["tokens"]) - length + 1, length):
        inside = ends[(ends > start) & (ends < start + length)] - start
        pieces.append(
            {
                "id": f"{record['id']}@{start}",
                "tokens": record["tokens"][start : start + length],
                "segment_lengths": np.diff(np.concatenate([[0], inside, [length]])).astype(
                    np.int32
                ),
                "marks": record["marks"][start : start + length],
            }
        )
    return pieces


def write_long_documents(path, documents, tokenizer, *, source_length, samples, budget, bad) -> int:
    """Tokenises long documents, cuts them and writes the samples; returns their number.

    A document shorter than `source_length` serves whole as long as it has `budget` tokens. One that is shorter
    than the budget, or a sample without a sentence end, is an error or (`bad="skip"`) left out and logged.
    """

    def pieces():
        kept = 0
        for index in range(len(documents)):
            if samples and kept >= samples:
                return
            record = tokenise(documents[index], tokenizer)
            found = cut(record, source_length) or [record]
            for piece in found:
                if samples and kept >= samples:
                    return
                if problem := _problem(piece, budget):
                    if bad == "error":
                        raise UserError(
                            f"document {piece['id']!r}: {problem}; remove it or set "
                            "config.data.bad_document=skip"
                        )
                    logging.warning("document %r is left out: %s", piece["id"], problem)
                    continue
                kept += 1
                yield piece

    write_records(path, pieces())
    written = len(RecordFile(path))
    if not written:
        raise UserError(f"{path}: no document has the {budget} tokens that a training sample takes")
    if samples and written < samples:
        raise UserError(
            f"config.data.samples {samples}: the documents make {written} samples of {source_length} tokens"
        )
    return written


def _problem(piece: dict, budget: int) -> str:
    if len(piece["tokens"]) < budget:
        return f"it has {len(piece['tokens'])} tokens, fewer than the training length {budget}"
    if len(piece["segment_lengths"]) < 2:
        return "it has no sentence end, so there is no place for a gap"
    return ""


def packed(documents, tokenizer, length: int, mark_weight: float = 1.0) -> list[dict]:
    """Documents packed to rows [length] at plain positions: {id, tokens, positions, segment_ids, weights}."""
    records = [tokenise(documents[index], tokenizer) for index in range(len(documents))]
    rows = packing.pack([len(record["tokens"]) for record in records], length)
    filled = []
    for number, row in enumerate(rows):
        pieces = [(records[document], start, stop) for document, start, stop in row]
        tokens = [record["tokens"][start:stop] for record, start, stop in pieces]
        example = packing.fill_row(tokens, length)
        marks = np.concatenate([record["marks"][start:stop] for record, start, stop in pieces])
        example["weights"][: len(marks)] *= np.where(marks, mark_weight, 1.0).astype(np.float32)
        filled.append({"id": f"row {number}", **example})
    return filled


def packed_component(documents, tokenizer, length, weight, mark_weight=1.0) -> Component:
    """Short documents at plain positions, as a part of a mixture."""
    rows = packed(documents, tokenizer, length, mark_weight)
    return Component(rows, _plain, weight)


def _plain(record: dict, rng) -> dict:
    del rng
    return {name: record[name] for name in ("tokens", "positions", "segment_ids", "weights")}


def placed_component(
    source, positions: str, target_length: int, *, train_length: int, from_source: bool, weight=1.0
):
    """Long documents at transformed positions, drawn anew for every document and epoch.

    Args:
        source: records {id, tokens, segment_lengths}: the selected text, or whole samples when `from_source`. Selected
            text may bring its own loss weights, "weights" [L].
        positions: name of the transform.
        target_length: window that the positions span.
        train_length: tokens in an example.
        from_source: take the text that lies at the positions in the sample (PoSE as published), instead of placing
            text that is already selected.
        weight: share in a mixture.
    """
    if positions not in TRANSFORMS:
        raise UserError(f"positions {positions!r}: allowed: {', '.join(TRANSFORMS)}")
    transform = TRANSFORMS[positions]

    def place(record: dict, rng) -> dict:
        if from_source:
            span = min(target_length, len(record["tokens"]))
            chosen = transform(np.asarray([train_length], np.int32), span, rng)
            tokens = record["tokens"][chosen]
        else:
            chosen = transform(record["segment_lengths"], target_length, rng)
            tokens = record["tokens"]
        weights = np.array(record.get("weights", np.ones(len(tokens))), np.float32)
        weights[0] = 0.0  # nothing predicts the first token
        return {
            "tokens": tokens.astype(np.int32),
            "positions": chosen,
            "segment_ids": np.ones(len(tokens), np.int32),
            "weights": weights,
        }

    return Component(source, place, weight)


def example_length(config, method) -> int:
    """Tokens of a long example of a method."""
    if method.positions == "full":
        return config.target_length
    return method.train_length or config.train_length


def shuffled(token_index, segment_lengths, rng):
    """`(token_index, segment_lengths)` of a selection with its sentences in random order."""
    order = rng.permutation(len(segment_lengths))
    pieces = np.split(token_index, np.cumsum(segment_lengths)[:-1])
    return np.concatenate([pieces[i] for i in order]), segment_lengths[order]


def rng_of(seed: int, identifier: str) -> np.random.Generator:
    """The generator of what is drawn once for a document."""
    return np.random.default_rng(stable_hash(seed, identifier))


def open_records(path) -> RecordFile:
    """The records of a stage, or a `UserError` that names what has to run first."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: not there; run the stages before this one first")
    return RecordFile(path)
