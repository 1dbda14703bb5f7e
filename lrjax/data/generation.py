"""A checkpoint's settings for generation (generation_config.json): temperature, end tokens and the rest, kept whole."""

import json
from pathlib import Path

from lrjax.errors import UserError

GENERATION_FILE = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(directory: Path) -> dict:
    """generation_config.json, and what only config.json says of the end and other tokens.

    Raises:
        UserError: a file that is not a JSON object.
    """
    found = _read(directory / GENERATION_FILE)
    for name, value in _read(directory / "config.json").items():
        if name in _TOKENS and value is not None:
            found.setdefault(name, value)
    return found


def _read(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON object is expected")
    return content
