"""Needles: prompts are exact, the needle is where it should be, and both ways of judging agree."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from lrjax.data import keyfacts
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation.haystack import Haystack
from lrjax.evaluation.niah import NiahTask, evaluate, make_prompts
from lrjax.models.llama import LlamaConfig, init_params

PROSE = [
    f"Chapter {number}. " + "The river ran on, and nobody knew why! It was late (very late).\n" * 9
    for number in range(20)
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return load_tokenizer(keyfacts.write_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def filler():
    return [row["text"] for row in keyfacts.documents("filler", 30, 80, np.random.default_rng(0))]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Byte-level BPE trained on the prose, so that cuts and seams change how the text is split."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*PROSE, "What is the pass key? Remember it."], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


def demo_task(**changes):
    settings = {
        "lengths": (64, 128),
        "needle": "key {key} {value} .",
        "question": "key {key}",
        "keys": keyfacts.NAMES,
        "values": keyfacts.NUMBERS,
        "distractors": 3,
        "samples_per_cell": 4,
    }
    return NiahTask(**(settings | changes))


def prompts_of(task, tokenizer, texts, length, seed=0):
    return make_prompts(task, tokenizer, tuple(texts), length, seed)


@pytest.mark.parametrize("length", [30, 64, 512])
def test_demo_prompts_are_exact_and_answerable(words, filler, length):
    for prompt in prompts_of(demo_task(depths=(0.0, 0.5, 1.0)), words, filler, length):
        text = words.decode(prompt.tokens).split()
        assert len(text) == length and prompt.answer_length == 1
        *_, key_word, name, answer = text
        assert key_word == "key" and prompt.answer == " " + answer
        facts = {text[i + 1]: text[i + 2] for i in range(length - 3) if text[i] == "key"}
        assert facts[name] == answer
        assert len(facts) == 4 and list(facts.values()).count(answer) == 1
        # The front may be half a sentence; what stands before any other fact and the question is whole.
        starts = [i for i, word in enumerate(text) if word == "key" and i]
        assert all(text[i - 1] == "." for i in starts if i > 9)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(words, filler, depth):
    for prompt in prompts_of(demo_task(depths=(depth,), distractors=0), words, filler, 512):
        before = len(words.encode(prompt.text[: prompt.text.index("key")]))
        assert abs(before / 505 - depth) < 0.02


@pytest.mark.parametrize("length", [120, 700, 2500])
@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_prose_prompts_are_exact_on_the_final_text(request, kind, length):
    tokenizer = load_tokenizer("bytes") if kind == "bytes" else request.getfixturevalue("bpe")
    length *= 4 if kind == "bytes" else 1
    task = NiahTask(lengths=(length,), depths=(0.0, 0.4, 1.0), samples_per_cell=3, digits=(5, 7))
    for prompt in prompts_of(task, tokenizer, PROSE, length):
        np.testing.assert_array_equal(prompt.tokens, tokenizer.encode(prompt.text + prompt.answer))
        assert len(prompt.tokens) == length
        assert tokenizer.decode(prompt.tokens[-prompt.answer_length :]) == prompt.answer
        assert prompt.text.count(prompt.needle) == 1 and prompt.answer in prompt.needle
        assert prompt.text.endswith(".\n\n" + task.question) or prompt.text.endswith(
            "\n\n" + task.question
        )
        before = prompt.text[: prompt.text.index(prompt.needle)].rstrip(" \n")
        if prompt.depth:
            assert before[-1] in ".!?)"


def test_prompts_depend_on_seed_cell_and_sample_alone(words, filler):
    few, many = (
        prompts_of(demo_task(samples_per_cell=count), words, filler, 64) for count in (2, 4)
    )
    for depth in range(5):
        for sample in range(2):
            assert few[2 * depth + sample].text == many[4 * depth + sample].text
    assert len({prompt.text for prompt in many}) == len(many)
    assert many[0].text != prompts_of(demo_task(), words, filler, 64, seed=1)[0].text


def test_short_haystacks_are_repeated(words, filler):
    [*prompts] = prompts_of(demo_task(samples_per_cell=1), words, [filler[0][:60]], 300)
    assert all(len(prompt.tokens) == 300 for prompt in prompts)


# A model that knows nothing but speaks only four words: about every fourth one-word answer is right by chance.
SPOKEN = keyfacts.NUMBERS[:4]


@pytest.fixture(scope="module")
def chatter(words):
    config = LlamaConfig(
        vocab_size=words.vocab_size,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=24,
        dtype="float32",
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(3))
    silent = np.ones(words.vocab_size, bool)
    silent[words.encode(" ".join(SPOKEN))] = False
    params["head"] = np.where(silent, 0, np.asarray(params["head"]))
    params["layers"] = jax.tree.map(lambda leaf: 2 * leaf, params["layers"])
    return config, params


@pytest.mark.parametrize(
    "values", [SPOKEN, [f"{a} {b}" for a in SPOKEN for b in SPOKEN if a != b] + list(SPOKEN)]
)
def test_fast_judgement_is_that_of_greedy_generation(words, filler, chatter, values):
    task = demo_task(
        lengths=(40, 64),
        depths=(0.2, 0.8),
        samples_per_cell=10,
        distractors=1,
        values=tuple(values),
    )
    seen = []
    slow = evaluate(
        task,
        *chatter,
        words,
        filler,
        batch_size=8,
        prefill_chunk=32,
        progress=lambda *at: seen.append(at),
    )
    fast = evaluate(task, *chatter, words, filler, batch_size=20, fast=True)
    assert 0 < slow["overall"] < 1
    assert seen == [(8, 40), (16, 40), (20, 40), (28, 40), (36, 40), (40, 40)]
    for name in ("accuracy", "interval", "overall", "overall_interval", "template", "tokens"):
        assert slow[name] == fast[name]
    for a, b in zip(slow["cells"], fast["cells"], strict=True):
        assert {**a, "nll": 0} == {**b, "nll": 0}
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-4)


def test_the_result_says_what_was_asked(words, filler, chatter):
    task = demo_task(samples_per_cell=3, values=SPOKEN)
    result = evaluate(task, *chatter, words, filler, batch_size=15, fast=True, seed=5)
    assert json.loads(json.dumps(result)) == result
    assert set(result["accuracy"]) == set(result["interval"]) == {"64", "128"}
    assert [cell["count"] for cell in result["cells"]] == [3] * 10
    for length in (64, 128):
        right = sum(cell["correct"] for cell in result["cells"] if cell["length"] == length)
        low, high = result["interval"][str(length)]
        assert low <= right / 15 == result["accuracy"][str(length)] <= high
    assert len(result["samples"]) == 3
    for sample in result["samples"]:
        assert sample["needle"].split()[1] == sample["prompt"].split()[-1]
        assert sample["needle"].split()[2] == sample["expected"].strip()
    assert result["tokens"] == 15 * (64 + 128) and result["seed"] == 5


def test_a_stopped_run_asks_what_is_missing(words, filler, chatter, tmp_path):
    task, kept = demo_task(samples_per_cell=2, values=SPOKEN), tmp_path / "answers" / "niah.jsonl"
    arguments = {"batch_size": 4, "prefill_chunk": 32, "kept": kept}
    whole = evaluate(task, *chatter, words, filler, **arguments)
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 20
    kept.write_bytes(b"".join(lines[:7]) + lines[7][:9])
    seen = []
    again = evaluate(
        task, *chatter, words, filler, progress=lambda *at: seen.append(at), **arguments
    )
    assert again == whole
    assert seen == [(10, 20), (14, 20), (18, 20), (20, 20)]
    assert len(kept.read_bytes().splitlines()) == 20
    with pytest.raises(
        UserError, match=r"niah.jsonl: answers to other prompts of 64 tokens .* \(10\)"
    ):
        evaluate(task, *chatter, words, filler, seed=1, **arguments)
    kept.write_text('{"length": 64, "prompt": "a", "nll": "b"}\n')
    with pytest.raises(UserError, match=r"niah.jsonl, line 1: not what"):
        evaluate(task, *chatter, words, filler, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, "niah.lengths"),
        ({"depths": (0.1, 1.2)}, "niah.depths"),
        ({"samples_per_cell": 0}, "niah.samples_per_cell"),
        ({"needle": "key {key} ."}, "niah.needle"),
        ({"needle": "{place} {value}"}, "niah.needle"),
        ({"question": "{value}"}, "niah.question"),
        ({"keys": ("Ada", "Alan")}, "4 different ones"),
        ({"values": ("10",) * 9}, "niah.values"),
        ({"values": (), "digits": (5, 4)}, "niah.digits"),
        ({"needle": "{value}", "question": "?"}, "niah.distractors"),
    ],
)
def test_impossible_tasks_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        demo_task(**changes)


def test_what_only_the_tokenizer_can_tell_is_refused(words, bpe, filler):
    with pytest.raises(UserError, match=r"niah.lengths: 15; .* alone take 19 tokens"):
        prompts_of(demo_task(lengths=(15,)), words, filler, 15)
    with pytest.raises(UserError, match="no text"):
        Haystack(["", " "], words)
    with pytest.raises(UserError, match="add_bos: True"):
        prompts_of(demo_task(add_bos=True), words, filler, 64)
    # " river" is one token of this tokenizer, so a question that ends with the space is split otherwise.
    task = NiahTask(lengths=(200,), needle="It is {value}.", question="It is ", values=("river",))
    with pytest.raises(UserError, match=r"niah.question: 'It is '; its tokens change"):
        prompts_of(task, bpe, PROSE, 200)
