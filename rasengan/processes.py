"""What the processes of a run do together; a process that is alone does not wait.

accelerate's own barrier takes the process's number on its machine for a GPU's, and fails where processes share a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def wait_for_everyone() -> None:
    """Wait until every process is here."""
    if torch.distributed.is_initialized():
        on_gpus = torch.distributed.get_backend() == "nccl"
        torch.distributed.barrier(device_ids=[torch.cuda.current_device()] if on_gpus else None)


@contextmanager
def one_goes_first(is_first: bool) -> Iterator[None]:
    """Run the body on the processes that are first, and then on the others, which find what those left on disk."""
    if not is_first:
        wait_for_everyone()
    yield
    if is_first:
        wait_for_everyone()


def average(tensor: torch.Tensor) -> None:
    """Replace the tensor by its mean over all processes, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
