"""Conversion: bit-identical, resumed after a stop, nothing half under the final name."""

import json
import os

import jax
import numpy as np
import pytest
from test_huggingface import TINY, random_params

import lrjax
from lrjax import convert
from lrjax.checkpoints import huggingface, orbax
from lrjax.errors import UserError


def test_there_and_back_is_bit_identical_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    params = random_params(TINY)
    huggingface.save(tmp_path / "a", TINY, params, tokenizer="bytes")
    monkeypatch.setattr(huggingface, "_SHARD_BYTES", 20_000)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done > 40_000:  # in the second shard
            raise Stop

    with pytest.raises(Stop):
        convert.convert(tmp_path / "a", tmp_path / "b", progress=stop)
    assert not (tmp_path / "b").exists()
    shard = next((tmp_path / "b.partial").glob("model-00001-*.safetensors"))
    written = shard.stat().st_mtime_ns
    convert.convert(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / shard.name).stat().st_mtime_ns == written
    assert not (tmp_path / "b.partial").exists()
    assert not list((tmp_path / "b").glob("source*")) + list((tmp_path / "b").glob("*.unfinished"))
    convert.convert(tmp_path / "b", tmp_path / "c", to="orbax")
    config, again = orbax.load_model(tmp_path / "c")
    assert config == TINY
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.convert(tmp_path / "a", tmp_path / "b")


def test_shards_of_another_source_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "_SHARD_BYTES", 20_000)
    for name, scale in (("a", 1), ("b", 2)):
        params = jax.tree.map(lambda leaf, scale=scale: scale * leaf, random_params(TINY))
        huggingface.save(tmp_path / name, TINY, params)

    def stop(done, total):
        if done > 40_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(tmp_path / "a", tmp_path / "c", progress=stop)
    done = []
    convert.convert(tmp_path / "b", tmp_path / "c", progress=lambda *now: done.append(now))
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path / "c")[1], params)
    assert done == sorted(done) and done[-1][0] == done[-1][1]


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_killed_conversion_leaves_nothing_under_the_final_name(tmp_path, monkeypatch, to):
    """Stopped just before the rename, it goes on or begins anew, and no trace of the first call is in the result."""
    params = random_params(TINY)
    huggingface.save(tmp_path / "a", TINY, params, tokenizer="bytes")

    def killed(*paths):
        if str(paths[1]).endswith("b"):
            raise KeyboardInterrupt
        return replace(*paths)

    replace = os.replace
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(tmp_path / "a", tmp_path / "b", to=to)
    assert not (tmp_path / "b").exists() and (tmp_path / "b.partial").is_dir()
    monkeypatch.undo()
    convert.convert(tmp_path / "a", tmp_path / "b", to=to)
    files = {path.name for path in (tmp_path / "b").iterdir()}
    if to == "hf":
        assert files == {
            "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json",
        }  # fmt: skip
    else:
        assert files == {"model.json", "params", "tokenizer"}


def test_generation_settings_and_the_card_come_along(tmp_path):
    huggingface.save(tmp_path / "a", TINY, random_params(TINY), tokenizer="bytes", card="mine")
    settings = {"eos_token_id": [256, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(settings))
    convert.convert(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == "mine"
    lrjax.load(tmp_path / "b").save(tmp_path / "c")  # an lrjax model
    convert.convert(tmp_path / "c", tmp_path / "d")
    model = lrjax.load(tmp_path / "d")
    assert model.tokenizer.end_ids == [256, 7]
    model.save(tmp_path / "e", format="hf")
    for name in "bde":
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert settings.items() <= written.items()
        raw = json.loads((tmp_path / name / "config.json").read_text())
        assert raw["eos_token_id"] == [256, 7]
    assert "Read from `d` and written by lrjax" in (tmp_path / "e" / "README.md").read_text()
    # Where only config.json names the end tokens, they are kept, too.
    (tmp_path / "e" / "generation_config.json").unlink()
    assert lrjax.load(tmp_path / "e").tokenizer.end_ids == [256, 7]


def test_the_card_of_a_run_has_its_recipe_and_figures(tmp_path):
    run = tmp_path / "run"
    for name in ("base", "merged"):
        orbax.save_model(run / "checkpoints" / name, TINY, random_params(TINY))
    config = {"name": "tiny", "window": 64, "target_length": 128, "method": "longrecipe", "seed": 3}
    (run / "config.json").write_text(json.dumps(config))
    (run / "stages").mkdir()
    (run / "stages" / "extend.json").write_text('{"tokens": 4096, "seconds": 2.0, "flops": 1}')
    (run / "report").mkdir()
    figures = {"base": {"niah": {"128": 0.05}}, "merged": {"niah": {"128": 0.975}}}
    (run / "report" / "summary.json").write_text(json.dumps({"evaluation": figures}))
    convert.convert(run, tmp_path / "out")
    lrjax.load(run / "checkpoints" / "base").save(tmp_path / "base", format="hf")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "Checkpoint `merged` of a run of the config `tiny`, whose window of 64 tokens was extended to 128",
        "| method | longrecipe |",
        "| extend | 4,096 | 2 |",
        "| niah | 128 | 0.05 | 0.975 |",
        "# A LlamaForCausalLM for 128 tokens",
    ):
        assert part in card, card
    assert str(tmp_path) not in card
    assert "Checkpoint `base`" in (tmp_path / "base" / "README.md").read_text()
    orphan = lrjax.Model(TINY, random_params(TINY))
    orphan.save(tmp_path / "orphan", format="hf")
    assert "not recorded" in (tmp_path / "orphan" / "README.md").read_text()
