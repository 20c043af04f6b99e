"""How much memory there is, how much something takes, and the budget that a run keeps to."""

import gc
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rasengan import UserError


GIB = 1024**3
# Beside PyTorch's memory, libraries take some of the card when they are first used.
MARGIN_GIB = 0.2


class DoesNotFit(UserError):
    """The smallest plan takes more memory than there is."""


# --- measuring ---


def reset_peak(device: torch.device) -> None:
    """Start the measurement of the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_reserved_gib(device: torch.device) -> float:
    """Return the peak of what PyTorch reserved on the card, in GiB; 0 without one."""
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0


def host_peak_rss_gib() -> float:
    """Return the most that this process had in the host's memory, mapped files included, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # which Linux counts in KiB


def give_back() -> None:
    """Return what is cached but not used to the card."""
    gc.collect()
    if torch.cuda.is_initialized():
        # A graph may still run in memory that is taken away here: PyTorch waits for the stream that it was captured
        # on alone, and it is replayed on another.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure_peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that PyTorch reserved at most while something ran, or None where they did not suffice."""
    give_back()
    reset_peak(device)
    try:
        run()
    except torch.OutOfMemoryError:
        return None
    finally:
        peak = torch.cuda.max_memory_reserved(device)
        give_back()
    return peak


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, the trained ones left out."""
    tensors = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- the budget ---


def limit(budget_gib: float | None, device: torch.device, processes: int = 1) -> float:
    """Let PyTorch reserve no more than a budget on this card, and return it in GiB.

    Args:
        budget_gib: None takes what the card has left, less a margin.
        device: a CUDA device.
        processes: of this run that share the card.

    Raises:
        UserError: the card does not have it.
    """
    left = left_gib(device, processes)
    if budget_gib is None:
        budget_gib = left - MARGIN_GIB
    elif budget_gib > left:
        raise UserError(f"--vram_budget_gib is {budget_gib:g}, but this card has {left:.2f} GiB left. Give less.")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gib * GIB / total), device)
    return budget_gib


def lift_limit(device: torch.device) -> None:
    """Let PyTorch reserve all that the card has, until `limit` says otherwise; on a CPU there is nothing to lift."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def left_gib(device: torch.device, processes: int = 1) -> float:
    """Return what this process may have of the card's memory, with what it has; `processes` of the run share it."""
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / GIB / processes


@contextmanager
def must_fit(unet: nn.Module, device: torch.device, is_quantized: bool) -> Iterator[None]:
    """Bring a UNet and its LoRA to the card inside of this; a budget is lifted, until the memory plan sets it again.

    So a budget that is less than the weights ends where every budget does that is too small: in the memory plan, which
    measures how much is needed.

    Args:
        unet: on the host, not quantized yet.
        device: where it goes.
        is_quantized: it is quantized on the way.

    Raises:
        DoesNotFit: the card does not have the room.
    """
    size_gib = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters()) / GIB
    lift_limit(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = "quantized to nf4" if is_quantized else f"{size_gib:.2f} GiB before any quantization"
        raise DoesNotFit(
            f"The UNet, {size}, and its LoRA do not fit into what this card has left. Take a card with more memory"
            f"{', or give --base_quantization nf4' * (not is_quantized)}."
        ) from error


@contextmanager
def must_suffice(doing: str, budget_gib: float | None, smaller: str | None = None) -> Iterator[None]:
    """Run inside of this what the memory plan is no part of; no `DoesNotFit`, since a quantized base is no help.

    Args:
        doing: what is done, for the message.
        budget_gib: what --vram_budget_gib was given; None for nothing.
        smaller: a remedy by which this takes less, such as "lower --resolution"; None for none.

    Raises:
        UserError: the card's memory does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        given = budget_gib is not None
        under = f"under --vram_budget_gib {budget_gib:g}" if given else "in what the card has left"
        more = "raise --vram_budget_gib" if given else "free some of the card's memory"
        remedies = [smaller, more] if smaller else [more]
        raise UserError(f"Out of memory while {doing}, {under}. To make it fit: {', or '.join(remedies)}.") from error
