"""The gradients of the UNet's LoRA, and the UNet's small passes, but for its norms (`norms.py`).

By `kernels.cu` and `tensor_cores.cu` on CUDA, by PyTorch's operators elsewhere.

PyTorch runs these as several kernels each, converts between layouts around them, and keeps more tensors for the
backward pass. Where NVRTC is missing (`nvrtc.py`), PyTorch's operators do the work, slower.

Shapes: `rows` are (T, D); pictures are (N, C, H, W) in channels_last. All of fp16, bf16 or fp32; statistics are fp32.
"""

import torch
import torch.nn.functional as F

from rasengan import nvrtc


# What `lora_gradient_sums` takes: columns of a block, rows of a stage, ranks at most, and about so many blocks.
STRIP, STAGE_ROWS, MOST_RANKS, MOST_BLOCKS = 128, 64, 64, 528
# Its rows are split into no more parts than this, since the sums of each are written, read and added.
MOST_SPLITS = 32


def _packs(elements: int) -> tuple[tuple[int, int], tuple[int, int], int]:
    packs = elements // 8
    return ((packs + 255) // 256, 1), (256, 1), packs


# --- GEGLU ---


def geglu(h: torch.Tensor) -> torch.Tensor:
    """Return value * gelu(gate), (T, D), of rows h (T, 2 D) that hold value and gate side by side."""
    width = h.shape[-1] // 2
    kernels = nvrtc.kernels_for(h, width, 2**20)
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
    kernels = nvrtc.kernels_for(h, width, 2**20)
    if kernels is None:
        value, gate = h.chunk(2, dim=-1)
        return torch.cat([grad_y * F.gelu(gate), torch.ops.aten.gelu_backward(grad_y * value, gate)], dim=-1)
    grad_h = torch.empty_like(h)
    grid, block, packs = _packs(grad_y.numel())
    kernels.launch("geglu_backward", grid, block, h, grad_y.contiguous(), grad_h, packs, width)
    return grad_h


# --- the end of a residual block ---


def add_with_bias(x: torch.Tensor, h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return x + h + bias (C,) of two pictures (N, C, H, W)."""
    kernels = nvrtc.kernels_for(x, x.shape[1], 2**20)
    if kernels is None:
        return x + (h + bias[:, None, None])
    x, h = (t.contiguous(memory_format=torch.channels_last) for t in (x, h))
    y = torch.empty_like(x)
    grid, block, packs = _packs(x.numel())
    kernels.launch("add_with_bias", grid, block, x, h, bias, y, packs, x.shape[1])
    return y


def add_bias_(h: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add bias (C,) to pictures (N, C, H, W) in place, and return them."""
    fits = h.is_contiguous(memory_format=torch.channels_last) and bias.dtype == h.dtype
    kernels = nvrtc.kernels_for(h, h.shape[1], 2**20) if fits else None
    if kernels is None:
        return h.add_(bias[:, None, None])
    grid, block, packs = _packs(h.numel())
    kernels.launch("add_with_bias", grid, block, None, h, bias, h, packs, h.shape[1])
    return h


# --- twice as many pixels each way ---


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Return pictures (N, C, H, W) with each pixel four times, (N, C, 2 H, 2 W)."""
    count, channels, height, width = x.shape
    is_ready = x.is_contiguous(memory_format=torch.channels_last)
    kernels = nvrtc.kernels_for(x, channels, 2**20) if is_ready else None
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
    kernels = nvrtc.kernels_for(grad_y, channels, 2**20)
    if kernels is None:
        return F.avg_pool2d(grad_y, 2, divisor_override=1)
    sizes = (count, channels, height // 2, width // 2)
    grad_x = torch.empty(sizes, dtype=grad_y.dtype, device=grad_y.device, memory_format=torch.channels_last)
    grid, block, packs = _packs(grad_x.numel())
    grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    kernels.launch("upsample_backward", grid, block, grad_y, grad_x, packs, width // 2, channels)
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
    kernels = nvrtc.kernels_for(x, width, 2**20)
    # For q, k and v side by side, PyTorch's products were measured to be as fast or faster.
    fits = (
        layers == 1 and rank % 8 == 0 and rank <= MOST_RANKS and out_width % 8 == 0 and grad_A.dtype == torch.float32
    )
    if kernels is None or not kernels.has_tensor_cores or not fits:
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
