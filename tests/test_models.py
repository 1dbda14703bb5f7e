"""The Llama model: agreement with transformers, causality, packing, remat, sharding, and its description."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lrjax.errors import UserError
from lrjax.models import head
from lrjax.models.linear import linear
from lrjax.models.llama import (
    ACTIVATIONS,
    REMAT_POLICIES,
    Llama,
    LlamaConfig,
    abstract_params,
    gated,
    init_params,
    logical_axes,
)
from lrjax.models.rope import apply_rope, paper_theta, rope_angles

CONFIG = LlamaConfig(
    vocab_size=37, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def tokens(B, L, seed=1):
    return jax.random.randint(jax.random.key(seed), (B, L), 0, CONFIG.vocab_size)


def loss_and_grad(config, params, tokens_BL, **inputs):
    def loss(params):
        x_BLD = Llama(config).apply({"params": params}, tokens_BL, **inputs)
        targets_BL = jnp.roll(tokens_BL, -1, axis=1)
        return head.weighted_cross_entropy(params, x_BLD, targets_BL, jnp.ones(tokens_BL.shape))[0]

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tied):
    """Tiny random Llama, plain and non-contiguous positions."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, rope_theta=5000.0)
    params = init_params(config, jax.random.key(3))
    theirs = transformers.LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, rope_theta=5000.0, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(theirs).eval()
    names = {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }  # fmt: skip
    state = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"],
        "lm_head.weight": params["embedding"] if tied else params["head"].T,
    }
    for ours, name in names.items():
        for i, w in enumerate(params["layers"][ours]):
            if w.ndim > 1:
                w = w.reshape(-1, 16) if ours == "o" else w.reshape(w.shape[0], -1)
            state[f"model.layers.{i}.{name}.weight"] = w.T
    model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in state.items()})
    tokens_BL = np.asarray(tokens(2, 12))
    for positions_L in (np.arange(12), np.asarray([0, 1, 2, 9, 10, 30, 31, 32, 77, 78, 400, 401])):
        positions_BL = np.broadcast_to(positions_L, (2, 12))
        with torch.no_grad():
            expected = model(
                input_ids=torch.tensor(tokens_BL), position_ids=torch.tensor(positions_BL.copy())
            ).logits.numpy()
        x_BLD = Llama(config).apply({"params": params}, tokens_BL, positions_BL)
        np.testing.assert_allclose(head.logits(params, x_BLD), expected, atol=1e-4)


@pytest.mark.parametrize("positions", ["rising with gaps", "falling", "all the same"])
def test_causality_follows_the_index_whatever_the_positions(params, positions):
    """The output at t has no gradient from any later token's embedding, and has one from every earlier."""
    L = 9
    positions_BL = {
        "rising with gaps": jnp.asarray([[0, 1, 5, 6, 7, 30, 31, 99, 100]]),
        "falling": jnp.arange(L, 0, -1)[None],
        "all the same": jnp.full((1, L), 3),
    }[positions]

    def outputs(embedding_LD):
        given = {**params, "embedding": embedding_LD}  # every token has an embedding of its own
        x_BLD = Llama(CONFIG).apply({"params": given}, jnp.arange(L)[None], positions_BL)
        return (x_BLD[0] * jnp.arange(1, 17)).sum(axis=1)

    jacobian_LV = jnp.abs(jax.jacrev(outputs)(params["embedding"])).sum(axis=2)[:, :L]
    np.testing.assert_array_equal(jacobian_LV > 0, np.tril(np.ones((L, L), bool)))


def test_only_differences_of_positions_matter(params):
    tokens_BL = tokens(1, 10)
    near = Llama(CONFIG).apply({"params": params}, tokens_BL, jnp.arange(10)[None])
    far = Llama(CONFIG).apply({"params": params}, tokens_BL, jnp.arange(10)[None] + 1000)
    np.testing.assert_allclose(near, far, atol=1e-3)


def test_packed_documents_are_each_alone(params):
    first, second = tokens(1, 5, seed=4), tokens(1, 8, seed=5)
    packed = Llama(CONFIG).apply(
        {"params": params},
        jnp.concatenate([first, second], axis=1),
        jnp.concatenate([jnp.arange(5), jnp.arange(8)])[None],
        jnp.asarray([[1] * 5 + [2] * 8]),
    )
    alone = [Llama(CONFIG).apply({"params": params}, part) for part in (first, second)]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "policies"),
    [("float32", sorted(set(REMAT_POLICIES) - {"none"})), ("bfloat16", ["attention"])],
)
def test_remat_changes_nothing(params, dtype, policies):
    tokens_BL = tokens(2, 24)
    config = dataclasses.replace(CONFIG, dtype=dtype, attention="blockwise")
    loss, grad = loss_and_grad(config, params, tokens_BL)
    for remat in policies:
        other = loss_and_grad(dataclasses.replace(config, remat=remat), params, tokens_BL)
        np.testing.assert_allclose(other[0], loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other[1], grad)


def test_bfloat16_is_near_float32(params):
    tokens_BL = tokens(2, 24)
    loss, grad = loss_and_grad(CONFIG, params, tokens_BL)
    half_loss, half_grad = loss_and_grad(
        dataclasses.replace(CONFIG, dtype="bfloat16"), params, tokens_BL
    )
    np.testing.assert_allclose(half_loss, loss, rtol=0.01)
    for a, b in zip(jax.tree.leaves(half_grad), jax.tree.leaves(grad), strict=True):
        assert a.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_over_eight_devices_is_one_device(params, dtype):
    tokens_BL = tokens(4, 24)
    config = dataclasses.replace(CONFIG, dtype=dtype, attention="blockwise")
    expected = loss_and_grad(config, params, tokens_BL)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    places = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
    split = jax.tree.map(
        lambda axes, a: jax.device_put(
            a, NamedSharding(mesh, PartitionSpec(*(places.get(axis) for axis in axes)))
        ),
        logical_axes(params),
        params,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    rows = jax.device_put(tokens_BL, NamedSharding(mesh, PartitionSpec("fsdp")))
    got = loss_and_grad(config, split, rows)
    tolerance = 1e-4 if dtype == "float32" else 0.02  # sums over shards round in another order
    np.testing.assert_allclose(got[0], expected[0], rtol=tolerance)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        assert jnp.linalg.norm(a - jax.device_get(b)) <= tolerance * jnp.linalg.norm(b)


def test_linear_weight_gradient_may_be_transposed():
    """A transposed bfloat16 product must not reach XLA's CPU backend as one: it has no kernel for it."""
    x_BI, w_IO = jnp.ones((64, 32), jnp.bfloat16), jnp.ones((32, 48))
    grad = jax.jit(lambda x, w: jax.grad(lambda w: linear(x, w).astype(jnp.float32).sum())(w).T)
    np.testing.assert_allclose(grad(x_BI, w_IO), np.full((48, 32), 64.0))


def test_a_row_alone_is_multiplied_as_among_others():
    """On a CPU it is joined by rows of zeros."""
    x_BI = jax.random.normal(jax.random.key(0), (3, 64)).astype(jnp.bfloat16)
    w_IO = jax.random.normal(jax.random.key(1), (64, 48))
    several, several_vjp = jax.vjp(lambda w: linear(x_BI, w), w_IO)
    alone, alone_vjp = jax.vjp(lambda w: linear(x_BI[1:2], w), w_IO)
    assert alone.shape == (1, 48)
    np.testing.assert_allclose(
        alone.astype(jnp.float32), several[1:2].astype(jnp.float32), rtol=2**-7
    )
    only = several_vjp(jnp.zeros_like(several).at[1].set(1))[0]
    np.testing.assert_allclose(alone_vjp(jnp.ones_like(alone))[0], only, rtol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gated_activation_is_rounded_once_on_a_cpu(activation):
    gate, up = (
        3 * jax.random.normal(jax.random.key(i), (64, 32)).astype(jnp.bfloat16) for i in (0, 1)
    )
    exact = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
    found = jax.jit(gated, static_argnums=0)(activation, gate, up)
    assert found.dtype == jnp.bfloat16
    # Half a unit of the last of 8 bits, and float32's own rounding.
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8 + 1e-5, atol=1e-6)


def test_linear_contracts_several_axes_and_maps():
    x_BLNH = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    w_NHD = jax.random.normal(jax.random.key(1), (4, 5, 6))
    expected = jnp.einsum("BLNH,NHD->BLD", x_BLNH, w_NHD)
    np.testing.assert_allclose(linear(x_BLNH, w_NHD, inputs=2), expected, atol=1e-5)
    mapped = jax.vmap(lambda x: linear(x, w_NHD, inputs=2))(x_BLNH)
    np.testing.assert_allclose(mapped, expected, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_tree_is_the_one_the_axes_describe(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    shapes = abstract_params(config)
    assert ("head" in shapes) is not tied
    jax.tree.map(
        lambda names, leaf: [len(names) == leaf.ndim or pytest.fail(str(names))],
        logical_axes(shapes), shapes, is_leaf=lambda node: isinstance(node, tuple),
    )  # fmt: skip
    assert shapes["layers"]["o"].shape == (2, 4, 4, 16)
    assert jax.tree.map(jnp.shape, init_params(config, jax.random.key(0))) == jax.tree.map(
        lambda leaf: leaf.shape, shapes
    )


def test_a_token_beyond_the_vocabulary_is_loud(params):
    x_BLD = Llama(CONFIG).apply({"params": params}, jnp.asarray([[1, 37]]))
    assert jnp.isnan(x_BLD[0, 1]).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "model.num_layers: 0; must be positive"),
        ("num_kv_heads", 3, "model.num_kv_heads: 3 does not divide num_heads"),
        ("head_dim", 5, "model.head_dim: 5"),
        ("dtype", "float16", "model.dtype: 'float16'; allowed: bfloat16, float32"),
        ("remat", "some", "model.remat: 'some'; allowed: none, full"),
        ("attention", "flash", "model.attention: 'flash'; allowed: auto"),
        ("attention_block", 500, "model.attention_block: 500; allowed: multiples of 128"),
    ],
)
def test_config_names_the_field(field, value, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


def test_rope_angles_stay_exact_at_far_positions():
    """Position 131,071 and its neighbour differ by one radian in the first pair: nothing was rounded away."""
    cos, sin = rope_angles(jnp.asarray([[131_070, 131_071]]), 64, 5e5)
    expected = np.asarray([131_070.0, 131_071.0])
    np.testing.assert_allclose(cos[0, :, 0], np.cos(expected), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(expected), atol=1e-6)


def test_rope_keeps_lengths_and_pairs_the_halves():
    x_BLNH = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)
    out = apply_rope(x_BLNH, *rope_angles(jnp.asarray([[3]]), 8, 100.0))
    angle = 3 / 100 ** (2 / 8)
    np.testing.assert_allclose(out[0, 0, 0, [1, 5]], [np.cos(angle), np.sin(angle)], rtol=1e-6)


@pytest.mark.parametrize(
    ("theta", "window", "target", "expected"),
    [(5e5, 8192, 81920, 48.9e6), (5e5, 8192, 131072, 131.5e6), (1e6, 32768, 131072, 13.5e6)],
)
def test_paper_theta_gives_the_bases_of_the_paper(theta, window, target, expected):
    assert paper_theta(theta, target / window, 128) == pytest.approx(expected, rel=0.005)
