"""Matrix products of the model: operands in the compute dtype, sums in float32, gradients likewise.

`linear(x, w)` contracts the last axis of x with the first of w. With bfloat16 activations the operands are
bfloat16 and the product is accumulated in float32 and rounded once; the cotangents that enter the two
backward products are bfloat16 too, and the weight's gradient leaves in the weight's own dtype (float32)
without having been rounded. Left to itself, XLA's CPU backend would run bfloat16 products at a fraction of
that speed, forwards and (through float32 cotangents) backwards.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from lrjax.sharding import constrain, current

# Of a product in bfloat16 on a CPU: a row alone XLA multiplies with a float32 copy of the weight. (2 rows took up
# to 25 % longer than 4 with SmolLM2's weights, 8 no less.)
_FEWEST_ROWS = 4


def contract(x, w, dimensions) -> jax.Array:
    """`lax.dot_general` without batch axes, float32 result; float32 operands keep all their bits."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, w, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def outer_sum(x_TI, g_TO) -> jax.Array:
    """x^T g summed over the tokens T, float32 [I, O]: the gradient of a weight.

    XLA's CPU backend has no fast path for a product that contracts the first axis of its left operand; x
    transposed in memory has one. Other platforms choose their own layouts, and where tokens are split over devices
    the constraint would have every device gather all of them.
    """
    if x_TI.dtype != jnp.bfloat16 or current().split:
        return contract(x_TI, g_TO, ((0,), (0,)))

    def cpu(x_TI, g_TO):
        x_IT = with_layout_constraint(x_TI.T, Layout(major_to_minor=(0, 1)))
        # The barrier: a transpose behind the product must not become part of it. jaxlib 0.10.2 rewrites it to
        # a bfloat16 product with a transposed result, and has no kernel for that one.
        return lax.optimization_barrier(contract(x_IT, g_TO, ((1,), (0,))))

    def default(x_TI, g_TO):
        return contract(x_TI, g_TO, ((0,), (0,)))

    return lax.platform_dependent(x_TI, g_TO, cpu=cpu, default=default)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x_TI, w, inputs, axes):
    w_IO = _whole(w, x_TI.dtype, inputs, axes)
    rows = x_TI.shape[0]
    if rows == 1 and x_TI.dtype == jnp.bfloat16 and current().platform == "cpu":
        x_TI = jnp.pad(x_TI, ((0, _FEWEST_ROWS - 1), (0, 0)))
    return contract(x_TI, w_IO, ((1,), (0,)))[:rows].astype(x_TI.dtype)


def _matmul_forward(x_TI, w, inputs, axes):
    return _matmul(x_TI, w, inputs, axes), (x_TI, w)


def _matmul_backward(inputs, axes, residuals, g_TO):
    x_TI, w = residuals
    g_TO = g_TO.astype(x_TI.dtype)
    w_IO = _whole(w, x_TI.dtype, inputs, axes)
    x_bar_TI = contract(g_TO, w_IO, ((1,), (1,))).astype(x_TI.dtype)
    w_bar = outer_sum(x_TI, g_TO).reshape(w.shape)
    if axes:  # where the weight lies; XLA would sum it whole on every device
        w_bar = constrain(w_bar, axes)
    return x_bar_TI, w_bar.astype(w.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _whole(w, dtype, inputs, axes):
    """The weight [I..., O...] as [I, O] in the compute dtype, gathered over the devices that its width is split over.

    XLA left to itself would gather the longer activations, or the weight before it is rounded.
    """
    w = w.astype(dtype)
    if axes:
        w = constrain(w, tuple(None if axis == "embed" else axis for axis in axes))
    return w.reshape(math.prod(w.shape[:inputs]), -1)


@functools.partial(jax.jit, static_argnames=("inputs", "axes"), inline=True)
def linear(x: jax.Array, w: jax.Array, inputs: int = 1, axes: tuple | None = None) -> jax.Array:
    """x [..., I...] times w [I..., O...] -> [..., O...], contracting `inputs` axes, in the dtype of x.

    q, k and v weights are [D, N, H]; the output projection [N, H, D] is contracted over two axes. `axes` are the
    logical axes of w (`lrjax.sharding`): w is gathered along "embed" and its gradient is left as w lies.
    """
    batch = x.shape[: x.ndim - inputs]
    y = _matmul(x.reshape(-1, math.prod(w.shape[:inputs])), w, inputs, axes)
    return y.reshape(*batch, *w.shape[inputs:])
