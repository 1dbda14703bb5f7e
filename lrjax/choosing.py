"""From long documents to the text that is trained on: the stages score, analyse and select of `recipe.py`.

scores/long.array_record      {id, delta_logit, ... [L-1]}, written once; every analysis and selection reads it
scores/classes_KIND.array_record   {id, classes [L]}: only of classes that depend on the document
scores/analysis.json          what `impact.analyse` returns
selected/METHOD.array_record  {id, tokens, segment_lengths, marks, token_index}, and weights where a method has them
"""

import itertools
import shutil
import time

import jax
import numpy as np
from absl import logging

from lrjax import examples, sharding
from lrjax import workdir as wd
from lrjax.data.records import RecordFile, write_records
from lrjax.errors import UserError
from lrjax.longrecipe import classing, contrast, impact, references, scoring, selection
from lrjax.models.flops import forward_flops
from lrjax.run import load_for_reading, on_first_process, open_tokenizer

LONGCE_LIMIT = 5.0  # the largest loss weight of LongCE (arXiv 2410.23771)
MOSTLY_THE_START = 1.5  # a selection whose budget is full within so many times its tokens

# ------------------------------------------------------------------------------------------- score


def score(config, workdir):
    """The change of every token's logit from the base to the probe, on the long samples at plain positions."""
    (base_config, base), probe = (
        load_for_reading(config, workdir, name) for name in ("base", "probe")
    )
    scorer = scoring.make_scorer(base_config, probe[0], kl=config.score.kl)
    documents = examples.open_records(workdir / "documents" / "long.array_record")
    count = min(config.score.samples or len(documents), len(documents))
    length = config.score.length or config.data.source_length or config.target_length
    batch_size, short = config.score.batch_size, config.score.short_context
    started, scored = time.perf_counter(), 0

    def rows(first, last):
        nonlocal scored
        for start in range(first, last, batch_size):
            batch = [documents[index] for index in range(start, min(start + batch_size, last))]
            # A short batch or document is filled up with padding (segment 0), which is cut off again.
            tokens = np.zeros((batch_size, length), np.int32)
            segment_ids = np.zeros((batch_size, length), np.int32)
            for row, record in enumerate(batch):
                ids = record["tokens"][:length]
                tokens[row, : len(ids)], segment_ids[row, : len(ids)] = ids, 1
            positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
            scores = jax.device_get(scorer(base, probe[1], tokens, positions, segment_ids))
            if short:
                scores["contrast"] = contrast.contrast(
                    probe, tokens, segment_ids, scores["logprob_extended"],
                    context=short, stride=max(1, short // 4),
                )  # fmt: skip
            for row, record in enumerate(batch):
                used = min(len(record["tokens"]), length)
                scored += used
                yield {"id": record["id"]} | {
                    name: values[row, : used - 1] for name, values in scores.items()
                }
            logging.info(
                "score: %d of %d samples, %.0f tokens/s (with compilation)",
                start + len(batch), count, scored / (time.perf_counter() - started),
            )  # fmt: skip

    path = workdir / "scores" / "long.array_record"
    _write_in_parts(path, count, batch_size * config.score.part, rows)
    return {
        "tokens": count * length,
        "flops": 2 * forward_flops(base_config, count, length),
        "tokens_per_second": round(scored / (time.perf_counter() - started), 1),
    }


def _write_in_parts(path, count: int, size: int, rows) -> None:
    """Writes `rows(first, last)` for ranges of `size` of `count` records, each to a file of its own, then all together.

    Parts that are there already are not made again. All processes make the rows together; the first one writes.
    """
    folder = path.with_suffix(".parts")
    # The size is part of the name: parts of another size are of no use.
    parts = [
        (folder / f"{first:08d}-{min(first + size, count):08d}.array_record", first)
        for first in range(0, count, size)
    ]
    for part, first in parts:
        if not part.is_file():
            _write(part, rows(first, min(first + size, count)))
    _write(path, itertools.chain.from_iterable(RecordFile(part) for part, _ in parts))
    if jax.process_index() == 0:
        shutil.rmtree(folder)


def _write(path, rows) -> None:
    if jax.process_index() == 0:
        write_records(path, rows)
    else:
        for _ in rows:
            pass
    sharding.barrier(str(path))


# ------------------------------------------------------------------------------------------- analyse


@on_first_process
def analyse(config, workdir):
    """Significance, the top fraction at each position, and the classes over-represented in it."""
    documents = examples.open_records(workdir / "documents" / "long.array_record")
    scores = examples.open_records(workdir / "scores" / "long.array_record")
    classes = open_classes(config, workdir)
    length = max(len(record["delta_logit"]) for record in scores)
    changes, class_rows, segments, marks = [], [], [], []
    for record in scores:
        document = documents.by_id(record["id"])
        changes.append(impact.score_of(record, config.analyse.score))
        class_rows.append(classes.of(document))
        segments.append(document["segment_lengths"])
        marks.append(document["marks"][1:])
    analysis = impact.analyse(
        delta_NL=impact.stack(changes, length),
        # The first token is predicted by nothing.
        classes_NL=impact.stack_rows(
            [row[1 : len(change) + 1] for row, change in zip(class_rows, changes, strict=True)],
            length,
        ),
        marks_NL=impact.stack(marks, length),
        names=classes.names,
        sentences_C=impact.sentence_shares(class_rows, segments, classes.names),
        top=config.analyse.top,
        top_fraction=config.analyse.top_fraction,
        min_lift=config.analyse.min_lift,
        unscored=impact.unscored(config.analyse.score, config.score.short_context),
    )
    if warning := analysis["flatness"]["warning"]:
        logging.warning("analyse: %s", warning)
    if analysis["top_share"] > 1.1 * config.analyse.top_fraction:
        logging.warning(
            "analyse: of %d samples the top %.0f %% at each position is %.0f %% of the tokens; score more samples, or "
            "set config.analyse.top=overall",
            analysis["samples"], 100 * config.analyse.top_fraction, 100 * analysis["top_share"],
        )  # fmt: skip
    logging.info("analyse: anchor classes: %s", ", ".join(analysis["anchors"]) or "none")
    for row in analysis["classes"]:
        over = row["lift"] > config.analyse.min_lift and row["interval"][0] > 1
        content = row["name"] not in impact.NO_CONTENT
        if over and content and not row["anchor"]:
            logging.info(
                "analyse: '%s' is over-represented too (lift %.2f), but %.0f %% of the sentences hold one: no anchor",
                row["name"], row["lift"], 100 * row["sentences"],
            )  # fmt: skip
    wd.write_json(workdir / "scores" / "analysis.json", analysis)


def open_classes(config, workdir) -> classing.Classing:
    """The config's classes: names, and a function from a record of a document {id, tokens} to its classes [L].

    Classes that depend on the document are found once for all documents and kept in scores/classes_KIND.array_record.
    """
    kind = config.analyse.classes
    made = classing.make_classing(kind, open_tokenizer(workdir).token_texts(), window=config.window)
    if kind == "text":
        return classing.Classing(made.names, lambda record: made.of(record["tokens"]))
    path = workdir / "scores" / f"classes_{kind}.array_record"
    if not path.is_file():
        documents = examples.open_records(workdir / "documents" / "long.array_record")
        write_records(
            path,
            ({"id": record["id"], "classes": made.of(record["tokens"])} for record in documents),
        )
    kept = RecordFile(path)
    return classing.Classing(made.names, lambda record: kept.by_id(record["id"])["classes"])


# ------------------------------------------------------------------------------------------- select


@on_first_process
def select(config, workdir):
    """For every method, the sentences it keeps of each long sample, to exactly the training length."""
    analysis = wd.read_json(workdir / "scores" / "analysis.json")
    for name in config.methods:
        method = config.methods[name]
        if method.positions and method.selection != "at_positions":
            write_selection(config, workdir, name, method, analysis)


def write_selection(config, workdir, name, method, analysis) -> None:
    """selected/NAME.array_record: {id, tokens, segment_lengths, marks, token_index} and maybe weights."""
    if method.selection == "at_positions":
        return
    documents = examples.open_records(workdir / "documents" / "long.array_record")
    if method.selection.startswith("anchor") and not analysis["anchors"]:
        raise UserError(
            f"methods.{name}: selection {method.selection!r} has nothing to hold on to: {analysis['flat']}"
        )
    choose = make_selector(
        config, workdir, method.selection, analysis, method.train_length, method.top_fraction
    )
    scores = None
    if method.weighting:
        scores = examples.open_records(workdir / "scores" / "long.array_record")

    reaches = []

    def rows():
        for record in documents:
            kept = choose(record)
            reaches.append((len(kept.token_index), kept.reach, len(record["tokens"])))
            index, lengths = kept.token_index, kept.segment_lengths
            if method.shuffle:
                rng = examples.rng_of(config.seed, f"{record['id']} shuffled")
                index, lengths = examples.shuffled(index, lengths, rng)
            row = {
                "id": record["id"],
                "tokens": record["tokens"][index],
                "segment_lengths": lengths,
                "marks": record["marks"][index],
                "token_index": index,
            }
            if method.weighting == "longce":
                change_L = _score_of("logprob", scores, record, "weighting")
                row["weights"] = np.minimum(np.exp(change_L[index]), LONGCE_LIMIT)
            yield row

    write_records(workdir / "selected" / f"{name}.array_record", rows())
    kept, reach, whole = np.sum(reaches, axis=0)
    # These take every sentence that fits their rule, from the start on, until the budget is full.
    if method.selection in ("anchor", "digits") and reach < MOSTLY_THE_START * kept < whole:
        logging.warning(
            "methods.%s: selection %r has its %.0f %% of the tokens from the first %.0f %% of the documents: nearly "
            "every sentence is one that it keeps, so it hardly differs from 'first'; 'anchor_spread' takes them from "
            "everywhere",
            name, method.selection, 100 * kept / whole, 100 * reach / whole,
        )  # fmt: skip


def make_selector(config, workdir, method: str, analysis, length: int = 0, top_fraction=0.0):
    """The function from a record of a long document to what the method keeps of it (`selection.Selection`).

    Args:
        length: tokens to keep; 0: config.train_length.
        top_fraction: of the method top; 0: config.analyse.top_fraction.
    """
    texts = open_tokenizer(workdir).token_texts()
    digits_V = np.asarray([any(c.isdigit() for c in text) for text in texts])
    classes = scores = top = None
    if method.startswith("anchor"):
        classes = open_classes(config, workdir)
        anchors = [classes.names.index(name) for name in analysis["anchors"]]
    if method in ("score", "linked", "weighted", "top"):
        scores = examples.open_records(workdir / "scores" / "long.array_record")
    if method == "top":
        top = _top_tokens(config, workdir, scores, top_fraction or config.analyse.top_fraction)

    def choose(record) -> selection.Selection:
        tokens, wanted = record["tokens"], None
        if classes is not None:
            wanted = np.isin(classes.of(record), anchors)
        if top is not None:
            wanted = top[record["id"]]
        return selection.select(
            # Of more top tokens than fit, which stay must not depend on their place.
            "anchor_spread" if method == "top" else method,
            record["segment_lengths"], length or config.train_length,
            rng=examples.rng_of(config.seed, record["id"]), document_id=record["id"],
            anchor_mask_L=wanted,
            digit_mask_L=digits_V.take(tokens),
            delta_L=None if scores is None else _score_of(config.analyse.score, scores, record, method),
            source_L=references.copies(tokens) if method == "linked" else None,
        )  # fmt: skip

    return choose


def _top_tokens(config, workdir, scores, fraction: float) -> dict[str, np.ndarray]:
    """{document id: which of its tokens are in the top fraction, of all documents at their place or of all tokens}."""
    documents = examples.open_records(workdir / "documents" / "long.array_record")
    # The first token is predicted by nothing.
    rows = {
        record["id"]: _score_of(config.analyse.score, scores, record, "top")[1:]
        for record in documents
    }
    if fraction == 1:
        return {id_: np.ones(len(row) + 1, bool) for id_, row in rows.items()}
    delta_NL = impact.stack(list(rows.values()), max(map(len, rows.values())))
    delta_NL[:, : impact.unscored(config.analyse.score, config.score.short_context)] = np.nan
    top_NL = impact.TOPS[config.analyse.top](delta_NL, fraction, ~np.isnan(delta_NL))
    return {
        id_: np.concatenate([[False], top_L[: len(row)]])
        for top_L, (id_, row) in zip(top_NL, rows.items(), strict=True)
    }


def _score_of(name: str, scores, record, method):
    """The score of a whole sample; its first token is predicted by nothing and has none."""
    if record["id"] not in scores.ids:
        raise UserError(
            f"selection {method!r}: sample {record['id']!r} has no scores; set config.score.samples=0 (all)"
        )
    delta = impact.score_of(scores.by_id(record["id"]), name)
    if len(delta) + 1 != len(record["tokens"]):
        raise UserError(
            f"selection {method!r}: sample {record['id']!r} has {len(record['tokens'])} tokens, of which "
            f"{len(delta) + 1} are scored; set config.score.length=0 (all)"
        )
    return np.concatenate([[0.0], delta]).astype(np.float32)
