"""The plan that keeps a step inside the memory: pictures at once, and blocks that the backward pass recomputes."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from rasengan import first_line
from rasengan.memory import GIB, DoesNotFit, left_gib, lift_limit, limit, measure_peak, weight_bytes
from rasengan.optim import state_bytes


logger = logging.getLogger(__name__)

# What PyTorch reserves differs from one measurement to the next by a few of its segments, of 20 MiB.
SEGMENTS_GIB = 0.06
STEP_DOWN_GIB = 0.1  # by which a plan is to be smaller than one that did not fit
# More pictures at once than this make a step no faster for each of them.
LARGEST_JOINED = 8


class Plan(NamedTuple):
    """What a step does to fit: pictures at once, and how many blocks are recomputed in the backward pass."""

    micro_batch_size: int
    recomputed_blocks: int
    predicted_bytes: int = 0


class Planner:
    """Finds the plan of a run's steps on its card, and another where that does not fit any more."""

    def __init__(
        self,
        run: Callable[[int], object],
        recompute_blocks: Callable[[int], object],
        flat: nn.Parameter,
        optimizer: torch.optim.Optimizer,
        *,
        samples: int,
        batch_size: int,
        blocks: int,
        recompute: bool | None,
        budget_gib: float | None,
        sharing: int,
        update_bytes: int,
        can_quantize: bool,
    ):
        """Take what a step is, and let PyTorch reserve no more than the budget.

        Args:
            run: a step without the optimizer's, on so many pictures at once.
            recompute_blocks: sets how many blocks a step recomputes.
            flat: the trained parameter, whose gradient is zeroed after each measurement.
            optimizer: of the flat parameter; a resume may have brought its state already.
            samples: of a process in an optimizer step.
            batch_size: as `choose_plan` takes it.
            blocks: likewise.
            recompute: likewise.
            budget_gib: None takes what the card has left, less a margin.
            sharing: processes of the run on the card.
            update_bytes: what the optimizer and the average take in all.
            can_quantize: a quantized base would help.

        Raises:
            UserError: the card does not have the budget.
        """
        self.run, self.recompute_blocks, self.flat, self.optimizer = run, recompute_blocks, flat, optimizer
        self.samples, self.batch_size, self.blocks, self.recompute = samples, batch_size, blocks, recompute
        self.sharing, self.update_bytes = sharing, update_bytes
        # A budget that nobody gave is what the card has left, but for a margin that is needed.
        room = None if budget_gib is None else partial(left_gib, flat.device, sharing)
        self.remedies = {"can_quantize": can_quantize, "room_gib": room}
        self.budget_gib = limit(budget_gib, flat.device, sharing)

    def plan(self, remembered: list[int] | None = None, budget_gib: float | None = None) -> Plan:
        """Return the plan of a checkpoint where it still fits, or the fastest that is measured to fit.

        Args:
            remembered: a checkpoint's plan of the same card, or None.
            budget_gib: another than the run's.

        Raises:
            DoesNotFit: the smallest plan does not fit.
        """
        budget_bytes = (self.budget_gib if budget_gib is None else budget_gib) * GIB
        if remembered and self.samples % remembered[0] == 0 and remembered[2] <= budget_bytes:
            asked_for = {None: remembered[1], True: self.blocks, False: 0}
            if remembered[1] == asked_for[self.recompute]:
                return Plan(*remembered)
        to_come = self.update_bytes - state_bytes(self.optimizer)

        def measure(plan: Plan) -> int | None:
            self.recompute_blocks(plan.recomputed_blocks)
            taken = measure_peak(lambda: self.run(plan.micro_batch_size), self.flat.device)
            self.flat.grad.zero_()
            return None if taken is None else taken + to_come

        lift = partial(lift_limit, self.flat.device)
        step = (self.samples, self.batch_size, self.blocks, self.recompute)
        return choose_plan(*step, measure, lift, budget_bytes, **self.remedies)

    def describe(self, plan: Plan, unet: nn.Module, encoders: list[nn.Module | None], cached_bytes: int) -> str:
        """Return the plan as a table, with a line for each part of the memory that is known before a step runs.

        What no part names are the activations. `encoders` are those in the loop.
        """
        parts = {
            "base weights": weight_bytes(unet),
            "encoders in the loop": sum(weight_bytes(model) for model in encoders if model is not None),
            "LoRA and its gradient": 2 * self.flat.numel() * self.flat.element_size(),
            "optimizer": self.update_bytes,
        }
        return as_table(plan, self.blocks, self.samples, parts, self.budget_gib, cached_bytes)

    def out_of_memory(self, plan: Plan, global_step: int, saved: str, can_measure: bool) -> str:
        """Return what to say, and how to go on, when a step that was planned to fit does not fit any more.

        Args:
            plan: of the step.
            global_step: optimizer steps done.
            saved: the name of the last checkpoint; empty where there is none.
            can_measure: nothing else of this run is on the card, or waits for this process.
        """
        room_gib = min(self.budget_gib, left_gib(self.flat.device, self.sharing))
        measured = self.plan if can_measure else None
        return out_of_memory(plan, self.blocks, global_step, saved, room_gib, measured)


def choose_plan(
    samples: int,
    batch_size: int,
    blocks: int,
    recompute: bool | None,
    measure: Callable[[Plan], int | None],
    lift: Callable[[], object],
    budget_bytes: float,
    can_quantize: bool = True,
    room_gib: Callable[[], float] | None = None,
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
        room_gib: what the card has left, up to which a budget can be raised; None where it cannot.

    Raises:
        DoesNotFit: the smallest plan does not fit; the message says what it needs.
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
    needs, can_raise = "more than this card has", False
    if taken is not None:
        # Rounded up, so that a budget of this figure suffices; but the card must have it.
        needed_gib, left = math.ceil(100 * (taken / GIB + SEGMENTS_GIB)) / 100, room_gib() if room_gib else 0.0
        can_raise = taken / GIB <= left
        needs = f"at least {min(needed_gib, math.floor(100 * left) / 100) if can_raise else needed_gib:.2f} GiB"
    more = "raise --vram_budget_gib" if can_raise else "take a card with more memory"
    remedies = [more, "lower --resolution"]
    remedies += ["drop --no-gradient_checkpointing"] * (recompute is False)
    remedies += ["give --base_quantization nf4"] * can_quantize
    raise DoesNotFit(
        f"The smallest plan, one picture at once with {smallest.recomputed_blocks} of {blocks} blocks recomputed, "
        f"needs {needs}, but the budget is {budget_bytes / GIB:.2f} GiB. To make it fit: {', or '.join(remedies)}."
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


def as_table(
    plan: Plan, blocks: int, samples: int, parts_bytes: dict[str, int], budget_gib: float, cached_bytes: int
) -> str:
    """Return the plan as a table, with a line for each part of the memory; what no part names are the activations."""
    parts = parts_bytes | {"activations and the rest": plan.predicted_bytes - sum(parts_bytes.values())}
    parts |= {"predicted peak": plan.predicted_bytes, "budget": budget_gib * GIB}
    lines = [f"  {name:<26}{size / GIB:8.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'conditioning cache':<26}{cached_bytes / GIB:8.2f} GiB, on the disk, of which a batch is read")
    how = f"{plan.micro_batch_size} pictures at once, {samples // plan.micro_batch_size} times a step"
    return "\n".join([f"Memory plan: {how}; {plan.recomputed_blocks} of {blocks} blocks recomputed", *lines])


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
