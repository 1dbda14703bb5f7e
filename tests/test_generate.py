"""Generation must not depend on how it is computed: chunks, batches and padding change nothing."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from lrjax.errors import UserError
from lrjax.evaluation import generate as generate_module
from lrjax.evaluation.generate import generate, granule, prefill
from lrjax.models.head import logits
from lrjax.models.llama import Llama, LlamaConfig, init_params
from lrjax.models.rope import RopeScaling

CONFIG = LlamaConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    dtype="float32",
)


@pytest.fixture(scope="module")
def params():
    # Weights larger than at the start of training, so that the logits are far from flat and from ties.
    return jax.tree.map(
        lambda leaf: 2 * leaf, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    )


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 61, length).astype(np.int32) for length in (5, 40, 17)]


@jax.jit
def padded_logits(params, tokens_1L):
    return logits(params, Llama(CONFIG).apply({"params": params}, tokens_1L))[0]


def whole_logits(params, tokens):
    """Logits [L, V] of one sequence in one forward pass without a cache (what comes after does not matter)."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(padded_logits(params, padded))[: len(tokens)]


def plainly(params, prompt, count):
    """Greedy generation that reads everything again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(whole_logits(params, tokens)[-1])))
    return tokens[len(prompt) :]


def test_cached_batched_and_chunked_equals_plain_generation(params, prompts):
    expected = [plainly(params, prompt, 6) for prompt in prompts]
    assert len({token for row in expected for token in row}) > 4  # no constant
    for chunk in (7, 64):
        together = generate(CONFIG, params, prompts, 6, prefill_chunk=chunk)
        assert [row.tolist() for row in together] == expected
    alone = [generate(CONFIG, params, [prompt], 6)[0].tolist() for prompt in prompts]
    assert alone == expected


def test_greedy_tokens_equal_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lrjax.checkpoints import huggingface

    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    reference.save_pretrained(tmp_path)
    config, params = huggingface.load(tmp_path)
    config = dataclasses.replace(config, dtype="float32")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 97, length).astype(np.int32) for length in (9, 33)]
    ours = generate(config, params, prompts, 20, prefill_chunk=16)
    for prompt, new in zip(prompts, ours, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
        )
        assert new.tolist() == theirs[0, len(prompt) :].tolist()
        assert len(set(new.tolist())) > 3


def test_a_row_ends_with_eos_and_the_others_go_on(params, prompts):
    free = generate(CONFIG, params, prompts, 8)
    eos_id = int(free[1][3])
    ended = generate(CONFIG, params, prompts, 8, eos_id=eos_id)
    for row, whole in zip(ended, free, strict=True):
        found = np.flatnonzero(whole == eos_id)
        stop = found[0] + 1 if len(found) else 8
        assert row.tolist() == whole[:stop].tolist()
    assert len(ended[1]) <= 4


def test_one_prefill_serves_generation_and_scoring(params, prompts):
    filled = prefill(CONFIG, params, prompts, room=9, chunk=16)
    rng = np.random.default_rng(2)
    answers = [rng.integers(0, 61, length).astype(np.int32) for length in (9, 1, 4)]
    scores = filled.score(answers)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        logits_LV = whole_logits(params, [*prompt, *answer])[len(prompt) - 1 : -1]
        logprob_LV = np.asarray(jax.nn.log_softmax(logits_LV))
        expected = -logprob_LV[np.arange(len(answer)), answer]
        np.testing.assert_allclose(score.nll, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(score.argmax, logits_LV.argmax(-1))
    # The prefill is as before: its own answer is the greedy one, and that answer is all argmax.
    greedy = filled.generate(5)
    assert [row.tolist() for row in greedy] == [plainly(params, prompt, 5) for prompt in prompts]
    for answer, score in zip(greedy, filled.score(greedy), strict=True):
        np.testing.assert_array_equal(answer, score.argmax)


def test_drawing_follows_the_softmax_and_the_key(params, prompts):
    prompt = prompts[2]
    count = 400
    drawn = generate(CONFIG, params, [prompt] * count, 2, temperature=2.0, rng=jax.random.key(1))
    again = generate(CONFIG, params, [prompt] * count, 2, temperature=2.0, rng=jax.random.key(1))
    np.testing.assert_array_equal(drawn, again)
    share = np.bincount([row[0] for row in drawn], minlength=61) / count
    expected = np.asarray(jax.nn.softmax(whole_logits(params, prompt)[-1] / 2.0))
    assert np.abs(share - expected).max() < 4 * 0.5 / np.sqrt(count)
    cold = generate(CONFIG, params, [prompt], 5, temperature=1e-4, rng=jax.random.key(2))
    assert cold[0].tolist() == plainly(params, prompt, 5)


@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        ([[1, 2], []], {}, "prompt 1 has shape"),
        ([[1, 2], [3, 61, 4]], {}, "prompt 1: token id 61 at position 1"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"temperature": 1.0}, "needs an rng"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"prefill_chunk": 0}, "chunk is 0"),
    ],
)
def test_mistakes_are_named(params, bad, options, message):
    prompts = [np.array(prompt, np.int32) for prompt in bad]
    with pytest.raises(UserError, match=message):
        generate(CONFIG, params, prompts, 2, **options)


def test_no_prompts_no_answers(params):
    assert generate(CONFIG, params, [], 3) == []


def test_prefill_refuses_more_tokens_than_it_left_room_for(params, prompts):
    filled = prefill(CONFIG, params, prompts, room=2, chunk=8)
    with pytest.raises(UserError, match="left room for"):
        filled.generate(filled.room + 1)
    assert len(filled.generate(filled.room)[0]) == filled.room


@pytest.mark.parametrize(("platform", "steps"), [("cpu", 128), ("gpu", 512), ("tpu", 512)])
def test_lengths_are_rounded_to_fewer_shapes_on_accelerators(monkeypatch, platform, steps):
    """But for encodings that go by the length of the cache: the answers would be others than on a CPU."""
    monkeypatch.setattr(
        generate_module, "current", lambda: types.SimpleNamespace(platform=platform)
    )
    assert granule(CONFIG, 512) == granule(CONFIG, 2048) == steps
    assert granule(CONFIG, 64) == 64
    dynamic = RopeScaling("dynamic", factor=2.0, original_max_position_embeddings=64)
    assert granule(dataclasses.replace(CONFIG, rope_scaling=dynamic), 512) == 128
