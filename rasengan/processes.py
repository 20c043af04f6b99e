"""What the processes of a run do together; a process that is alone does not wait.

accelerate's own barrier takes the process's number on its machine for a GPU's, and fails where processes share a GPU.
"""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, broadcast_object_list, gather_object
from tqdm.auto import tqdm

from rasengan import UserError, first_line
from rasengan.components import weight_dtype


logger = logging.getLogger(__name__)
T = TypeVar("T")
# Others wait while one process downloads or decodes, or writes to a slow disk, which takes longer than usual limits.
PATIENCE = timedelta(hours=12)

# The variables by which `accelerate launch` hands on what a configuration asks for and training here leaves undone.
NOT_SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


class OtherEnded(UserError):
    """Another process of the run has ended."""


def holds_up_the_card(error: UserError) -> bool:
    """Say whether an error leaves the card waiting for ever, so that nothing can be read from it any more.

    So does the end of another process: NCCL's sum of the gradients may have begun, and does not end without it.
    """
    return isinstance(error, OtherEnded) and torch.distributed.get_backend() == "nccl"


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


def machine_share(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return this process's number on its machine, and how many the launcher started there."""
    return int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1))


def make_accelerator(environment: Mapping[str, str], mixed_precision: str | None, **options) -> Accelerator:
    """Return the accelerator, once it is sure that it has the precision and the processes that were asked for.

    Args:
        environment: of this process, as the launcher set it up.
        mixed_precision: None takes the launcher's.
        options: more of `Accelerator`.

    Raises:
        UserError: the device lacks the precision, or the processes would each train alone.
    """
    for_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() in {"true", "1"}
    on_cpu = for_cpu or not torch.cuda.is_available()
    precision = mixed_precision or environment.get("ACCELERATE_MIXED_PRECISION", "no")
    weight_dtype(precision, torch.device("cpu" if on_cpu else "cuda"))
    # NCCL refuses two processes on one GPU; gloo carries them.
    here = machine_share(environment)[1]
    shared_gpu = not on_cpu and here > torch.cuda.device_count()
    group = InitProcessGroupKwargs(backend="gloo" if on_cpu or shared_gpu else "nccl", timeout=PATIENCE)
    launched = int(environment.get("WORLD_SIZE", 1))
    # A step divides its loss itself, and a plugin wins over the environment's own number.
    options["gradient_accumulation_plugin"] = GradientAccumulationPlugin(num_steps=1)
    options["kwargs_handlers"] = [group] if launched > 1 else []
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, **options)
    # `accelerate launch --cpu --num_processes 2` sets an address for several processes, and starts one.
    only_one = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and launched == 1
    if launched != accelerator.num_processes or (only_one and "WORLD_SIZE" not in environment):
        raise UserError(
            "Several processes were asked for, but they would not train together. In the accelerate config set "
            "distributed_type: MULTI_GPU (with use_cpu: true on CPUs, as accelerate_configs/cpu.yaml does). If one is "
            "what you want, unset MASTER_ADDR, which SLURM sets."
        )
    if on_cpu and not for_cpu:
        logger.warning(
            "PyTorch finds no GPU: this runs on the CPU, which takes minutes for a GPU's second. If there is a GPU, "
            "`python -c 'import torch; torch.zeros(1).cuda()'` says why."
        )
    if shared_gpu:
        logger.warning("%d processes share %d GPU(s), through gloo", here, torch.cuda.device_count())
    return accelerator


def default_precision(environment: Mapping[str, str]) -> str:
    """Return the precision to draw in where none is asked for: the launcher's, else fp16 on a GPU, fp32 on a CPU."""
    asked_for = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() in {"true", "1"} or not torch.cuda.is_available()
    return asked_for if asked_for != "no" or on_cpu else "fp16"


def sharing_a_gpu(environment: Mapping[str, str]) -> int:
    """Return how many processes of this machine share each GPU."""
    return math.ceil(machine_share(environment)[1] / torch.cuda.device_count())


def device_of(accelerator: Accelerator) -> torch.device:
    """Return the device as tensors name it: cuda:0 rather than cuda, and cpu rather than cpu:0."""
    return torch.empty(0, device=accelerator.device).device


def progress_bar(accelerator: Accelerator, description: str, total: int, initial: int = 0) -> tqdm:
    """Return a progress bar that one process on each machine shows."""
    disable = not accelerator.is_local_main_process
    stream = SteadyStream(sys.stderr)
    return tqdm(desc=description, total=total, initial=initial, disable=disable, dynamic_ncols=True, file=stream)


def wait_for_everyone() -> None:
    """Wait until every process is here.

    Raises:
        UserError: another process has ended; so do all that meet others here.
    """
    if torch.distributed.is_initialized():
        on_gpus = torch.distributed.get_backend() == "nccl"
        with _told_of_an_end():
            torch.distributed.barrier(device_ids=[torch.cuda.current_device()] if on_gpus else None)


def end(code: int) -> NoReturn:
    """End this process; one that an error ends among others, without what Python does then.

    Gloo's threads are still there, and once in many times one of them aborts the process, past its exit code.
    """
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def gather(objects: list[T]) -> list[T]:
    """Return the objects of all processes, in their order."""
    with _told_of_an_end():
        return gather_object(objects)


@contextmanager
def one_goes_first(is_first: bool) -> Iterator[None]:
    """Run the body on the processes that are first, and then on the others, which find what those left on disk."""
    if not is_first:
        wait_for_everyone()
    yield
    if is_first:
        wait_for_everyone()


def as_on_main(call: Callable[[], T], refusal: type[Exception]) -> T:
    """Call something on every process, and return what it returned on the main one, or raise a refusal of either."""
    try:
        outcome = call()
    except refusal as error:
        outcome = error
    with _told_of_an_end():
        first = broadcast_object_list([outcome])[0]
    for answer in (outcome, first):
        if isinstance(answer, refusal):
            raise answer
    return first


def check_same_settings(settings: Mapping[str, object]) -> None:
    """Check that all processes were given the same settings, which those of several machines need not be.

    Raises:
        UserError: they were not; each of them raises it, and names what differs.
    """
    everywhere = gather([dict(settings)])
    differing = {name: [found.get(name) for found in everywhere] for name in settings}
    differing = {name: values for name, values in differing.items() if any(value != values[0] for value in values)}
    if differing:
        listed = "; ".join(f"--{name} is {', '.join(map(str, values))}" for name, values in differing.items())
        raise UserError(
            f"Not all processes of this run have the same settings: {listed}. Start every machine with the same "
            "command and accelerate config, but for the machine's number."
        )


def check_same(what: str, found: str, remedy: str) -> None:
    """Check that all processes found the same, which those of machines with a disk of their own need not.

    Raises:
        UserError: they did not; each of them raises it.
    """
    answers = dict.fromkeys(gather([found]))
    if len(answers) > 1:
        raise UserError(f"Not all processes of this run have the same {what}, but {', '.join(answers)}. {remedy}")


def is_first() -> bool:
    """Say whether this is the first process of the run, over all machines."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def add_up(tensor: torch.Tensor) -> int:
    """Replace the tensor by its sum over all processes, in place, and return how many these are.

    Raises:
        UserError: another process has ended.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return 1
    with _told_of_an_end():
        torch.distributed.all_reduce(tensor)
    return torch.distributed.get_world_size()


def average(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its mean over all processes, in place, as `add_up` does its sum."""
    for tensor in tensors:
        if (processes := add_up(tensor)) > 1:
            tensor /= processes


@contextmanager
def _told_of_an_end() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's
        raise OtherEnded(
            f"Another process of this run has ended ({first_line(error).rstrip('.')}). Its own error stands above or "
            "below this. Start again; a training goes on with --resume_from_checkpoint latest."
        ) from error


class Ballot:
    """Asks all processes of a run, at the same step, on the host: the card need not be waited for."""

    def __init__(self):
        """Begin on every process."""
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self.group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def any(self, *votes: bool) -> tuple[bool, ...]:
        """Return for each vote whether any process has it."""
        if self.group is None:
            return votes
        counted = torch.tensor(votes, dtype=torch.int32)
        with _told_of_an_end():
            torch.distributed.all_reduce(counted, torch.distributed.ReduceOp.MAX, group=self.group)
        return tuple(map(bool, counted.tolist()))


class SteadyStream:
    """A stream that may end before the run does, as the pipe to `tee` does at Ctrl-C: then it writes nothing."""

    def __init__(self, stream):
        self.stream = stream

    def __eq__(self, other: object) -> bool:
        """Be the stream itself for tqdm, which clears a bar where something else is written to its stream."""
        return self.stream is getattr(other, "stream", other)

    def __hash__(self) -> int:
        """Fit the equality."""
        return hash(self.stream)

    def write(self, text: str) -> None:
        """Write, if somebody reads."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self) -> None:
        """Flush, if somebody reads."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)
