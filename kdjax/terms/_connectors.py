"""Small trained layers between a student's features and a teacher's, as functions of parameters.

They are part of Terms, and dropped with them after training. Kernels and biases start like torch's
layers, uniform in +-1/sqrt(fan_in), as those of the published codes do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import _checks
from kdjax._pairs import Batch, Outputs, Tree
from kdjax.losses._spatial import blank_rows
from kdjax.terms._outputs import student_output, teacher_output


def maps(name: str, outputs: Outputs, tap: str) -> jax.Array:
    """A tapped output of "student" or "teacher" that must be feature maps [B, H, W, C]."""
    found = _checks.floating(f"the {name}'s output {tap!r}", one_output(name, outputs, tap))
    if found.ndim != 4:
        raise ValueError(
            f"the {name}'s output {tap!r} must be feature maps [B, H, W, C], got "
            f"{_checks.describe(found)}."
        )
    return found if name == "student" else jax.lax.stop_gradient(found)


def one_output(name: str, outputs: Outputs, tap: str) -> jax.Array:
    """A tapped output of "student" or "teacher" that must be one array."""
    found = student_output(outputs, tap) if name == "student" else teacher_output(outputs, tap)
    return _checks.as_array(f"the {name}'s output {tap!r}", found)


def counted(batch: Batch, *features: jax.Array) -> tuple[Any, ...]:
    """The rows that count [B] (None: all), and features [B, ...] with zeros in all others.

    What isn't finite in a row that doesn't count would pass into the gradients of kernels.
    """
    for x in features[1:]:
        if x.shape[:1] != features[0].shape[:1]:  # one row would be compared with all
            raise ValueError(
                f"outputs that are compared must have equally many examples, {len(features[0])}, "
                f"got {_checks.describe(x)}."
            )
    if "weight" not in batch:
        return None, *features
    weight = jnp.asarray(batch["weight"])
    _checks.shape("batch['weight']", weight, features[0].shape[:1], "for the examples")
    where = weight > 0
    return where, *(blank_rows(x, where) for x in features)


def mean_of_batch(values: jax.Array, where: jax.Array | None, axis_name: Any) -> jax.Array:
    """The mean of values [B] over the rows that count, of all devices: what a coupled Term returns.

    0 if no row counts.
    """
    kept = jnp.ones(values.shape, bool) if where is None else where
    total, count = jnp.sum(jnp.where(kept, values, 0)), jnp.sum(kept)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def conv_init(
    key: jax.Array, inputs: int, outputs: int, *, size: int = 1, bias: bool = True
) -> dict[str, jax.Array]:
    """Parameters of a convolution: kernel [size, size, inputs, outputs], and bias [outputs]."""
    kernel_key, bias_key = jax.random.split(key)
    bound = (inputs * size * size) ** -0.5
    shape = (size, size, inputs, outputs)
    params = {"kernel": jax.random.uniform(kernel_key, shape, minval=-bound, maxval=bound)}
    if bias:
        params["bias"] = jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound)
    return params


def conv(params: Tree, x: jax.Array, *, stride: int = 1, padding: int | None = None) -> jax.Array:
    """A convolution [B, H, W, C] -> [B, H', W', D] with a square kernel.

    Args:
      params: of `conv_init`.
      x: feature maps.
      stride: of both axes.
      padding: zeros on each side; None is half the kernel, which keeps the size at stride 1.
    """
    kernel = params["kernel"].astype(x.dtype)
    size, dtype = kernel.shape[0], jnp.promote_types(x.dtype, jnp.float32)
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"features must have {kernel.shape[2]} channels as when the term was started, got "
            f"{_checks.describe(x)}."
        )
    if size == 1 and stride == 1:  # a product: fast in loops, too
        y = jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0], preferred_element_type=dtype)
    else:
        pad = size // 2 if padding is None else padding
        y = jax.lax.conv_general_dilated(
            x.astype(dtype), kernel.astype(dtype), (stride, stride), [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
    return y + params["bias"][None, None, None] if "bias" in params else y


def transposed_conv(params: Tree, x: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """The transpose of a convolution: [B, H, W, C] -> [B, (H - 1) stride + size - 2 padding, ...].

    The kernel is [size, size, C, D] and used as torch does, mirrored in both axes.
    """
    kernel = params["kernel"].astype(jnp.promote_types(x.dtype, jnp.float32))
    size = kernel.shape[0]
    pad = size - 1 - padding
    y = jax.lax.conv_general_dilated(
        x.astype(kernel.dtype), kernel[::-1, ::-1], (1, 1), [(pad, pad)] * 2,
        lhs_dilation=(stride, stride), dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return y + params["bias"][None, None, None] if "bias" in params else y


def linear_init(
    key: jax.Array, inputs: int, outputs: int, *, bias: bool = True
) -> dict[str, jax.Array]:
    """Parameters of a linear layer: kernel [inputs, outputs], and bias [outputs]."""
    params = conv_init(key, inputs, outputs, bias=bias)
    return {**params, "kernel": params["kernel"][0, 0]}


def linear(params: Tree, x: jax.Array) -> jax.Array:
    """A linear layer over the last axis, in at least float32."""
    kernel, dtype = params["kernel"], jnp.promote_types(x.dtype, jnp.float32)
    if x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"features must have {kernel.shape[0]} channels as when the term was started, got "
            f"{_checks.describe(x)}."
        )
    y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)
    return y + jnp.expand_dims(params["bias"], range(y.ndim - 1)) if "bias" in params else y


def norm_init(channels: int) -> dict[str, jax.Array]:
    """Parameters of batch normalisation: scale of 1 and bias of 0, [channels]."""
    return {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)}


def batch_norm(
    params: Tree,
    x: jax.Array,
    *,
    axis_name: Any = None,
    where: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """Batch normalisation of [B, ..., C] by the statistics of this batch, of all devices.

    Terms are there in training only, so that running averages would have no use. Rows that don't
    count are left out of the statistics, and come out finite.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    places = x.size // (x.shape[0] * x.shape[-1])
    rows = jnp.asarray(x.shape[0] if where is None else jnp.sum(where), x.dtype)

    def mean(values: jax.Array) -> jax.Array:
        total, count = jnp.sum(blank_rows(values, where), axis=axes, keepdims=True), rows
        if axis_name is not None:
            total, count = jax.lax.psum((total, count), axis_name)
        return total / (jnp.maximum(count, 1) * places)

    centred = x - mean(x)
    scaled = centred * jax.lax.rsqrt(mean(centred**2) + eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return scaled * params["scale"].reshape(shape) + params["bias"].reshape(shape)
