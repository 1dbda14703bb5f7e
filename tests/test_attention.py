"""Attention: every implementation is the reference, forwards and backwards, and nobody sees ahead."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lrjax import sharding
from lrjax.errors import UserError
from lrjax.models import attention as attention_module
from lrjax.models import blockwise as blockwise_module
from lrjax.models.attention import attention, choose, few_queries, reference, wide
from lrjax.models.bits import rounded, to_bits
from lrjax.models.blockwise import blockwise
from lrjax.models.gpu_attention import after_cache, cudnn, triton
from lrjax.models.splash import block_size, block_states, splash


def make_inputs(seed, B=2, L=50, S=None, N=6, K=2, H=8, segments=3, dtype=jnp.float32):
    """Random queries, keys, values and rising segment ids, some padding (0) at the end."""
    S = S or L
    keys = jax.random.split(jax.random.key(seed), 4)
    q_BLNH = jax.random.normal(keys[0], (B, L, N, H), dtype)
    k_BSKH = jax.random.normal(keys[1], (B, S, K, H), dtype)
    v_BSKH = jax.random.normal(keys[2], (B, S, K, H), dtype)
    ids_BS = np.sort(np.random.default_rng(seed).integers(1, segments + 1, (B, S)), axis=1)
    ids_BS[0, S - S // 8 :] = 0
    return q_BLNH, k_BSKH, v_BSKH, jnp.asarray(ids_BS[:, S - L :]), jnp.asarray(ids_BS)


def gradients(kernel, inputs, q_offset=0):
    q, k, v, q_ids, k_ids = inputs
    weights = jnp.cos(jnp.arange(q.size)).reshape(q.shape)  # a cotangent that is not constant

    def loss(q, k, v):
        return jnp.sum(weights * kernel(q, k, v, q_ids, k_ids, q_offset).astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)


def assert_same(inputs, q_offset=0, atol=2e-5):
    out = jax.jit(blockwise)(*inputs, q_offset)
    np.testing.assert_allclose(out, reference(*inputs, q_offset), atol=atol)
    for got, expected in zip(
        gradients(blockwise, inputs, q_offset), gradients(reference, inputs, q_offset), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=10 * atol)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short inputs have many, of different sizes for queries and keys."""
    monkeypatch.setattr(blockwise_module, "KEY_BLOCK", 8)
    monkeypatch.setattr(blockwise_module, "QUERY_BLOCKS", (16, 16))
    monkeypatch.setattr(blockwise_module, "TOGETHER", 0)  # and rows one by one


@pytest.mark.parametrize("length", [1, 7, 16, 50, 77])
def test_blockwise_is_reference_on_packed_documents(small_blocks, length):
    assert_same(make_inputs(length, L=length))


def test_blockwise_is_reference_with_blocks_as_they_are():
    assert_same(make_inputs(0, B=1, L=600, N=3, K=1))  # two of 304


@pytest.mark.parametrize(
    ("L", "S", "q_offset"), [(5, 40, 35), (16, 64, 8), (1, 33, 32), (20, 90, 3)]
)
def test_blockwise_with_offset_into_the_keys(small_blocks, L, S, q_offset):
    q, k, v, _, k_ids = make_inputs(1, L=L, S=S)
    assert_same((q, k, v, k_ids[:, q_offset : q_offset + L], k_ids), q_offset)


def test_offset_may_be_traced(small_blocks):
    inputs = make_inputs(2, L=6, S=30, segments=1)
    out = jax.jit(lambda offset: blockwise(*inputs, offset))(jnp.int32(11))
    np.testing.assert_allclose(out, reference(*inputs, 11), atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_blockwise_with_segments_in_any_order(data):
    """Block skipping looks at ranges of segment ids; ids that do not rise must come out right as well."""
    L = data.draw(st.sampled_from([9, 24]))
    ids_L = data.draw(st.lists(st.integers(0, 3), min_size=L, max_size=L))
    q, k, v, _, _ = make_inputs(L, B=1, L=L, N=2, K=1, H=4)
    ids_BL = jnp.asarray([ids_L])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise_module, "KEY_BLOCK", 4)
        patch.setattr(blockwise_module, "QUERY_BLOCKS", (4, 4))
        out = blockwise(q, k, v, ids_BL, ids_BL)
    np.testing.assert_allclose(out, reference(q, k, v, ids_BL, ids_BL), atol=2e-5)


def test_bfloat16_is_near_float32(small_blocks):
    inputs = make_inputs(3, L=40)
    half = [x.astype(jnp.bfloat16) for x in inputs[:3]] + list(inputs[3:])
    exact = reference(*(x.astype(jnp.float32) for x in half[:3]), *half[3:])
    out = jax.jit(blockwise)(*half)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)
    for got, expected in zip(gradients(blockwise, half), gradients(reference, inputs), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.15)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_no_gradient_from_later_keys_or_other_documents(small_blocks, implementation):
    q, k, v, ids_BL, _ = make_inputs(4, L=24)
    seen_BLS = jnp.tril(jnp.ones((24, 24), bool)) & (ids_BL[:, :, None] == ids_BL[:, None, :])

    def out(v):
        return attention(q, k, v, ids_BL, ids_BL, implementation=implementation).sum(axis=(2, 3))

    jacobian_BLBS = jnp.abs(jax.jacrev(out)(v)).sum(axis=(4, 5))
    for b in range(2):
        np.testing.assert_array_equal(jacobian_BLBS[b, :, b] > 0, seen_BLS[b])


def test_one_document_alone_is_the_document_packed(small_blocks):
    q, k, v, _, _ = make_inputs(5, B=1, L=40)
    ids_BL = jnp.repeat(jnp.asarray([[1, 2]]), jnp.asarray([13, 27]), axis=1)
    packed = blockwise(q, k, v, ids_BL, ids_BL)
    for part in (slice(0, 13), slice(13, 40)):
        ones = jnp.ones_like(ids_BL[:, part])
        alone = blockwise(q[:, part], k[:, part], v[:, part], ones, ones)
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-6)


def test_split_over_eight_devices_is_one_device(small_blocks):
    inputs = make_inputs(6, B=4, L=32, N=4, K=2)
    expected = gradients(blockwise, inputs)
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "tensor"))
    heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    split = [jax.device_put(x, heads) for x in inputs[:3]]
    split += [jax.device_put(x, rows) for x in inputs[3:]]
    for got, want in zip(gradients(blockwise, split), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
def test_gpu_kernels_split_over_devices_are_one_device(implementation):
    """Rows and heads split, the keys the queries' own: the kernels with gradients."""
    inputs = make_inputs(6, B=4, L=160, N=4, K=2, H=16, segments=1)

    def attend(q, k, v, q_ids, k_ids, offset):
        return attention(q, k, v, q_ids, k_ids, implementation=implementation)

    # The padding of the one row that has some comes out as each kernel pleases.
    inputs = (*inputs[:3], jnp.ones_like(inputs[3]), jnp.ones_like(inputs[4]))
    expected = gradients(reference, inputs)
    with sharding.layout(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        for got, want in zip(gradients(attend, inputs), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
def test_gpu_kernels_want_the_sequence_whole(implementation):
    q, k, v, ids, _ = make_inputs(6, L=512, H=16)
    with (
        sharding.layout(sharding.make_mesh({"context": 2})),
        pytest.raises(UserError, match="wants the sequence whole"),
    ):
        attention(q, k, v, ids, ids, implementation=implementation)


@pytest.mark.parametrize("kinds", [{"window": 5}, {"window": 21}, {"soft_cap": 1.5, "scale": 0.8}])
def test_blockwise_is_reference_with_sliding_window_and_soft_cap(small_blocks, kinds):
    def with_kinds(kernel):
        return lambda *args: kernel(*args, **kinds)

    inputs = make_inputs(7, L=50, segments=2)
    out = jax.jit(with_kinds(blockwise))(*inputs)
    np.testing.assert_allclose(out, with_kinds(reference)(*inputs), atol=2e-5)
    ours, theirs = (gradients(with_kinds(kernel), inputs) for kernel in (blockwise, reference))
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kinds", [{}, {"window": 7}, {"soft_cap": 1.5, "scale": 0.8}])
@pytest.mark.parametrize("count", [1, 3])
def test_few_queries_attend_to_their_layer_of_a_cache_as_among_many(count, kinds, dtype):
    """N, K and padding in the last rows' segments included."""
    q, k, v, ids, _ = make_inputs(9, L=40, N=6, K=3, dtype=dtype)
    many = reference(q, k, v, ids, ids, **kinds)
    k_cache, v_cache = (to_bits(jnp.stack([-x, x, 2 * x])) for x in (k, v))
    few = jax.jit(functools.partial(few_queries, **kinds))(
        q[:, -count:], k_cache, v_cache, 1, ids[:, -count:], ids, 40 - count
    )
    assert_same_attention(few, many[:, -count:], dtype)


def assert_same_attention(got, expected, dtype):
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-7  # a unit of bfloat16's last place at 1
    got, expected = (x.astype(jnp.float32) for x in (got, expected))
    np.testing.assert_allclose(got, expected, atol=tolerance)


@pytest.mark.parametrize("rule", [{"kv_heads": ""}, {"heads": ""}, {"heads": "fsdp"}])
def test_heads_that_are_split_otherwise_than_their_keys(monkeypatch, rule):
    """No device has the keys of its heads: XLA's products do it, the kernels refuse."""
    q, k, v, ids, _ = make_inputs(9, L=40, N=6, K=3)
    inputs = q[:, -3:], k, v, ids[:, -3:], ids, jnp.int32(37)
    expected = reference(*inputs)
    monkeypatch.setattr(sharding.Layout, "platform", "gpu")
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 3})
    with sharding.layout(mesh, {"batch": "data"} | rule):
        assert_same_attention(jax.jit(attention)(*inputs), expected, jnp.float32)
        with pytest.raises(UserError, match=r"heads are split over|does not divide the 6 heads"):
            attention(q, k, v, ids, ids, implementation="blockwise")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kinds", [{}, {"window": 7}, {"soft_cap": 1.5, "scale": 0.8}])
@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 3}])
def test_decoding_on_a_gpu_has_all_key_heads_in_one_product(monkeypatch, axes, kinds, dtype):
    q, k, v, ids, _ = make_inputs(9, L=40, N=6, K=3, dtype=dtype)
    many = reference(q, k, v, ids, ids, **kinds)
    monkeypatch.setattr(sharding.Layout, "platform", "gpu")
    taken = []

    def told(*args, **keywords):
        taken.append(args[0].shape[2])
        return wide(*args, **keywords)

    monkeypatch.setattr(attention_module, "wide", told)
    traced = {"window": kinds["window"]} if "window" in kinds else {}  # as where layers differ
    with sharding.layout(sharding.make_mesh(axes) if axes else None):
        few = jax.jit(lambda *inputs, **traced: attention(*inputs, **(kinds | traced)))(
            q[:, -3:], k, v, ids[:, -3:], ids, jnp.int32(37), **traced
        )
    assert taken == [6 // axes.get("tensor", 1)]  # a device's own heads
    assert_same_attention(few, many[:, -3:], dtype)


@pytest.mark.parametrize(
    "value",
    [
        0.0,
        -0.0,
        1.0,
        1.00390625,
        1.01171875,
        -3.3e38,
        3.3895e38,
        3.4e38,
        1e-40,
        np.inf,
        -np.inf,
        np.nan,
    ],
)
def test_rounding_by_bits_is_rounding(value):
    x = jnp.asarray([value, np.nextafter(np.float32(value), np.float32(0))], jnp.float32)
    np.testing.assert_array_equal(
        np.asarray(jax.jit(lambda x: rounded(x, jnp.bfloat16))(x)).view(np.uint16),
        np.asarray(x).astype(jnp.bfloat16).view(np.uint16),
    )
    _, slope = jax.jvp(lambda x: rounded(x, jnp.bfloat16), (x,), (3 * jnp.ones(2),))
    np.testing.assert_array_equal(slope, 3.0)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_sliding_window_sees_so_many_keys_and_may_be_traced(small_blocks, implementation):
    q, k, v, _, _ = make_inputs(8, B=1, L=40)
    ids_BL = jnp.ones((1, 40), jnp.int32)

    def out(v, window):
        kinds = {"implementation": implementation, "window": window}
        return attention(q, k, v, ids_BL, ids_BL, **kinds).sum(axis=(2, 3))

    jacobian_BLBS = jax.jit(jax.jacrev(out))(v, jnp.int32(7))
    seen_LS = jnp.abs(jacobian_BLBS[0, :, 0]).sum(axis=(2, 3)) > 0
    expected_LS = np.tril(np.ones((40, 40), bool)) & ~np.tril(np.ones((40, 40), bool), -7)
    np.testing.assert_array_equal(seen_LS, expected_LS)


# ------------------------------------------------------------------------------- kernels, interpreted


def only_real(kernel, ids_BL):
    """The kernel with what queries of padding attend to, which no one asks for, set to 0."""
    real = (ids_BL > 0)[..., None, None]
    return lambda *args, **kwargs: jnp.where(real, kernel(*args, **kwargs), 0)


@pytest.mark.parametrize(
    ("kernel", "keywords"),
    [
        (splash, {}),
        (functools.partial(splash, max_block=128), {}),
        (splash, {"window": 50, "soft_cap": 3.0, "scale": 0.5}),
        (triton, {"scale": 0.5}),
    ],
    ids=["splash", "splash two blocks", "splash window", "triton"],
)
def test_kernels_are_the_reference(kernel, keywords):
    """GQA, packed documents, a length that is no multiple of a block."""
    inputs = make_inputs(0, B=2, L=200, N=4, K=2, H=16)
    interpreted = only_real(functools.partial(kernel, interpret=True, **keywords), inputs[3])
    expected = only_real(functools.partial(reference, **keywords), inputs[3])
    np.testing.assert_allclose(interpreted(*inputs), expected(*inputs), atol=2e-5)
    for got, want in zip(gradients(interpreted, inputs), gradients(expected, inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_splash_with_offset_into_the_keys():
    q, k, v, _, k_ids = make_inputs(1, L=40, S=300)
    ids = k_ids[:, 150:190]
    kernel = only_real(functools.partial(splash, interpret=True), ids)
    out = jax.jit(kernel)(q, k, v, ids, k_ids, jnp.int32(150))
    expected = only_real(reference, ids)(q, k, v, ids, k_ids, 150)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_block_states_say_what_the_mask_says(window):
    q_index = np.concatenate([np.arange(8, 16), np.arange(48, 56)])  # two runs
    seen = np.arange(64) <= q_index[:, None]
    if window:
        seen &= np.arange(64) > q_index[:, None] - window
    states = block_states(jnp.asarray(q_index), 64, 4, 8, window)
    blocks = seen.reshape(4, 4, 8, 8).swapaxes(1, 2)
    expected = np.where(blocks.all((2, 3)), 2, blocks.any((2, 3)))
    np.testing.assert_array_equal(states, expected)


@pytest.mark.parametrize("length", [131_072, 1_048_576])
def test_the_mask_of_a_long_sequence_takes_no_time(length):
    start = time.perf_counter()
    block = block_size(length)
    states = jax.jit(block_states, static_argnums=(1, 2, 3))(
        jnp.arange(length), length, block, block
    )
    n = length // block
    assert int((states > 0).sum()) == n * (n + 1) // 2
    # Under a second on an idle machine; splash's own mask in Python takes 20 s and more at 131,072.
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("L", "S", "q_offset", "keywords"),
    [
        (20, 90, 3, {}),
        (100, 300, 150, {"scale": 0.5}),
        (70, 200, 130, {"window": 50}),
        (64, 256, 100, {"soft_cap": 3.0}),
        (5, 40, 35, {"window": 1}),
    ],
)
def test_the_gpu_kernel_for_a_cache_is_the_reference(L, S, q_offset, keywords, dtype):
    """GQA, packed documents, padding, an offset and a window that are traced."""
    q, k, v, _, k_ids = make_inputs(L, L=L, S=S, H=16, dtype=dtype)
    ids = k_ids[:, q_offset : q_offset + L]
    traced = {name: keywords[name] for name in keywords if name == "window"}
    static = {name: keywords[name] for name in keywords if name != "window"}

    @jax.jit
    def kernel(offset, traced):
        return after_cache(q, k, v, ids, k_ids, offset, interpret=True, **traced, **static)

    expected = reference(
        *(x.astype(jnp.float32) for x in (q, k, v)), ids, k_ids, q_offset, **keywords
    )
    out = kernel(jnp.int32(q_offset), traced)
    assert out.dtype == dtype
    atol = (
        2e-5 if dtype == jnp.float32 else 0.03
    )  # half of a bfloat16's last bit, of numbers up to 4
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=atol)


def test_the_gpu_kernel_for_a_cache_sees_nothing_where_nothing_is():
    q, k, v, _, k_ids = make_inputs(0, B=1, L=30, S=60, H=16)
    out = after_cache(q, k, v, jnp.full((1, 30), 9), k_ids, 20, interpret=True)
    np.testing.assert_array_equal(out, jnp.zeros_like(q))


def test_cudnn_gets_an_even_length(monkeypatch):
    """Its backward pass refuses others (seen on an H100)."""
    seen = []
    theirs = jax.nn.dot_product_attention

    def spy(q, *args, **kwargs):
        seen.append(q.shape[1])
        return theirs(q, *args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    q, k, v, _, _ = make_inputs(2, B=1, L=13)
    ids = jnp.ones((1, 13), jnp.int32)
    out = cudnn(q, k, v, ids, ids, implementation="xla")
    np.testing.assert_allclose(out, reference(q, k, v, ids, ids), atol=2e-5)
    assert seen == [14]


def test_cudnn_serves_rows_of_one_document_and_never_a_wrong_result():
    q, k, v, _, _ = make_inputs(2, B=3, L=12)
    ids = jnp.asarray([[1] * 12, [1] * 8 + [0] * 4, [1] * 6 + [2] * 6])
    out = cudnn(q, k, v, ids, ids, implementation="xla")
    expected = reference(q, k, v, ids, ids)
    np.testing.assert_allclose(out[0], expected[0], atol=2e-5)
    np.testing.assert_allclose(out[1, :8], expected[1, :8], atol=2e-5)
    assert jnp.isnan(out[2]).all()


def test_what_cannot_be_served_is_refused():
    q, k, v, ids, k_ids = make_inputs(3, L=20, S=40, H=8)
    with pytest.raises(UserError, match=r"'cudnn': 20 queries of 40 keys .*allowed: blockwise"):
        attention(q, k, v, ids, k_ids, implementation="cudnn")
    with pytest.raises(UserError, match=r"'cudnn': computes in bfloat16, model\.dtype is float32"):
        cudnn(q, q, q, ids, ids)
    with pytest.raises(UserError, match="'triton': this model has a soft_cap"):
        wide = jnp.zeros((1, 20, 2, 16))
        attention(wide, wide, wide, ids[:1], ids[:1], implementation="triton", soft_cap=1.0)
    with pytest.raises(
        UserError, match="'triton': head_dim 8 in float32; allowed: powers of two, 16"
    ):
        attention(q, q, q, ids, ids, implementation="triton")
    with pytest.raises(UserError, match="window is fixed when it is compiled"):
        jax.jit(lambda w: attention(q, k, v, ids, k_ids, implementation="splash", window=w))(4)


@pytest.mark.parametrize(
    ("platform", "keywords", "choice"),
    [
        ("tpu", {}, "splash"),
        ("gpu", {}, "triton"),
        ("cpu", {}, "blockwise"),
        ("gpu", {"window": 5}, "blockwise"),
        ("gpu", {"window": 5, "q_offset": None}, "triton"),  # after a cache
        ("gpu", {"head_dim": 96}, "blockwise"),
        ("gpu", {"head_dim": 256}, "triton"),
        ("gpu", {"head_dim": 256, "dtype": jnp.float32}, "blockwise"),
        ("gpu", {"q_offset": 5}, "triton"),  # a cache as long as the queries
    ],
)
def test_auto_takes_what_the_platform_has(monkeypatch, platform, keywords, choice):
    monkeypatch.setattr(sharding.Layout, "platform", platform)
    assert choose(4096, 4096, **{"q_offset": 0, "head_dim": 64, **keywords}) == choice
    assert choose(1, 4096, 0, head_dim=64) == "reference"  # decoding
