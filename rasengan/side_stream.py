"""A second stream of a card, for small kernels that run beside a large one, which leaves part of the card idle.

It joins a CUDA graph that captures the main stream, and is then a branch of the graph. On a CPU all of it is done in
turn.
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
    """What one backward pass does beside the main stream, which is PyTorch's current one."""

    def __init__(self, device: torch.device):
        """Take the side stream of a device, free of what a pass may have left there that ended half way."""
        self.device, self.stream = device, _stream(device) if device.type == "cuda" else None
        self.held, self.marked = (), None
        if self.stream is not None and not torch.cuda.is_current_stream_capturing():
            self._main().wait_stream(self.stream)

    def _main(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    @contextmanager
    def fork(self, *tensors: torch.Tensor) -> Iterator[None]:
        """Run what stands inside on the side, after all that is on the main stream now.

        Args:
            tensors: of the main stream's memory, that are used there. They are held until the main stream has waited:
                PyTorch gives the memory of a tensor that is gone to the next one of the stream that made it.
        """
        self.join()
        self.held = tensors
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(self._main())
        with torch.cuda.stream(self.stream):
            yield

    def mark(self) -> None:
        """Let `wait_for_mark` wait for what the side has been given until now; to be called inside `fork`."""
        if self.stream is not None:
            self.marked = self.stream.record_event()

    def wait_for_mark(self) -> None:
        """Let the main stream wait until the side has come to its mark."""
        if self.stream is not None:
            self._main().wait_event(self.marked)

    def join(self) -> None:
        """Let the main stream wait for all that the side was given, whose tensors are free then."""
        if self.held and self.stream is not None:
            self._main().wait_stream(self.stream)
        self.held = ()
