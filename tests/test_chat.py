"""Chat templates: the text is that of transformers' apply_chat_template, in a sandbox, wherever the template lies."""

import json

import gguf as gguf_format
import pytest

from lrjax.checkpoints import gguf
from lrjax.data.tokenizers import byte_tokenizer, load_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation.samples import Prompter, Sample

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") if strftime_now is defined else "2024" %}
{%- endif %}
{#- the first message, if it is the system's #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for tool in tools or [] %}
    {{- tool | tojson(indent=2) }}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.index0 > 9 %}{% break %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {% generation %}{{- message['content'] | trim }}{% endgeneration %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% set ns = namespace(turn=0) %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (ns.turn % 2 == 0) %}
        {{ raise_exception('roles must alternate: user, assistant, ...') }}
    {% endif %}
    {% set ns.turn = ns.turn + 1 %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% else %}
{{ message['content'] + eos_token }}
    {% endif %}
{% endfor %}"""
CHATS = {
    "one": [{"role": "user", "content": "What is <b>1 & 2</b>, é?"}],
    "several": [
        {"role": "user", "content": "  Hi\n"},
        {"role": "assistant", "content": "Hello.", "tool_calls": None},
        {"role": "user", "content": "Bye"},
    ],
    "system": [{"role": "system", "content": "Be kind. "}, {"role": "user", "content": "Hi"}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]


def tokenizer_with(directory, template, **config):
    byte_tokenizer().save(directory)
    content = {"bos_token": "<s>", "eos_token": "<eos>", "chat_template": template} | config
    backend = json.loads((directory / "tokenizer.json").read_text())
    backend["model"]["vocab"]["<s>"] = 257
    backend["added_tokens"] = [
        {"id": index, "content": text, "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for index, text in ((256, "<eos>"), (257, "<s>"))
    ]  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(backend))
    content |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return load_tokenizer(directory)


@pytest.mark.slow
def test_texts_are_those_of_transformers(tmp_path):
    import transformers

    smollm2 = load_tokenizer(gguf.packaged_smollm2())
    smollm2.save(tmp_path / "smollm2")
    named = [{"name": "default", "template": MISTRAL}, {"name": "tool_use", "template": LLAMA3}]
    ours = {
        "smollm2": smollm2,
        "llama3": tokenizer_with(tmp_path / "llama3", LLAMA3),
        "mistral": tokenizer_with(tmp_path / "mistral", MISTRAL),
        "named": tokenizer_with(tmp_path / "named", named),
    }
    for name, tokenizer in ours.items():
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for kind, messages in CHATS.items():
            if kind == "system" and name in ("mistral", "named"):
                continue
            for prompt in (True, False):
                text = tokenizer.chat(messages, add_generation_prompt=prompt)
                expected = theirs.apply_chat_template(
                    messages, add_generation_prompt=prompt, tokenize=False
                )
                assert text == expected, (name, kind, prompt)
                ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
                assert tokenizer.encode(text).tolist() == ids["input_ids"]
        if name in ("llama3", "named"):
            text = tokenizer.chat(
                CHATS["one"],
                tools=TOOLS,
                date_string="today",
                template="default" if name == "llama3" else "tool_use",
            )
            assert text == theirs.apply_chat_template(
                CHATS["one"], tools=TOOLS, date_string="today", add_generation_prompt=True, tokenize=False
            )  # fmt: skip
            assert '"description": "<é>"' in text


def test_a_templates_own_refusal_is_one_line(tmp_path):
    tokenizer = tokenizer_with(tmp_path, MISTRAL)
    with pytest.raises(UserError, match="cannot write these messages: roles must alternate"):
        tokenizer.chat(CHATS["system"])
    with pytest.raises(UserError, match="no messages"):
        tokenizer.chat([])
    with pytest.raises(UserError, match=r"no chat template 'tools'; it has: default"):
        tokenizer.chat(CHATS["one"], template="tools")
    with pytest.raises(UserError, match=r"no chat template 'default'; it has: none"):
        byte_tokenizer().chat(CHATS["one"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ range(10 ** 9) }}",
        "{% include 'other' %}",
        "{{ messages",
        "{{ 1 + 'a' }}",
    ],
)
def test_a_template_can_read_and_change_nothing_else(tmp_path, template):
    tokenizer = tokenizer_with(tmp_path, template)
    with pytest.raises(UserError, match="chat template cannot write"):
        tokenizer.chat(CHATS["one"])


def test_templates_are_found_wherever_transformers_writes_them(tmp_path):
    assert tokenizer_with(tmp_path, None).chat_template is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "legacy"}')
    assert load_tokenizer(tmp_path).chat_template == "legacy"
    config = tmp_path / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"chat_template": "in the config"}))
    assert load_tokenizer(tmp_path).chat_template == "in the config"
    (tmp_path / "chat_template.jinja").write_text("a file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_templates == {"default": "a file", "tool_use": "tools"}
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_templates == tokenizer.chat_templates
    (tmp_path / "again" / "tokenizer_config.json").write_text('{"chat_template": [1]}')
    with pytest.raises(UserError, match=r"chat_template is '\[1\]'; known are a text and a list"):
        load_tokenizer(tmp_path / "again")


def test_a_gguf_can_hold_several(tmp_path):
    writer = gguf_format.GGUFWriter(tmp_path / "tokenizer.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "<|end|>"])
    writer.add_token_types([1, 3])
    writer.add_token_merges([])
    writer.add_eos_token_id(1)
    writer.add_chat_template(
        [{"name": "default", "template": "d{{ eos_token }}"}, {"name": "rag", "template": "r"}]
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "tokenizer.gguf")
    assert tokenizer.chat_templates == {"default": "d{{ eos_token }}", "rag": "r"}
    assert tokenizer.chat(CHATS["one"]) == "d<|end|>"
    assert tokenizer.encode("a<|end|>").tolist() == [0, 1]


def test_a_prompt_has_the_templates_bos_and_no_second_one(tmp_path):
    tokenizer = tokenizer_with(tmp_path, LLAMA3)
    sample = Sample(0, "Who?", "", ("me",))
    plain = Prompter(tokenizer, chat=True)
    text = plain.text(sample)
    assert text.startswith("<s><|start_header_id|>system") and text.count("<s>") == 1
    assert plain.template == LLAMA3
    with pytest.raises(UserError, match="--chat: the tokenizer has no chat template"):
        Prompter(byte_tokenizer(), chat=True)
