"""The planner: its counts against what can be counted by hand, its contract, and what a user gets wrong."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lrjax import config as config_lib
from lrjax import sharding
from lrjax.errors import UserError
from lrjax.planning import chips, counting, estimate, steps

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = {
    "vocab_size": 512, "num_layers": 2, "embed_dim": 64, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16,
    "mlp_dim": 128,
}  # fmt: skip


def make_config(**extend):
    config = config_lib.default()
    config.name = "small"
    config.model.update(shape=SHAPE, remat="full", attention="blockwise")
    config.window, config.target_length, config.train_length = 128, 1024, 512
    config.mesh.update(fsdp=1, context=-1)
    config.score.samples = 8
    config.extend.update(global_batch_size=2, micro_batches=2, **extend)
    return config


def test_flops_follow_loops_branches_and_devices():
    def body(x, _):
        return jnp.tanh(x @ x), None

    def program(x):
        x, _ = jax.lax.scan(jax.checkpoint(body), x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x).sum()

    x = jnp.ones((8, 8))
    product = 2 * 8**3
    assert counting.dot_flops(jax.make_jaxpr(program)(x).jaxpr) == 6 * product
    gradient = jax.make_jaxpr(jax.grad(program))(x).jaxpr
    # Forward, again under remat, and two products backward; the branch is not computed again.
    assert counting.dot_flops(gradient) == (5 * 4 + 3) * product
    mesh = sharding.make_mesh({"fsdp": 8})
    spread = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh, in_specs=jax.sharding.PartitionSpec("fsdp"),
        out_specs=jax.sharding.PartitionSpec("fsdp"),
    )  # fmt: skip
    jaxpr = jax.make_jaxpr(spread)(jnp.ones((8, 8))).jaxpr
    assert counting.dot_flops(jaxpr) == 8 * 2 * 1 * 8 * 1


def test_pairs_of_the_blocks_that_are_visited():
    assert counting.visited_pairs(8, 1, 1) == 8 * 9 // 2
    assert counting.visited_pairs(8, 4, 4) == 16 + 32
    assert counting.visited_pairs(8, 2, 4) == 2 * (4 + 4 + 8 + 8)


def test_bytes_over_mesh_axes():
    """A loop of three gathers over context, and one sum over everything."""
    mesh = sharding.make_mesh({"fsdp": 2, "context": 4})
    P = jax.sharding.PartitionSpec

    def local(x):
        def body(x, _):
            whole = jax.lax.all_gather(x, "context", axis=0, tiled=True)
            return x + whole[: x.shape[0]] * whole.sum(), None

        x, _ = jax.lax.scan(body, x, length=3)
        return jax.lax.psum(x, ("fsdp", "context"))

    program = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=P(("fsdp", "context")), out_specs=P(), check_vma=False
        )
    )
    hlo = program.lower(jnp.ones((64, 16))).compile().as_text()
    part = 8 * 16 * 4  # of a device
    assert counting.bytes_per_mesh_axis(hlo, mesh) == {
        "context": 3 * 4 * part * 3 // 4, "fsdp+context": 2 * part * 7 // 8,
    }  # fmt: skip


@pytest.fixture(scope="module")
def result():
    from lrjax.plan import plan

    return plan(make_config(), "v5e:2x4", devices=jax.devices())


@pytest.mark.slow
def test_a_plan_keeps_its_contract(result):
    assert {"config", "topology", "devices", "steps", "recipe"} <= result.keys()
    assert result["devices"] == 8
    assert list(result["steps"]) == ["train", "full_length_train", "score", "prefill"]
    for step in result["steps"].values():
        assert step["accepted"] and step["reason"] == ""
        assert 0 < step["argument_bytes_per_device"] <= step["peak_bytes_per_device"] < 16e9
        assert set(step["flops"]) == {"model_causal", "model_full_square", "executed"}
        assert step["flops"]["model_causal"] <= step["flops"]["model_full_square"]
        assert step["roofline_seconds"] > 0
    train = result["steps"]["train"]
    assert train["bytes_per_mesh_axis"]["context"] > 0
    assert train["parts"]["optimizer"] == pytest.approx(2 * train["parts"]["parameters"], rel=1e-3)
    ratios = result["recipe"]["ratio_to_full_length"]
    assert 2 < ratios["model_causal"] < ratios["model_full_square"] < 4
    assert result["recipe"]["hours"] > 0 and result["recipe"]["cost"] > 0
    json.dumps(result)


@pytest.mark.slow
def test_flops_and_memory_of_a_device_fall_as_1_over_n():
    """The same batch on 2 and on 8 devices: executed FLOPs stay, a device's state is a quarter."""
    totals = {}
    for n in (2, 8):
        config = make_config()
        mesh = sharding.make_mesh({"fsdp": 1, "context": n}, jax.devices()[:n])
        with sharding.layout(mesh):
            program = steps.train(config, mesh, 512)
            executed = estimate.flops(program, "blockwise", train=True)["executed"]
            memory = program.traced.lower().compile().memory_analysis()
        totals[n] = executed, memory.argument_size_in_bytes, memory.temp_size_in_bytes
    assert totals[8][0] == pytest.approx(totals[2][0], rel=0.1)
    assert totals[8][1] == pytest.approx(totals[2][1] / 4, rel=0.1)
    assert totals[8][2] < 0.6 * totals[2][2]


def test_mistakes_of_a_plan():
    from lrjax.plan import plan

    with pytest.raises(
        UserError, match=r"--topology 'v5p:3x3': not known; allowed: v4:2x2x1, .*h100:8"
    ):
        plan(make_config(), "v5p:3x3")
    with pytest.raises(UserError, match="unknown step 'tarin'; allowed: train"):
        plan(make_config(), "v5e:2x4", ["tarin"])
    config = make_config()
    config.mesh.update(fsdp=3, context=2)
    with pytest.raises(UserError, match=r"6 places, v5e:2x4 8 devices"):
        plan(config, "v5e:2x4", ["train"], devices=jax.devices())
    config = make_config()
    config.train_length = 500
    with pytest.raises(UserError, match=r"rows of 500 tokens do not divide by 16"):
        plan(config, "v5e:2x4", ["train"], devices=jax.devices())
    config = make_config(state_dtype="float16")
    with pytest.raises(UserError, match="state_dtype 'float16': allowed: float32, bfloat16"):
        plan(config, "v5e:2x4", ["train"], devices=jax.devices())
    config = make_config()
    config.model.shape = {}
    with pytest.raises(UserError, match=r"config.model.shape: has no vocab_size"):
        plan(config, "v5e:2x4", ["train"], devices=jax.devices())


def test_over_memory_says_by_how_much_and_what_would_help():
    from lrjax.plan import refusal

    told = refusal(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", make_config(),
    )  # fmt: skip
    assert "needs 20.50 GiB a device of 15.75 GiB, 4.75 GiB over" in told
    assert "config.model.remat=offload" in told and "config.extend.state_dtype=bfloat16" in told


def test_every_topology_has_a_chip():
    for topology in chips.known_topologies():
        chip, shape = chips.parse(topology)
        assert chip.flops > 1e14 and chips.chips_in(shape) >= 1


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (requirements-plan.txt)"
)
def test_a_tpu_program_is_compiled_here():
    result = subprocess.run(
        [sys.executable, "-m", "lrjax.plan", "--config=configs/tiny.py", "--topology=v5e:2x2", "--json",
         "--steps=train", "--config.mesh.fsdp=-1", "--config.model.shape.vocab_size=512"],
        cwd=ROOT, env={**os.environ}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    step = json.loads(result.stdout)["steps"]["train"]
    assert step["accepted"] and step["peak_bytes_per_device"] > 0
