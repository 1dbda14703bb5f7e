"""Merging files: both formats, what does not fit, being stopped at any moment, and the command."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from lrjax.checkpoints import huggingface, orbax, streamed_output
from lrjax.errors import UserError
from lrjax.longrecipe import merge_methods, merging
from lrjax.longrecipe.merge_trees import merge_trees
from lrjax.models.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=13, num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8,
    rope_theta=1e5, max_position_embeddings=64,
)  # fmt: skip
EXTENDED = dataclasses.replace(CONFIG, rope_theta=5e5, max_position_embeddings=512, dtype="float32")
BF16 = ml_dtypes.bfloat16
PLAIN = {
    "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 50, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def params():
    init = jax.jit(init_params, static_argnums=0)
    return [init(CONFIG, jax.random.key(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def models(params, tmp_path_factory):
    """lrjax models: the base and the extended one, which brings a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    orbax.save_model(folder / "base", CONFIG, params[0])
    orbax.save_model(folder / "extended", EXTENDED, params[1])
    (folder / "extended" / "tokenizer").mkdir()
    (folder / "extended" / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder / "base", folder / "extended"


def hf_tensors(seed, width=300):
    rng = np.random.default_rng(seed)
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (width, 400) for i in range(2)}
    shapes |= {"model.layers.0.self_attn.q_proj.weight": (64, width), "model.norm.weight": (width,)}
    shapes |= {"model.embed_tokens.weight": (50, width), "lm_head.weight": (50, width)}
    return {name: rng.standard_normal(shape).astype(BF16) for name, shape in shapes.items()}


def write_hf(path, tensors, files=1, **config):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(PLAIN | config))
    names = list(tensors)
    parts = [names[i::files] for i in range(files)]
    if files == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({n: tensors[n] for n in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.fixture
def hf(tmp_path):
    return [write_hf(tmp_path / name, hf_tensors(i)) for i, name in enumerate("abc")]


def weights_of(path):
    found = {}
    for file in pathlib.Path(path).glob("*.safetensors"):
        found |= load_file(file)
    return found


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(
            a[name].view(np.uint16), b[name].view(np.uint16), err_msg=name
        )


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


# ------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("method", merge_methods.METHODS)
def test_files_give_what_the_function_gives(hf, tmp_path, monkeypatch, method):
    """In blocks that end inside rows, two tensors at once."""
    monkeypatch.setattr(merging, "CHUNK", 3000)
    monkeypatch.setattr(merging, "BLOCK", 1000)
    a, b, base = hf
    pair = {a: 0.4, b: 0.6}
    settings = {"seed": 5}
    if method not in ("linear", "slerp"):
        settings |= {"base": base, "density": {a: 0.3, b: 0.6}}
    merging.merge(pair, tmp_path / "out", method, threads=2, **settings)
    sources = [weights_of(path) for path in (a, b, base)]
    found = weights_of(tmp_path / "out")
    parameters = merge_methods.Parameters(
        (0.4, 0.6), (0.3, 0.6), t=0.6, normalize=method == "ties", seed=5
    )
    for name, tensor in found.items():
        x, y, z = (source[name] for source in sources)
        tensors = [x, y] if method in ("linear", "slerp") else [z, x, y]
        want = merge_methods.merge_tensors(method, tensors, parameters, name).astype(BF16)
        if method == "slerp":  # norms are summed block by block
            np.testing.assert_allclose(np.float32(tensor), np.float32(want), rtol=1e-2, atol=1e-5)
        else:
            same_bits({name: tensor}, {name: want})


def test_weight_1_itself_and_order(hf, tmp_path):
    a, b, c = hf
    merging.merge({a: 0.0, b: 1.0}, tmp_path / "one")
    same_bits(weights_of(tmp_path / "one"), weights_of(b))
    shutil.copytree(a, tmp_path / "copy")
    merging.merge({a: 0.3, tmp_path / "copy": 0.7}, tmp_path / "itself")
    same_bits(weights_of(tmp_path / "itself"), weights_of(a))
    merging.merge({a: 0.2, b: 0.3, c: 0.5}, tmp_path / "abc")
    merging.merge({c: 0.5, a: 0.2, b: 0.3}, tmp_path / "cab")
    same_bits(weights_of(tmp_path / "abc"), weights_of(tmp_path / "cab"))


def test_what_goes_with_a_hugging_face_result(tmp_path):
    a = write_hf(tmp_path / "a", hf_tensors(0), files=3, eos_token_id=1)
    b = write_hf(tmp_path / "b", hf_tensors(1), eos_token_id=2, rope_theta=5e5)
    vocabulary = {"model": {"vocab": {"x": 0}}, "added_tokens": []}
    for folder, template in ((a, "plain"), (b, "chat")):
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary | {"decoder": template}))
        (folder / "chat_template.jinja").write_text(template)
    out = tmp_path / "out"
    record = merging.merge({a: 0.5, b: 0.5}, out, rope_from=b, tokenizer_from=a, dtype="float32")
    assert json.loads((out / "merge.json").read_text()) == record
    config = json.loads((out / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5e5, "float32")
    assert (out / "chat_template.jinja").read_text() == "plain"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    assert all(tensor.dtype == np.float32 for tensor in weights_of(out).values())
    assert record["weight"] == {str(a): 0.5, str(b): 0.5}
    assert len(record["sources"][0]["sha256"]) == 3
    hashed = subprocess.run(
        ["sha256sum", str(b / "model.safetensors")], capture_output=True, text=True, check=True
    )
    assert record["sources"][1]["sha256"]["model.safetensors"] == hashed.stdout.split()[0]
    assert any("eos_token_id is 1" in note for note in record["differences"])
    assert not list(tmp_path.glob("*.partial"))


def test_hugging_face_models(params, tmp_path):
    for name, tree in (("a", params[0]), ("b", params[1])):
        huggingface.save(tmp_path / name, CONFIG, jax.device_get(tree))
    merging.merge({tmp_path / "a": 0.5, tmp_path / "b": 0.5}, tmp_path / "out")
    config, found = huggingface.load(tmp_path / "out")
    assert config == CONFIG
    equal(found, jax.device_get(merge_trees([(0.5, params[0]), (0.5, params[1])])))
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers wants it


def test_lrjax_models(models, params, tmp_path):
    base, extended = models
    merging.merge({base: 0.5, str(extended): 0.5}, tmp_path / "out", rope_from=extended)
    config, found = orbax.load_model(tmp_path / "out")
    assert config == EXTENDED
    equal(found, merge_trees([(0.5, params[0]), (0.5, params[1])]))
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    # A result is a source like any other, and bfloat16 is one of its dtypes.
    merging.merge({tmp_path / "out": 1.0}, tmp_path / "again", dtype="bfloat16")
    _, again = orbax.load_model(tmp_path / "again")
    equal(again, jax.tree.map(lambda x: x.astype(jnp.bfloat16), found))


def test_weights_by_layer_and_module_are_the_same_in_both_formats(params, tmp_path):
    weights = [
        [
            {"filter": "attention", "value": [0.1, 0.6]},
            {"filter": "norm", "value": 1},
            {"value": 0.5},
        ],
        [
            {"filter": "attention", "value": [0.9, 0.4]},
            {"filter": "norm", "value": 0},
            {"value": 0.5},
        ],
    ]
    for name, tree in (("a", params[0]), ("b", params[1])):
        huggingface.save(tmp_path / f"hf-{name}", CONFIG, jax.device_get(tree))
        orbax.save_model(tmp_path / f"or-{name}", CONFIG, tree)
    for kind in ("hf", "or"):
        paths = (tmp_path / f"{kind}-a", tmp_path / f"{kind}-b")
        merging.merge(dict(zip(paths, weights, strict=True)), tmp_path / kind)
    _, found = orbax.load_model(tmp_path / "or")
    equal(huggingface.load(tmp_path / "hf")[1], jax.device_get(found))
    np.testing.assert_array_equal(found["final_norm"], params[0]["final_norm"])
    q = 0.6 * params[0]["layers"]["q"][1] + 0.4 * params[1]["layers"]["q"][1]
    np.testing.assert_allclose(found["layers"]["q"][1], q, rtol=1e-6)


def test_several_processes_share_the_tensors(models, params, tmp_path):
    """Two workers, as two processes of a mesh would be: each its own tensors, one result."""
    base, extended = models
    barrier = threading.Barrier(2)
    failures = []

    def work(index):
        share = merging.Share(index, 2, lambda name: barrier.wait(600))
        try:
            merging.merge({base: 0.5, extended: 0.5}, tmp_path / "out", rope_from=base, share=share)
        except BaseException as error:
            failures.append(error)
            barrier.abort()
            raise

    workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    equal(orbax.load_model(tmp_path / "out")[1], merge_trees([(0.5, params[0]), (0.5, params[1])]))


# ------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_trees_with_weight_1(params, dtype):
    source, other = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in params[:2])
    source["final_norm"] = source["final_norm"].at[0].set(-0.0)
    for weighted in ([(1.0, source)], [(1.0, source), (0.0, other)], [(0.0, other), (1, source)]):
        merged = merge_trees(weighted)
        equal(merged, source)
        assert np.signbit(merged["final_norm"][0])


def test_trees_keep_their_sharding(params):
    mesh = jax.make_mesh((2,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    sharded = [
        {"layers": {"gate": jax.device_put(p["layers"]["gate"], sharding)}} for p in params[:2]
    ]
    merged = merge_trees([(0.25, sharded[0]), (0.75, sharded[1])])
    assert merged["layers"]["gate"].sharding == sharding
    expected = 0.25 * params[0]["layers"]["gate"] + 0.75 * params[1]["layers"]["gate"]
    np.testing.assert_allclose(merged["layers"]["gate"], expected, rtol=1e-6)


def test_trees_are_merged_layer_by_layer(params):
    """slerp's angle is that of one layer's matrix, as in a file that holds it alone."""
    merged = merge_trees([(0.5, params[0]), (0.5, params[1])], method="slerp")
    expected = merge_methods.slerp(params[0]["layers"]["q"][1], params[1]["layers"]["q"][1], 0.5)
    np.testing.assert_array_equal(merged["layers"]["q"][1], expected)
    ties = merge_trees([(1.0, params[0])], method="ties", base=params[1], density=0.5)
    expected = merge_methods.ties(
        params[1]["layers"]["up"][0], [params[0]["layers"]["up"][0]], [1.0], [0.5]
    )
    np.testing.assert_array_equal(ties["layers"]["up"][0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros(3)}, r"w is \(2,\) in source 0, \(3,\) in source 1"),
        ({"w": np.zeros(2), "b": np.zeros(1)}, "b is only in source 1"),
        ({}, "w is only in source 0"),
        ({"w": np.array([0, np.nan])}, "source 1: w holds NaN"),
        ({"w": np.array([0, np.inf])}, "source 1: w holds NaN or infinite"),
    ],
)
def test_trees_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        merge_trees([(0.5, {"w": np.zeros(2)}), (0.5, change)])


# ------------------------------------------------------------------------------------------- what does not fit


def refused(message, tmp_path, sources, **settings):
    """The merge is refused with the message, and nothing of it is left."""
    with pytest.raises(UserError, match=message):
        merging.merge(sources, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out*"))


def test_rope_of_the_named_source_only(models, tmp_path):
    base, extended = models
    message = r"rope_theta is 100000.0 in .*base, 500000.0 in .*extended .*rope_from"
    refused(message, tmp_path, {base: 0.5, extended: 0.5})
    merging.merge({base: 0.5, extended: 0.5}, tmp_path / "out", rope_from=base)
    assert orbax.load_config(tmp_path / "out") == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 5e5}, r"rope_theta is 10000.0 in .*, 500000.0 in"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"rope_scaling.factor is absent in .*, 4.0",
        ),
        ({"sliding_window": 16}, "sliding_window is absent in"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is absent in .*, 1e-06"),
        ({"model_type": "qwen2", "vocab_size": 51}, "model_type is llama .*vocab_size is 50"),
    ],
)
def test_configs_that_differ(hf, tmp_path, change, message):
    other = write_hf(tmp_path / "d", hf_tensors(3), **change)
    refused(message, tmp_path, {hf[0]: 0.5, other: 0.5})


def test_one_rope_in_two_spellings(hf, tmp_path):
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    other = write_hf(tmp_path / "d", hf_tensors(3), rope_parameters=parameters, rope_scaling=None)
    merging.merge({hf[0]: 0.5, other: 0.5}, tmp_path / "out")


def test_tokenizers_that_differ(hf, tmp_path):
    for path, ids in ((hf[0], {"x": 0, "y": 1}), (hf[1], {"x": 1, "y": 0})):
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    message = r"differ in 2 tokens .*'x' \(0, 1\), 'y' \(1, 0\) .*tokenizer_from"
    refused(message, tmp_path, {hf[0]: 0.5, hf[1]: 0.5})
    merging.merge({hf[0]: 0.5, hf[1]: 0.5}, tmp_path / "out", tokenizer_from=hf[1])
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]["x"] == 1


def test_tensors_that_do_not_fit(hf, tmp_path):
    fewer, other = hf_tensors(3), hf_tensors(3)
    del fewer["model.norm.weight"]
    other["lm_head.weight"] = other["lm_head.weight"][:40]
    for name, tensors, message in (
        ("fewer", fewer, "model.norm.weight is only in .*a"),
        ("other", other, r"lm_head.weight is \(50, 300\) in .*a, \(40, 300\) in .*other"),
    ):
        path = write_hf(tmp_path / name, tensors)
        refused(message, tmp_path, {hf[0]: 0.5, path: 0.5})


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    without = hf_tensors(1)
    del without["lm_head.weight"]
    a = write_hf(tmp_path / "a", hf_tensors(0), tie_word_embeddings=True)
    b = write_hf(tmp_path / "b", without, tie_word_embeddings=True)
    merging.merge({a: 0.5, b: 0.5}, tmp_path / "out")
    assert "lm_head.weight" not in weights_of(tmp_path / "out")


def test_values_that_are_not_finite(tmp_path, hf):
    tensors = hf_tensors(3)
    tensors["model.norm.weight"][7] = np.nan
    bad = write_hf(tmp_path / "bad", tensors)
    message = "bad: model.norm.weight holds NaN"
    refused(message, tmp_path, {hf[0]: 0.5, bad: 0.5})
    refused(message, tmp_path, {hf[0]: 1.0, bad: 0.0})
    refused(message, tmp_path, {bad: 1.0}, method="ties", base=hf[0], density=0.5)
    large = {name: np.full_like(tensor, 3e4) for name, tensor in hf_tensors(3).items()}
    large = write_hf(tmp_path / "large", large)
    refused("too large for float16", tmp_path, {large: 3.0}, strict_sum=False, dtype="float16")


def test_sources_that_are_being_written(tmp_path, hf, models):
    a, b, _ = hf
    whole = (b / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (b / "model.safetensors").write_bytes(whole[:size])
        refused("model.safetensors: .*is it being written", tmp_path, {a: 0.5, b: 0.5})
    shards = write_hf(tmp_path / "shards", hf_tensors(1), files=2)
    (shards / "model-00002-of-00002.safetensors").unlink()
    refused("names files that are not there: model-00002", tmp_path, {a: 0.5, shards: 0.5})
    half = tmp_path / "half"
    shutil.copytree(models[0], half)
    (half / "model.json").unlink()
    refused("without its model.json", tmp_path, {models[0]: 0.5, half: 0.5})


def test_a_source_that_changes_meanwhile(tmp_path, hf, monkeypatch):
    write = streamed_output.Output.write

    def and_touch(self, *args):
        os.utime(hf[1] / "model.safetensors")
        write(self, *args)

    monkeypatch.setattr(streamed_output.Output, "write", and_touch)
    refused("was written to while it was merged", tmp_path, {hf[0]: 0.5, hf[1]: 0.5})


def test_a_full_disk_is_found_before_the_first_byte(tmp_path, hf, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(os, "pwrite", None)  # nothing is written
    refused("GB are needed, the disk has 0.00 GB left", tmp_path, {hf[0]: 0.5, hf[1]: 0.5})


def test_outputs_that_exist(tmp_path, hf):
    a, b, c = hf
    pair = {a: 0.5, b: 0.5}
    for out, message in ((c, "c: exists; choose another"), (b, "is one of the sources")):
        with pytest.raises(UserError, match=message):
            merging.merge(pair, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is there"):
        merging.merge(pair, tmp_path / "file", overwrite=True)
    merging.merge(pair, c, overwrite=True)
    assert (c / "merge.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "file"]


def test_two_merges_into_one_place(tmp_path, hf, monkeypatch):
    write = streamed_output.Output.write
    seen = []

    def merge_again(self, *args):
        if not seen:
            seen.append(True)
            with pytest.raises(UserError, match="another merge is writing there"):
                merging.merge({hf[0]: 1.0}, tmp_path / "out")
        write(self, *args)

    monkeypatch.setattr(streamed_output.Output, "write", merge_again)
    merging.merge({hf[0]: 0.5, hf[1]: 0.5}, tmp_path / "out", threads=1)
    assert seen


def test_formats_are_not_mixed(tmp_path, hf, models):
    refused(
        "of two formats: .* is safetensors, .* is orbax", tmp_path, {hf[0]: 0.5, models[0]: 0.5}
    )
    refused("no checkpoint there", tmp_path, {hf[0]: 0.5, tmp_path / "none": 0.5})


# ------------------------------------------------------------------------------------------- being stopped


class Stopped(Exception):
    pass


def test_goes_on_where_it_was_stopped(tmp_path, hf, monkeypatch):
    write = streamed_output.Output.write
    written = []

    def stop_after_3(self, name, start, block):
        if len(written) == 3:
            raise Stopped
        write(self, name, start, block)
        written.append(name)

    pair = {hf[0]: 0.5, hf[1]: 0.5}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(streamed_output.Output, "write", stop_after_3)
        merging.merge(pair, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    first = list(written)
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            streamed_output.Output,
            "write",
            lambda self, name, *rest: (written.append(name), write(self, name, *rest)),
        )
        merging.merge(pair, tmp_path / "out", threads=1)
    assert len(first) == 3 and not set(first) & set(written)
    assert {*first, *written} == hf_tensors(0).keys()
    merging.merge(pair, tmp_path / "whole")
    same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "whole"))


def test_does_not_go_on_with_another_merge(tmp_path, hf, monkeypatch):
    def stop(self, *args):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(streamed_output.Output, "write", stop)
        merging.merge({hf[0]: 0.5, hf[1]: 0.5}, tmp_path / "out")
    (tmp_path / "out.partial" / "merge-done-0").write_text("model.norm.weight\n")
    merging.merge({hf[0]: 0.0, hf[1]: 1.0}, tmp_path / "out")
    same_bits(weights_of(tmp_path / "out"), weights_of(hf[1]))


ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lrjax.merge", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
    )  # fmt: skip


def test_sigkill_leaves_the_old_or_the_new(tmp_path):
    """Killed at many moments of replacing a model; then the same command ends the work."""
    a = write_hf(tmp_path / "a", hf_tensors(0, width=8_000))
    b = write_hf(tmp_path / "b", hf_tensors(1, width=8_000))
    old = write_hf(tmp_path / "out", hf_tensors(2, width=8_000))
    before = weights_of(old)
    command = [
        sys.executable, "-m", "lrjax.merge", str(a), str(b), "--weights=.5,.5", f"--out={old}", "--overwrite",
    ]  # fmt: skip
    started = tmp_path / "out.partial" / "model.safetensors"
    killed = 0
    for delay in (0.0, 0.03):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        while not started.exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = weights_of(old)
        if not (old / "merge.json").exists():
            killed += 1
            same_bits(found, before)
    assert killed  # at least once in the middle
    assert run(*command[3:]).returncode == 0
    expected = {
        name: merge_methods.linear([x, hf_tensors(1, width=8_000)[name]], [0.5, 0.5]).astype(BF16)
        for name, x in hf_tensors(0, width=8_000).items()
    }
    same_bits(weights_of(old), expected)
    assert not (tmp_path / "out.partial").exists()


# ------------------------------------------------------------------------------------------- the command


def test_the_command(hf, tmp_path):
    a, b, _ = hf
    out = tmp_path / "out"
    done = run(a, b, "--weights=.25,.75", f"--out={out}")
    assert done.returncode == 0, done.stderr
    merging.merge({a: 0.25, b: 0.75}, tmp_path / "same")
    same_bits(weights_of(out), weights_of(tmp_path / "same"))

    config = tmp_path / "merge.yml"
    config.write_text(
        f"models:\n- {{model: {a}, parameters: {{weight: 1, density: 0.5}}}}\n"
        f"merge_method: ties\nbase_model: {b}\ndtype: bfloat16\n"
    )
    done = run(f"--config={config}", f"--out={tmp_path / 'ties'}")
    assert done.returncode == 0, done.stderr
    merging.merge({a: 1.0}, tmp_path / "ties2", "ties", base=b, density=0.5)
    same_bits(weights_of(tmp_path / "ties"), weights_of(tmp_path / "ties2"))

    mistakes = {
        "exists; choose another directory": (a, b, "--weights=.5,.5", f"--out={out}"),
        "sum to 1.5": (a, b, "--weights=1,.5", f"--out={tmp_path}/x"),
        "flag 'nonsense'": (a, "--weights=1", "--nonsense=1"),
        "--config says what is merged": (a, f"--config={config}", f"--out={tmp_path}/x"),
    }
    for message, arguments in mistakes.items():
        failed = run(*arguments)
        assert failed.returncode == 2
        assert message in failed.stderr.strip().splitlines()[-1]
        assert "Traceback" not in failed.stderr


def test_a_merge_of_files_does_without_jax():
    code = "import sys; import lrjax.merge; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
