"""Attention to a prompt, whose keys are few: `tensor_cores.cu` on CUDA, in 16 bits; PyTorch's operator elsewhere.

PyTorch's is made for many keys: its backward pass on a card takes three kernels, one of which adds the queries'
gradient up in fp32, and one converts it.

Shapes: q and y (N, tokens, heads, width of a head), k and v (N, keys, heads, width of a head), of one dtype.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rasengan import nvrtc


# What the kernels take: words of a head, keys at most, and queries at a time.
HEAD, MOST_KEYS, FORWARD_QUERIES, BACKWARD_QUERIES = 64, 80, 64, 32
FORWARD_THREADS, BACKWARD_THREADS = 128, 160
# The last of the blocks that share a head in the backward pass reads the sums of all: so many share it at most, and
# each takes queries two times at least.
MOST_SPLITS, LEAST_ROUNDS = 8, 2


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(width of a head)) v of each head; differentiable."""
    kernels = _kernels_for(q, k, v)
    if kernels is None:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    return _AttendToText.apply(q, k, v, kernels)


class _AttendToText(torch.autograd.Function):
    """`attend` by the kernels; keeps what it takes and returns, of which the projections keep most anyway."""

    @staticmethod
    def forward(ctx, q, k, v, kernels):
        q, (k, v) = _dense(q), _of_one_stride(k, v)
        pictures, tokens, heads, _ = q.shape
        y, log_sums = torch.empty_like(q), q.new_empty(pictures, heads, tokens, dtype=torch.float32)
        rounds, name, threads = -(-tokens // FORWARD_QUERIES), "attend_to_text", FORWARD_THREADS
        grid = _blocks(q, rounds, kernels.blocks_at_once(name, threads), rounds), pictures * heads
        arguments = q, k, v, y, log_sums, tokens, heads, k.shape[1], k.stride(1)
        kernels.launch(name, grid, (threads, 1), *arguments)
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        q, k, v, y, log_sums = ctx.saved_tensors
        pictures, tokens, heads, _ = q.shape
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
        rounds, name, threads = -(-tokens // BACKWARD_QUERIES), "attend_to_text_backward", BACKWARD_THREADS
        # Blocks of a head are counted where the norms count theirs of a picture.
        most = min(MOST_SPLITS, rounds // LEAST_ROUNDS) if pictures * heads <= nvrtc.COUNTERS else 1
        grid = _blocks(q, rounds, ctx.kernels.blocks_at_once(name, threads), most), pictures * heads
        partial = q.new_empty(*grid, 2, MOST_KEYS, HEAD, dtype=torch.float32) if grid[0] > 1 else None
        arguments = *grads, partial, ctx.kernels.counters, tokens, heads, k.shape[1], k.stride(1)
        inputs = q, k, v, y, log_sums, _dense(grad_y)
        ctx.kernels.launch(name, grid, (threads, 1), *inputs, *arguments)
        return *grads, None


def _kernels_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> nvrtc.Kernels | None:
    """Return the kernels where they can take such tensors, or None."""
    fits = q.shape[-1] == HEAD and k.shape[1] <= MOST_KEYS and q.shape[0] * q.shape[2] < 2**16  # of a grid's y
    is_countable = max(q.numel(), k.shape[0] * k.stride(0)) < 2**31
    is_alike = q.dtype == k.dtype == v.dtype and k.shape == v.shape
    is_alike &= (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    kernels = nvrtc.kernels_for(q, HEAD, HEAD) if fits and is_countable and is_alike else None
    return kernels if kernels is not None and kernels.has_tensor_cores else None


def _begins_with_a_pack(t: torch.Tensor) -> bool:
    return t.data_ptr() % 16 == 0  # bytes, which are read at once


def _dense(t: torch.Tensor) -> torch.Tensor:
    t = t.contiguous()
    return t if _begins_with_a_pack(t) else t.clone()


def _of_one_stride(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values that lie alike, the heads of a token side by side: parts of one product do so already."""
    _, keys, _, width = k.shape
    lie_alike = k.stride() == v.stride() and k.stride(0) == keys * k.stride(1) and k.stride()[2:] == (width, 1)
    are_packs = k.stride(1) % 8 == 0 and _begins_with_a_pack(k) and _begins_with_a_pack(v)
    return (k, v) if lie_alike and are_packs else (_dense(k), _dense(v))


def _blocks(q: torch.Tensor, rounds: int, at_once: int, most: int) -> int:
    """Return how many blocks share a head's queries, which one block would take in so many rounds.

    One at least, but no more than `most`, nor so many that a multiprocessor has more than `at_once`. All have the same
    number of rounds, but for the last, which may have fewer.
    """
    pictures, _, heads, _ = q.shape
    fit = at_once * nvrtc.multiprocessors(q.device) // (pictures * heads)
    each = -(-rounds // max(1, min(fit, most)))
    return -(-rounds // each)
