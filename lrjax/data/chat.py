"""Chat templates: messages become the text that an instruct model was trained on, as transformers renders them.

    templates = read_templates(directory, tokenizer_config)        # {"default": "{% for message in messages %}..."}
    text = render(templates["default"], messages, {"bos_token": "<s>"}, add_generation_prompt=True)

A template comes with a checkpoint and is code of a stranger: it runs in jinja's sandbox, sees what it is handed and
nothing else, and can change none of it.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from lrjax.errors import UserError

DEFAULT = "default"
_FILE, _FOLDER = "chat_template.jinja", "additional_chat_templates"  # as transformers 5 writes them
_PROCESSOR_FILE = "chat_template.json"  # of processors of transformers 4


def read_templates(directory: Path, config: Mapping) -> dict[str, str]:
    """The templates of a checkpoint by name; empty where there are none.

    As `AutoTokenizer` looks for them: chat_template.jinja and additional_chat_templates/NAME.jinja, or else
    "chat_template" in tokenizer_config.json (a text, or a list of {"name", "template"}), or else chat_template.json.

    Raises:
        UserError: "chat_template" is none of these, or chat_template.json is not readable.
    """
    found = {}
    if (file := directory / _FILE).is_file():
        found[DEFAULT] = file.read_text(encoding="utf-8")
    for file in sorted((directory / _FOLDER).glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    if found:
        return found
    where, given = directory / "tokenizer_config.json", config.get("chat_template")
    if given is None and (file := directory / _PROCESSOR_FILE).is_file():
        where = file
        try:
            given = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{file}: no JSON object with a "chat_template" ({error})') from error
    return named(given, str(where))


def named(given, where: str) -> dict[str, str]:
    """Templates by name, from the forms that "chat_template" has: nothing, a text, or [{"name", "template"}]."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {DEFAULT: given}
    try:
        found = {entry["name"]: entry["template"] for entry in given}
    except (TypeError, KeyError):
        found = {}
    if not found or not all(isinstance(part, str) for part in (*found, *found.values())):
        raise UserError(
            f'{where}: chat_template is {str(given)[:60]!r}; known are a text and a list of {{"name", "template"}}'
        )
    return found


def render(
    template: str,
    messages: Sequence[Mapping],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping] | None = None,
    **variables,
) -> str:
    """The text of a conversation.

    Args:
        messages: [{"role", "content", ...}]; entries that are None are left out, as transformers does.
        special_tokens: "bos_token" and the like: what the template can name.
        add_generation_prompt: end with what the assistant's answer begins with.
        tools: JSON schemas of functions, for templates that show them to the model.
        variables: what else a template reads, such as date_string or enable_thinking.

    Raises:
        UserError: no message, or the template refuses the messages (its own words) or cannot be run.
    """
    if not messages:
        raise UserError("chat: there are no messages; allowed: one and more")
    chat = [{key: part for key, part in m.items() if part is not None} for m in messages]
    given = {**special_tokens, **variables, "messages": chat, "tools": tools, "documents": None}
    try:
        return _compile(template).render(**given, add_generation_prompt=add_generation_prompt)
    # The second kind is what a template runs into that adds a text to a list, or the like.
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the chat template cannot write these messages: {reason}") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant said; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """jinja's, without names that Python itself looks up (`__class__`)."""

    def __init__(*given, **names):
        self, *given = given
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*given, **names).items():
            self[name] = value

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)


def _refuse(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Without jinja's escapes for HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
