import pytest
import torch

from rasengan import UserError, memory, memory_plan
from rasengan.memory import GIB
from rasengan.memory_plan import Plan, Planner


BLOCKS = 20
CPU = torch.device("cpu")


class Card:
    """A card on which a plan takes 5 GiB, and 1 GiB for each picture less a share for each recomputed block."""

    def __init__(self, budget_gib):
        self.budget_gib, self.measured, self.limited = budget_gib, [], True

    def measure(self, plan):
        self.measured.append(plan[:2])
        taken = (5 + plan.micro_batch_size * (1 - 0.9 * plan.recomputed_blocks / BLOCKS)) * GIB
        return int(taken) if taken <= self.budget_gib * GIB or not self.limited else None

    def lift(self):
        self.limited = False


def make_planner(run, *, samples=1, recompute=None, budget_gib, can_quantize=True):
    flat = torch.nn.Parameter(torch.zeros(2))
    flat.grad = torch.ones(2)
    return Planner(
        run,
        lambda count: None,
        flat,
        torch.optim.AdamW([flat]),
        samples=samples,
        batch_size=1,
        blocks=BLOCKS,
        recompute=recompute,
        budget_gib=budget_gib,
        sharing=1,
        update_bytes=GIB // 2,
        can_quantize=can_quantize,
    )


def choose(budget_gib, samples, batch_size, recompute=None):
    card = Card(budget_gib)
    plan = memory_plan.choose_plan(
        samples, batch_size, BLOCKS, recompute, card.measure, card.lift, budget_gib * GIB, room_gib=lambda: 8.0
    )
    return plan, card


@pytest.mark.parametrize(
    ("budget_gib", "samples", "batch_size", "expected"),
    [
        (14, 1, 1, (1, 0)),
        (14, 8, 8, (8, 0)),
        (14, 4, 1, (4, 0)),  # micro-batches are joined
        (14, 16, 1, (8, 0)),  # but no more than make a step faster
        (30, 16, 16, (16, 0)),  # unless they were asked for
        (10, 8, 8, (4, 0)),  # or split
        (10, 7, 7, (1, 0)),  # into equal parts only
        (5.5, 4, 4, (1, 12)),  # recomputing is the last resort: 1 - 0.9 n / 20 <= 0.5
        (5.1, 1, 1, (1, 20)),
    ],
)
def test_the_fastest_plan_that_fits_is_chosen(budget_gib, samples, batch_size, expected):
    plan, card = choose(budget_gib, samples, batch_size)
    assert plan[:2] == expected
    assert plan.predicted_bytes == card.measure(plan) <= budget_gib * GIB
    assert len(card.measured) <= 10


@pytest.mark.parametrize(("budget_gib", "expected"), [(10, (4, 0)), (5.5, (1, 12)), (5.1, (1, 20))])
def test_a_plan_that_takes_more_than_the_budget_is_not_taken_though_the_card_lets_it_run(budget_gib, expected):
    """As where the optimizer's state comes later, and counts."""
    card = Card(100)
    samples = 8 if budget_gib > 6 else 1
    plan = memory_plan.choose_plan(samples, 8, BLOCKS, None, card.measure, card.lift, budget_gib * GIB)
    assert plan[:2] == expected
    assert plan.predicted_bytes <= budget_gib * GIB


def test_a_plan_recomputes_all_or_nothing_where_that_was_asked_for():
    assert choose(14, 4, 4, recompute=True)[0][:2] == (4, BLOCKS)
    assert choose(9, 4, 4, recompute=False)[0][:2] == (4, 0)
    assert choose(7, 4, 4, recompute=False)[0][:2] == (2, 0)


@pytest.mark.parametrize(
    ("recompute", "needs"), [(None, "5.16 GiB"), (True, "5.16 GiB"), (False, "6.06 GiB, .* drop --no-gradient_check")]
)
def test_a_budget_that_is_too_small_is_an_error_with_the_smallest_figure(recompute, needs):
    with pytest.raises(UserError, match=f"needs at least {needs}") as error:
        choose(5.05, 4, 4, recompute)
    assert isinstance(error.value, memory.DoesNotFit)
    assert "the budget is 5.05 GiB" in str(error.value)
    assert "--vram_budget_gib" in str(error.value)
    assert "nf4" in str(error.value)


@pytest.mark.parametrize("taken", [5.044, 5.046, 5.05])
def test_the_smallest_figure_is_a_budget_that_suffices(taken):
    """Also where a second measurement comes to three segments more."""

    def measure(plan):
        return int(taken * GIB)

    with pytest.raises(memory.DoesNotFit) as error:
        memory_plan.choose_plan(1, 1, BLOCKS, None, measure, lambda: None, 5 * GIB)
    assert "needs at least 5.11 GiB" in str(error.value)
    taken += 3 * 20 / 1024
    assert memory_plan.choose_plan(1, 1, BLOCKS, None, measure, lambda: None, 5.11 * GIB)


def test_a_quantized_base_is_not_offered_to_one_who_has_it():
    with pytest.raises(memory.DoesNotFit) as error:
        memory_plan.choose_plan(1, 1, BLOCKS, None, lambda plan: None, lambda: None, GIB, can_quantize=False)
    assert "nf4" not in str(error.value)


@pytest.mark.parametrize(
    ("room_gib", "needed", "remedy"),
    [
        (None, "4.06", "take a card with more memory"),  # nobody gave a budget
        (lambda: 3.99, "4.06", "take a card with more memory"),
        (lambda: 4.05, "4.05", "raise --vram_budget_gib"),
        (lambda: 5.0, "4.06", "raise --vram_budget_gib"),
    ],
)
def test_a_budget_is_to_be_raised_where_the_card_has_what_is_needed(room_gib, needed, remedy):
    def measure(plan):
        return 4 * GIB

    with pytest.raises(
        memory.DoesNotFit, match=f"at least {needed} GiB.* To make it fit: {remedy}, or lower"
    ) as error:
        memory_plan.choose_plan(1, 1, BLOCKS, None, measure, lambda: None, GIB, room_gib=room_gib)
    assert str(error.value).count("--vram_budget_gib") == remedy.count("--vram_budget_gib")


@pytest.mark.parametrize(
    ("is_quantized", "what", "remedy"),
    [
        (
            False,
            "The UNet, 2.00 GiB before any quantization, and its LoRA do",
            "more memory, or give --base_quantization nf4.",
        ),
        (True, "The UNet, quantized to nf4, and its LoRA do", "more memory."),
    ],
)
def test_weights_that_the_card_has_no_room_for_are_an_error(is_quantized, what, remedy):
    unet = torch.nn.Linear(2**15, 2**14, device="meta").requires_grad_(False)
    with pytest.raises(memory.DoesNotFit) as error, memory.must_fit(unet, CPU, is_quantized):
        raise torch.OutOfMemoryError
    assert str(error.value).startswith(what)
    assert str(error.value).endswith(remedy)
    assert "--vram_budget_gib" not in str(error.value)  # to which loading does not keep


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_budget_below_the_weights_is_an_error_with_what_the_smallest_plan_takes(is_quantized, monkeypatch):
    caps = [2.0]  # GiB that may be reserved, as the training sets them one after the other

    def reserve(size_gib):
        if size_gib > caps[-1]:
            raise torch.OutOfMemoryError
        return size_gib * GIB

    def measure_peak(run, device):
        try:
            return run()
        except torch.OutOfMemoryError:
            return None

    for module in (memory, memory_plan):
        monkeypatch.setattr(module, "lift_limit", lambda device: caps.append(16.0))
    monkeypatch.setattr(memory_plan, "limit", lambda budget_gib, *_: caps.append(budget_gib) or budget_gib)
    monkeypatch.setattr(memory_plan, "left_gib", lambda *_: 16.0)
    monkeypatch.setattr(memory_plan, "measure_peak", measure_peak)
    with memory.must_fit(torch.nn.Linear(1, 1), CPU, is_quantized):
        reserve(3.0)
    planner = make_planner(lambda size: reserve(3.0 + size), budget_gib=2.0, can_quantize=not is_quantized)
    assert caps == [2.0, 16.0, 2.0]
    said = "needs at least 4.56 GiB, but the budget is 2.00 GiB. To make it fit: raise --vram_budget_gib, or lower"
    with pytest.raises(memory.DoesNotFit, match=said) as error:
        planner.plan()
    assert ("give --base_quantization nf4" in str(error.value)) != is_quantized


def test_a_card_that_is_too_small_by_itself_is_an_error_too():
    with pytest.raises(UserError, match="needs more than this card has.* take a card with more memory") as error:
        memory_plan.choose_plan(1, 1, BLOCKS, None, lambda plan: None, lambda: None, GIB, room_gib=lambda: 2.0)
    assert "--vram_budget_gib" not in str(error.value)  # which was given, but can no more be raised


@pytest.mark.parametrize(
    ("recompute", "samples", "budget_gib", "kept"),
    [
        (None, 4, 14, True),
        (None, 3, 14, False),  # it does not divide the samples any more
        (None, 4, 9, False),  # it does not fit any more
        (True, 4, 14, False),  # a flag wins over it
        (False, 4, 14, False),
    ],
)
def test_a_checkpoints_plan_is_used_where_it_still_holds(recompute, samples, budget_gib, kept, monkeypatch):
    monkeypatch.setattr(memory_plan, "measure_peak", lambda run, device: 8 * GIB)
    monkeypatch.setattr(memory_plan, "limit", lambda budget_gib, *_: budget_gib)
    planner = make_planner(lambda size: None, samples=samples, recompute=recompute, budget_gib=budget_gib)
    plan = planner.plan([2, 3, 10 * GIB])
    assert (plan == Plan(2, 3, 10 * GIB)) == kept
    if not kept:
        assert plan == Plan(samples, BLOCKS if recompute else 0, 8 * GIB + GIB // 2)
        assert torch.equal(planner.flat.grad, torch.zeros(2))


def test_the_table_adds_up():
    plan = Plan(4, 3, 10 * GIB)
    text = memory_plan.as_table(plan, BLOCKS, 8, {"base weights": 5 * GIB, "optimizer": GIB}, 14.3, GIB // 4)
    assert text.splitlines()[0] == "Memory plan: 4 pictures at once, 2 times a step; 3 of 20 blocks recomputed"
    rows = {line[:28].strip(): float(line[28:].split(" GiB")[0]) for line in text.splitlines()[1:]}
    assert rows == {
        "base weights": 5.0,
        "optimizer": 1.0,
        "activations and the rest": 4.0,
        "predicted peak": 10.0,
        "budget": 14.3,
        "conditioning cache": 0.25,
    }


def test_weights_are_counted_without_what_is_trained():
    model = torch.nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    assert memory.weight_bytes(model) == 4 * 3 * 4


@pytest.mark.parametrize(("saved", "named"), [("checkpoint-7", "checkpoint-7"), ("", "the start")])
def test_a_step_that_does_not_fit_any_more_says_what_fits_and_how_to_go_on(saved, named):
    asked = []

    def plan_for(budget_gib):
        asked.append(budget_gib)
        return Plan(2, 3, 4 * GIB)

    text = memory_plan.out_of_memory(Plan(4, 0, 10 * GIB), 5, 7, saved, 4.5, plan_for)
    assert text.startswith("Out of memory in step 8, with 4 pictures at once and 0 blocks recomputed")
    assert f"{named} is where to resume, with --resume_from_checkpoint latest, and with --vram_budget_gib 4.50" in text
    assert "as measured, 2 pictures at once with 3 of 5 blocks recomputed take 4.00 GiB." in text
    # However much room there is, what failed is not to be planned again.
    memory_plan.out_of_memory(Plan(4, 0, 10 * GIB), 5, 7, saved, 80.0, plan_for)
    assert asked == [4.5, 9.9]


def test_out_of_memory_where_nothing_fits_or_can_be_measured_says_so():
    def too_small(budget_gib):
        raise memory.DoesNotFit("The smallest plan takes 3.00 GiB, but 2. To make it fit: lower --resolution.")

    def broken(budget_gib):
        raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    text = memory_plan.out_of_memory(Plan(2, 0, 3 * GIB), 5, 7, "checkpoint-7", 2.0, too_small)
    assert text.endswith("latest, once the card has more room. The smallest plan takes 3.00 GiB, but 2.")
    for plan_for in (broken, None):
        text = memory_plan.out_of_memory(Plan(1, 3, 3 * GIB), 5, 7, "checkpoint-7", 80.0, plan_for)
        assert text.endswith("checkpoint latest, and with --vram_budget_gib 2.9, say, for a smaller plan.")
    text = memory_plan.out_of_memory(Plan(1, 5, 3 * GIB), 5, 7, "checkpoint-7", 80.0, broken)
    assert "once the card has more room: no plan takes less" in text
    assert "--vram_budget_gib" not in text
