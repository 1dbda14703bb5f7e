"""The one exception of lrjax for what a user can put right.

Library code raises `UserError` with a single line: what is wrong, where, the value, and what is allowed.
The command-line programs print that line and end with exit code 2; every other exception is a bug and keeps
its traceback.
"""


class UserError(ValueError):
    """A mistake in a config, a file or an argument that the user can correct."""
