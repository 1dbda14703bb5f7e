"""RULER's tasks: exact lengths, answerable prompts, the published definition, scores of perfect and empty answers."""

import json
import re

import pytest

from lrjax.checkpoints import gguf
from lrjax.data import pypi_texts
from lrjax.data.jsonl import write_jsonl
from lrjax.data.tokenizers import byte_tokenizer, load_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation import depths, qa_sample, ruler, wording
from lrjax.evaluation.questions import ask, rows_of
from lrjax.evaluation.ruler_material import Material
from lrjax.evaluation.samples import Prompter, Sample, read_samples

PUBLISHED = """
TASKS = {
    "niah": {"tokens_to_generate": 64, "template": "Some odd {type_needle_v} are here.\\n{context}\\nWhat are all "
             "the {type_needle_v} of {query}?", "answer_prefix": " The {type_needle_v} of {query} are"},
    "variable_tracking": {"tokens_to_generate": 30, "template": "Track.\\n{context}\\nWho is {query}?",
                          "answer_prefix": " {num_v} are {query}: "},
    "common_words_extraction": {"tokens_to_generate": 120, "template": "List.\\n{context}\\nTop 10?",
                                "answer_prefix": " Top:"},
    "freq_words_extraction": {"tokens_to_generate": 50, "template": "Code. {context}\\nTop 3?", "answer_prefix": " 3:"},
    "qa": {"tokens_to_generate": 32, "template": "Docs.\\n{context}\\nQ: {query}", "answer_prefix": " A:"},
}
"""
NIAH = """
raise SystemExit("a checkout is read, never run")
needle = "One {type_needle_v} of {key}: {value}."
if essay:
    haystack = load()
elif noise:
    haystack = "Grass grows."
def f(template):
    template = template.replace("Some", "A")
    template = template.replace("are all", "is")
    template = template.replace("are", "is")
"""


@pytest.fixture(scope="module")
def prompter():
    return Prompter(load_tokenizer(gguf.packaged_smollm2()))


@pytest.fixture(scope="module")
def material():
    return Material(pypi_texts.essays, squad="sample", hotpotqa="sample")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("RULER")
    folder = root / "scripts" / "data" / "synthetic"
    folder.mkdir(parents=True)
    (folder / "constants.py").write_text(PUBLISHED)
    (folder / "niah.py").write_text(NIAH)
    (folder / "qa.py").write_text(
        'DOCUMENT_PROMPT = "Doc {i}: {document}"\nimport nothing_like_it\n'
    )
    return root


@pytest.fixture(scope="module")
def made(prompter, material):
    """Every task at 1,536 tokens, three samples."""
    words = wording.ruler()
    return {
        name: ruler.make(name, 1536, prompter, material, words, count=3) for name in ruler.TASKS
    }


@pytest.mark.parametrize("name", ruler.TASKS)
def test_prompt_and_budget_fill_the_length_and_never_more(made, prompter, name):
    task = made[name]
    assert len({sample.input for sample in task.samples}) == 3
    for sample in task.samples:
        used = len(prompter.tokens(sample)) + task.max_new_tokens
        assert used == sample.length <= 1536
        assert used > 1536 - 110  # a paragraph of HotpotQA, the largest unit


@pytest.mark.parametrize("name", ruler.TASKS)
def test_a_perfect_answer_scores_100_and_an_empty_one_0(made, prompter, name, tmp_path):
    task = made[name]

    def perfect(prompts, max_new_tokens, stop):
        assert max_new_tokens == task.max_new_tokens
        return [(i, " It is " + ", ".join(s.outputs)) for i, s in enumerate(task.samples)]

    def empty(prompts, max_new_tokens, stop):
        return [(i, "") for i in range(len(prompts))]

    assert ask(task, perfect, prompter, limit=1536)["score"] == 100
    result = ask(task, empty, prompter, limit=1536)
    assert result["score"] == 0 and result["empty"] == 3
    assert len(result["samples"]) == 3 and result["samples"][0]["prompt"].startswith(
        task.samples[0].input
    )
    json.dumps(result)


def test_the_answers_are_in_the_prompts(made):
    counts = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    for name, task in made.items():
        for sample in task.samples:
            assert len(sample.outputs) == counts.get(name, 1)
            for answer in sample.outputs:
                assert answer in sample.input, name


def test_needles_of_each_kind(made):
    """Keys, values and haystacks are the published ones: words, seven digits, uuids; noise, essays, needles."""
    needle = re.compile(r"Note that the secret (\w+) for (\S+) is: (\S+)\.")
    for name, kind, key, value, count in (
        ("niah_single_1", "numbers", r"[a-z-]+", r"\d{7}", 1),
        ("niah_single_3", "uuids", r"[a-z-]+", r"[0-9a-f-]{36}", 1),
        ("niah_multikey_1", "numbers", r"[a-z-]+", r"\d{7}", 4),
        ("niah_multikey_3", "uuids", r"[0-9a-f-]{36}", r"[0-9a-f-]{36}", None),
        ("niah_multivalue", "numbers", r"[a-z-]+", r"\d{7}", 4),
    ):
        sample = made[name].samples[0]
        found = needle.findall(sample.input)
        assert len(found) == count or (count is None and len(found) > 8)
        for found_kind, found_key, found_value in found:
            assert found_kind == kind
            assert re.fullmatch(key, found_key, re.IGNORECASE), found_key
            assert re.fullmatch(value, found_value)
    many, one = made["niah_multivalue"].samples[0], made["niah_single_2"].samples[0]
    assert " are" in many.answer_prefix and one.answer_prefix.endswith(" is")


def test_common_words_come_up_most_often(made):
    """The published repetitions: 6 and 1 below 4,096 tokens, 30 and 3 from there on."""
    for sample in made["cwe"].samples:
        listed = sample.input.rsplit("keep those in mind.\n", 1)[1].split("\nQuestion")[0]
        words = re.findall(r"\d+\. (\S+)", listed)
        counts = {word: words.count(word) for word in {*words}}
        assert {word for word, n in counts.items() if n == 6} == {*sample.outputs}
        assert {n for word, n in counts.items() if word not in sample.outputs} == {1}


def test_frequent_words_are_unambiguous(made):
    for sample in made["fwe"].samples:
        words = sample.input.split("comes up. ", 1)[1].split("\nQuestion")[0].split()
        counts = sorted(((words.count(w), w) for w in {*words}), reverse=True)
        assert counts[0][1] == "..."
        assert [word for _, word in counts[1:4]] == list(sample.outputs)
        assert counts[3][0] > counts[4][0]


def test_chains_lead_from_the_value_to_every_variable(made):
    for sample in made["vt"].samples:
        value = re.search(r"hold the value (\d{5})", sample.input.rsplit("Question", 1)[1])[1]
        question = sample.input.rsplit("Some lines of the text", 1)[1]
        assigned = dict(re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})", question))
        for name in sample.outputs:
            for _ in range(5):
                name = assigned.get(name, name)
            assert name == value


def test_samples_depend_on_seed_index_and_length_alone(prompter, material):
    words = wording.ruler()
    make = lambda **o: ruler.make("niah_multikey_2", 700, prompter, material, words, **o).samples  # noqa: E731
    assert make(count=4)[:2] == make(count=2)
    assert make(count=1, seed=43)[0].input != make(count=1)[0].input


def test_the_published_wording_is_read_and_not_run(checkout, prompter, material):
    words = wording.ruler(checkout)
    assert words["source"] == "RULER" and words["noise"] == "Grass grows."
    assert words["niah"]["template_one"].startswith("A odd {type_needle_v} is here.")
    task = ruler.make("niah_single_1", 512, prompter, material, words, count=1)
    assert task.max_new_tokens == 64 and task.about["wording"] == "RULER"
    assert (
        "What is the number of" in task.samples[0].input
        and "Grass grows.\n" in task.samples[0].input
    )
    many = ruler.make("niah_multiquery", 700, prompter, material, words, count=1).samples[0]
    assert "What are all the numbers of" in many.input and ", and " in many.input
    with pytest.raises(UserError, match="checkout of"):
        wording.ruler(checkout / "elsewhere")
    (checkout / "scripts/data/synthetic/qa.py").write_text("DOCUMENT_PROMPT = make()")
    with pytest.raises(UserError, match=r"qa.py: no literal is assigned to DOCUMENT_PROMPT"):
        wording.ruler(checkout)


def test_jsonl_goes_out_and_comes_back(made, tmp_path):
    path = tmp_path / "niah" / "validation.jsonl"
    task = made["niah_multivalue"]
    write_jsonl(path, rows_of(task))
    row = json.loads(path.read_text().splitlines()[1])
    assert {"index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix"} <= set(
        row
    )
    assert read_samples(path) == task.samples
    # RULER's own niah files have the place of the answer there, which may come twice.
    theirs = tmp_path / "theirs.jsonl"
    write_jsonl(theirs, (sample.row() | {"index": 417} for sample in task.samples))
    samples = read_samples(theirs)
    assert [sample.index for sample in samples] == list(range(len(task.samples)))
    assert {sample.extra["others"]["id"] for sample in samples} == {417}
    with open(path, "a") as file:
        file.write('{"index": 3,\n')
    with pytest.raises(UserError, match=r"validation.jsonl, line 4: not JSON"):
        read_samples(path)


def test_scores_are_those_of_ruler():
    sample = Sample(0, "", "", ("Ab 1", "cd", "ef"))
    assert ruler.string_match_all("xx ab 1\x07CD", sample) == pytest.approx(2 / 3)
    assert (
        ruler.string_match_part("nothing", sample) == 0
        and ruler.string_match_part("EF", sample) == 1
    )
    scores = dict.fromkeys(ruler.TASKS, 50.0) | {"niah_multikey_1": 80.0, "niah_multivalue": 20.0}
    assert ruler.averages(scores)["niah_m"] == pytest.approx((60 + 20 + 50) / 3)
    assert ruler.averages(scores)["ruler"] == pytest.approx(50.0)
    assert "ruler" not in ruler.averages({"vt": 1.0})


def test_mistakes_are_named(prompter, material, tmp_path):
    words = wording.ruler()
    with pytest.raises(UserError, match=r"unknown task 'vtt'; allowed: niah_single_1"):
        ruler.make("vtt", 1024, prompter, material, words, count=1)
    with pytest.raises(UserError, match=r"ruler vt: length 300; the task's own text takes"):
        ruler.make("vt", 300, prompter, material, words, count=1)
    with pytest.raises(UserError, match=r"--squad= is missing; the file is dev-v2.0.json"):
        ruler.make("qa_1", 1024, prompter, Material(pypi_texts.essays), words, count=1)
    with pytest.raises(UserError, match="has 240 questions"):
        ruler.make("qa_1", 1024, prompter, material, words, count=241)
    bad = tmp_path / "squad.json"
    bad.write_text('{"data": [{"title": "no paragraphs"}]}')
    with pytest.raises(UserError, match=r"squad.json: not in the format of squad"):
        ruler.make("qa_1", 1024, prompter, Material(None, squad=str(bad)), words, count=1)
    with pytest.raises(UserError, match="no chat template"):
        Prompter(byte_tokenizer(), chat=True)


def test_questions_of_files_are_those_of_the_data_sets(tmp_path, prompter):
    data = qa_sample.squad()
    data["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = True
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(data))
    task = ruler.make(
        "qa_1", 900, prompter, Material(None, squad=str(path)), wording.ruler(), count=2
    )
    assert task.samples[0].outputs == (
        data["data"][0]["paragraphs"][0]["qas"][1]["answers"][0]["text"],
    )
    assert task.about["sources"]["squad"] == "squad.json"


@pytest.mark.parametrize("kind", depths.KINDS)
def test_needles_stand_at_their_depths(prompter, kind):
    essays = pypi_texts.essays()
    task = depths.make(kind, 1024, prompter, essays, count=2, depths=(0.0, 0.5, 1.0))
    assert len(task.samples) == 6 and max(s.length for s in task.samples) <= 1024
    for sample in task.samples:
        (value,) = sample.outputs
        text = sample.input.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        assert text.index(value) / len(text) == pytest.approx(sample.extra["depth"], abs=0.15)
    if kind != "passkey":
        task = depths.make(kind, 1024, prompter, essays, count=1, depths=(0.2, 0.8), together=True)
        a, b = task.samples
        assert a.outputs[0] in b.input and b.outputs[0] in a.input and a.outputs != b.outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["niah_multiquery", "cwe", "qa_2"])
def test_131072_tokens_are_fitted_in_a_few_readings(prompter, material, name, monkeypatch):
    """Seconds a sample are for docs/evaluation.md; what they hang on is how much text is tokenised on the way."""
    read = []
    encode = prompter.tokenizer.encode
    monkeypatch.setattr(
        prompter.tokenizer, "encode", lambda text: read.append(len(text)) or encode(text)
    )
    words = wording.ruler()
    ruler.make(name, 1536, prompter, material, words, count=1)
    read.clear()
    (sample,) = ruler.make(name, 131072, prompter, material, words, count=1).samples
    assert 131072 - 300 < sample.length <= 131072
    assert 0 < sum(read) < 10 * len(sample.input)  # 6, 7 and 2 times
