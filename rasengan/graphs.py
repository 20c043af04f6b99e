"""CUDA graphs: work on the card that is started by one call, where kernel by kernel the host would be the limit."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch


# Runs before a capture: libraries load their kernels and choose their algorithms in the first.
WARM_UP = 2


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """Return the stream of all captures on a device: what a pool has kept from one is free for that stream alone."""
    return torch.cuda.Stream(device)


class Graph(NamedTuple):
    """A captured function: replayed, it reads `inputs` and overwrites `output`."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    output: torch.Tensor

    def __call__(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the output for other inputs, of the shapes that were captured; the next call overwrites it."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.output


def capture(
    run: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    inputs: dict[str, torch.Tensor],
    pool: object = None,
    after_warm_up: Callable[[], object] = lambda: None,
) -> Graph:
    """Capture a function of tensors on the card, whose shapes hang on those of its inputs alone.

    Args:
        run: it waits for nothing on the host.
        inputs: copied, so that a later call can replace their values.
        pool: another graph's `graph.pool()`, whose memory is shared, since only one of them runs at a time.
        after_warm_up: undoes what the first runs left behind.
    """
    inputs = {name: tensor.clone() for name, tensor in inputs.items()}
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run(inputs)
    finally:  # also where the memory did not suffice: the caller undoes what was done until then
        torch.cuda.current_stream().wait_stream(stream)
    after_warm_up()
    graph = torch.cuda.CUDAGraph()
    # Other threads, which load data, may call CUDA meanwhile.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = run(inputs)
    return Graph(graph, inputs, output)


def shapes_of(tensors: dict[str, torch.Tensor]) -> tuple:
    """Return what a capture hangs on: each tensor's name, shape and dtype."""
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
