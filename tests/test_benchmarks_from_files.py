"""LongBench, LooGLE and HumanEval from local files: their metrics to the digit, echoes score 100, cuts are counted."""

import gc
import json

import pytest

from lrjax.data.jsonl import write_jsonl
from lrjax.data.tokenizers import byte_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation import (
    humaneval,
    longbench,
    loogle,
    metrics_with_data,
    sandbox,
    suite,
    wording,
)
from lrjax.evaluation import text_metrics as metrics
from lrjax.evaluation.questions import ask
from lrjax.evaluation.samples import Prompter, Sample

ANSWERS = {
    "passage_count": "7",
    "passage_retrieval_en": "Paragraph 12",
    "passage_retrieval_zh": "段落3",
    "trec": "Food",
    "lsht": "体育",
    "lcc": "return total + 1",
    "repobench-p": "return total + 1",
}
CHINESE = {"multifieldqa_zh", "dureader", "vcsum"}


def rows(name, count=3):
    answer = ANSWERS.get(name, "The old bridge. It was built in 1417")
    return [
        {
            "input": f"input {i}", "context": "some long context, " * 20, "answers": [answer],
            "length": 3000 * (i + 1), "all_classes": ["Food", "Foodstuff", "Animal", "体育", "音乐"], "_id": str(i),
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def prompter():
    return Prompter(byte_tokenizer())


def echo(task):
    return lambda prompts, budget, stop: [(i, s.outputs[0]) for i, s in enumerate(task.samples)]


def empty(prompts, budget, stop):
    return [(i, "") for i in range(len(prompts))]


@pytest.mark.parametrize("name", sorted({*longbench.SUBSETS} - CHINESE))
def test_longbench_scores_an_echo_100_and_nothing_0(tmp_path, prompter, name):
    for suffix in ("", "_e"):
        write_jsonl(tmp_path / f"{name}{suffix}.jsonl", rows(name))
    task = longbench.make(name, tmp_path, prompter, wording.longbench())
    assert task.max_new_tokens == wording.longbench()["max_new_tokens"][name]
    result = ask(task, echo(task), prompter)
    assert result["score"] == pytest.approx(100) and result["cut"] == 0
    assert ask(task, empty, prompter)["score"] == 0
    cut = ask(task, echo(task), prompter, limit=task.max_new_tokens + 150)
    assert cut["cut"] == 3 and cut["wording"] == "lrjax"
    assert cut["limit"] == task.max_new_tokens + 150 and cut["of"] == cut["count"] == 3
    shown, whole = cut["samples"][0], result["samples"][0]
    assert shown["cut"] and not whole["cut"] and len(shown["prompt"]) < len(whole["prompt"])
    assert len(longbench.make(name, tmp_path, prompter, wording.longbench(), count=2).samples) == 2
    if name in longbench.SUBSETS_E:
        task = longbench.make(name, tmp_path, prompter, wording.longbench(), e=True)
        groups = ask(task, echo(task), prompter)["groups"]
        assert {bucket: group["count"] for bucket, group in groups.items()} == {
            "0-4k": 1,
            "4-8k": 1,
            "8k+": 1,
        }


def test_every_subset_has_wording_a_metric_and_a_budget():
    words = wording.longbench()
    assert len(longbench.SUBSETS) == 21 and len(longbench.SUBSETS_E) == 13
    assert set(words["prompts"]) == set(words["max_new_tokens"]) == set(longbench.SUBSETS)
    for template in words["prompts"].values():
        assert "some text" in template.format(context="some text", input="a question")
    assert set(wording.loogle()["prompts"]) == set(loogle.SUBSETS)


def test_published_prompts_come_from_a_checkout(tmp_path, prompter):
    folder = tmp_path / "LongBench" / "config"
    folder.mkdir(parents=True)
    (folder / "dataset2prompt.json").write_text(json.dumps({"trec": "Q {context} {input}"}))
    (folder / "dataset2maxlen.json").write_text(json.dumps({"trec": 9}))
    write_jsonl(tmp_path / "trec.jsonl", rows("trec"))
    task = longbench.make("trec", tmp_path, prompter, wording.longbench(tmp_path), count=2)
    assert (
        task.about["wording"] == "LongBench" and task.max_new_tokens == 9 and len(task.samples) == 2
    )
    assert task.samples[0].input.startswith("Q some long context") and not task.chat
    with pytest.raises(UserError, match=r"no config/dataset2prompt\.json"):
        wording.longbench(folder)


def test_averages_are_the_published_ones():
    scores = dict.fromkeys(longbench.SUBSETS, 40.0) | {"lcc": 82.0}
    found = longbench.averages(scores)
    assert found["mean"] == pytest.approx(42) and found["categories"]["code"] == pytest.approx(61)
    assert found["category_mean"] == pytest.approx((5 * 40 + 61) / 6)
    assert longbench.averages({"lcc": 1.0}) == {}


PAIRS = [
    ("the cat sat. on the mat", "a cat sat on the mat. it was late"),
    ("same words same words", "same words"),
    ("one.two. three", "three two one"),
    ("b a b c", "a b c b"),
    ("nothing", "in common here"),
    ("end.", "end. "),
]


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_rouge_is_that_of_its_package(answer, reference):
    rouge = pytest.importorskip("rouge")
    theirs = rouge.Rouge().get_scores([answer], [reference])[0]
    for part in "fpr":
        assert metrics.rouge_l(answer, reference, part) == pytest.approx(theirs["rouge-l"][part])
        assert metrics.rouge_n(answer, reference, 1, part) == pytest.approx(theirs["rouge-1"][part])
        assert metrics.rouge_n(answer, reference, 2, part) == pytest.approx(theirs["rouge-2"][part])


def test_metrics_by_hand():
    # 3 of 4 and 3 of 6 different words: P .75, R .5
    assert metrics.rouge_l("a b c x", "a q b r c s") == pytest.approx(0.6)
    assert metrics.rouge_l("", "a") == 0
    assert metrics.qa_f1("The cat, it sat!", "a cat sat") == pytest.approx(0.8)
    assert metrics.counting("5 or 7", "7") == 0.5 and metrics.counting("none", "7") == 0
    assert metrics.retrieval(r"Paragraph (\d+)")("It is 12", "Paragraph 12") == 1
    assert metrics.classification("Food or Animal", "Food", ["Food", "Animal"]) == 0.5
    assert metrics.classification("Foodstuff", "Foodstuff", ["Food", "Foodstuff"]) == 1
    assert metrics.code_similarity("# hint\nx = 1\ny", "x = 1") == 1
    assert metrics.code_similarity("```\nx = 2", "x = 1") == 0.8
    assert metrics.bleu("a b c", "a b d", 1) == pytest.approx(2 / 3)
    assert metrics.bleu("a b c d", "a b c d", 4) == 1


def test_chinese_words_need_jieba():
    pytest.importorskip("jieba")
    assert metrics.qa_f1_zh("今天天气很好!", "今天天气很好") == 1
    assert metrics.rouge_l_zh("今天天气很好", "今天天气很好") == pytest.approx(1)


def test_loogle_scores_an_echo_100_and_a_cloze_by_its_masks(tmp_path, prompter):
    pairs = [{"Q": "Who?", "A": "Ada of Turin", "S": []}, {"Q": "When?", "A": "In 1417", "S": []}]
    for name in ("shortdep_qa", "longdep_qa"):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"input": "A text.", "qa_pairs": repr(pairs), "output": "none"}],
        )
    summary = {"input": "A paper.", "qa_pairs": "none", "output": "It says a lot of things."}
    write_jsonl(tmp_path / "longdep_summarization.jsonl", [summary])
    cloze = [{"Q": "<mask-0> met <mask-1>.", "A": {"<mask-0>": "Ada Low", "<mask-1>": "Bob"}}]
    write_jsonl(
        tmp_path / "shortdep_cloze.jsonl", [{"input": "T", "qa_pairs": repr(cloze), "output": ""}]
    )
    for name in loogle.SUBSETS:
        task = loogle.make(name, tmp_path, prompter, wording.loogle())
        result = ask(task, echo(task), prompter)
        assert result["score"] == pytest.approx(100) and len(task.samples) == (
            2 if "qa" in name else 1
        )
        assert result["more"].get("rouge_1", 100) == pytest.approx(100)
        assert ask(task, empty, prompter)["score"] == 0
    half = lambda *_: [(0, "{'<mask-0>': 'Ada', '<mask-1>': 'Bob'}")]  # noqa: E731
    result = ask(task, half, prompter)
    assert result["score"] == 50 and result["more"]["partial_match"] == 100


@pytest.fixture
def wordnet():
    yield make_wordnet
    gc.collect()  # nltk leaves WordNet's files to it


def make_wordnet(folder, *synsets):
    """A WordNet of nouns, each of one synset, as nltk reads it."""
    folder = folder / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in ("noun", "verb", "adj", "adv"):
        for file in (f"data.{name}", f"index.{name}", f"{name}.exc"):
            (folder / file).write_text("")
    (folder / "data.adj").write_text("  1 WordNet 3.0 of a test\n")
    for file in ("index.sense", "cntlist.rev"):
        (folder / file).write_text("")
    (folder / "lexnames").write_text("00\tnoun.Tops\t1\n")
    lines, index = "", ""
    for words in synsets:
        named = " ".join(f"{word} 0" for word in words)
        offset = f"{len(lines):08d}"
        lines += f"{offset} 00 n {len(words):02x} {named} 000 | what they mean  \n"
        index += "".join(f"{word} n 1 0 1 0 {offset}  \n" for word in words)
    (folder / "data.noun").write_text(lines)
    (folder / "index.noun").write_text(index)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_meteor_matches_words_stems_and_synonyms(tmp_path, wordnet):
    wordnet(
        tmp_path, ("arch", "span"), ("mason",)
    )  # of words that are their own stems: nltk asks for stems
    meteor = metrics_with_data.meteor(tmp_path)
    # By the paper: F = 10 P R / (R + 9 P), less half the cube of chunks over matches.
    assert meteor("old bridges stand", "old bridges stand") == pytest.approx(1 - 0.5 / 27)
    assert meteor("old bridge stands", "old bridges stand") == pytest.approx(1 - 0.5 / 27)
    assert meteor("the span", "the arch") == pytest.approx(1 - 0.5 / 8)
    assert meteor("the mason", "the arch") == pytest.approx(0.5 * 0.5)
    assert meteor("the the span", "span the") == meteor("the span", "span the") == 0.5
    assert meteor("", "the arch") == 0


def test_bert_score_is_the_mean_of_the_best_cosines(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "old", "new", "bridge", "road"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)

    def states(text):
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt")
            return torch.nn.functional.normalize(
                model(**inputs, output_hidden_states=True).hidden_states[2][0], dim=-1
            )

    answer, reference = "the old bridge", "new road"
    best = (states(answer) @ states(reference).T).max(1).values[1:-1].mean()  # [CLS], [SEP] not
    score = metrics_with_data.bert_score(tmp_path, 2)
    assert score(answer, reference) == pytest.approx(float(best), abs=1e-5)
    assert score(answer, answer) == pytest.approx(1) and score(" ", answer) == 0
    with pytest.raises(UserError, match=r"bertscore_layer: 4; .* has layers 1 to 3"):
        metrics_with_data.bert_score(tmp_path, 4)


def test_bert_score_takes_a_first_word_for_the_same_token_as_later_ones(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = byte_level(tmp_path)
    assert tokenizer.tokenize("ab ab") == ["a", "b", "\u0120", "a", "b"]
    torch.manual_seed(0)
    transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=12,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    score = metrics_with_data.bert_score(tmp_path, 1)
    assert score("ab", " ab\n") == pytest.approx(1)
    assert 0 < score("ab ab", "ab") < 1
    assert score("ab " * 9, "ab " * 20) == pytest.approx(1)  # both are cut to 10 tokens


def byte_level(folder):
    """A tokenizer of RoBERTa's kind with bytes for tokens; it says no longest length."""
    tokenizers, transformers = (
        pytest.importorskip("tokenizers"),
        pytest.importorskip("transformers"),
    )
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    made = transformers.RobertaTokenizer(vocab=vocabulary, merges=[])
    made.save_pretrained(folder)
    return made


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_metrics_whose_data_are_missing_say_so(tmp_path, prompter, wordnet):
    with pytest.raises(UserError, match=r"nltk_data: .* has no corpora/wordnet; .*nltk.download"):
        metrics_with_data.meteor(tmp_path)
    with pytest.raises(UserError, match=r"bertscore_model: .* has no config.json"):
        metrics_with_data.bert_score(tmp_path, 17)
    wordnet(tmp_path / "data", ("arch", "span"))
    pairs = [{"Q": "What?", "A": "the old arch", "S": []}]
    row = {"input": "A text.", "qa_pairs": repr(pairs), "output": "none"}
    write_jsonl(tmp_path / "longdep_qa.jsonl", [row])
    asked = suite.Options(
        tasks=("loogle:longdep_qa",), loogle_dir=str(tmp_path), nltk_data=str(tmp_path / "data")
    )
    (task,) = suite.Suite(asked, prompter).tasks()
    result = ask(task, lambda *_: [(0, "the old span")], prompter)
    assert result["more"]["meteor"] == pytest.approx(100 * (1 - 0.5 / 27))


def test_files_that_are_missing_or_broken_are_named(tmp_path, prompter):
    words = wording.longbench()
    with pytest.raises(UserError, match=r"unknown subset 'trek'; allowed: narrativeqa"):
        longbench.make("trek", tmp_path, prompter, words)
    with pytest.raises(
        UserError, match=r"--longbench_dir= is missing.*huggingface.co/datasets/THUDM"
    ):
        longbench.make("trec", "", prompter, words)
    with pytest.raises(UserError, match=r"trec.jsonl is not there; it is in data.zip"):
        longbench.make("trec", tmp_path, prompter, words)
    (tmp_path / "trec.jsonl").write_text(json.dumps(rows("trec")[0]) + '\n{"input": 3}\n')
    with pytest.raises(UserError, match=r"trec.jsonl, line 2: 'input' has to be there"):
        longbench.make("trec", tmp_path, prompter, words)
    (tmp_path / "longdep_qa.jsonl").write_text('{"input": "T", "qa_pairs": "[{", "output": ""}\n')
    with pytest.raises(UserError, match=r"longdep_qa.jsonl, line 1: not a row of LooGLE"):
        loogle.make("longdep_qa", tmp_path, prompter, wording.loogle())
    with pytest.raises(UserError, match=r"unknown subset 'qa'; allowed: shortdep_qa"):
        loogle.make("qa", tmp_path, prompter, wording.loogle())


# ------------------------------------------------------------------------------------------- programs of a model


@pytest.fixture
def contained():
    try:
        sandbox.check_available()
    except UserError as error:
        pytest.skip(str(error))


def test_humaneval_is_off_unless_asked_for(tmp_path, prompter, contained):
    path = tmp_path / "HumanEval.jsonl"
    problem = {
        "task_id": "HumanEval/0", "prompt": "def double(x):\n", "entry_point": "double",
        "canonical_solution": "    return 2 * x\n", "test": "def check(f):\n    assert f(3) == 6\n",
    }  # fmt: skip
    write_jsonl(path, [problem])
    with pytest.raises(UserError, match="allowed: with --run_code"):
        humaneval.make(path, run_code=False)
    task = humaneval.make(path, run_code=True)
    assert ask(task, echo(task), prompter)["score"] == 100
    assert ask(task, empty, prompter)["score"] == 0
    wrong = lambda *_: [(0, "    return x\n")]  # noqa: E731
    assert ask(task, wrong, prompter)["score"] == 0


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("x = 1", True),
        ("raise SystemExit(1)", False),
        ("while True: pass", False),
        ("import socket; socket.create_connection(('127.0.0.1', 1), 1)", False),
        ("import socket\ns = socket.socket()\ntry: s.connect(('8.8.8.8', 53))\n"
         "except OSError as e:\n    import errno; assert e.errno == errno.ENETUNREACH, e", True),
        ("x = bytearray(2 << 30)", False),
        ("open('here', 'w').write('x' * (2 << 20))", False),
        ("import os; assert os.listdir() == []", True),
        ("open('here', 'w').write('x'); assert open('here').read() == 'x'", True),
        ("import tempfile; tempfile.TemporaryFile().write(b'x')", True),
        ("import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start(); p.join()\n"
         "assert p.exitcode == 0", True),
    ],
)  # fmt: skip
def test_a_program_is_contained(contained, program, passes):
    assert sandbox.run_program(program, seconds=3) is passes


@pytest.mark.parametrize(
    "ending",
    [
        "exit(0)", "quit()", "import sys; sys.exit()", "raise SystemExit(0)", "raise SystemExit",
        "import os; os._exit(0)", "import os, threading; threading.Timer(0.1, os._exit, [0]).start()\nwhile True: pass",
        "import os; os.write(1, b'passed'); os._exit(0)",
        "import os\nfor i in range(64):\n  try: os.write(i, b'0' * 32)\n  except OSError: pass\nos._exit(0)",
        "import os\nif os.fork(): os.wait(); os._exit(0)",
        "import os; os.execv('/bin/true', ['true'])",
    ],
)  # fmt: skip
def test_only_a_program_that_runs_to_its_end_passes(contained, ending):
    assert not sandbox.run_program(f"{ending}\nx = 1")


def test_a_program_writes_and_deletes_nothing_outside_of_its_folder(contained, tmp_path):
    path = tmp_path / "mine"
    path.write_text("kept")
    for act in (
        f"os.remove({str(path)!r})",
        f"os.chmod({str(path)!r}, 0)",
        f"open({str(path)!r}, 'a')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open(os.path.join(os.path.dirname(os.getcwd()), 'lrjax-new'), 'w')",
    ):
        program = f"import errno, os\ntry: {act}\nexcept OSError as e: assert e.errno == errno.EROFS, e\nelse: 1 / 0"
        assert sandbox.run_program(program), act
    again = f"subprocess.run(['mount', '-o', 'remount,bind,rw', '/']); open({str(path)!r}, 'a')"
    assert not sandbox.run_program(f"import subprocess; {again}")
    assert [each.name for each in tmp_path.iterdir()] == ["mine"] and path.read_text() == "kept"


def test_where_a_program_cannot_be_contained_it_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: name)
    monkeypatch.setattr(sandbox, "_UNSHARE", ("sh", "-c", "echo 'not permitted' >&2; exit 1"))
    sandbox.check_available.cache_clear()
    with pytest.raises(UserError, match=r"\(not permitted\); allowed: Linux 5.12"):
        sandbox.run_program("x = 1")


def test_pass_at_1_scores_a_sample(contained):
    sample = Sample(0, "def f():\n", "", ("",), extra={"tests": "assert f() == 1"})
    assert humaneval.passes("    return 1", sample) == 1
