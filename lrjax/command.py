"""What the command-line programs share: flags of their own, one line for a user's mistake, quiet logs.

    _FLAGS = ProgramFlags()
    _OUT = _FLAGS.DEFINE_string("out", None, "Directory of the result.")

    if __name__ == "__main__":
        run_program(main, _FLAGS)

absl keeps one table of flags for a whole process, in which two programs may not have flags of one name. Here each has
a table of its own until it is the one that runs, so that a notebook or a test can import them all.
"""

import ctypes
import functools
import pathlib
import sys
from logging import INFO

from absl import app, flags, logging

from lrjax.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_ONE_GIB = 1 << 30


class ProgramFlags:
    """The flags of one program: `DEFINE_string` and the others of `absl.flags`."""

    def __init__(self):
        self.values = flags.FlagValues()

    def __getattr__(self, name: str):
        if not name.startswith("DEFINE_"):
            raise AttributeError(name)
        return functools.partial(getattr(flags, name), flag_values=self.values)

    def __getitem__(self, name: str) -> flags.Flag:
        return self.values[name]

    def parse(self, argv) -> list[str]:
        """Reads the command line into these flags and absl's own; returns what is no flag."""
        table = flags.FLAGS
        others = {name: table[name] for name in self.values if name in table}
        for name in self.values:
            if name in others:
                delattr(table, name)
            table[name] = self.values[name]
            table.register_key_flag_for_module(argv[0], self.values[name])  # for --help
        try:
            rest = parse_flags(argv)
        finally:
            for name in self.values:
                delattr(table, name)
            for name, flag in others.items():
                table[name] = flag
        self.values.mark_as_parsed()
        return rest


def run_program(main_function, own: ProgramFlags | None = None) -> None:
    """Runs a command-line program: a `UserError` is one line and exit code 2."""
    logging.set_verbosity(logging.INFO)
    _quieten()
    keep_freed_memory()
    try:
        app.run(main_function, flags_parser=own.parse if own else parse_flags)
    except UserError as error:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
        sys.exit(2)


def keep_freed_memory() -> None:
    """Lets the C allocator keep what is freed. XLA's CPU programs take and free their temporaries at every step, and
    glibc gives large ones back to the system each time, which then clears the pages again: a fifth of the time of
    the small models' steps. Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _ONE_GIB)
        mallopt(_M_TRIM_THRESHOLD, _ONE_GIB)


def parse_flags(argv) -> list[str]:
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


def _quieten() -> None:
    """Of other libraries' log lines, only the warnings: Orbax alone writes several for each checkpoint."""
    package = str(pathlib.Path(__file__).parent)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno > INFO or record.pathname.startswith(package)
    )
