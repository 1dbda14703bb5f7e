"""Methods of merging against the formulas of their papers, written down plainly, and what must hold to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lrjax.longrecipe import merge_methods as mm

FLOATS = hnp.arrays(np.float32, 12, elements=st.floats(-1e3, 1e3, width=32))
DIFFERENCES = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def tensors(count=3, shape=(7, 9), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


def bits(array):
    return np.asarray(array, np.float32).view(np.int32)


@settings(deadline=None, max_examples=100)
@given(st.lists(FLOATS, min_size=2, max_size=4), st.data())
def test_linear_knows_no_order(sources, data):
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=len(sources), max_size=len(sources)))
    order = data.draw(st.permutations(range(len(sources))))
    merged = mm.linear(sources, weights)
    again = mm.linear([sources[i] for i in order], [weights[i] for i in order])
    np.testing.assert_array_equal(bits(merged), bits(again))


@settings(deadline=None, max_examples=100)
@given(FLOATS, st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_linear_of_one_model_with_itself_is_that_model(source, weights):
    merged = mm.linear([source] * len(weights), weights, normalize=True)
    np.testing.assert_array_equal(bits(merged), bits(source))


def test_linear_against_float64_and_weight_1():
    sources = tensors()
    weights = [0.5, 0.2, 0.3]
    expected = sum(w * x.astype(np.float64) for w, x in zip(weights, sources, strict=True))
    np.testing.assert_allclose(mm.linear(sources, weights), expected, rtol=1e-5, atol=1e-7)
    twice = mm.linear(sources, [1.0, 0.4, 0.6], normalize=True)
    np.testing.assert_allclose(twice, mm.linear(sources, weights), rtol=1e-5, atol=1e-7)
    sources[1][0, 0] = -0.0
    for weights in ([0, 1.0, 0], [0, 7.0, 0]):
        merged = mm.linear(sources, weights, normalize=True)
        np.testing.assert_array_equal(bits(merged), bits(sources[1]))


def test_slerp_keeps_the_angle_and_the_ends():
    a, b = tensors(2)
    for t in (0.0, 0.3, 1.0):
        x, y = (v.astype(np.float64).ravel() for v in (a, b))
        phi = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        expected = (np.sin((1 - t) * phi) * x + np.sin(t * phi) * y) / np.sin(phi)
        np.testing.assert_allclose(mm.slerp(a, b, t).ravel(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(bits(mm.slerp(a, b, 0.0)), bits(a))
    np.testing.assert_array_equal(bits(mm.slerp(a, b, 1.0)), bits(b))
    np.testing.assert_array_equal(bits(mm.slerp(a, a, 0.3)), bits(a))  # parallel
    np.testing.assert_array_equal(mm.slerp(0 * a, b, 0.5), mm.slerp(b, 0 * a, 0.5))  # no direction


def test_task_arithmetic():
    base, a, b = tensors()
    merged = mm.task_arithmetic(base, [a, b], [0.7, -0.4], scale=1.5)
    expected = base + 1.5 * (0.7 * (a - base) - 0.4 * (b - base))
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


def plain_ties(base, sources, weights, density, scale, normalize):
    """Yadav et al. 2023, algorithm 1, with weights; element by element."""
    deltas = []
    for x, weight, share in zip(sources, weights, density, strict=True):
        delta = (x - base).ravel()
        keep = max(1, int(share * delta.size))
        kept = np.argsort(-np.abs(delta), kind="stable")[:keep]
        trimmed = np.zeros_like(delta)
        trimmed[kept] = delta[kept]
        deltas.append(weight * trimmed)
    merged = np.zeros_like(deltas[0])
    for i in range(merged.size):
        column = [delta[i] for delta in deltas]
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [(c, w) for c, w in zip(column, weights, strict=True) if np.sign(c) == sign]
        total = sum(c for c, _ in agreeing)
        divisor = sum(w for _, w in agreeing) or 1
        merged[i] = total / divisor if normalize else total
    return base + scale * merged.reshape(base.shape)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [(1.0, 1.0), (0.3, 0.6), (0.001, 0.999)])
def test_ties_against_the_algorithm(normalize, density):
    base, a, b = tensors()
    merged = mm.ties(base, [a, b], [0.6, 0.5], density, scale=0.8, normalize=normalize)
    expected = plain_ties(base, [a, b], [0.6, 0.5], density, 0.8, normalize)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0, 1, -1, 2, -2, 0.5])),
    st.floats(0.01, 0.99),
)
def test_ties_keeps_as_many_as_it_says_and_the_largest(delta, density):
    base = np.full_like(delta, 64)  # so that every sum is exact
    kept = mm.ties(base, [base + delta], [1.0], [density], normalize=False) - base
    keep = max(1, int(density * delta.size))
    order = np.sort(np.abs(delta))[::-1]
    assert (kept != 0).sum() == (order[:keep] > 0).sum()
    assert ((kept == 0) | (kept == delta)).all()
    np.testing.assert_array_equal(np.sort(np.abs(kept))[::-1][:keep], order[:keep])


@settings(deadline=None, max_examples=200)
@given(
    hnp.arrays(
        np.float32, (20, 16), elements=st.sampled_from([0, 1, -1, 2, -2, 0.5, 3, 4, 5, 6, 7, 8])
    ),
    st.floats(0.01, 0.99),
    st.sets(st.integers(0, 19), min_size=1),
    st.sampled_from([0, 10, 320]),
)
def test_any_sample_finds_the_threshold(delta, density, sampled, held):
    """However the sample was drawn, and however little may be held."""
    base = np.zeros(16, np.float32)

    def blocks(sample=False):
        for row in sorted(sampled) if sample else range(20):
            yield 16 * row, [base, delta[row]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm._Search, "HELD", held)
        (trim,) = mm.Ties().prepare(blocks, mm.Parameters((1.0,), (density,)), "x")
    magnitudes = np.sort(np.abs(delta), axis=None)[::-1]
    keep = max(1, int(density * 320))
    threshold = np.int32(trim.threshold).view(np.float32)
    assert threshold == magnitudes[keep - 1]
    assert trim.ties == (magnitudes == threshold).sum()
    assert trim.kept == keep - (magnitudes > threshold).sum()


def test_ties_at_the_threshold_are_spread():
    """All differences alike: any half is a top half, but the first half would leave the last rows untouched."""
    base = np.zeros((8, 8), np.float32)
    kept = mm.ties(base, [base + 1], [1.0], [0.5], normalize=False)
    np.testing.assert_array_equal(kept.sum(axis=1), np.full(8, 4))


def test_dare_is_rescaled_seeded_and_by_name():
    base = np.zeros(200_000, np.float32)
    draw = {}
    for seed, name in ((0, "a"), (0, "b"), (1, "a")):
        merged = mm.dare(base, [base + 1], [1.0], [0.25], seed, name=name)
        assert set(np.unique(merged)) == {0.0, 4.0}
        assert merged.mean() == pytest.approx(1, abs=0.02)
        draw[seed, name] = merged > 0
        np.testing.assert_array_equal(
            merged, mm.dare(base, [base + 1], [1.0], [0.25], seed, name=name)
        )
    for other in ((0, "b"), (1, "a")):
        share = (draw[0, "a"] & draw[other]).mean()
        assert share == pytest.approx(1 / 16, abs=0.005)  # independent draws
    two = mm.dare(base, [base + 1, base + 8], [1.0, 1.0], [0.5, 0.5])
    assert set(np.unique(two)) == {0.0, 2.0, 16.0, 18.0}  # sources are drawn for apart
    signs = mm.dare(base, [base + 1, base - 8], [1.0, 1.0], [0.5, 0.5], elect=True)
    assert set(np.unique(signs)) == {0.0, 2.0, -16.0}


@pytest.mark.parametrize("method", mm.METHODS)
def test_blocks_give_what_the_whole_tensor_gives(method):
    sources = tensors(2 if method == "slerp" else 3, shape=(1000,))
    weight = (0.4, 0.3, 0.3) if method == "linear" else (0.7, 0.5)[: len(sources) - 1]
    parameters = mm.Parameters(weight, (0.3, 0.7), t=0.3, normalize=method == "ties", seed=3)
    whole = mm.merge_tensors(method, sources, parameters, "x")

    def blocks(sample=False):
        for start in (0, 24, 496, 504)[: 1 if sample else None]:  # not all of one length
            stop = {0: 24, 24: 496, 496: 504, 504: 1000}[start]
            yield start, [x[start:stop] for x in sources]

    chosen = mm.METHODS[method]
    prepared = chosen.prepare(blocks, parameters, "x")
    parts = [chosen.combine(block, parameters, prepared, "x") for block in blocks()]
    # The norms of slerp are sums over blocks, in float32 within one.
    tolerance = 1e-6 if method == "slerp" else 0
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", DIFFERENCES)
def test_no_difference_changes_no_bit(method):
    base = tensors(1)[0]
    base[0] = -0.0
    parameters = mm.Parameters((0.7, 0.3), (0.5, 0.5), normalize=method == "ties")
    merged = mm.merge_tensors(method, [base, base, base], parameters, "x")
    np.testing.assert_array_equal(bits(merged), bits(base))
