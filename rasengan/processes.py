"""What the processes of a run do together; a process that is alone does not wait.

accelerate's own barrier takes the process's number on its machine for a GPU's, and fails where processes share a GPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from rasengan import UserError


# The variables by which `accelerate launch` hands on what a configuration asks for and training here leaves undone.
NOT_SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def check_launch(environment: Mapping[str, str]) -> None:
    """Check that the accelerate configuration asks for nothing that would silently not happen.

    Raises:
        UserError: it does.
    """
    for variable, name in NOT_SUPPORTED.items():
        if environment.get(variable, "false").lower() in {"true", "1"}:
            raise UserError(
                f"The accelerate configuration asks for {name}, which is not supported: every GPU holds the whole "
                "UNet here. Use distributed_type: MULTI_GPU, as accelerate_configs/multi_gpu.yaml does."
            )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(
            f"The accelerate configuration sets dynamo_backend to {backend}, which would compile nothing here. Remove "
            "dynamo_config from it, or give `accelerate launch` --dynamo_backend no."
        )


def progress_bar(accelerator: Accelerator, description: str, total: int, initial: int = 0) -> tqdm:
    """Return a progress bar that one process on each machine shows."""
    disable = not accelerator.is_local_main_process
    return tqdm(desc=description, total=total, initial=initial, disable=disable, dynamic_ncols=True)


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
