import math

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType, get_scheduler
from prodigyopt import Prodigy

from rasengan import adamw_8bit, optim


LORA_ELEMENTS = 23_224_320  # of the recipe: r=16 on the attention of SDXL's UNet
ADAM = {"name": "adamw", "learning_rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-6}


def parameter_of(values):
    flat = torch.nn.Parameter(values.clone())
    flat.grad = torch.zeros_like(flat)
    return flat


def bytes_of_all_tensors(optimizer):
    """Every tensor that the optimizer keeps, each once, whatever its name: counted apart from the project's code."""
    tensors = {t.data_ptr(): t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)}
    return sum(tensor.nbytes for tensor in tensors.values())


def test_the_state_of_8_bit_adamw_takes_a_quarter_of_the_bytes_at_the_size_of_the_recipe():
    sizes = {}
    for use_8bit_adam in (False, True):
        flat = parameter_of(torch.zeros(LORA_ELEMENTS))
        optimizer = optim.make_optimizer(flat, use_8bit_adam=use_8bit_adam, **ADAM)
        flat.grad.fill_(1e-3)
        optimizer.step()
        assert flat.abs().min() > 0
        sizes[use_8bit_adam] = bytes_of_all_tensors(optimizer)
        tables = 2 * 256 * 4 if use_8bit_adam else 0  # dynamic quantization, shared by all parameters
        assert optim.state_bytes(optimizer) == sizes[use_8bit_adam] - tables
        room = 6 * adamw_8bit.PART if use_8bit_adam else 0
        expected = optim.expected_update_bytes(LORA_ELEMENTS, "adamw", use_8bit_adam, use_ema=False) - room
        assert expected == pytest.approx(optim.state_bytes(optimizer), rel=1e-3)
    assert sizes[False] == 2 * 4 * LORA_ELEMENTS + 4
    assert 0.25 < sizes[True] / sizes[False] <= 0.27


def gradients(steps, size):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(size, generator=generator)
    return [1e-3 * (mean + torch.randn(size, generator=generator)) for _ in range(steps)]


def train(flat, use_8bit_adam, grads):
    optimizer = optim.make_optimizer(flat, use_8bit_adam=use_8bit_adam, **ADAM)
    for grad in grads:
        flat.grad.copy_(grad)
        optimizer.step()
    return flat.detach()


def test_adamw_follows_the_formula_of_its_paper():
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weights, first, second = start.double(), 0, 0
    grads = gradients(5, len(start))
    for step, grad in enumerate((grad.double() for grad in grads), 1):
        first = 0.9 * first + 0.1 * grad
        second = 0.99 * second + 0.01 * grad**2
        weights = weights * (1 - 1e-3 * 0.1)
        corrected = first / (1 - 0.9**step), second / (1 - 0.99**step)
        weights = weights - 1e-3 * corrected[0] / (corrected[1].sqrt() + 1e-6)
    trained = train(parameter_of(start), False, grads)
    torch.testing.assert_close(trained, weights.float(), rtol=1e-6, atol=1e-6)


def test_8_bit_adamw_moves_the_weights_as_adamw_does_within_two_percent():
    start = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    grads = gradients(20, len(start))
    exact, quantized = (train(parameter_of(start), use_8bit_adam, grads) - start for use_8bit_adam in (False, True))
    assert not torch.equal(exact, quantized)
    assert (quantized - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("size", [1000, 4096, 10_000])  # under 4,096 bitsandbytes keeps its state in fp32
def test_8_bit_adamw_that_decides_on_the_card_is_bitsandbytes_own_that_is_asked_first(size, monkeypatch):
    monkeypatch.setattr(adamw_8bit, "PART", 2048)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0))
    ours, theirs = parameter_of(start), parameter_of(start)
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-6}
    deciding, asked = adamw_8bit.AdamW8bit(ours, **options), bitsandbytes.optim.AdamW8bit([theirs], **options)
    for step, grad in enumerate(gradients(12, size)):
        is_finite = step not in (0, 1, 5, 11)
        grad[size // 2] = grad[size // 2] if is_finite else float("nan")
        ours.grad.copy_(grad)
        theirs.grad.copy_(grad)
        deciding.found_inf = torch.tensor(0.0 if is_finite else 1.0)
        deciding.step()
        if is_finite:
            asked.step()
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)
    found, expected = deciding.state_dict()["state"][0], asked.state_dict()["state"][0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_a_resumed_8_bit_adamw_counts_no_update_that_was_left_out():
    flat = parameter_of(torch.zeros(5000))
    optimizer = adamw_8bit.AdamW8bit(flat)
    flat.grad.fill_(1e-3)
    for found_inf in (1.0, 0.0, 1.0):
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    saved = optimizer.state_dict()
    resumed = adamw_8bit.AdamW8bit(flat)
    resumed.found_inf = torch.tensor(1.0)
    resumed.step()
    resumed.load_state_dict(saved)
    assert [o.state_dict()["state"][0]["step"] for o in (optimizer, resumed)] == [1, 1]


def test_a_gradient_that_is_not_finite_changes_nothing_without_a_scaler():
    for options in (ADAM | {"use_8bit_adam": True}, ADAM | {"use_8bit_adam": False}, PRODIGY):
        flat = parameter_of(torch.ones(5000))
        optimizer = Accelerator(cpu=True).prepare(optim.make_optimizer(flat, **options))
        flat.grad.fill_(1e-3)
        flat.grad[17] = torch.inf
        optim.step_if_finite(optimizer, flat.grad.norm(), scaler=None)
        assert torch.equal(flat, torch.ones(5000))
        flat.grad[17] = 1e-3
        optim.step_if_finite(optimizer, flat.grad.norm(), scaler=None)
        assert not torch.equal(flat, torch.ones(5000))
        assert not hasattr(optimizer.optimizer, "found_inf")


def test_8_bit_adamw_refuses_a_gradient_that_is_still_scaled():
    flat, scaler = parameter_of(torch.zeros(5000)), torch.amp.GradScaler("cpu")
    optimizer = optim.make_optimizer(flat, use_8bit_adam=True, **ADAM)
    scaler.scale(torch.ones(()))
    flat.grad.fill_(1e-3)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(optimizer)


PRODIGY = ADAM | {"name": "prodigy", "learning_rate": 1.0, "use_8bit_adam": True}


def test_prodigy_over_the_flat_parameter_is_prodigy_over_its_parts():
    start = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    start[1000:2000] = 0  # as lora_B begins
    flat = parameter_of(start)
    parts = [torch.nn.Parameter(part.clone()) for part in start.split(1000)]
    whole = optim.make_optimizer(flat, **PRODIGY)
    apart = Prodigy(parts, lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-6, use_bias_correction=True)
    for group in apart.param_groups:
        group["safeguard_warmup"] = True
    for grad in gradients(200, len(start)):
        flat.grad.copy_(grad)
        for part, part_grad in zip(parts, grad.split(1000), strict=True):
            part.grad = part_grad.clone()
        whole.step()
        apart.step()
    found, expected = flat.detach() - start, torch.cat([part.detach() for part in parts]) - start
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert whole.param_groups[0]["d"] == pytest.approx(apart.param_groups[0]["d"], rel=1e-3)
    assert whole.param_groups[0]["d"] > 10 * 1e-6  # it found a rate


def test_prodigy_says_nothing_and_takes_the_bytes_that_are_planned(capsys):
    flat = parameter_of(torch.ones(10000))
    optimizer = optim.make_optimizer(flat, **PRODIGY)
    flat.grad.fill_(1e-3)
    optimizer.step()
    assert capsys.readouterr().out == ""
    kept = bytes_of_all_tensors(optimizer)
    planned = [optim.expected_update_bytes(10000, "prodigy", True, use_ema) for use_ema in (False, True)]
    assert (planned[0], planned[1]) == (kept + 40000, kept + 40000 + 40000)


def test_the_average_follows_its_formula_and_leaves_no_trace():
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    flat = parameter_of(start)
    view = flat.data[10:20]
    ema, expected = optim.make_ema(flat, 0.9), start.double()
    for step, change in enumerate(gradients(100, len(start)), 1):
        flat.data += change
        ema.step([flat])
        decay = 0.0 if step == 1 else min(0.9, step / (9 + step))
        expected = decay * expected + (1 - decay) * flat.detach().double()
    trained = flat.detach().clone()
    assert (trained - expected).norm() > 1e-3  # it lags behind
    with optim.averaged(ema, flat):
        torch.testing.assert_close(view, expected.float()[10:20], rtol=1e-5, atol=1e-6)
    assert torch.equal(flat, trained)
    with optim.averaged(None, flat):
        assert torch.equal(flat, trained)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_a_schedule_gives_the_learning_rates_of_the_librarys_own_scheduler(name, power):
    options = {"num_warmup_steps": 4, "num_training_steps": 25, "num_cycles": 3, "power": power}
    options["step_rules"] = "5:3,0.5:20,0.1" if name == "piecewise_constant" else None
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    scheduler = get_scheduler(name, optimizer, **options)
    expected = []
    for _ in range(30):  # five steps longer than the schedule
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    factor = optim.learning_rate_schedule(name, 1e-4, **options)
    assert [1e-4 * factor(step) for step in range(30)] == pytest.approx(expected, rel=1e-12, abs=0)
    # Asked in another order, as after a resume, it answers the same.
    assert [1e-4 * factor(step) for step in (29, 3, 17)] == pytest.approx([expected[s] for s in (29, 3, 17)])
    assert len(set(expected)) > 1 or name == "constant"


def test_an_unknown_schedule_or_rule_is_refused():
    with pytest.raises(ValueError, match="sawtooth"):
        optim.learning_rate_schedule("sawtooth", 1e-4, 0, 10)
    with pytest.raises(ValueError):
        optim.learning_rate_schedule("piecewise_constant", 1e-4, 0, 10, step_rules="0.1:ten,1")


# --- a state that was loaded ---


def updated(name, use_8bit_adam, count=20_000):
    generator = torch.Generator().manual_seed(0)
    flat = torch.nn.Parameter(torch.randn(count, generator=generator))
    flat.grad = torch.randn(count, generator=generator)
    made = optim.make_optimizer(flat, name, use_8bit_adam, *RATES)
    made.step()
    return made, next(iter(made.state.values()))


RATES = (1e-3, (0.9, 0.999), 0.01, 1e-8)
KINDS = [("adamw", False), ("adamw", True), ("prodigy", False)]


def check(made, name, use_8bit_adam, may_lack=False):
    optim.check_state(made, lambda flat: optim.make_optimizer(flat, name, use_8bit_adam, *RATES), may_lack)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 100, 8192, 20_000])
def test_the_state_of_an_update_is_one(kind, count):
    check(updated(*kind, count)[0], *kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_none_of_this_optimizer_is_told_by_its_first_fault(kind):
    for name in updated(*kind)[1]:
        made, state = updated(*kind)
        whole = state[name]
        if torch.is_tensor(whole) and whole.dim():
            state[name] = whole[:-1]
            with pytest.raises(ValueError, match=rf"{name} is \({len(whole) - 1},\) of .*, not \({len(whole)},\) of"):
                check(made, *kind)
            for odd in (whole.view(-1, 1), whole[:1].expand(len(whole))):
                state[name] = odd
                with pytest.raises(ValueError, match=f"{name} is "):
                    check(made, *kind)
            if whole.is_floating_point():
                state[name] = torch.full_like(whole, torch.nan)
                with pytest.raises(ValueError, match=f"{name} is not finite"):
                    check(made, *kind)
        state[name] = "x"
        with pytest.raises(ValueError, match=f"{name} is a str"):
            check(made, *kind)
        del state[name]
        with pytest.raises(ValueError, match=f"{name} is missing"):
            check(made, *kind)
    made, state = updated(*kind)
    state["step"] = state["step"] * 0 - 1
    with pytest.raises(ValueError, match="it has done -1 updates"):
        check(made, *kind)
    made.state.clear()
    check(made, *kind, may_lack=True)
    with pytest.raises(ValueError, match="is missing"):
        check(made, *kind)


def test_a_state_of_another_device_is_whole_and_a_rate_that_is_none_is_refused():
    made, _ = updated("adamw", False)
    made.param_groups[0]["fused"] = True
    check(made, "adamw", False)
    made, _ = updated("prodigy", False)
    made.param_groups[0]["d"] = math.nan
    with pytest.raises(ValueError, match="d is nan"):
        check(made, "prodigy", False)
    for name, odd in (
        ("d", "x"),
        ("k", -1),
        ("k", 10**400),
        ("d", math.inf),
        ("slice_p", 0),
        ("growth_rate", math.nan),
    ):
        made, _ = updated("prodigy", False)
        made.param_groups[0][name] = odd
        with pytest.raises(ValueError, match=f"{name} is "):
            check(made, "prodigy", False)
    made, state = updated("adamw", True)
    state["qmap2"] = -state["qmap2"]
    with pytest.raises(ValueError, match="qmap2 is no table of bitsandbytes'"):
        check(made, "adamw", True)
    made, state = updated("adamw", False)
    state["exp_avg_sq"][5] = -1
    with pytest.raises(ValueError, match="exp_avg_sq is negative"):
        check(made, "adamw", False)


def test_an_option_of_a_strangers_state_that_turns_the_optimizer_round_is_refused():
    made, _ = updated("adamw", False)
    made.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize is True, not False"):
        check(made, "adamw", False)
