"""What the prompts of RULER, LongBench and LooGLE say: lrjax's own words, or the published ones from a checkout.

    wording = ruler()                        # ships with lrjax (wording.json)
    wording = ruler("/somewhere/RULER")      # the published one: scores compare with published scores

Nothing of a checkout is run: its Python files are parsed and their literals read.
"""

import ast
import json
import pathlib

from lrjax.errors import UserError

_OWN = pathlib.Path(__file__).parent / "wording.json"
_FAMILIES = (
    "niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa",
)  # fmt: skip


def own(benchmark: str) -> dict:
    """lrjax's own wording of a benchmark."""
    return json.loads(_OWN.read_text(encoding="utf-8"))[benchmark] | {"source": "lrjax"}


def ruler(checkout=None) -> dict:
    """{"source", "noise", "needle", "document", FAMILY: {"tokens_to_generate", "template", "answer_prefix"}}.

    "niah" also has "template_one" and "answer_prefix_one", for a single value. Of a checkout of
    github.com/NVIDIA/RULER, "source" is "RULER".

    Raises:
      UserError: the directory is no such checkout, or a literal is not where it should be.
    """
    if not checkout:
        return own("ruler")
    folder = pathlib.Path(checkout) / "scripts" / "data" / "synthetic"
    tasks = _assigned(folder / "constants.py", "TASKS")[0]
    wording = {"source": "RULER"}
    for family in _FAMILIES:
        try:
            entry = tasks[family]
            wording[family] = {
                "tokens_to_generate": int(entry["tokens_to_generate"]),
                "template": entry["template"],
                "answer_prefix": entry["answer_prefix"],
            }
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder / 'constants.py'}: TASKS has no {family} with tokens_to_generate, template "
                "and answer_prefix"
            ) from error
    wording["noise"] = _assigned(folder / "niah.py", "haystack")[0]
    wording["needle"] = _assigned(folder / "niah.py", "needle")[0]
    wording["document"] = _assigned(folder / "qa.py", "DOCUMENT_PROMPT")[0]
    niah = wording["niah"]
    replacements = _replacements(folder / "niah.py")
    for part in ("template", "answer_prefix"):
        text = niah[part]
        for old, new in replacements:
            text = text.replace(old, new)
        niah[f"{part}_one"] = text
    return wording


def longbench(checkout=None) -> dict:
    """{"source", "prompts": {subset: template}, "max_new_tokens": {subset: tokens}}; of a checkout of
    github.com/THUDM/LongBench its config/*.json."""
    if not checkout:
        return own("longbench")
    root = pathlib.Path(checkout)
    for folder in (root / "LongBench" / "config", root / "config"):
        if (folder / "dataset2prompt.json").is_file():
            return {
                "source": "LongBench",
                "prompts": _json(folder / "dataset2prompt.json"),
                "max_new_tokens": _json(folder / "dataset2maxlen.json"),
            }
    raise UserError(
        f"--longbench_wording={checkout}: no config/dataset2prompt.json there; allowed: a checkout of "
        "github.com/THUDM/LongBench"
    )


def loogle(checkout=None) -> dict:
    """The same of LooGLE: config/task2prompt.json and task2maxlen.json of github.com/bigai-nlco/LooGLE."""
    if not checkout:
        return own("loogle")
    folder = pathlib.Path(checkout) / "config"
    return {
        "source": "LooGLE",
        "prompts": _json(folder / "task2prompt.json"),
        "max_new_tokens": _json(folder / "task2maxlen.json"),
    }


def _json(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it belongs to the benchmark's checkout")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def _parse(path: pathlib.Path) -> ast.Module:
    if not path.is_file():
        raise UserError(
            f"--ruler_dir: {path} is not there; allowed: a checkout of github.com/NVIDIA/RULER"
        )
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not readable as Python: {error}") from error


def _assigned(path: pathlib.Path, name: str) -> list:
    """The literals that the file assigns to a name, in order."""
    found = []
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            try:
                found.append(ast.literal_eval(node.value))
            except ValueError:
                continue  # an expression: not what is looked for
    if not found:
        raise UserError(f"{path}: no literal is assigned to {name}; another version of RULER?")
    return found


def _replacements(path: pathlib.Path) -> list[tuple[str, str]]:
    """The (old, new) of `template = template.replace(old, new)` in the file, in order: how many become one."""
    found = []
    for node in ast.walk(_parse(path)):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        call = node.value
        if (
            isinstance(call.func, ast.Attribute)
            and call.func.attr == "replace"
            and isinstance(call.func.value, ast.Name)
            and call.func.value.id == "template"
        ):
            found.append((node.lineno, tuple(map(ast.literal_eval, call.args))))
    if not found:
        raise UserError(f"{path}: no template.replace(...) there; another version of RULER?")
    return [pair for _, pair in sorted(found)]
