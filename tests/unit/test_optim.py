import pytest
import torch
from diffusers.optimization import SchedulerType, get_scheduler

from rasengan import optim


LORA_ELEMENTS = 23_224_320  # of the recipe: r=16 on the attention of SDXL's UNet
ADAM = {"learning_rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-6}


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
        optimizer = optim.make_optimizer(flat, use_8bit_adam, **ADAM)
        flat.grad.fill_(1e-3)
        optimizer.step()
        assert flat.abs().min() > 0
        sizes[use_8bit_adam] = bytes_of_all_tensors(optimizer)
        tables = 2 * 256 * 4 if use_8bit_adam else 0  # dynamic quantization, shared by all parameters
        assert optim.state_bytes(optimizer) == sizes[use_8bit_adam] - tables
        expected = optim.expected_state_bytes(LORA_ELEMENTS, use_8bit_adam)
        assert expected == pytest.approx(optim.state_bytes(optimizer), rel=1e-3)
    assert sizes[False] == 2 * 4 * LORA_ELEMENTS + 4
    assert 0.25 < sizes[True] / sizes[False] <= 0.27


def gradients(steps, size):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(size, generator=generator)
    return [1e-3 * (mean + torch.randn(size, generator=generator)) for _ in range(steps)]


def train(flat, use_8bit_adam, grads):
    optimizer = optim.make_optimizer(flat, use_8bit_adam, **ADAM)
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
