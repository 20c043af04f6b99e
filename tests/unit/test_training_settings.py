import pytest
import torch

from rasengan import memory_plan, optim, training_settings


CPU, GIB = torch.device("cpu"), 1024**3


@pytest.fixture
def kernels():
    """What PyTorch is allowed, put back at the end."""
    fill, tf32 = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cuda.matmul.allow_tf32 = fill, tf32


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_are_deterministic_where_that_is_asked_for(deterministic, kernels):
    environment = {}
    training_settings.choose_kernels({"deterministic": deterministic, "allow_tf32": False}, CPU, environment)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert environment == ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if deterministic else {})
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_what_the_user_gives_cublas_stays(kernels):
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    training_settings.choose_kernels({"deterministic": True, "allow_tf32": False}, CPU, environment)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


@pytest.mark.parametrize("allow_tf32", [True, False])
def test_tf32_that_a_device_has_not_is_told_of_and_not_allowed(allow_tf32, kernels, caplog):
    caplog.set_level("INFO", "rasengan")
    torch.backends.cuda.matmul.allow_tf32 = True
    training_settings.choose_kernels({"deterministic": False, "allow_tf32": allow_tf32}, CPU, {})
    assert not torch.backends.cuda.matmul.allow_tf32
    assert caplog.messages == ["--allow_tf32 has no effect: this device has no TF32"] * allow_tf32


@pytest.mark.parametrize(
    ("changed", "samples", "plan", "can_quantize"),
    [
        ({}, 8, memory_plan.Plan(8, 0, 4 * GIB), True),
        ({"train_batch_size": 16}, 16, memory_plan.Plan(16, 0, 4 * GIB), True),
        (
            {"gradient_checkpointing": True, "base_quantization": "nf4"},
            2,
            memory_plan.Plan(2, 5, 4 * GIB),
            False,
        ),
    ],
)
def test_the_planner_is_of_the_settings(changed, samples, plan, can_quantize, monkeypatch):
    limits, ran = [], []
    monkeypatch.setattr(memory_plan, "limit", lambda *given: limits.append(given) or given[0])
    settings = {"optimizer": "adamw", "use_8bit_adam": False, "use_ema": True, "train_batch_size": 1}
    settings |= {"gradient_checkpointing": None, "vram_budget_gib": 6.0, "base_quantization": "auto"} | changed
    flat = torch.nn.Parameter(torch.zeros(1000))
    flat.grad = torch.zeros(1000)
    how = {"samples": samples, "blocks": 5, "sharing": 2}
    planner = training_settings.make_planner(settings, ran.append, ran.append, flat, torch.optim.AdamW([flat]), **how)
    assert limits == [(6.0, CPU, 2)]
    assert planner.remedies["can_quantize"] == can_quantize
    assert planner.update_bytes == 3 * 4 * 1000  # two moments and the average, fp32

    def measure(run, device):
        run()
        return plan.predicted_bytes - planner.update_bytes + optim.state_bytes(planner.optimizer)

    monkeypatch.setattr(memory_plan, "measure_peak", measure)
    assert planner.plan() == plan
    assert ran == [plan.recomputed_blocks, samples]
