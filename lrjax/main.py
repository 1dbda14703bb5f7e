"""Runs the recipe: `python -m lrjax.main --config=configs/NAME.py[:variant] --workdir=DIR [--stages=a,b]`.

Fields of the config are set with `--config.field=value`. A run that was stopped goes on with the same command.
A mistake ends with one line on standard error and exit code 2.
"""

import pathlib

from absl import flags, logging
from ml_collections import config_flags

from lrjax import multihost, preemption, recipe
from lrjax.command import run_program
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


if __name__ == "__main__":
    run_program(main)
