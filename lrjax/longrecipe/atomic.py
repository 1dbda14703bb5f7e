"""A finished directory takes its place in one step, also where another one is."""

import ctypes
import errno
import os
import pathlib
import shutil

from lrjax.errors import UserError

_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


def replace_directory(new: pathlib.Path, place: pathlib.Path) -> None:
    """`new` becomes `place`; a directory that is there is exchanged with it and then removed.

    Raises:
        UserError: something is at `place` and this system cannot exchange directories.
    """
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        os.replace(new, place)
        return
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        arguments = (_AT_FDCWD, bytes(new), _AT_FDCWD, bytes(place), _RENAME_EXCHANGE)
        code = 0 if rename(*arguments) == 0 else ctypes.get_errno()
    if code:
        raise UserError(
            f"{place}: cannot be replaced in one step here ({os.strerror(code)}); remove it and run again"
        )
    shutil.rmtree(new)
