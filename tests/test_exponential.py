import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.models.exponential import exp_to_one


def test_error_grows_with_the_exponent():
    x = -np.concatenate([np.linspace(0, 1, 100_001), np.linspace(1, 87, 400_001)]).astype(
        np.float32
    )
    y = np.asarray(jax.jit(exp_to_one)(x)).astype(np.float64)
    error = np.abs(y / np.exp(x.astype(np.float64)) - 1)
    assert (error <= 1.3e-7 * np.maximum(1, -x)).all()


def test_ends_of_the_range():
    x = jnp.array([0.0, -88.1, -1e30, -jnp.inf])
    np.testing.assert_array_equal(exp_to_one(x), [1.0, 0.0, 0.0, 0.0])
    assert jnp.isnan(exp_to_one(jnp.float32(jnp.nan)))


def test_gradient_is_its_value():
    x = jnp.float32(-1.7)
    assert jax.grad(exp_to_one)(x) == pytest.approx(exp_to_one(x))
    assert jax.grad(jax.grad(exp_to_one))(x) == pytest.approx(exp_to_one(x))
