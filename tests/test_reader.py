"""What prompts share is read once, and changes no token; a run that was stopped goes on where it was."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax import sharding
from lrjax.data.tokenizers import byte_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation import decoding, reader
from lrjax.evaluation.generate import generate, prefill
from lrjax.evaluation.questions import (
    Task,
    ask,
    before_stop,
    cut_middle,
    difference,
    lrjax_answerer,
)
from lrjax.evaluation.reader import Reader, answers, shared_length
from lrjax.evaluation.samples import Prompter, Sample
from lrjax.models.bits import from_bits, ready
from lrjax.models.llama import LlamaConfig, init_params
from lrjax.training.state import shardings_of

DOCUMENT = 265  # tokens
CONFIG = LlamaConfig(
    vocab_size=257, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(
        lambda leaf: 2 * leaf, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    )


@pytest.fixture(scope="module")
def prompts():
    """Six prompts: three questions on one document, two that share half, one that shares nothing."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 257, n).astype(np.int32)  # noqa: E731
    document = draw(DOCUMENT)
    questions = [np.concatenate([document, draw(n)]) for n in (3, 12, 7)]
    halves = [np.concatenate([document[:40], draw(50)]) for _ in range(2)]
    return [draw(20), *questions, *halves]


@pytest.fixture(scope="module")
def alone(params, prompts):
    """The answers, every prompt by itself."""
    return [generate(CONFIG, params, [p], 7, prefill_chunk=128)[0].tolist() for p in prompts]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # row by row, and as accelerators read batches
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_sharing_and_batching_change_no_token(
    params, prompts, alone, batch_size, platform, monkeypatch
):
    monkeypatch.setattr(reader, "current", lambda: types.SimpleNamespace(platform=platform))
    found = dict(answers(CONFIG, params, prompts, 7, batch_size=batch_size, chunk=128))
    assert {i: row.tolist() for i, row in found.items()} == dict(enumerate(alone))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_drawn_answers_are_those_of_the_prompts_own_keys(params, prompts, batch_size):
    def found(keys, order, size):
        ask = [prompts[index] for index in order]
        drawn = dict(
            answers(
                CONFIG, params, ask, 7, batch_size=size, chunk=128, temperature=1.0, rng=keys[np.asarray(order)]
            )
        )  # fmt: skip
        return {order[place]: row.tolist() for place, row in drawn.items()}

    keys = jax.random.split(jax.random.key(3), len(prompts))
    whole = found(keys, range(6), 1)
    assert found(keys, [4, 1, 3], batch_size) == {index: whole[index] for index in (4, 1, 3)}
    assert found(keys[::-1], range(6), 1) != whole
    for wrong in (keys[:2], jax.random.PRNGKey(0)):
        with pytest.raises(UserError, match=r"allowed: one jax.random.key, or 1"):
            generate(CONFIG, params, prompts[:1], 2, temperature=1.0, rng=wrong)
        with pytest.raises(UserError, match=r"allowed: one jax.random.key, or 6"):
            dict(answers(CONFIG, params, prompts, 2, temperature=1.0, rng=wrong))


def test_what_is_drawn_does_not_hang_on_what_else_is_asked(params, prompts):
    tokenizer = byte_tokenizer()
    first, second = (
        lrjax_answerer(CONFIG, params, tokenizer, temperature=1.0, seed=seed) for seed in (0, 1)
    )
    ids = [prompts[index] for index in (0, 4, 5)]
    whole = dict(first(ids, 6, ()))
    assert dict(first(ids[1:], 6, ())) == {0: whole[1], 1: whole[2]}
    assert dict(second(ids, 6, ())) != whole


@pytest.mark.parametrize("chunk", [48, 128, 512])  # the last reads in quarters, too
def test_a_shared_beginning_is_read_once(params, prompts, alone, chunk):
    one = Reader(CONFIG, params, max_length=DOCUMENT + 31, chunk=chunk)
    for prompt, answer in zip(prompts[1:4], alone[1:4], strict=True):
        assert one.answer(prompt, 7).tolist() == answer
    document = shared_length(prompts[1], prompts[2])
    assert one.tokens_read == document + 3 + 12 + 7
    one.read(prompts[1])  # again, and back: only its own end
    assert one.tokens_read == document + 3 + 12 + 7 + 3
    scored = one.filled(prompts[2]).score([np.asarray(alone[2], np.int32)])
    assert scored[0].argmax.tolist() == alone[2]
    with pytest.raises(UserError, match="the reader was made for"):
        one.answer(prompts[1], 100)
    with pytest.raises(UserError, match="chunk is 0; allowed: 1 and more"):
        Reader(CONFIG, params, max_length=8, chunk=0)


def test_the_last_chunk_has_room_behind_a_shared_beginning(params):
    """A chunk that would be written past the end of the cache would be moved over what stands there."""
    rng = np.random.default_rng(4)
    first, second = rng.integers(0, 257, (2, 377)).astype(np.int32)
    # The chunk of 128 behind what they share ends at 428, where the longest may be 384.
    second[:300] = first[:300]
    one = Reader(CONFIG, params, max_length=384, chunk=128)
    one.read(first)
    expected = generate(CONFIG, params, [second], 7)[0].tolist()
    assert one.answer(second, 7).tolist() == expected


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 20}, {"rope_scaling": DYNAMIC}])
def test_prompts_read_one_by_one_are_answered_together(params, prompts, changes):
    """Rows of different lengths end at one index: what is copied there says the same as where it was read."""
    config = dataclasses.replace(CONFIG, **changes)
    order = [0, 4, 5, 1, 3, 2]
    answer = np.arange(5, dtype=np.int32)
    apart = Reader(config, params, max_length=DOCUMENT + 31, chunk=128)
    expected = [apart.answer(prompts[index], 7).tolist() for index in order]
    scores = [apart.filled(prompts[index]).score([answer])[0] for index in order]
    one = Reader(config, params, max_length=DOCUMENT + 31, chunk=128)
    filled = one.side_by_side([prompts[index] for index in order], room=7)
    assert one.tokens_read < sum(map(len, prompts))
    assert [row.tolist() for row in filled.generate(7)] == expected
    for score, alone in zip(filled.score([answer] * 6), scores, strict=True):
        np.testing.assert_allclose(score.nll, alone.nll, rtol=1e-5)


def test_prompts_side_by_side_are_checked(params, prompts):
    one = Reader(CONFIG, params, max_length=DOCUMENT + 31, chunk=128)
    for wrong, room, message in (
        ([], 7, "no prompt is given"),
        ([prompts[0], prompts[0][:0]], 7, r"prompt 1 has shape \(0,\)"),
        (prompts, 20, "the reader was made for 296"),
    ):
        with pytest.raises(UserError, match=message):
            one.side_by_side(wrong, room)
    with pytest.raises(UserError, match="prefill left room for"):
        one.side_by_side(prompts[:2], 7).generate(500)


def test_a_batch_is_read_row_by_row_where_that_spares_enough(params, prompts, monkeypatch):
    rng = np.random.default_rng(1)
    calls = []
    side_by_side = Reader.side_by_side

    def spy(self, rows, room):
        calls.append(sorted(map(len, rows)))
        return side_by_side(self, rows, room)

    def asked(shared, own, count=3):
        """Whether prompts that share their first tokens were read row by row."""
        text = rng.integers(0, 257, shared)
        rows = [np.concatenate([text, rng.integers(0, 257, own)]) for _ in range(count)]
        del calls[:]
        dict(
            answers(
                CONFIG,
                params,
                [row.astype(np.int32) for row in rows],
                2,
                batch_size=count,
                chunk=128,
            )
        )
        return bool(calls)

    monkeypatch.setattr(Reader, "side_by_side", spy)
    assert asked(shared=0, own=20)  # on a CPU always
    monkeypatch.setattr(reader, "current", lambda: types.SimpleNamespace(platform="gpu"))
    assert not asked(shared=280, own=20)  # of so small a model all rows cost as much as one
    monkeypatch.setattr(reader, "LAUNCHES", 0)
    assert asked(shared=280, own=20)
    assert not asked(shared=100, own=10)  # few tokens
    assert not asked(shared=280, own=600)  # a fifth
    # Of a mesh whose 4 parts would have a row each, all read all rows.
    ordered = [np.r_[np.arange(300), own] for own in (7, 8, 9, 10)]
    assert reader._worth_sharing(ordered, shards=1, launch=0)
    assert not reader._worth_sharing(ordered, shards=4, launch=0)
    # A long text and a few questions, of a small model on a GPU: worth it for few rows, not for many short ones.
    ordered = [np.r_[np.zeros(15_000), np.full(1000, row)] for row in range(1, 6)]
    assert reader._worth_sharing(ordered, shards=1, launch=6100)
    ordered = [np.r_[np.zeros(400), np.full(200, row)] for row in range(1, 33)]
    assert reader._worth_sharing(ordered, shards=1, launch=0)
    assert not reader._worth_sharing(ordered, shards=1, launch=6100)


def test_a_cache_on_a_mesh_changes_no_token(params, prompts, alone):
    mesh = sharding.make_mesh({"data": 2, "tensor": 2, "context": 2})
    placed = jax.device_put(params, shardings_of(params, mesh))
    filled = prefill(CONFIG, placed, prompts[:2], room=8, chunk=128)
    assert filled.cache["k"].sharding.shard_shape(filled.cache["k"].shape)[1] == 1
    assert filled.cache["k"].sharding.shard_shape(filled.cache["k"].shape)[3] == 1
    assert [row.tolist() for row in filled.generate(7)] == alone[:2]
    filled = Reader(CONFIG, placed, DOCUMENT + 31, 128).side_by_side(prompts[1:3], room=7)
    _, _, size, _, _ = whole = filled.cache["k"].shape
    assert filled.cache["k"].sharding.shard_shape(whole) == (2, 1, size // 2, 1, 8)
    assert [row.tolist() for row in filled.generate(7)] == alone[1:3]


def test_the_cache_has_the_compute_dtype(params, prompts):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert prefill(config, params, prompts[:1], room=2).cache["k"].dtype == jnp.uint16
    rounded = ready(config, params)
    assert from_bits(rounded["layers"]["q"]).dtype == jnp.bfloat16
    assert rounded["layers"]["attention_norm"].dtype == jnp.float32
    same = generate(config, rounded, prompts[:1], 5)[0]
    assert same.tolist() == generate(config, params, prompts[:1], 5)[0].tolist()


def test_a_nucleus_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    for top_p in (0.1, 0.5, 0.9):
        warp = transformers.TopPLogitsWarper(top_p)
        theirs = warp(None, torch.tensor(logits)).numpy()
        ours = np.asarray(decoding.nucleus(jnp.asarray(logits), top_p))
        np.testing.assert_array_equal(np.isinf(ours), np.isinf(theirs))


def test_drawing_from_a_small_nucleus_is_greedy(params, prompts, alone):
    drawn = generate(
        CONFIG, params, prompts[:1], 7, temperature=1.0, top_p=1e-6, rng=jax.random.key(0)
    )
    assert drawn[0].tolist() == alone[0]
    with pytest.raises(UserError, match="top_p is 0"):
        generate(CONFIG, params, prompts[:1], 2, temperature=1.0, top_p=0, rng=jax.random.key(0))


def test_several_end_tokens_and_stops_end_a_row(params, prompts, alone):
    wanted = alone[0][4]
    first = alone[0].index(wanted)
    row = generate(CONFIG, params, prompts[:1], 7, eos_id=(300, wanted))[0]
    assert row.tolist() == alone[0][: first + 1]
    calls = []

    def stop(ids):
        calls.append(len(ids))
        return True

    assert len(generate(CONFIG, params, prompts[:1], 200, stop=stop)[0]) == 1 and calls == [1]


def test_positions_may_skip(params, prompts):
    """What stands at positions 0..9 and 50.. is told from what stands at 0.. by its answer's scores."""
    plain = prefill(CONFIG, params, prompts[:1], room=8)
    skipping = [np.concatenate([np.arange(10), 50 + np.arange(10)])]
    skipped = prefill(CONFIG, params, prompts[:1], room=8, positions=skipping)
    assert skipped.next_positions_B.tolist() == [60] and plain.next_positions_B.tolist() == [20]
    answer = [np.array([1, 2, 3], np.int32)]
    assert np.abs(plain.score(answer)[0].nll - skipped.score(answer)[0].nll).max() > 1e-4
    with pytest.raises(UserError, match="positions: lengths"):
        prefill(CONFIG, params, prompts[:1], room=8, positions=[np.arange(3)])


# ------------------------------------------------------------------------------------------------- questions


def small_task(**changes) -> Task:
    samples = [
        Sample(i, f"text number {i}, which goes on for a while", " ->", (str(i),), extra={})
        for i in range(4)
    ]
    settings = {
        "name": "small", "samples": samples, "max_new_tokens": 3, "about": {"seed": 1},
        "score": lambda answer, sample: float(sample.outputs[0] in answer),
    }  # fmt: skip
    return Task(**(settings | changes))


def test_a_stopped_run_asks_only_what_is_missing(tmp_path):
    prompter = Prompter(byte_tokenizer())
    file = tmp_path / "pred" / "small.jsonl"
    asked = []

    def dies(prompts, max_new_tokens, stop):
        yield 2, "it is 2"
        yield 0, "none"
        raise KeyboardInterrupt

    def answer(prompts, max_new_tokens, stop):
        asked.append(len(prompts))
        for index in reversed(range(len(prompts))):
            yield index, "3 or 1"

    with pytest.raises(KeyboardInterrupt):
        ask(small_task(), dies, prompter, predictions=file)
    with open(file, "a") as torn:
        torn.write('{"index": 3, "pred": "th')
    result = ask(small_task(), answer, prompter, predictions=file)
    assert asked == [2] and result["score"] == 75 and result["count"] == 4
    low, high = result["interval"]
    assert low < 75 < high
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["index"] for row in rows] == [2, 0, 3, 1]
    assert set(rows[0]) == {"index", "pred", "input", "outputs", "others", "truncation", "length"}
    other = small_task(samples=[Sample(0, "", "", ("else",))])
    with pytest.raises(UserError, match=r"small.jsonl, line 1: an answer to another question"):
        ask(other, answer, prompter, predictions=file)
    samples = [sample._replace(input="Worded otherwise:") for sample in small_task().samples]
    with pytest.raises(UserError, match=r"small.jsonl, line 1: an answer to another question"):
        ask(small_task(samples=samples), answer, prompter, predictions=file)


def test_checkpoints_are_compared_question_by_question():
    """Two models that are right on 2 and 3 of the same 4 questions: wide apart as shares, one question as pairs."""

    def asked(texts, **changes):
        return ask(small_task(**changes), lambda *_: enumerate(texts), Prompter(byte_tokenizer()))

    first, better = asked(["0", "1", "", ""]), asked(["0", "1", "2", ""])
    found = difference(better, first)
    # Differences 0, 0, 100, 0: deviation 50, so 25 of the mean, times Student's 3.182 of 3 degrees of freedom.
    assert found["mean"] == 25
    np.testing.assert_allclose(found["interval"], [25 - 79.56, 25 + 79.56], atol=0.01)
    assert difference(first, first) == {"mean": 0, "interval": None}
    others = [sample._replace(input="another") for sample in small_task().samples]
    assert difference(asked(["0"] * 4, samples=others), first) is None
    weighted = [sample._replace(extra={"weight": 2}) for sample in small_task().samples]
    assert "scores" not in asked(["0"] * 4, samples=weighted)
    assert difference(*[asked(["0"], samples=others[:1])] * 2) is None


def test_no_prompt_is_cut_silently():
    prompter = Prompter(byte_tokenizer())
    lengths = []

    def answer(prompts, max_new_tokens, stop):
        lengths.extend(map(len, prompts))
        return [(i, str(i)) for i in range(len(prompts))]

    with pytest.raises(
        UserError, match=r"small: sample 0 has 43 tokens and a budget of 3; the limit is 30"
    ):
        ask(small_task(), answer, prompter, limit=30)
    result = ask(small_task(cut=True), answer, prompter, limit=30)
    assert result["cut"] == 4 and lengths == [27] * 4
    sample = small_task().samples[0]
    text = byte_tokenizer().decode(cut_middle(sample, prompter, 27)[1])
    assert text.startswith("text number") and text.endswith("while ->") and len(text) == 27
    with pytest.raises(UserError, match="fewer than what is around"):
        cut_middle(sample, prompter, 3)


def test_a_model_answers_until_its_stop(params):
    tokenizer = byte_tokenizer()
    task = small_task(score=lambda answer, sample: 1.0, max_new_tokens=40)
    prompter = Prompter(tokenizer)
    free = ask(task, lrjax_answerer(CONFIG, params, tokenizer), prompter)["samples"][0]["answer"]
    word = free[5]
    stopped = dataclasses.replace(task, stop=(word,))
    result = ask(stopped, lrjax_answerer(CONFIG, params, tokenizer), prompter)
    assert result["samples"][0]["answer"] == before_stop(free, (word,))
    assert result["stop"] == [word]


def test_a_chat_template_frames_the_question_and_not_the_answer_prefix():
    class Chatty:
        chat_template = "a template"

        def chat(self, messages, add_generation_prompt):
            assert add_generation_prompt and messages[0]["role"] == "user"
            return f"<user>{messages[0]['content']}<assistant>"

        encode = staticmethod(byte_tokenizer().encode)

    sample = Sample(0, "question", " prefix", ("1",))
    assert Prompter(Chatty(), chat=True).text(sample) == "<user>question<assistant> prefix"
