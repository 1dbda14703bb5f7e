"""Optimizers and learning-rate schedules by name, from optax.

`make_optimizer(config)` reads: optimizer (adamw | muon | adafactor), learning_rate, schedule (constant | cosine |
linear), warmup_steps, steps, weight_decay, b1, b2, clip_norm.
"""

import optax
from optax.contrib import MuonDimensionNumbers

from lrjax.errors import UserError

# Which axes of a stacked weight are its inputs and its outputs; the layer axis is a batch of matrices. What is
# not listed (embedding, head, norms) is trained by Adam, as Muon's authors do.
_MUON_AXES = {
    "q": MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3)),
    "k": MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3)),
    "v": MuonDimensionNumbers(reduction_axis=1, output_axis=(2, 3)),
    "o": MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=3),
    "gate": MuonDimensionNumbers(reduction_axis=1, output_axis=2),
    "up": MuonDimensionNumbers(reduction_axis=1, output_axis=2),
    "down": MuonDimensionNumbers(reduction_axis=1, output_axis=2),
}

_ADAFACTOR_SMALLEST = 64  # axes: a norm's scales of all layers, [32, D], are no matrix


def make_schedule(config) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then constant, or cosine or linear to 0 at `steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(config.steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
    }
    if config.schedule not in after:
        raise UserError(f"schedule {config.schedule!r}: allowed: {', '.join(after)}")
    if not warmup:
        return after[config.schedule]()
    # From peak / warmup on, so that the first step is not lost to a learning rate of 0.
    rise = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([rise, after[config.schedule]()], [warmup])


def make_optimizer(config) -> optax.GradientTransformation:
    """The gradient transformation that a training section of a config asks for."""
    schedule = make_schedule(config)
    match config.optimizer:
        case "adamw":
            update = optax.adamw(
                schedule, config.b1, config.b2,
                weight_decay=config.weight_decay, mask=_is_matrix,
            )  # fmt: skip
        case "muon":
            # Updates of AdamW's usual size (Liu et al. 2025, arXiv 2502.16982), so that one learning rate
            # serves the matrices and, through Adam, everything else.
            update = optax.contrib.muon(
                schedule, weight_decay=config.weight_decay, adam_b1=config.b1, adam_b2=config.b2,
                muon_weight_dimension_numbers=_muon_axes, consistent_rms=0.2,
            )  # fmt: skip
        case "adafactor":
            # Shazeer & Stern 2018 (arXiv 1804.04235): second moments as a row and a column, no first moment, so that
            # the state is next to nothing. Updates are of RMS 1 at most and not scaled by their parameter's size:
            # the learning rate means what it means for AdamW.
            update = optax.chain(
                optax.scale_by_factored_rms(min_dim_size_to_factor=_ADAFACTOR_SMALLEST),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
                optax.scale_by_learning_rate(schedule),
            )
        case other:
            raise UserError(f"optimizer {other!r}: allowed: adamw, muon, adafactor")
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, update)


def _is_matrix(params):
    """Weight decay is for matrices; a norm's scale is pulled to no value."""
    return _by_name(params, lambda name: "norm" not in name)


def _muon_axes(params):
    return _by_name(params, _MUON_AXES.get)


def _by_name(params, function):
    return {
        name: _by_name(leaf, function) if isinstance(leaf, dict) else function(name)
        for name, leaf in params.items()
    }
