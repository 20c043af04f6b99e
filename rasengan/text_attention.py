"""Attention to a prompt, whose keys are few: `tensor_cores.cu` on CUDA, PyTorch's operator elsewhere.

PyTorch's is made for many keys: its backward pass takes three kernels, of which one adds the queries' gradient up in
fp32 and one converts it, and on a T4 it has no flash attention at all.

Shapes: q and y (N, tokens, heads, width of a head), k and v (N, keys, heads, width of a head), of one dtype.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rasengan import nvrtc


# What the kernels take: words of a head, keys at most, and queries at a time.
HEAD, MOST_KEYS, FORWARD_QUERIES, BACKWARD_QUERIES = 64, 80, 64, 32
# Blocks that a multiprocessor takes at once, and the most that share the queries of a head in the backward pass: the
# last of them reads the sums of all.
FORWARD_BLOCKS, BACKWARD_BLOCKS, MOST_SPLITS = 5, 2, 8


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(width of a head)) v of each head; differentiable."""
    if _kernels_for(q, k) is None:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    return _AttendToText.apply(q, k, v)


class _AttendToText(torch.autograd.Function):
    """`attend` by the kernels; keeps what it takes and returns, of which the projections keep most anyway."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, (k, v) = q.contiguous(), _of_one_stride(k, v)
        pictures, tokens, heads, _ = q.shape
        y, log_sums = torch.empty_like(q), q.new_empty(pictures, heads, tokens, dtype=torch.float32)
        grid = _blocks(q, FORWARD_QUERIES, FORWARD_BLOCKS, tokens), pictures * heads
        sizes = tokens, heads, k.shape[1], k.stride(1)
        _kernels_for(q, k).launch("attend_to_text", grid, (128, 1), q, k, v, y, log_sums, *sizes)
        ctx.save_for_backward(q, k, v, y, log_sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        q, k, v, y, log_sums = ctx.saved_tensors
        kernels, (pictures, tokens, heads, _) = _kernels_for(q, k), q.shape
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        # Blocks of one head are counted where the norms count theirs.
        heads_of_all = pictures * heads
        blocks = (
            _blocks(q, BACKWARD_QUERIES, BACKWARD_BLOCKS, MOST_SPLITS) if heads_of_all <= nvrtc.MOST_PICTURES else 1
        )
        partial = q.new_empty(blocks, heads_of_all, 2, MOST_KEYS, HEAD, dtype=torch.float32) if blocks > 1 else None
        inputs, sizes = (q, k, v, y, log_sums, grad_y.contiguous()), (tokens, heads, k.shape[1], k.stride(1))
        arguments = *inputs, *grads, partial, kernels.counters, *sizes
        kernels.launch("attend_to_text_backward", (blocks, heads_of_all), (160, 1), *arguments)
        return tuple(grads)


def _kernels_for(q: torch.Tensor, k: torch.Tensor) -> nvrtc.Kernels | None:
    fits = q.shape[-1] == HEAD and k.shape[1] <= MOST_KEYS and q.shape[0] * q.shape[2] < 2**16  # blocks of a grid's y
    is_countable = max(q.numel(), k.shape[0] * k.stride(0)) < 2**31
    kernels = nvrtc.kernels_for(q, HEAD, HEAD) if fits and is_countable else None
    return kernels if kernels is not None and kernels.has_tensor_cores else None


def _of_one_stride(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values that lie alike, each row of heads dense: views of projections side by side do."""
    _, tokens, heads, width = k.shape
    is_ready = (
        k.stride() == v.stride()
        and k.stride()[2:] == (width, 1)
        and k.stride(0) == tokens * k.stride(1)
        and k.stride(1) % 8 == 0
        and k.data_ptr() % 16 == v.data_ptr() % 16 == 0
    )
    return (k, v) if is_ready else (k.contiguous(), v.contiguous())


def _blocks(q: torch.Tensor, queries: int, of_each: int, most: int) -> int:
    """Return how many blocks, `most` or fewer, share the tokens of a head.

    A block takes so many queries at a time, and a multiprocessor `of_each` blocks at once.
    """
    pictures, tokens, heads, _ = q.shape
    tiles = -(-tokens // queries)
    most = max(1, min(most, tiles, of_each * nvrtc.multiprocessors(q.device) // (pictures * heads)))
    return -(-tiles // -(-tiles // most))  # each with the same number of tiles, or one less
