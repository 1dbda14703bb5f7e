"""The directory of a run: which config it belongs to, and which stages are complete.

A stage is complete when its marker `stages/NAME.json` is there; it is written last, by renaming, so a kill at any
moment leaves a stage either complete or to be done again (training goes on from its newest step).
"""

import json
import os
import pathlib

import jax
from ml_collections import ConfigDict

from lrjax.config import without_added
from lrjax.errors import UserError
from lrjax.sharding import barrier

_LAYOUT = ("mesh.", "rules.", "row_multiple", "model.attention", "model.context_parallel")


def write_json(path, content) -> None:
    """Writes JSON under a temporary name and renames it: whole or not at all. Of several processes one writes."""
    if jax.process_index() != 0:
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def read_json(path):
    """Reads JSON; an unreadable file is a `UserError` that names it."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; run the stage that writes it first") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not readable as JSON ({error}); remove it and run again"
        ) from error


def flatten(config, prefix="") -> dict:
    """{"evaluate.niah.lengths": [...], ...}: one entry for each leaf of a config."""
    flat = {}
    for key in config:
        value, name = config[key], f"{prefix}{key}"
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, name + ".")
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def read_config(workdir) -> ConfigDict:
    """The config that a run belongs to, from its config.json. Raises `UserError` where there is none."""
    nested: dict = {}
    for name, value in read_json(pathlib.Path(workdir) / "config.json").items():
        section = nested
        *sections, leaf = name.split(".")
        for part in sections:
            section = section.setdefault(part, {})
        section[leaf] = value
    for section in ("rules", "methods"):  # sections that may be empty leave no line
        nested.setdefault(section, {})
    return ConfigDict(nested)


def claim(workdir, config) -> None:
    """Makes `workdir` the home of `config`, or checks that it is.

    Raises:
        UserError: the directory belongs to another config; the fields that differ are named.
    """
    workdir = pathlib.Path(workdir)
    file = workdir / "config.json"
    mine = json.loads(json.dumps(flatten(config)))
    if file.exists():
        mine, theirs = without_added(mine), without_added(read_json(file))
        different = [
            f"{name} ({theirs.get(name, 'absent')!r} there, {mine.get(name, 'absent')!r} here)"
            for name in sorted(set(mine) | set(theirs))
            if mine.get(name, "absent") != theirs.get(name, "absent")
            and not name.startswith(_LAYOUT)  # a run may go on on other devices
        ]
        if different:
            raise UserError(
                f"{workdir} belongs to another config; it differs in {'; '.join(different)}; "
                "use another --workdir or the same config"
            )
        barrier("config")
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot be made: {error.strerror}") from error
    write_json(file, mine)
    barrier("config")


def is_complete(workdir, stage: str) -> bool:
    return (pathlib.Path(workdir) / "stages" / f"{stage}.json").is_file()


def mark_complete(workdir, stage: str, facts: dict) -> None:
    """Records that a stage is complete: {"seconds", "tokens", "flops"}."""
    write_json(pathlib.Path(workdir) / "stages" / f"{stage}.json", facts)
    barrier(stage)
