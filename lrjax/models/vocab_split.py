"""How `lrjax.models.head` works on a mesh: who holds which tokens, which vocabulary, which part of the width.

`on_devices(local, vocab_axis, w, x_BLD, ...)` calls `local(split, w, x_BLD, ...)` with each device's own parts under
`shard_map`, everything else as if there were one device; `split` does what has to be done together. Without a mesh it
is a plain call, and `split` does nothing.

A mesh axis may split several things. Over "context" both the tokens and the vocabulary are split: tokens are
gathered before their logits are made. Over "fsdp" both the tokens and the width of the head are: the width is gathered.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from lrjax import sharding
from lrjax.models.exponential import exp_to_one


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh axes that split each thing, and the collectives over them; all methods run on a device."""

    vocab_axis: int  # of the head's weight
    batch: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    sizes: tuple = ()

    def _size(self, axes) -> int:
        return math.prod(dict(self.sizes)[axis] for axis in axes)

    @property
    def length_size(self) -> int:
        return self._size(self.length)

    @property
    def gathered(self) -> int:
        """How many times a device's own tokens `gather_tokens` returns."""
        return self._size(axis for axis in self.batch + self.length if axis in self.vocab)

    # ------------------------------------------------------------------------------------- tokens

    def _shared(self):
        """(dimension of tokens, mesh axis) of what splits tokens and vocabulary, the outermost first."""
        for dimension, axes in ((0, self.batch), (1, self.length)):
            for axis in axes:
                if axis in self.vocab:
                    yield dimension, axis

    def gather_tokens(self, a_BC):
        for dimension, axis in reversed(list(self._shared())):
            a_BC = lax.all_gather(a_BC, axis, axis=dimension, tiled=True)
        return a_BC

    def own_tokens(self, a_BC):
        for dimension, axis in self._shared():
            a_BC = _own(a_BC, axis, dimension, self._size((axis,)))
        return a_BC

    def sum_to_own_tokens(self, a_BCD):
        """Sums parts that the devices made of their vocabularies, and keeps the own tokens."""
        if rest := tuple(a for a in self.vocab if a not in self.batch + self.length):
            a_BCD = lax.psum(a_BCD, rest)
        for dimension, axis in self._shared():
            a_BCD = lax.psum_scatter(a_BCD, axis, scatter_dimension=dimension, tiled=True)
        return a_BCD

    def sum_tokens(self, total):
        axes = tuple(axis for axis in self.batch + self.length if axis not in self.vocab)
        return lax.psum(total, axes) if axes else total

    # ------------------------------------------------------------------------------------- the head's weight

    def whole_width(self, w):
        for axis in reversed(self.width):
            w = lax.all_gather(w, axis, axis=1 - self.vocab_axis, tiled=True)
        return w

    def sum_to_own_width(self, w_bar):
        """The gradient of the own vocabulary and width, summed over all tokens."""
        tokens = [axis for axis in self.batch + self.length if axis not in self.vocab]
        dimension = 1 - self.vocab_axis
        for axis in self.width:
            if axis in tokens:
                tokens.remove(axis)
                w_bar = lax.psum_scatter(w_bar, axis, scatter_dimension=dimension, tiled=True)
            else:
                w_bar = _own(w_bar, axis, dimension, self._size((axis,)))
        return lax.psum(w_bar, tuple(tokens)) if tokens else w_bar

    # ------------------------------------------------------------------------------------- logits
    # [B, C, V]; or [V, B, C], with axis 0.

    def vocabulary(self, logits, axis=-1):
        """The token ids along the vocabulary's axis."""
        V = logits.shape[axis]
        first = lax.axis_index(self.vocab) * V if self.vocab else 0
        return jnp.expand_dims(first + jnp.arange(V), (1, 2) if axis == 0 else (0, 1))

    def sum(self, a_BC):
        return lax.psum(a_BC, self.vocab) if self.vocab else a_BC

    def max(self, logits, axis=-1):
        top_BC = logits.max(axis=axis)
        return lax.pmax(top_BC, self.vocab) if self.vocab else top_BC

    def logsumexp(self, logits, axis=-1):
        top_BC = self.max(logits, axis)
        weights = exp_to_one(logits - jnp.expand_dims(top_BC, axis))
        return top_BC + jnp.log(self.sum(weights.sum(axis=axis)))

    def pick(self, logits, targets_BC, axis=-1):
        """The targets' logits."""
        targets = jnp.expand_dims(targets_BC, axis)
        if not self.vocab:
            return jnp.take_along_axis(logits, targets, axis=axis).squeeze(axis)
        hit = self.vocabulary(logits, axis) == targets
        return self.sum(jnp.where(hit, logits, 0.0).sum(axis=axis))

    def argmax(self, logits, axis=-1):
        """The first of the likeliest token ids, or of NaN. A CPU takes longer for `jnp.argmax` than for two passes."""
        none = jnp.iinfo(jnp.int32).max
        likeliest = (logits == jnp.expand_dims(self.max(logits, axis), axis)) | jnp.isnan(logits)
        first_BC = jnp.where(likeliest, self.vocabulary(logits, axis), none).min(axis=axis)
        return lax.pmin(first_BC, self.vocab) if self.vocab else first_BC


def on_devices(local, vocab_axis: int, w, x_BLD, *arrays_BL, outputs):
    """Calls `local(split, w, x_BLD, *arrays_BL)` on every device.

    Args:
        vocab_axis: of w: 1 for a head [D, V], 0 for a tied embedding [V, D].
        outputs: a tree in the structure of what `local` returns, saying how each is laid out: "scalar", "tokens"
            [B, L], "states" [B, L, D], "head" (as w).
    """
    here = sharding.current()
    if not here.split:
        return local(Split(vocab_axis), w, x_BLD, *arrays_BL)
    names = ("vocab", "head_embed") if vocab_axis == 0 else ("head_embed", "vocab")
    specs = {
        "scalar": P(),
        "tokens": here.spec(("batch", "length"), x_BLD.shape[:2]),
        "states": here.spec(("batch", "length", None), x_BLD.shape),
        "head": here.spec(names, w.shape),
    }
    split = Split(
        vocab_axis,
        *(_axes(entry) for entry in specs["tokens"]),
        vocab=_axes(specs["head"][vocab_axis]),
        width=_axes(specs["head"][1 - vocab_axis]),
        sizes=tuple(here.mesh.shape.items()),
    )
    # check_vma: a sum over one mesh axis of what another one has whole is told only by the axes' meaning here.
    return jax.shard_map(
        lambda *args: local(split, *args),
        mesh=here.mesh,
        in_specs=(specs["head"], specs["states"], *(specs["tokens"] for _ in arrays_BL)),
        out_specs=jax.tree.map(specs.__getitem__, outputs),
        check_vma=False,
    )(w, x_BLD, *arrays_BL)


def _axes(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _own(a, axis, dimension, parts):
    size = a.shape[dimension] // parts
    return lax.dynamic_slice_in_dim(a, lax.axis_index(axis) * size, size, dimension)
