"""The small passes of the training step: `kernels.cu` on CUDA, PyTorch's operators elsewhere.

PyTorch runs these as several kernels each, converts between layouts around them, and keeps more tensors for the
backward pass. Where NVRTC is missing (`nvrtc.py`), PyTorch's operators do the work, slower.

Shapes: `rows` are (T, D); pictures are (N, C, H, W) in channels_last. All of fp16, bf16 or fp32; statistics are fp32.
"""

from functools import cache

import torch
import torch.nn.functional as F

from rasengan import nvrtc


# Blocks of a GroupNorm's passes that a multiprocessor runs at once: by their registers two of the forward one, and one
# of the backward ones. Two of the statistics' would run too, but their sums take longer than they save.
FORWARD_BLOCKS, OTHER_BLOCKS = 2, 1
LEAST_ROUNDS = 2  # of pixels that a block takes, however few there are
# What `lora_gradient_sums` takes: columns of a block, rows of a stage, ranks at most, and about so many blocks.
STRIP, STAGE_ROWS, MOST_RANKS, MOST_BLOCKS = 128, 64, 64, 528
# Its rows are split into no more parts than this, since the sums of each are written, read and added.
MOST_SPLITS = 32


def _kernels_for(x: torch.Tensor, width: int, widest: int) -> nvrtc.Kernels | None:
    """Return the kernels for a tensor whose channels they can take, or None."""
    fits = x.device.type == "cuda" and x.dtype in nvrtc.MACROS and width % 8 == 0 and width <= widest
    is_countable = x.numel() // 8 < 2**31  # packs, by the int of a launch
    return nvrtc.load(x.dtype, x.device) if fits and is_countable else None


def _packs(elements: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    packs = elements // 8
    return ((packs + 255) // 256, 1), (256, 1), packs


# --- GEGLU ---


def geglu(h: torch.Tensor) -> torch.Tensor:
    """Return value * gelu(gate), (T, D), of rows h (T, 2 D) that hold value and gate side by side."""
    width = h.shape[-1] // 2
    kernels = _kernels_for(h, width, 2**20)
    if kernels is None:
        value, gate = h.chunk(2, dim=-1)
        return value * F.gelu(gate)
    y = h.new_empty(*h.shape[:-1], width)
    grid, block, packs = _packs(y.numel())
    kernels.launch("geglu_forward", grid, block, h.contiguous(), y, packs, width)
    return y


def geglu_backward(h: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `geglu` with respect to h (T, 2 D)."""
    width = h.shape[-1] // 2
    kernels = _kernels_for(h, width, 2**20)
    if kernels is None:
        value, gate = h.chunk(2, dim=-1)
        return torch.cat([grad_y * F.gelu(gate), torch.ops.aten.gelu_backward(grad_y * value, gate)], dim=-1)
    grad_h = torch.empty_like(h)
    grid, block, packs = _packs(grad_y.numel())
    kernels.launch("geglu_backward", grid, block, h, grad_y.contiguous(), grad_h, packs, width)
    return grad_h


# --- residual add and LayerNorm ---


def _row_kernel(name: str, rows: int, width: int) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """Return the kernel of a pass over rows that has registers for their width, with its grid and block."""
    packs = next(packs for packs in (3, 5, 8) if width <= packs * 32 * 8)
    return f"{name}_{packs}", ((rows + 3) // 4, 1), (32, 4)


def add_layer_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + delta (x itself for None) and its LayerNorm, all rows (T, D)."""
    rows, width = x.shape
    kernels = _kernels_for(x, width, 2048)
    if kernels is None:
        total = x if delta is None else x + delta
        return total, F.layer_norm(total, (width,), weight, bias, eps)
    total, y = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    name, grid, block = _row_kernel("add_layer_norm", rows, width)
    kernels.launch(name, grid, block, x, delta, weight, bias, total, y, rows, width, eps)
    return total, y


def layer_norm_backward(
    total: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
) -> torch.Tensor:
    """Return the gradient of `add_layer_norm` with respect to x and delta alike; `grad_total` came past the norm."""
    rows, width = total.shape
    kernels = _kernels_for(total, width, 2048)
    if kernels is None:
        _, mean, rstd = torch.native_layer_norm(total, (width,), weight, bias, eps)
        grad, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_y, total, (width,), mean, rstd, weight, bias, [True, False, False]
        )
        return grad if grad_total is None else grad + grad_total
    grad = torch.empty_like(total)
    name, grid, block = _row_kernel("layer_norm_backward", rows, width)
    kernels.launch(name, grid, block, total, weight, grad_y, grad_total, grad, rows, width, eps)
    return grad


# --- GroupNorm and SiLU ---


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _slices(x: torch.Tensor, channels: int, blocks: int) -> tuple[tuple[int, int], tuple[int, int], int, int]:
    """Return grid and block of a pass over pictures, the pixels that a block takes, and its shared memory in bytes.

    There are as many blocks as run at once, `blocks` on each multiprocessor: one more would run alone in the end.
    """
    pictures, _, height, width = x.shape
    pixels, rows = height * width, max(1, 512 // (channels // 8))
    of_a_picture = max(1, blocks * _multiprocessors(x.device) // pictures)
    each = max(LEAST_ROUNDS * rows, -(-pixels // of_a_picture))
    return (-(-pixels // each), pictures), (channels // 8, rows), each, 2 * rows * channels * 4


def _channels_of(x: torch.Tensor, skip: torch.Tensor | None) -> int:
    return x.shape[1] + (0 if skip is None else skip.shape[1])


def _kernels_for_norm(x: torch.Tensor, skip: torch.Tensor | None) -> nvrtc.Kernels | None:
    fits = (skip is None or x.shape[1] % 8 == 0) and len(x) <= nvrtc.MOST_PICTURES
    return _kernels_for(x, _channels_of(x, skip), 4096) if fits else None


def _is_channels_last(*pictures: torch.Tensor | None) -> bool:
    return all(part is None or part.is_contiguous(memory_format=torch.channels_last) for part in pictures)


def _shifted(x: torch.Tensor, skip: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
    """Return what is normalized as one tensor."""
    x = x if skip is None else torch.cat([x, skip], dim=1)
    return x if shift is None else x + shift[:, :, None, None]


def _channels_last(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def group_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return silu(GroupNorm(x + shift)) (N, C, H, W), and statistics (N, groups, 2) for the backward pass.

    Args:
        x: pictures.
        shift: (N, C), added to every pixel; or None.
        weight: (C,).
        bias: (C,).
        groups: that the channels are normalized in.
        eps: added to the variance.
        silu: False leaves the SiLU out.
        skip: pictures with the channels that follow those of x; None where x has all.
    """
    pictures, _, height, width = x.shape
    if _kernels_for_norm(x, skip) is None:
        shifted = _shifted(x, skip, shift).contiguous()
        sizes = (pictures, shifted.shape[1], height * width, groups)
        y, mean, rstd = torch.native_group_norm(shifted, weight, bias, *sizes, eps)
        return F.silu(y) if silu else y, torch.stack([mean, rstd], dim=-1)
    x, skip = _channels_last(x), _channels_last(skip)
    statistics = group_norm_statistics(x, shift, groups, eps, skip)
    return group_norm_forward(x, shift, statistics, weight, bias, groups, silu, skip), statistics


def group_norm_statistics(
    x: torch.Tensor, shift: torch.Tensor | None, groups: int, eps: float, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """Return mean and 1 / standard deviation (N, groups, 2) of the groups of x + shift, as `group_norm` takes them."""
    pictures, _, height, width = x.shape
    kernels = _kernels_for_norm(x, skip) if _is_channels_last(x, skip) else None
    if kernels is None:
        grouped = _shifted(x, skip, shift).reshape(pictures, groups, -1)
        variance, mean = torch.var_mean(grouped, dim=-1, correction=0)
        return torch.stack([mean, (variance + eps).rsqrt()], dim=-1)
    channels = _channels_of(x, skip)
    grid, block, each, shared_bytes = _slices(x, channels, OTHER_BLOCKS)
    statistics = x.new_empty(pictures, groups, 2, dtype=torch.float32)
    partial = x.new_empty(pictures, grid[0], groups, 2, dtype=torch.float32)
    arguments = (x, skip, x.shape[1], shift, partial, kernels.counters, statistics)
    sizes = (height * width, channels, groups, each, eps)
    kernels.launch("group_norm_statistics", grid, block, *arguments, *sizes, shared_bytes=shared_bytes)
    return statistics


def group_norm_forward(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    silu: bool,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return silu(GroupNorm(x + shift)) (N, C, H, W) by statistics (N, groups, 2) that may be of more than x."""
    pictures, _, height, width = x.shape
    kernels = _kernels_for_norm(x, skip) if _is_channels_last(x, skip) else None
    channels = _channels_of(x, skip)
    if kernels is None:
        mean, rstd = statistics.repeat_interleave(channels // groups, dim=1).unbind(-1)  # each (N, C)
        scale, offset = rstd * weight, bias - mean * rstd * weight
        y = torch.addcmul(offset[:, :, None, None], _shifted(x, skip, shift), scale[:, :, None, None])
        return F.silu(y, inplace=True) if silu else y
    sizes = (pictures, channels, height, width)
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid, block, each, _ = _slices(x, channels, FORWARD_BLOCKS)
    of = (x, skip, x.shape[1], shift, statistics, weight, bias)
    kernels.launch("group_norm_forward", grid, block, *of, y, height * width, channels, groups, each, int(silu))
    return y


def group_norm_backward(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    statistics: torch.Tensor,
    grad_y: torch.Tensor,
    grad_past: torch.Tensor | None,
    skip: torch.Tensor | None = None,
    grad_past_skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of `group_norm` with respect to x and skip, plus what reached each past the norm."""
    pictures, _, height, width = x.shape
    kernels, channels = _kernels_for_norm(x, skip), _channels_of(x, skip)
    if kernels is None:
        shifted = _shifted(x, skip, shift).contiguous()
        sizes, (mean, rstd) = (pictures, channels, height * width, groups), statistics.unbind(-1)
        if silu:
            y, _, _ = torch.native_group_norm(shifted, weight, bias, *sizes, eps)
            grad_y = torch.ops.aten.silu_backward(grad_y.contiguous(), y)
        grad, _, _ = torch.ops.aten.native_group_norm_backward(
            grad_y.contiguous(), shifted, mean.contiguous(), rstd.contiguous(), weight, *sizes, [True, False, False]
        )
        grad_x, grad_skip = grad[:, : x.shape[1]], None if skip is None else grad[:, x.shape[1] :]
        grad_x = grad_x if grad_past is None else grad_x + grad_past
        return grad_x, grad_skip if grad_past_skip is None else grad_skip + grad_past_skip
    x, skip, grad_y, *past = map(_channels_last, (x, skip, grad_y, grad_past, grad_past_skip))
    grad_x, grad_skip = torch.empty_like(x), None if skip is None else torch.empty_like(skip)
    grid, block, each, shared_bytes = _slices(x, channels, OTHER_BLOCKS)
    sizes = (height * width, channels, groups, each)
    means, partial = torch.empty_like(statistics), statistics.new_empty(pictures, grid[0], groups, 2)
    of = (x, skip, x.shape[1], shift, statistics, weight, bias, grad_y)
    arguments = (*of, partial, kernels.counters, means, *sizes, int(silu))
    kernels.launch("group_norm_backward_means", grid, block, *arguments, shared_bytes=shared_bytes)
    arguments = (*of, means, *past, grad_x, grad_skip, *sizes, int(silu))
    kernels.launch("group_norm_backward", grid, block, *arguments)
    return grad_x, grad_skip


# --- the end of a residual block ---


def add_with_bias(x: torch.Tensor, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return x + h + bias (C,) of two pictures (N, C, H, W)."""
    kernels = _kernels_for(x, x.shape[1], 2**20)
    if kernels is None:
        return x + (h + bias[:, None, None])
    x, h = (t.contiguous(memory_format=torch.channels_last) for t in (x, h))
    y = torch.empty_like(x)
    grid, block, packs = _packs(x.numel())
    kernels.launch("add_with_bias", grid, block, x, h, bias, y, packs, x.shape[1])
    return y


def add_bias_(h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add bias (C,) to pictures (N, C, H, W) in place, and return them."""
    fits = _is_channels_last(h) and bias.dtype == h.dtype
    kernels = _kernels_for(h, h.shape[1], 2**20) if fits else None
    if kernels is None:
        return h.add_(bias[:, None, None])
    grid, block, packs = _packs(h.numel())
    kernels.launch("add_with_bias", grid, block, None, h, bias, h, packs, h.shape[1])
    return h


# --- twice as many pixels each way ---


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Return pictures (N, C, H, W) with each pixel four times, (N, C, 2 H, 2 W)."""
    count, channels, height, width = x.shape
    kernels = _kernels_for(x, channels, 2**20) if _is_channels_last(x) else None
    if kernels is None:
        # Beyond these sizes PyTorch's kernel for channels_last fails: diffusers issue 984, PyTorch issue 141831.
        x = x.contiguous() if count >= 64 or 2 * x.numel() > 2**31 else x
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    sizes = (count, channels, 2 * height, 2 * width)
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    grid, block, packs = _packs(x.numel())
    kernels.launch("upsample_forward", grid, block, x, y, packs, width, channels)
    return y


def upsample_backward(grad_y: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `upsample` with respect to x: the sum of each pixel's four."""
    count, channels, height, width = grad_y.shape
    kernels = _kernels_for(grad_y, channels, 2**20)
    if kernels is None:
        return F.avg_pool2d(grad_y, 2, divisor_override=1)
    sizes = (count, channels, height // 2, width // 2)
    grad_x = torch.empty(sizes, dtype=grad_y.dtype, device=grad_y.device, memory_format=torch.channels_last)
    grid, block, packs = _packs(grad_x.numel())
    kernels.launch("upsample_backward", grid, block, _channels_last(grad_y), grad_x, packs, width // 2, channels)
    return grad_x


# --- gradients of the LoRA's matrices ---


def by_layer(rows: torch.Tensor, layers: int) -> torch.Tensor:
    """Return rows (T, n E) of n layers side by side as (n, T, E), without a copy."""
    return rows.view(len(rows), layers, -1).transpose(0, 1)


def add_lora_gradients(
    x: torch.Tensor,
    h: torch.Tensor,
    grad_y: torch.Tensor,
    grad_h: torch.Tensor,
    grad_A: torch.Tensor,
    grad_B: torch.Tensor,
    scale: float,
) -> None:
    """Add the gradients of n layers' LoRA matrices to what is there already, all rows at once.

    Args:
        x: (T, D).
        h: x A^T, (T, n r).
        grad_y: (T, n E).
        grad_h: (T, n r).
        grad_A: (n r, D), gains grad_h^T x.
        grad_B: (n, E, r), gains scale * grad_y^T h of each layer.
        scale: of the LoRA, which h's product has, and lora_B has not.
    """
    layers, out_width, rank = grad_B.shape
    rows, width = x.shape
    kernels = _kernels_for(x, width, 2**20)
    # For q, k and v side by side, PyTorch's products were measured to be as fast or faster.
    fits = (
        layers == 1 and rank % 8 == 0 and rank <= MOST_RANKS and out_width % 8 == 0 and grad_A.dtype == torch.float32
    )
    if kernels is None or not kernels.has_lora_gradients or not fits:
        grad_A += grad_h.t() @ x
        grad_B.add_(torch.bmm(by_layer(grad_y, layers).transpose(1, 2), by_layer(h, layers)), alpha=scale)
        return
    x, h, grad_y, grad_h = (t.contiguous() for t in (x, h, grad_y, grad_h))
    strips = -(-width // STRIP) + -(-out_width // STRIP)
    splits = max(1, min(-(-rows // STAGE_ROWS), MOST_BLOCKS // strips, MOST_SPLITS))
    each = -(-rows // (splits * STAGE_ROWS)) * STAGE_ROWS
    splits, tiles, sizes = -(-rows // each), -(-rank // 16), (width, out_width, rank)
    partial = x.new_empty(strips, splits, tiles * 16, STRIP, dtype=torch.float32)
    arguments = (x, grad_h, grad_y, h, partial, rows, *sizes, each)
    kernels.launch(f"lora_gradient_sums_{tiles}", (strips, splits), (128, 1), *arguments)
    arguments = (partial, grad_A, grad_B, splits, tiles * 16, *sizes, float(scale))
    kernels.launch("add_lora_gradients", (strips, rank), (STRIP, 1), *arguments)
