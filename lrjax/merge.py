"""Merges models.

    python -m lrjax.merge A B --weights=.5,.5 --out=C [--method=slerp] [--rope_from=B]
    python -m lrjax.merge A B --weights=1,1 --base=BASE --method=ties --density=.3 --out=C
    python -m lrjax.merge --config=merge.yml --out=C                   mergekit's YAML, as it is
    python -m lrjax.merge --last=3 RUN/checkpoints/STAGE --out=C       the average of the last steps of a training
    python -m lrjax.merge A B --search=4 --recipe=configs/tiny.py --workdir=RUN --out=DIR
    python -m lrjax.merge A B C --soup=short --recipe=configs/tiny.py --workdir=RUN --out=C

A, B, ... are Hugging Face directories with safetensors, or lrjax models; the result is the same. `--search` and
`--soup` evaluate with the tasks of a recipe whose run is in `--workdir` (see `lrjax.merge_search`). What the settings
mean is in `lrjax.longrecipe.merge_settings`. A mistake ends with one line on standard error and exit code 2; a merge
that was stopped goes on with the same command.
"""

import pathlib

from lrjax.command import ProgramFlags, run_program
from lrjax.errors import UserError
from lrjax.longrecipe import merging
from lrjax.longrecipe.merge_methods import METHODS
from lrjax.longrecipe.merge_settings import MergeRecipe, read_mergekit

_FLAGS = ProgramFlags()
_OUT = _FLAGS.DEFINE_string("out", None, "Directory of the result.")
_CONFIG = _FLAGS.DEFINE_string("config", None, "A merge in mergekit's YAML, instead of models.")
_METHOD = _FLAGS.DEFINE_enum("method", "linear", list(METHODS), "How to merge.")
_WEIGHTS = _FLAGS.DEFINE_list("weights", None, "A weight for each model.")
_BASE = _FLAGS.DEFINE_string("base", None, "What differences are taken to, or slerp starts from.")
_DENSITY = _FLAGS.DEFINE_list(
    "density", None, "Share of the differences to keep: one, or one each."
)
_SCALE = _FLAGS.DEFINE_float("scale", None, "Factor on the sum of differences (lambda).")
_SEED = _FLAGS.DEFINE_integer("seed", None, "Of DARE's draws.")
_NORMALIZE = _FLAGS.DEFINE_bool("normalize", None, "Divide by the sum of the weights.")
_STRICT_SUM = _FLAGS.DEFINE_bool(
    "strict_sum", None, "Refuse weights of a linear merge that do not sum to 1, or warn."
)
_DTYPE = _FLAGS.DEFINE_enum("dtype", None, ["float32", "float16", "bfloat16"], "Of the result.")
_ROPE_FROM = _FLAGS.DEFINE_string(
    "rope_from", None, "The model whose RoPE and window the result has; needed if they differ."
)
_TOKENIZER_FROM = _FLAGS.DEFINE_string("tokenizer_from", None, "The same for the tokenizer.")
_LAST = _FLAGS.DEFINE_integer("last", None, "Average the last steps that a stage has kept.")
_OVERWRITE = _FLAGS.DEFINE_bool("overwrite", False, "Replace what is at --out, in one step.")
_THREADS = _FLAGS.DEFINE_integer("threads", None, "Tensors merged at once.")
_HASHES = _FLAGS.DEFINE_bool("hashes", True, "Record the sha256 of every source file.")
_SYNC = _FLAGS.DEFINE_bool("sync", False, "Wait until the disk has it all.")
_SEARCH = _FLAGS.DEFINE_integer(
    "search", None, "Evaluate all weights that are multiples of 1/SEARCH, and plot the frontier."
)
_SOUP = _FLAGS.DEFINE_enum(
    "soup", None, ["needle", "short"], "Average the models that improve a metric, best first."
)
_RECIPE = _FLAGS.DEFINE_string("recipe", None, "configs/NAME.py[:variant] whose tasks evaluate.")
_WORKDIR = _FLAGS.DEFINE_string("workdir", None, "The run with the data and tokenizer of --recipe.")


def main(argv) -> None:
    paths = argv[1:]
    if _OUT.value is None:
        raise UserError("--out is missing; see --help")
    if _SEARCH.value is not None or _SOUP.value is not None:
        _evaluate(paths)
        return
    merging.run(
        _recipe(paths), _OUT.value, overwrite=_OVERWRITE.value, threads=_THREADS.value,
        hashes=_HASHES.value, sync=_SYNC.value,
    )  # fmt: skip


def _recipe(paths) -> MergeRecipe:
    changes = {
        "base": _BASE.value, "scale": _SCALE.value, "seed": _SEED.value, "normalize": _NORMALIZE.value,
        "strict_sum": _STRICT_SUM.value, "dtype": _DTYPE.value, "rope_from": _ROPE_FROM.value,
        "tokenizer_from": _TOKENIZER_FROM.value,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    if _CONFIG.value is not None:
        if paths or _WEIGHTS.value or _DENSITY.value or _LAST.value or _FLAGS["method"].present:
            raise UserError("--config says what is merged; leave models, weights and methods out")
        return read_mergekit(_CONFIG.value, **changes)
    if _LAST.value is not None:
        if len(paths) != 1 or _WEIGHTS.value or _FLAGS["method"].present:
            raise UserError("--last=K takes one directory, RUN/checkpoints/STAGE, and no weights")
        return MergeRecipe("linear", last_steps(paths[0], _LAST.value), **changes)
    if not paths or _WEIGHTS.value is None:
        raise UserError("needed: models and --weights, or --config; see --help")
    weights = _numbers("weights", _WEIGHTS.value, len(paths))
    if len(set(paths)) < len(paths):
        raise UserError(f"models {', '.join(paths)}: one of them is there twice")
    if _DENSITY.value is not None:
        values = _DENSITY.value * (len(paths) if len(_DENSITY.value) == 1 else 1)
        densities = _numbers("density", values, len(paths))
        changes["density"] = dict(zip(paths, densities, strict=True))
    return MergeRecipe(_METHOD.value, dict(zip(paths, weights, strict=True)), **changes)


def last_steps(stage, count: int) -> dict[str, float]:
    """Equal weights for the last steps that a training stage has kept (config: keep_checkpoints)."""
    steps = pathlib.Path(stage) / "steps"
    numbers = [int(path.name) for path in steps.glob("*") if path.name.isdigit()]
    if not 1 <= count <= len(numbers):
        raise UserError(
            f"--last={count}: {steps} has {len(numbers)} steps; allowed: 1 to that (a stage keeps as many as "
            "its keep_checkpoints says)"
        )
    return {str(steps / str(number)): 1 / count for number in sorted(numbers)[-count:]}


def _numbers(flag: str, texts, count: int) -> list[float]:
    try:
        numbers = [float(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--{flag}={','.join(texts)}: {error}") from error
    if len(numbers) != count:
        raise UserError(f"--{flag} has {len(numbers)} numbers for {count} models")
    return numbers


def _evaluate(paths) -> None:
    if not paths or _RECIPE.value is None or _WORKDIR.value is None:
        raise UserError("--search and --soup need models, --recipe and --workdir; see --help")
    from lrjax import merge_search  # with jax, which a merge of files does without

    if _SEARCH.value is not None:
        merge_search.search(
            paths, _SEARCH.value, _RECIPE.value, _WORKDIR.value, _OUT.value,
            method=_METHOD.value, rope_from=_ROPE_FROM.value,
        )  # fmt: skip
    else:
        merge_search.soup(
            paths,
            _SOUP.value,
            _RECIPE.value,
            _WORKDIR.value,
            _OUT.value,
            rope_from=_ROPE_FROM.value,
        )


if __name__ == "__main__":
    run_program(main, _FLAGS)
