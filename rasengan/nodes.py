"""The autograd nodes of the training forward: each keeps the least that a frozen model's backward pass needs.

Shapes: T rows (a picture's pixels, or a prompt's tokens, times the batch), D and E widths, r rank, n layers side by
side; pictures are (N, C, H, W) in channels_last. Weights and biases that are not a LoRA's are frozen.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rasengan import kernels, norms
from rasengan.kernels import by_layer
from rasengan.side_stream import forked


class LoraMatrices(NamedTuple):
    """The LoRA matrices of n layers side by side in the UNet's dtype, and where their gradients are added to.

    lora_A (n r, D), and lora_B (n, E, r) with the LoRA's scale in it; grad_A and grad_B, of the same shapes, are parts
    of the flat parameter's gradient, and of it without the scale.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    grad_A: torch.Tensor
    grad_B: torch.Tensor
    scale: float


class LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + (x A^T) B^T, for n layers of one input side by side.

    x (T, D), weight (n E, D), bias (n E,) or None: y is (T, n E). The base's product accumulates onto the LoRA's, so
    that this takes no pass of its own over y. Keeps x and x A^T. The weight may be one that bitsandbytes quantized.

    The backward pass adds the LoRA's gradients where `lora` says, past autograd, which would gather and copy them, and
    beside the base's product. `anchor` requires a gradient and gets none: it makes autograd come here also where x
    requires none.
    """

    @staticmethod
    def forward(ctx, x, anchor, lora, weight, bias):
        layers, width, _ = lora.lora_B.shape
        h = x @ lora.lora_A.t()  # (T, n r)
        if layers == 1:
            y = h @ lora.lora_B[0].t() if bias is None else torch.addmm(bias, h, lora.lora_B[0].t())
        else:
            y = x.new_empty(len(x), layers * width)
            torch.bmm(by_layer(h, layers), lora.lora_B.transpose(1, 2), out=by_layer(y, layers))
            if bias is not None:
                y += bias
        ctx.save_for_backward(x, h)
        ctx.lora, ctx.weight = lora, weight
        return y.addmm_(x, dense(weight, x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (x, h), lora = ctx.saved_tensors, ctx.lora
        layers, grad_y, grad_x = len(lora.lora_B), grad_y.contiguous(), None
        grad_h = torch.empty_like(h)
        with forked(x.device) as side:
            with side.running():
                torch.bmm(by_layer(grad_y, layers), lora.lora_B, out=by_layer(grad_h, layers))
                side.mark()
                kernels.add_lora_gradients(x, h, grad_y, grad_h, lora.grad_A, lora.grad_B, lora.scale)
            if ctx.needs_input_grad[0]:
                grad_x = grad_y @ dense(ctx.weight, x.dtype)
                side.wait_for_mark()
                grad_x.addmm_(grad_h, lora.lora_A)
        return grad_x, None, None, None, None


def dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as a matrix (E, D); one that bitsandbytes quantized to 4 bits is expanded."""
    if getattr(weight, "quant_state", None) is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


class QuantizedProduct(torch.autograd.Function):
    """y = x W^T + bias of a frozen weight that bitsandbytes quantized; keeps nothing, and expands it once more."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, dense(weight, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return grad_y @ dense(ctx.weight, grad_y.dtype), None, None


class AddLayerNorm(torch.autograd.Function):
    """(x, delta) -> (x + delta, LayerNorm of it), (T, D); delta may be None. Keeps the sum and statistics (T, 2)."""

    @staticmethod
    def forward(ctx, x, delta, weight, bias, eps):
        total, y, statistics = norms.add_layer_norm(x, delta, weight, bias, eps)
        ctx.save_for_backward(total, statistics)
        ctx.weight, ctx.has_delta = weight, delta is not None
        ctx.set_materialize_grads(False)
        return (total if delta is not None else total.view_as(total)), y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_y):
        total, statistics = ctx.saved_tensors
        if grad_y is not None:
            grad_total = None if grad_total is None else grad_total.contiguous()
            grad_total = norms.layer_norm_backward(total, ctx.weight, statistics, grad_y.contiguous(), grad_total)
        return grad_total, grad_total if ctx.has_delta else None, None, None, None


class GroupNormSilu(torch.autograd.Function):
    """(x, skip, shift) -> (x, skip, silu(GroupNorm([x, skip] + shift))), pictures; keeps x, skip and the statistics.

    x and skip are handed on, so that the gradient that comes past the norm is added by the norm's own backward pass.
    skip has the channels that follow those of x, or is None. shift is (N, C) or None, and has a gradient where a text
    encoder is trained: pooled text is in it. silu may be left out.
    """

    @staticmethod
    def forward(ctx, x, skip, shift, weight, bias, groups, eps, silu):
        y, statistics = norms.group_norm(x, shift, weight, bias, groups, eps, silu, skip)
        ctx.save_for_backward(x, skip, shift, statistics)
        ctx.options = (weight, bias, groups, eps, silu)
        ctx.set_materialize_grads(False)
        return x.view_as(x), None if skip is None else skip.view_as(skip), y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_skip, grad_y):
        x, skip, shift, statistics = ctx.saved_tensors
        grad_shift = None
        if grad_y is not None and ctx.needs_input_grad[2]:
            parts = norms.group_norm_backward(x, shift, *ctx.options, statistics, grad_y, None, skip)
            grad_shift = torch.cat([part.sum(dim=(2, 3)) for part in parts if part is not None], dim=1)
            grad_x, grad_skip = (
                part if past is None else part + past for part, past in zip(parts, (grad_x, grad_skip), strict=True)
            )
        elif grad_y is not None:
            past = grad_x, skip, grad_skip
            grad_x, grad_skip = norms.group_norm_backward(x, shift, *ctx.options, statistics, grad_y, *past)
        return grad_x, grad_skip, grad_shift, None, None, None, None, None


class GroupNormSiluConv(torch.autograd.Function):
    """(x, skip) -> (x, conv(silu(GroupNorm([x, skip])))), pictures, where only x requires a gradient.

    So is it where skip comes from before the first LoRA. The backward pass leaves out the groups that have none of x's
    channels, in the convolution's gradient as well. Keeps x, skip and the statistics.
    """

    @staticmethod
    def forward(ctx, x, skip, weight, bias, groups, eps, conv_weight, padding):
        y, statistics = norms.group_norm(x, None, weight, bias, groups, eps, True, skip)
        ctx.save_for_backward(x, skip, statistics)
        ctx.options = (weight, bias, groups, eps, conv_weight, padding)
        ctx.set_materialize_grads(False)
        return x.view_as(x), F.conv2d(y, conv_weight, None, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_y):
        x, skip, statistics = ctx.saved_tensors
        weight, bias, groups, eps, conv_weight, padding = ctx.options
        if grad_y is not None:
            groups, channels = norms.groups_with(x.shape[1], len(weight), groups)
            weight, bias, statistics = weight[:channels], bias[:channels], statistics[:, :groups].contiguous()
            skip = skip[:, : channels - x.shape[1]] if channels > x.shape[1] else None
            grad_y = F.conv_transpose2d(grad_y, conv_weight[:, :channels], None, padding=padding)
            options = None, weight, bias, groups, eps, True, statistics
            grad_x, _ = norms.group_norm_backward(x, *options, grad_y, grad_x, skip)
        return grad_x, *[None] * 7


class Geglu(torch.autograd.Function):
    """h (T, 2 D) -> value * gelu(gate) (T, D); keeps h."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return kernels.geglu(h)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return kernels.geglu_backward(ctx.saved_tensors[0], grad_y)


class FrozenConv(torch.autograd.Function):
    """A convolution with a frozen weight; keeps nothing, where PyTorch's own keeps its input.

    Source: section 3 of arXiv 2404.12406 for what autograd keeps without need.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.weight, ctx.stride, ctx.padding, ctx.size = weight, stride, padding, x.shape[2:]
        y = F.conv2d(x, weight, None, stride, padding)
        return y if bias is None else kernels.add_bias_(y, bias)  # PyTorch adds it after cuDNN, in single channels

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        # The transposed convolution is this gradient. autograd's own function for it converts between layouts.
        kernel, stride, padding, out = ctx.weight.shape[2:], ctx.stride, ctx.padding, grad_y.shape[2:]
        rest = [ctx.size[i] - (out[i] - 1) * stride[i] + 2 * padding[i] - kernel[i] for i in range(2)]
        return F.conv_transpose2d(grad_y, ctx.weight, None, stride, padding, rest), None, None, None, None


class PixelProduct(torch.autograd.Function):
    """A convolution of single pixels with a frozen weight (E, C, 1, 1), of pictures whose channels x and skip share.

    Keeps nothing.
    """

    @staticmethod
    def forward(ctx, x, skip, weight):
        ctx.weights = weight.flatten(1).split([x.shape[1], skip.shape[1]], dim=1)  # views (E, C of each)
        y = as_rows(x) @ ctx.weights[0].t()
        return as_pictures(y.addmm_(as_rows(skip), ctx.weights[1].t()), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        rows = as_rows(grad_y)
        found = zip(ctx.weights, ctx.needs_input_grad, strict=False)
        return *(as_pictures(rows @ weight, grad_y) if is_needed else None for weight, is_needed in found), None


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return pictures as the rows of their pixels' channels (T, C), without a copy where they are in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_pictures(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return rows (T, C) as pictures (N, C, H, W) of another's sizes, in channels_last and without a copy."""
    return rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


class Upsample(torch.autograd.Function):
    """x (N, C, H, W), each pixel four times (N, C, 2 H, 2 W); keeps nothing.

    The backward pass of PyTorch's own is not deterministic by its own account.
    """

    @staticmethod
    def forward(ctx, x):
        return kernels.upsample(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return kernels.upsample_backward(grad_y)


class AddWithBias(torch.autograd.Function):
    """x + h + bias (C,), pictures; keeps nothing."""

    @staticmethod
    def forward(ctx, x, h, bias):
        return kernels.add_with_bias(x, h, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        return grad_y, grad_y, None
