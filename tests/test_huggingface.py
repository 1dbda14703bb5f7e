"""Hugging Face directories: transformers' logits, exact round trips, bad ones refused by name."""

import dataclasses
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lrjax.checkpoints import huggingface, loading, orbax
from lrjax.checkpoints.tensors import flatten
from lrjax.data.tokenizers import load_tokenizer
from lrjax.errors import UserError
from lrjax.models import COMPUTING, head, llama
from lrjax.models.bits import ready, ready_leaf_by_leaf
from lrjax.sharding import make_mesh
from lrjax.training.state import shardings_of

TINY = llama.LlamaConfig(
    vocab_size=300,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,  # not embed_dim / num_heads
    mlp_dim=48,
    rope_theta=700.0,
    norm_eps=1e-5,
    max_position_embeddings=128,
)
SHAPE = (2, 24)


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / 4).astype(dtype), llama.abstract_params(config)
    )


def assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def our_logits(config, params, tokens_BL, positions_BL):
    config = dataclasses.replace(config, dtype="float32")
    x_BLD = llama.Llama(config).apply({"params": params}, tokens_BL, positions_BL)
    return np.asarray(head.logits(params, x_BLD))


def assert_logits_agree(model, config, params):
    """float32 logits of a transformers model and of ours at plain and at random increasing positions."""
    import torch

    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(0, config.vocab_size, SHAPE)
    plain_BL = np.broadcast_to(np.arange(SHAPE[1]), SHAPE)
    random_BL = np.stack(
        [np.sort(rng.choice(128, SHAPE[1], replace=False)) for _ in range(SHAPE[0])]
    )
    for positions_BL in (plain_BL, random_BL):
        with torch.no_grad():
            # Without a mask, transformers takes a jump in the positions for another document.
            expected_BLV = model(
                torch.tensor(tokens_BL),
                position_ids=torch.tensor(positions_BL),
                attention_mask=torch.ones(SHAPE, dtype=torch.long),
            ).logits.numpy()
        logits_BLV = our_logits(config, params, tokens_BL, positions_BL)
        assert np.abs(logits_BLV - expected_BLV).max() <= 1e-4


@pytest.fixture
def saved(tmp_path):
    """A whole directory for a test to damage."""
    huggingface.save(tmp_path / "model", TINY, random_params(TINY))
    return tmp_path / "model"


def edit_config(directory, **changes):
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def refusal(directory):
    with pytest.raises(UserError) as caught:
        huggingface.load(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", "20kB"])
def test_a_directory_of_transformers_has_its_logits(tmp_path, tied, shard_size):
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
            tie_word_embeddings=tied,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "1GB")
    config, params = huggingface.load(tmp_path)
    assert config.tie_embeddings == tied and ("head" in params) == (not tied)
    assert (config.rope_theta, config.norm_eps, config.max_position_embeddings) == (700, 1e-6, 128)
    assert_logits_agree(model, config, params)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_is_saved(tmp_path, monkeypatch, tied):
    import transformers

    config = dataclasses.replace(TINY, tie_embeddings=tied)
    params = random_params(config)
    for shard_bytes in (huggingface._SHARD_BYTES, 10_000):
        monkeypatch.setattr(huggingface, "_SHARD_BYTES", shard_bytes)
        directory = tmp_path / f"model-{shard_bytes}"
        huggingface.save(directory, config, params, tokenizer="bytes")
        assert (directory / "model.safetensors.index.json").exists() == (shard_bytes == 10_000)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True
        )
        assert not any(report.values()), report
        assert model.config.eos_token_id == 256
        assert_logits_agree(model, config, params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer("é!")["input_ids"] == [*"é!".encode()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
def test_round_trip_keeps_every_bit(tmp_path, monkeypatch, tied, shard_bytes):
    monkeypatch.setattr(huggingface, "_SHARD_BYTES", shard_bytes)
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    params = random_params(config)
    huggingface.save(tmp_path / "model", config, params)
    loaded, again = huggingface.load(tmp_path / "model")
    assert loaded == config
    assert_same_bits(again, params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_stored_as_it_is_and_read_as_float32(tmp_path, dtype):
    params = random_params(TINY, dtype)
    huggingface.save(tmp_path / "model", TINY, params)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == np.dtype(dtype).name
    _, again = huggingface.load(tmp_path / "model")
    assert_same_bits(again, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


@pytest.mark.parametrize("computing", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["huggingface", "lrjax", "lrjax on a mesh"])
def test_a_model_for_reading_is_rounded_as_it_is_read(tmp_path, kind, computing):
    params, path = random_params(TINY), tmp_path / "model"
    halfway = np.float32([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8])  # to the even one
    params["layers"]["gate"].reshape(-1)[:3] = params["embedding"].reshape(-1)[:3] = halfway
    expected = ready(dataclasses.replace(TINY, dtype=computing), params)
    (huggingface.save if kind == "huggingface" else orbax.save_model)(path, TINY, params)
    if kind == "lrjax on a mesh":
        mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
        config, found = orbax.load_model(path, shardings_of(params, mesh), computing)
        assert found["layers"]["gate"].dtype == computing
        found = ready_leaf_by_leaf(dataclasses.replace(config, dtype=computing), found)
        assert found["layers"]["gate"].sharding.num_devices == 4
    else:
        as_read = flatten(loading.load(path, reading=computing)[1])  # before anything else rounds
        assert {as_read[leaf].dtype for leaf in ("embedding", "layers/q", "head")} == {
            np.dtype(computing)
        }
        assert as_read["layers/attention_norm"].dtype == as_read["final_norm"].dtype == np.float32
        config, found, _ = loading.load_for_reading(path, computing)
        assert config == dataclasses.replace(TINY, dtype=computing)
    assert_same_bits(jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("lost", ["", "_METADATA"])  # all, or what is there
def test_an_lrjax_model_that_lost_a_file_is_one_clear_line(tmp_path, lost):
    orbax.save_model(tmp_path / "model", TINY, random_params(TINY))
    path = tmp_path / "model" / "params" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"model/params: unreadable checkpoint|no checkpoint there"):
        loading.load(tmp_path / "model")


def test_tokenizer_is_written_along(tmp_path):
    huggingface.save(tmp_path / "model", TINY, random_params(TINY), tokenizer="bytes")
    assert load_tokenizer(tmp_path / "model").encode("é").tolist() == [*"é".encode()]


def test_every_way_of_computing_a_model_can_be_stored(tmp_path):
    """A run with other blocks or another split of its sequences once stopped in its first stage."""
    ways = {
        "dtype": "float32",
        "remat": "full",
        "attention": "blockwise",
        "attention_block": 512,
        "context_parallel": "ulysses",
    }
    assert ways.keys() == set(COMPUTING)
    assert all(value != getattr(TINY, name) for name, value in ways.items())
    huggingface.save(tmp_path / "m", dataclasses.replace(TINY, **ways), random_params(TINY))
    assert huggingface.load(tmp_path / "m")[0] == TINY


def test_save_leaves_what_is_there_alone(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(UserError, match="exists and is not empty"):
        huggingface.save(saved, TINY, random_params(TINY))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_save_refuses_parameters_of_another_model(tmp_path):
    params = random_params(TINY)
    del params["layers"]["gate"]
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    with pytest.raises(UserError, match=r"head is \(32, 300\), not None; layers/gate is None"):
        huggingface.save(tmp_path / "model", tied, params)
    assert not (tmp_path / "model").exists()


def test_all_tensors_that_do_not_fit_are_named(saved):
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    safetensors.numpy.save_file(tensors, saved / "model.safetensors")
    message = refusal(saved)
    for part in (
        "model.norm.weight is missing",
        "model.layers.1.self_attn.k_proj.weight is missing",
        "model.layers.0.mlp.up_proj.weight has shape [48, 31] instead of [48, 32]",
        "model.layers.0.self_attn.q_proj.bias is not part of the model",
    ):
        assert part in message
    assert "inv_freq" not in message


def test_import_into_sharded_arrays_is_the_same(tmp_path):
    """Each device reads its part of a tensor; q, k, v, o and the MLP are split on two axes."""
    params = random_params(TINY)
    huggingface.save(tmp_path / "model", TINY, params)
    mesh = make_mesh({"data": 1, "fsdp": 2, "context": 1, "tensor": 2}, jax.devices()[:4])
    _, placed = huggingface.load(
        tmp_path / "model",
        shardings=lambda config: shardings_of(llama.abstract_params(config), mesh),
    )
    assert_same_bits(jax.device_get(placed), params)
    for leaf, sharding in zip(
        jax.tree.leaves(placed), jax.tree.leaves(shardings_of(params, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_a_second_head_of_a_tied_model_has_to_be_the_embedding(tmp_path):
    config = dataclasses.replace(TINY, tie_embeddings=True)
    huggingface.save(tmp_path / "model", config, random_params(config))
    file = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    head_VD = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head_VD}, file)
    assert "head" not in huggingface.load(tmp_path / "model")[1]
    head_VD[-1, -1] += 1
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head_VD}, file)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path / "model")
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head_VD[:-1]}, file)
    assert "lm_head.weight is not part of the model" in refusal(tmp_path / "model")


def test_unknown_dtype_is_named(saved):
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    safetensors.numpy.save_file(tensors, saved / "model.safetensors")
    assert "model.norm.weight is stored as I8; known are F32, F16, BF16" in refusal(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; known are gemma3_text, llama"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_scaling.rope_type is 'mrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing"),
        ({"model_type": "bloom"}, "model_type is 'bloom', which has ALiBi"),
        ({"rope_scaling": {"full": {"rope_theta": 2}}}, "rope_scaling.full is {'rope_theta': 2}"),
        ({"rope_theta": 5.0}, "rope_theta 5.0, rope_parameters.rope_theta 700.0"),
        ({"hidden_size": "absent"}, "hidden_size is None; a positive integer is expected"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 3}, "num_kv_heads: 3 does not divide"),
    ],
)
def test_unknown_settings_are_refused_never_ignored(saved, changes, message):
    edit_config(saved, **changes)
    refused = refusal(saved)
    assert "config.json: " in refused and message in refused


def test_settings_of_old_configs_are_read(saved):
    """transformers 4 wrote theta beside the rest, null for no scaling and for defaults."""
    edit_config(
        saved, rope_parameters="absent", rope_theta=900, rope_scaling=None, torch_dtype=None
    )
    assert huggingface.load(saved)[0].rope_theta == 900.0
    edit_config(saved, rope_theta="absent", rope_scaling={"type": "default"})
    assert huggingface.load(saved)[0].rope_theta == 10000.0


def test_unreadable_directories_are_one_clear_line(saved, tmp_path):
    assert "no such directory" in refusal(tmp_path / "missing")
    weights, index = saved / "model.safetensors", saved / "model.safetensors.index.json"
    content = weights.read_bytes()
    for part in (content[:-100], content[:50], b""):
        weights.write_bytes(part)
        assert re.search(r"model.safetensors: .*; is it being written\?", refusal(saved))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [65]
    changed = json.dumps(header).encode()
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    assert "model.norm.weight has 260 bytes by its shape" in refusal(saved)
    short = {"dtype": "F32", "shape": [], "data_offsets": [0]}
    for header in ([], {"x": {}}, {"x": [1]}, {"x": short}):
        changed = json.dumps(header).encode()
        weights.write_bytes(len(changed).to_bytes(8, "little") + changed)
        assert "model.safetensors: cannot be read as safetensors" in refusal(saved), header
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    weights.unlink()
    assert "names files that are not there: model-1.safetensors" in refusal(saved)
    index.unlink()
    (saved / "pytorch_model.bin").write_bytes(b"a pickle")
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(saved)
    (saved / "config.json").write_text("{")
    assert "config.json: cannot be read as JSON" in refusal(saved)
    shutil.rmtree(saved)
    saved.mkdir()
    assert "config.json: no such file" in refusal(saved)
