"""How much memory a run takes, and the plan that keeps it inside a budget."""

import gc
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from rasengan import UserError, first_line


logger = logging.getLogger(__name__)

GIB = 1024**3
# Beside PyTorch's memory, libraries take some of the card when they are first used.
MARGIN_GIB = 0.2
STEP_DOWN_GIB = 0.1  # by which a plan is to be smaller than one that did not fit
# More pictures at once than this make a step no faster for each of them.
LARGEST_JOINED = 8


class DoesNotFit(UserError):
    """The smallest plan takes more memory than there is."""


class Plan(NamedTuple):
    """What a step does to fit: pictures at once, and how many blocks are recomputed in the backward pass."""

    micro_batch_size: int
    recomputed_blocks: int
    predicted_bytes: int = 0


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


# --- the budget and the plan ---


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


def left_gib(device: torch.device, processes: int = 1) -> float:
    """Return what this process may have of the card's memory, with what it has; `processes` of the run share it."""
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / GIB / processes


def make_plan(
    run: Callable[[int], object],
    recompute_blocks: Callable[[int], object],
    flat: nn.Parameter,
    samples: int,
    batch_size: int,
    blocks: int,
    recompute: bool | None,
    budget_gib: float,
    state_bytes: int,
    remembered: list[int] | None,
    **remedies: bool,
) -> Plan:
    """Return the plan of a checkpoint where it still fits, or the fastest that is measured to fit.

    Args:
        run: a step without the optimizer's, on so many pictures at once.
        recompute_blocks: sets how many blocks a step recomputes.
        flat: the trained parameter, whose gradient is zeroed after each measurement.
        samples: of a process in an optimizer step.
        batch_size: as `choose_plan` takes it.
        blocks: likewise.
        recompute: likewise.
        budget_gib: what `limit` returned.
        state_bytes: what the optimizer will take beside what is measured.
        remembered: a checkpoint's plan of the same card, or None.
        remedies: as `choose_plan` takes them.

    Raises:
        DoesNotFit: the smallest plan does not fit.
    """
    budget_bytes = budget_gib * GIB
    if remembered and samples % remembered[0] == 0 and remembered[2] <= budget_bytes:
        asked_for = {None: remembered[1], True: blocks, False: 0}
        if remembered[1] == asked_for[recompute]:
            return Plan(*remembered)

    def measure(plan: Plan) -> int | None:
        recompute_blocks(plan.recomputed_blocks)
        taken = measure_peak(lambda: run(plan.micro_batch_size), flat.device)
        flat.grad.zero_()
        return None if taken is None else taken + state_bytes

    lift = partial(torch.cuda.set_per_process_memory_fraction, 1.0, flat.device)
    return choose_plan(samples, batch_size, blocks, recompute, measure, lift, budget_bytes, **remedies)


def choose_plan(
    samples: int,
    batch_size: int,
    blocks: int,
    recompute: bool | None,
    measure: Callable[[Plan], int | None],
    lift: Callable[[], object],
    budget_bytes: float,
    can_quantize: bool = True,
    can_raise: bool = True,
) -> Plan:
    """Return the fastest plan that fits, with the bytes that it was measured to take.

    Recomputing costs a third of the step's arithmetic, fewer pictures at once cost little: so first pictures are taken
    in smaller groups, and blocks are recomputed only where one picture alone does not fit otherwise.

    Args:
        samples: of a process in an optimizer step; it is split into equal micro-batches.
        batch_size: the largest micro-batch that was asked for; up to `LARGEST_JOINED` are joined.
        blocks: that can be recomputed.
        recompute: all of them (True), none (False), or as few as needed (None).
        measure: runs a plan inside the budget, and returns the bytes reserved at most, or None if they do not suffice.
        lift: lifts the budget, so that the smallest plan can be measured when it does not fit.
        budget_bytes: that may be reserved.
        can_quantize: a quantized base would help.
        can_raise: the budget was given, and is not all that the card has left.

    Raises:
        DoesNotFit: the smallest plan does not fit; the message says what it takes.
    """
    most = max(batch_size, LARGEST_JOINED)
    sizes = [size for size in range(min(samples, most), 0, -1) if samples % size == 0]
    for size in sizes:
        plan = Plan(size, blocks if recompute else 0)
        taken = measure(plan)
        if taken is not None and taken <= budget_bytes:
            return plan._replace(predicted_bytes=taken)
    plan = _fewest_blocks(blocks, measure, budget_bytes) if recompute is None else None
    if plan is not None:
        return plan
    smallest = Plan(1, 0 if recompute is False else blocks)
    lift()
    taken = measure(smallest)
    takes = "more than this card has" if taken is None else f"{taken / GIB:.2f} GiB"
    remedies = ["raise --vram_budget_gib" if can_raise else "take a card with more memory", "lower --resolution"]
    remedies += ["drop --no-gradient_checkpointing"] * (recompute is False)
    remedies += ["give --base_quantization nf4"] * can_quantize
    raise DoesNotFit(
        f"The smallest plan, one picture at once with {smallest.recomputed_blocks} of {blocks} blocks recomputed, "
        f"takes {takes}, but the budget is {budget_bytes / GIB:.2f} GiB. To make it fit: {', or '.join(remedies)}."
    )


def _fewest_blocks(blocks: int, measure: Callable[[Plan], int | None], budget_bytes: float) -> Plan | None:
    """Return the plan for one picture at once that recomputes least, by bisection; None where none fits."""
    found, low, high = None, 1, blocks
    while low <= high:
        middle = blocks if found is None else (low + high) // 2  # all of them first: that may not fit either
        taken = measure(Plan(1, middle))
        if taken is not None and taken <= budget_bytes:
            found, high = Plan(1, middle, taken), middle - 1
        elif found is None:
            return None
        else:
            low = middle + 1
    return found


def describe(
    plan: Plan, blocks: int, samples: int, parts_bytes: dict[str, int], budget_gib: float, cached_bytes: int
) -> str:
    """Return the plan as a table, with a line for each part of the memory; what no part names are the activations."""
    parts = parts_bytes | {"activations and the rest": plan.predicted_bytes - sum(parts_bytes.values())}
    parts |= {"predicted peak": plan.predicted_bytes, "budget": budget_gib * GIB}
    lines = [f"  {name:<26}{size / GIB:8.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'conditioning cache':<26}{cached_bytes / GIB:8.2f} GiB, on the disk, of which a batch is read")
    how = f"{plan.micro_batch_size} pictures at once, {samples // plan.micro_batch_size} times a step"
    return "\n".join([f"Memory plan: {how}; {plan.recomputed_blocks} of {blocks} blocks recomputed", *lines])


def parts_bytes(unet: nn.Module, encoders: list[nn.Module | None], flat: nn.Parameter, update_bytes: int):
    """Return what is known of a step's memory before it runs, by name, in bytes; `encoders` are those in the loop."""
    return {
        "base weights": weight_bytes(unet),
        "encoders in the loop": sum(weight_bytes(model) for model in encoders if model is not None),
        "LoRA and its gradient": 2 * flat.numel() * flat.element_size(),
        "optimizer": update_bytes,
    }


def out_of_memory(
    plan: Plan, blocks: int, global_step: int, saved: str, room_gib: float, plan_for: Callable[[float], Plan] | None
) -> str:
    """Return what to say, and how to go on, when a step that was planned to fit does not fit any more.

    Args:
        plan: of the step.
        blocks: that could be recomputed.
        global_step: optimizer steps done.
        saved: the name of the last checkpoint; empty where there is none.
        room_gib: the budget, or what the card has left by now if that is less.
        plan_for: measures what fits into a `budget_gib`; None where that cannot be measured now.
    """
    # A plan that is measured to take no less would fail again.
    budget_gib = min(room_gib, plan.predicted_bytes / GIB - STEP_DOWN_GIB)
    remedy = f"and with --vram_budget_gib {budget_gib:.1f}, say, for a smaller plan"
    if plan.micro_batch_size == 1 and plan.recomputed_blocks >= blocks:
        remedy = "once the card has more room: no plan takes less at this --resolution"
    elif plan_for is not None:
        try:
            fits = plan_for(budget_gib=budget_gib)
            takes = f"{fits.recomputed_blocks} of {blocks} blocks recomputed take {fits.predicted_bytes / GIB:.2f} GiB"
            size = fits.micro_batch_size
            remedy = f"and with --vram_budget_gib {budget_gib:.2f}: as measured, {size} pictures at once with {takes}"
        except DoesNotFit as error:  # whose remedies are of a run that begins
            remedy = f"once the card has more room. {str(error).partition('. To make')[0]}"
        except Exception as error:  # on a full card each library raises what it likes
            logger.warning("What would fit could not be measured: %s", first_line(error))
    return (
        f"Out of memory in step {global_step + 1}, with {plan.micro_batch_size} pictures at once and "
        f"{plan.recomputed_blocks} blocks recomputed; {saved or 'the start'} is where to resume, "
        f"with --resume_from_checkpoint latest, {remedy}."
    )


def recompute_whole(model: nn.Module, count: int) -> None:
    """Recompute every block of a model that diffusers wrote, or none for a count of 0."""
    model.enable_gradient_checkpointing() if count else model.disable_gradient_checkpointing()


@contextmanager
def must_fit(unet: nn.Module, can_quantize: bool) -> Iterator[None]:
    """Bring a UNet and its LoRA to the card inside of this; `can_quantize` says that a quantized base would help.

    Raises:
        DoesNotFit: they are more than the card has left.
    """
    size_gib = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters()) / GIB
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"The UNet, {size_gib:.2f} GiB before any quantization, and its LoRA do not fit into what this card, or "
            "--vram_budget_gib, leaves. Take a card with more memory, or raise a budget that was given"
            f"{', or give --base_quantization nf4' * can_quantize}."
        ) from error


# --- a quantized base ---


def quantize_base(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Quantize the linear layers of the transformer blocks to 4 bits (NF4, double quantization), one after the other.

    These are 87 % of the weights. What is left, convolutions and embeddings, keeps its precision.

    Args:
        unet: on the host, frozen, without a LoRA.
        device: where the quantized layers end.
        dtype: of the arithmetic.
    """
    import bitsandbytes

    for transformer in [module for module in unet.modules() if isinstance(module, Transformer2DModel)]:
        for name, layer in [(n, m) for n, m in transformer.named_modules() if type(m) is nn.Linear]:
            quantized = bitsandbytes.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            quantized.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=quantized
            )
            quantized.bias = layer.bias
            quantized.support_avx512bf16_for_cpu = False  # else its forward repacks the weight, in place
            transformer.set_submodule(name, quantized.to(device))
    unet.is_loaded_in_4bit = True  # by this PEFT knows which kind of layer to wrap
