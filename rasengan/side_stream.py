"""A second stream of a card, for small kernels that run beside a large one, which leaves part of the card idle.

A CUDA graph that captures the main stream, PyTorch's current one, captures this one with it, as a branch. On a CPU all
of it is done in turn. What counts in `nvrtc.Kernels.counters`, GroupNorm and the attention to the text, must stay on
the main stream: two at once would count each other's blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one side stream of a device, since PyTorch keeps memory for each."""
    return torch.cuda.Stream(device)


class SideStream:
    """The side stream of a device while `forked` holds it."""

    def __init__(self, device: torch.device):
        self.main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.stream = _stream(device) if device.type == "cuda" else None
        self.marked = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run what stands inside on the side stream, after all that is on the main one now."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(self.main)
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> None:
        """Let `wait_for_mark` wait for what the side stream was given until now."""
        if self.stream is not None:
            self.marked = self.stream.record_event()

    def wait_for_mark(self) -> None:
        """Let the main stream wait until the side stream has come to its mark."""
        if self.stream is not None:
            self.main.wait_event(self.marked)

    def join(self) -> None:
        """Let the main stream wait for all that the side stream was given."""
        if self.stream is not None:
            self.main.wait_stream(self.stream)


@contextmanager
def forked(device: torch.device) -> Iterator[SideStream]:
    """Hold the side stream, and join it at the end, also where what stands inside fails.

    So what is used there needs to live no longer than this: PyTorch gives the memory of a tensor that is gone to the
    next one of the stream that made it. And a capture that fails, for want of memory say, can be ended.
    """
    side = SideStream(device)
    try:
        yield side
    finally:
        side.join()
