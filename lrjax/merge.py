"""Merges models: `python -m lrjax.merge A B --weights=.5,.5 --out=C [--rope_from=B]`.

A, B, ... are Orbax model directories; what the weights and `--rope_from` mean is in `lrjax.longrecipe.merging`. A
mistake ends with one line on standard error and exit code 2.
"""

import sys

from absl import app, flags

from lrjax.checkpoints import orbax
from lrjax.errors import UserError
from lrjax.longrecipe import merging

_WEIGHTS = flags.DEFINE_list("weights", None, "A weight for each model, from 0 to 1, 1 in all.")
_OUT = flags.DEFINE_string("out", None, "Directory of the merged model; no model may be there.")
_METHOD = flags.DEFINE_enum("method", "linear", merging.METHODS, "How to merge.")
_ROPE_FROM = flags.DEFINE_string(
    "rope_from", None, "The model whose RoPE base and window the result has; needed if they differ."
)


def main(argv) -> None:
    paths = argv[1:]
    if not paths or _WEIGHTS.value is None or _OUT.value is None:
        raise UserError("needed: model directories, --weights and --out; see --help")
    try:
        weights = [float(weight) for weight in _WEIGHTS.value]
    except ValueError as error:
        raise UserError(f"--weights={','.join(_WEIGHTS.value)}: {error}") from error
    if len(weights) != len(paths):
        raise UserError(f"--weights has {len(weights)} numbers for {len(paths)} models")
    if len(set(paths)) < len(paths):
        raise UserError(f"models {', '.join(paths)}: one of them is there twice")
    if orbax.is_model(_OUT.value):
        raise UserError(f"--out={_OUT.value}: there is a model already; choose another directory")
    sources = dict(zip(paths, weights, strict=True))
    merging.merge(sources, _OUT.value, _METHOD.value, rope_from=_ROPE_FROM.value)


def parse_flags(argv):
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        print(f"lrjax.merge: {error}", file=sys.stderr)
        sys.exit(2)
