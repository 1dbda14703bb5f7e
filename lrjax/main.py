"""Runs the recipe: `python -m lrjax.main --config=configs/NAME.py[:variant] --workdir=DIR [--stages=a,b]`.

Fields of the config are set with `--config.field=value`. A run that was stopped goes on with the same command.
A mistake ends with one line on standard error and exit code 2.
"""

import pathlib
import sys
from logging import INFO

from absl import app, flags, logging
from ml_collections import config_flags

from lrjax import multihost, preemption, recipe
from lrjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, configs/NAME.py[:variant]."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made if it is not there.")
_STAGES = flags.DEFINE_list("stages", [], f"Only these stages: {', '.join(recipe.STAGES)}.")


def main(argv) -> None:
    if len(argv) > 1:
        raise UserError(f"unknown argument {argv[1]!r}; see --help")
    config = config_of_flag()
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing; see --help")
    multihost.start()
    try:
        preemption.end_on_notice()
        recipe.run(config, _WORKDIR.value, _STAGES.value)
    except preemption.Preempted as notice:
        logging.info("%s; the same command goes on", notice)


def config_of_flag():
    """The config that --config names."""
    if _CONFIG.value is None:
        raise UserError("--config is missing; see --help")
    file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    # ml_collections speaks of a missing file only when a field is looked at.
    if not pathlib.Path(file).is_file():
        raise UserError(f"--config={file}: there is no such file")
    return _CONFIG.value


def parse_flags(argv):
    """absl's flags, with a mistake in them told in one line (a config file's own bugs keep their traceback)."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, OSError, TypeError) as error:
        # ml_collections wraps what a config raises in its traceback; AttributeError, KeyError and TypeError are
        # its own words for a field that the config does not have, or a value of another type.
        first = error
        while first.__context__ is not None:
            first = first.__context__
        if isinstance(first, UserError):
            raise first from None
        if "Traceback" in str(error):
            raise
        if isinstance(error, KeyError | AttributeError):
            name = _one_line(error).strip("\"'")
            raise UserError(
                f"--config: no field {name!r}; lrjax/config.py has all of them"
            ) from error
        raise UserError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    message = str(error.args[0]) if error.args else str(error)
    return " ".join(message.split())


def run_program(main_function, parse=parse_flags) -> None:
    """Runs a command-line program: a `UserError` is one line and exit code 2."""
    try:
        app.run(main_function, flags_parser=parse)
    except UserError as error:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
        sys.exit(2)


def quieten() -> None:
    """Of other libraries' log lines, only the warnings: Orbax alone writes several for each checkpoint."""
    package = str(pathlib.Path(__file__).parent)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno > INFO or record.pathname.startswith(package)
    )


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    quieten()
    run_program(main)
