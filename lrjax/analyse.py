"""What each selection keeps of a run's long documents: `python -m lrjax.analyse WORKDIR [--chunk=32]`.

    WORKDIR/analysis/selections.json     everything below, with the settings
    WORKDIR/analysis/selections.md       the table
    WORKDIR/analysis/ablation.jsonl      with --ablation_documents: what the tokens of each document go by

The run needs its stages import to analyse. For every score that is stored (`longrecipe/impact.py`): the anchor classes
it finds, the p-value of its flatness and, where documents have marked answers, how well it tells them from the others.
For every method of `longrecipe/selection.py`, over the same documents:

    kept           share of the tokens that is kept, and of it the part that only fills up the budget
    reach          share of the documents that lies before the last kept token: a rule that fits nearly every sentence
                   has its budget full early, and what it keeps is little but the start
    references     tokens that repeat something from at least a window back: the marked answers where the documents have
                   marks, else every copied group of three tokens. How many are kept, how many with their source, and
                   of how many the source alone
    LDS            the Long Dependency Score of what is kept (`longrecipe/dependency.py`), beside that of the whole
    pairs          dependent pairs of chunks of the whole that are kept, and kept on both sides

With --ablation_documents the references are found a second time, by what the model makes use of: the tokens that lose a
nat and more when a part at least a window back is hidden (`longrecipe/ablation.py`; a reading of the document for every
part). The model has to read as far as the documents go: --model=probe where the base does not.

Intervals (95 %) are of a bootstrap over documents. A mistake ends with one line and exit code 2.
"""

import pathlib

import numpy as np
from absl import logging

from lrjax import choosing, examples, sharding
from lrjax import workdir as wd
from lrjax.command import ProgramFlags, run_program
from lrjax.data.jsonl import appender, read_appended
from lrjax.errors import UserError
from lrjax.longrecipe import ablation, dependency, impact, references, selection
from lrjax.run import load_for_reading, open_mesh

_FLAGS = ProgramFlags()
_METHODS = _FLAGS.DEFINE_list("methods", list(selection.METHODS), "Selections to look at.")
_DOCUMENTS = _FLAGS.DEFINE_integer("documents", 0, "Documents to look at; 0: all scored ones.")
_LDS_DOCUMENTS = _FLAGS.DEFINE_integer(
    "lds_documents", 16, "Of these, the number whose Long Dependency Score is taken; 0: none."
)
_CHUNK = _FLAGS.DEFINE_integer("chunk", 128, "Tokens of a chunk of the Long Dependency Score.")
_MODEL = _FLAGS.DEFINE_string("model", "base", "The checkpoint of the run that reads the texts.")
_ABLATION_DOCUMENTS = _FLAGS.DEFINE_integer(
    "ablation_documents",
    0,
    "Documents whose references are found by hiding parts, too.",
    lower_bound=0,
)
_PART = _FLAGS.DEFINE_integer(
    "part",
    1,
    "Tokens of a part that is hidden, at least: whole sentences; 1: one sentence.",
    lower_bound=1,
)

REPLICATES = 2000


def measure(
    config,
    workdir,
    *,
    methods=selection.METHODS,
    documents=0,
    lds_documents=16,
    chunk=128,
    model="base",
    ablation_documents=0,
    part=1,
) -> dict:
    """The figures of `selections.json`; arguments as the flags."""
    analysis = wd.read_json(workdir / "scores" / "analysis.json")
    samples = examples.open_records(workdir / "documents" / "long.array_record")
    scored = examples.open_records(workdir / "scores" / "long.array_record").ids
    ids = scored[: documents or len(scored)]
    reader, wholes, hidden = None, [], []
    if lds_documents or ablation_documents:
        reader = load_for_reading(config, workdir, model)
    if ablation_documents:
        asked = [samples.by_id(id_) for id_ in ids[:ablation_documents]]
        hidden = _without_parts(config, workdir, reader, asked, model=model, part=part)
    if lds_documents:
        for id_ in ids[:lds_documents]:
            tokens = samples.by_id(id_)["tokens"]
            wholes.append(dependency.long_dependency(reader, tokens, chunk=chunk))
            logging.info("analyse: LDS of %d documents", len(wholes))
    marked = any(samples.by_id(id_)["marks"].any() for id_ in ids)
    found = {
        "window": config.window,
        "budget": config.train_length,
        "documents": len(ids),
        "references": "marked answers" if marked else "copied groups of three tokens",
        "anchors": analysis["anchors"],
        "scores": _scores(config, workdir, samples, ids),
        "lds": None,
        "ablation": None,
        "methods": {},
    }
    if hidden:
        found["ablation"] = _agreement(hidden) | {
            "part": part, "model": model, "documents": len(hidden), "least": ablation.LEAST,
        }  # fmt: skip
    if wholes:
        found["lds"] = {
            "chunk": chunk, "model": model, "documents": len(wholes),
            "whole": _mean([whole["lds"] for whole in wholes]),
            "whole_chunks": wholes[0]["chunks"], "kept_chunks": config.train_length // chunk,
        }  # fmt: skip
    for method in methods:
        if method not in selection.METHODS:
            raise UserError(f"--methods {method!r}: allowed: {', '.join(selection.METHODS)}")
        if method.startswith("anchor") and not analysis["anchors"]:
            logging.warning("analyse: no anchor classes: %s", analysis["flat"])
            continue
        choose = choosing.make_selector(config, workdir, method, analysis)
        counts, reaches, filled, lds, pairs, used, total = [], [], 0, [], [], [], 0
        for index, id_ in enumerate(ids):
            record = samples.by_id(id_)
            kept = choose(record)
            filled, total = filled + kept.filled, total + len(record["tokens"])
            source_L = references.copies(record["tokens"])
            reference_L = references.is_far(source_L, config.window)
            if marked:
                reference_L &= record["marks"].astype(bool)
            reaches.append({"reach": kept.reach, "length": len(record["tokens"])})
            counts.append(references.count_kept(kept.token_index, source_L, reference_L))
            if index < len(wholes):
                kept_tokens = record["tokens"][kept.token_index]
                lds.append(dependency.long_dependency(reader, kept_tokens, chunk=chunk)["lds"])
                delta_CC = wholes[index]["delta_CC"]
                pairs.append(dependency.kept_pairs(delta_CC, kept.token_index, chunk))
            if index < len(hidden):
                of = hidden[index]
                used.append(ablation.count_kept(kept.token_index, of["source_L"], of["part_L"]))
        found["methods"][method] = {
            "kept_share": len(ids) * config.train_length / total,
            "filled_share": filled / (len(ids) * config.train_length),
            "reach": _share(reaches, "reach", "length"),
            **_kept_shares(counts),
            "ablation": _kept_shares(used) if used else None,
            "lds": _mean(lds) if lds else None,
            "pairs_kept": _share(pairs, "kept", "pairs") if pairs else None,
            "pairs_with_source": _share(pairs, "with_source", "pairs") if pairs else None,
        }
    return found


def _without_parts(config, workdir, reader, records, *, model: str, part: int) -> list[dict]:
    """Of every token of each document its part, the part it goes by, and whether that is where it is copied from.

    What has been read, which takes minutes a document, is kept in analysis/ablation.jsonl.
    """
    setting = {"model": model, "part": part, "window": config.window, "least": ablation.LEAST}
    file = workdir / "analysis" / "ablation.jsonl"
    known = {
        row["id"]: np.array(row["source"], np.int32)
        for _, row in read_appended(file)
        if setting.items() <= row.items()
    }
    found = []
    with appender(file) as append:
        for record in records:
            tokens_L, id_ = record["tokens"], record["id"]
            part_L = ablation.parts(record["segment_lengths"], part)
            if id_ not in known:
                lost_PL = ablation.lost_without(reader, tokens_L, part_L, window=config.window)
                known[id_] = ablation.source_parts(lost_PL)
                append({"id": id_, **setting, "source": known[id_].tolist()})
            source_L, copied_L = known[id_], references.copies(tokens_L)
            far_L = references.is_far(copied_L, config.window)
            same_L = far_L & (source_L == part_L[copied_L])
            found.append(
                {"part_L": part_L, "source_L": source_L, "copied_far_L": far_L, "same_L": same_L}
            )
            logging.info("analyse: parts of %d documents hidden", len(found))
    return found


def _agreement(hidden) -> dict:
    """How many tokens go by a part that is far away, and how far these are the tokens that copy from far away."""
    counts = [
        {
            "tokens": len(of["part_L"]),
            "used": int((of["source_L"] >= 0).sum()),
            "copied": int(of["copied_far_L"].sum()),
            "same": int(of["same_L"].sum()),
        }
        for of in hidden
    ]
    return {
        "references": _share(counts, "used", "tokens"),
        "copied": _share(counts, "copied", "tokens"),
        "copied_from_there": _share(counts, "same", "used"),
        "used_of_copied": _share(counts, "same", "copied"),
    }


def _kept_shares(counts) -> dict:
    """`references.count_kept` of all documents as shares."""
    return {
        "references": sum(row["references"] for row in counts),
        "kept": _share(counts, "kept", "references"),
        "with_source": _share(counts, "with_source", "references"),
        "with_source_of_kept": _share(counts, "with_source", "kept"),
        "source_only": _share(counts, "source_only", "references"),
    }


def _scores(config, workdir, samples, ids) -> dict:
    """{score: {"anchors", "p_value", "concentration", "auc", "recall_in_top"}}, the last two where there are marks."""
    stored = examples.open_records(workdir / "scores" / "long.array_record")
    classes = choosing.open_classes(config, workdir)
    rows = [(stored.by_id(id_), samples.by_id(id_)) for id_ in ids]
    length = max(len(record["delta_logit"]) for record, _ in rows)
    whole_rows = [classes.of(sample) for _, sample in rows]
    class_rows = [
        row[1 : len(record["valid"]) + 1] for row, (record, _) in zip(whole_rows, rows, strict=True)
    ]
    classes_NL = impact.stack_rows(class_rows, length)
    segments = [sample["segment_lengths"] for _, sample in rows]
    sentences_C = impact.sentence_shares(whole_rows, segments, classes.names)
    marks_NL = impact.stack([sample["marks"][1:] for _, sample in rows], length)
    found = {}
    for name in impact.SCORES:
        if name in ("kl", "contrast") and name not in rows[0][0]:
            continue
        delta_NL = impact.stack([impact.score_of(record, name) for record, _ in rows], length)
        analysis = impact.analyse(
            delta_NL, classes_NL, marks_NL, names=classes.names, sentences_C=sentences_C, top=config.analyse.top,
            top_fraction=config.analyse.top_fraction, min_lift=config.analyse.min_lift,
            unscored=impact.unscored(name, config.score.short_context),
        )  # fmt: skip
        flatness, validation = analysis["flatness"], analysis.get("validation", {})
        found[name] = {"anchors": analysis["anchors"]} | {
            "p_value": flatness["p_value"], "concentration": flatness["concentration"],
            "auc": validation.get("auc"), "recall_in_top": validation.get("recall_in_top"),
        }  # fmt: skip
    return found


def table(found: dict) -> str:
    """The figures as Markdown tables, with a line above that says what was counted."""
    scores = [
        "| score | anchor classes | p of flatness | top holds | AUC | in the top |",
        "|---" * 6 + "|",
    ]
    for name, row in found["scores"].items():
        figures = (row[key] for key in ("p_value", "concentration", "auc", "recall_in_top"))
        cells = " | ".join("-" if figure is None else f"{figure:.3f}" for figure in figures)
        scores.append(f"| {name} | {', '.join(row['anchors']) or 'none'} | {cells} |")
    lines = [
        *scores,
        "",
        f"{found['documents']} documents, budget {found['budget']} tokens, far is {found['window']} tokens and more; "
        f"references: {found['references']}; anchor classes: {', '.join(found['anchors']) or 'none'}.",
        "",
    ]
    head = [
        "selection",
        "fills up",
        "reach",
        "kept",
        "with source",
        "of the kept, with source",
        "source alone",
    ]
    if found["lds"]:
        whole = found["lds"]
        lines[-2] += (
            f" LDS in chunks of {whole['chunk']} by {whole['model']}, {whole['documents']} documents; whole: "
            f"{_text(whole['whole'], 2)} ({whole['whole_chunks']} chunks, kept: {whole['kept_chunks']})."
        )
        head += ["LDS", "pairs kept", "on both sides"]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method, row in found["methods"].items():
        cells = [method, f"{row['filled_share']:.2f}", _text(row["reach"], 2)]
        cells += [
            _text(row[k]) for k in ("kept", "with_source", "with_source_of_kept", "source_only")
        ]
        if found["lds"]:
            cells += [
                _text(row["lds"], 2),
                _text(row["pairs_kept"]),
                _text(row["pairs_with_source"]),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    if found["ablation"]:
        lines += ["", *_ablation_table(found)]
    return "\n".join(lines) + "\n"


def _ablation_table(found: dict) -> list[str]:
    of = found["ablation"]
    used, copied, there, same = (
        "none" if of[key] is None else _text([100 * share for share in of[key]], 1)
        for key in ("references", "copied", "copied_from_there", "used_of_copied")
    )
    lines = [
        f"References by what {of['model']} makes use of, {of['documents']} documents, hidden parts of {of['part']} "
        f"tokens and more: {used} % of the tokens lose {of['least']:g} nat and more without a part that is "
        f"{found['window']} tokens back and more; {there} % of these end three tokens copied from there. Of all tokens "
        f"{copied} % end three copied from so far back, and {same} % of these go by the part they are copied from.",
        "",
        "| selection | references | kept | with source | of the kept, with source | source alone |",
        "|---" * 6 + "|",
    ]
    for method, row in found["methods"].items():
        shares = row["ablation"]
        cells = [
            _text(shares[k]) for k in ("kept", "with_source", "with_source_of_kept", "source_only")
        ]
        lines.append(f"| {method} | {shares['references']} | {' | '.join(cells)} |")
    return lines


def _text(value, digits: int = 3) -> str:
    if value is None:
        return "-"
    share, low, high = (f"{number:.{digits}f}" for number in value)
    return f"{share} ({low} to {high})"


def _share(rows, part: str, whole: str):
    """[sum of part / sum of whole, and its interval by documents], or None where there is nothing to share."""
    parts, wholes = (np.array([row[key] for row in rows], float) for key in (part, whole))
    if not wholes.sum():
        return None
    draws = _draws(len(rows))
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile((draws @ parts) / (draws @ wholes), [0.025, 0.975])
    return [float(parts.sum() / wholes.sum()), float(low), float(high)]


def _mean(values):
    values = np.array(values)
    low, high = np.quantile(_draws(len(values)) @ values / len(values), [0.025, 0.975])
    return [float(values.mean()), float(low), float(high)]


def _draws(count: int) -> np.ndarray:
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), REPLICATES)


def main(argv) -> None:
    if len(argv) != 2:
        raise UserError("usage: python -m lrjax.analyse WORKDIR [--chunk=128] (--help for more)")
    workdir = pathlib.Path(argv[1])
    config = wd.read_config(workdir)
    with sharding.layout(open_mesh(config), config.rules):
        found = measure(
            config, workdir, methods=_METHODS.value, documents=_DOCUMENTS.value,
            lds_documents=_LDS_DOCUMENTS.value, chunk=_CHUNK.value, model=_MODEL.value,
            ablation_documents=_ABLATION_DOCUMENTS.value, part=_PART.value,
        )  # fmt: skip
    wd.write_json(workdir / "analysis" / "selections.json", found)
    text = table(found)
    (workdir / "analysis" / "selections.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_program(main, _FLAGS)
