"""LayerNorm and GroupNorm with what stands around them: `kernels.cu` on CUDA, PyTorch's operators elsewhere.

Shapes: `rows` are (T, D); pictures are (N, C, H, W) in channels_last. All of fp16, bf16 or fp32; statistics are fp32.
"""

import torch
import torch.nn.functional as F

from rasengan import nvrtc


# Blocks of a GroupNorm's passes that a multiprocessor runs at once: by their registers, in 16 bits, two of the forward
# one, and one of the backward ones. Two of the statistics' would run too, but their sums take longer than they save.
FORWARD_BLOCKS, OTHER_BLOCKS = 2, 1
LEAST_ROUNDS = 2  # of pixels that a block takes, however few there are


# --- residual add and LayerNorm ---


def _row_kernel(name: str, rows: int, width: int) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """Return the kernel of a pass over rows that has registers for their width, with its grid and block."""
    packs = next(packs for packs in (3, 5, 8) if width <= packs * 32 * 8)
    return f"{name}_{packs}", ((rows + 3) // 4, 1), (32, 4)


def add_layer_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x + delta (x itself for None) and its LayerNorm, all rows (T, D), and statistics (T, 2) for later."""
    rows, width = x.shape
    kernels = nvrtc.kernels_for(x, width, 2048)
    if kernels is None:
        total = x if delta is None else x + delta
        y, mean, rstd = torch.native_layer_norm(total, (width,), weight, bias, eps)
        return total, y, torch.cat([mean, rstd], dim=1)
    total, y = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    statistics = x.new_empty(rows, 2, dtype=torch.float32)
    name, grid, block = _row_kernel("add_layer_norm", rows, width)
    kernels.launch(name, grid, block, x, delta, weight, bias, total, y, statistics, rows, width, eps)
    return total, y, statistics


def layer_norm_backward(
    total: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
) -> torch.Tensor:
    """Return the gradient of `add_layer_norm` with respect to x and delta alike; `grad_total` came past the norm."""
    rows, width = total.shape
    kernels = nvrtc.kernels_for(total, width, 2048)
    if kernels is None:
        mean, rstd = (part.contiguous() for part in statistics.split(1, dim=1))  # it reads them as if they were
        grad, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_y, total, (width,), mean, rstd, weight, None, [True, False, False]
        )
        return grad if grad_total is None else grad + grad_total
    grad = torch.empty_like(total)
    name, grid, block = _row_kernel("layer_norm_backward", rows, width)
    kernels.launch(name, grid, block, total, weight, statistics, grad_y, grad_total, grad, rows, width)
    return grad


# --- GroupNorm and SiLU ---


def _slices(x: torch.Tensor, channels: int, blocks: int) -> tuple[tuple[int, int], tuple[int, int], int, int]:
    """Return grid and block of a pass over pictures, the pixels that a block takes, and its shared memory in bytes.

    There are no more blocks than run at once, `blocks` on each multiprocessor, but for one of each picture: those left
    over would run alone in the end.
    """
    pictures, _, height, width = x.shape
    pixels, rows = height * width, max(1, 512 // (channels // 8))
    of_a_picture = max(1, blocks * nvrtc.multiprocessors(x.device) // pictures)
    each = max(LEAST_ROUNDS * rows, -(-pixels // of_a_picture))
    return (-(-pixels // each), pictures), (channels // 8, rows), each, 2 * rows * channels * 4


def _channels_of(x: torch.Tensor, skip: torch.Tensor | None) -> int:
    return x.shape[1] + (0 if skip is None else skip.shape[1])


def _kernels_for_norm(x: torch.Tensor, skip: torch.Tensor | None) -> nvrtc.Kernels | None:
    fits = (skip is None or x.shape[1] % 8 == 0) and len(x) <= nvrtc.COUNTERS
    return nvrtc.kernels_for(x, _channels_of(x, skip), 4096) if fits else None


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


def groups_with(channels: int, all_channels: int, groups: int) -> tuple[int, int]:
    """Return how many of a GroupNorm's groups have one of its first channels, and how many channels they have.

    There may be some groups more, so that the kernels can take the channels, which they read in eights.
    """
    width = all_channels // groups
    counts = range(-(-channels // width), groups)
    count = next((count for count in counts if count * width % 8 == 0), groups)
    return count, count * width


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
