"""The rooms of the house: who may import whom. An arrow that points upwards makes a part unusable alone."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "lrjax"

# A room may import the rooms below it, and itself.
BELOW = {
    "errors": set(),
    "data": {"errors"},
    "reporting": {"errors"},
    "sharding": {"errors"},
    "models": {"errors", "sharding"},
    "checkpoints": {"errors", "sharding", "models", "data"},
    "longrecipe": {"errors", "sharding", "models", "checkpoints", "data"},
    "training": {"errors", "sharding", "preemption", "models", "checkpoints", "data", "reporting"},
    "evaluation": {"errors", "sharding", "models", "checkpoints", "data"},
    "preemption": {"errors"},
    "planning": {
        "errors",
        "sharding",
        "models",
        "checkpoints",
        "data",
        "training",
        "evaluation",
        "longrecipe",
        "config",
    },
}


def imports(file):
    """The rooms of lrjax that a module imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "lrjax" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("room", BELOW)
def test_rooms_import_downwards_only(room):
    files = list((PACKAGE / room).rglob("*.py")) or [PACKAGE / f"{room}.py"]
    for file in files:
        upwards = set(imports(file)) - BELOW[room] - {room}
        assert not upwards, f"{file.name} imports {upwards}"


def test_nothing_loads_pickles_or_remote_code():
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "cloudpickle"} & set(names), file
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{file}:{node.lineno}: bare except"
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", file
