"""One training step against a plain reference, which uses nothing of the project and no PEFT."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig

from rasengan import graphs, lora, processes, step


RANK, LORA_ALPHA, SNR_GAMMA = 4, 6.0, 5.0
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ALPHAS_CUMPROD = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


def make_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # Signal-to-noise ratios over and under gamma.
    return {
        "latents": randn(3, 4, 8, 12),
        "noise": randn(3, 4, 8, 12),
        "timesteps": torch.tensor([12, 333, 905]),
        "prompt_embeds": randn(3, 7, 96),
        "pooled_prompt_embeds": randn(3, 64),
        "time_ids": torch.tensor([[64, 96, 0, 0, 64, 96], [200, 300, 4, 0, 64, 96], [4001, 2049, 0, 7, 64, 96]]),
    }


@pytest.fixture(scope="module")
def matrices(tiny_base):
    """A and B of every attention projection, in float64; neither is zero."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for name, module in unet.named_modules():
        if name.endswith(tuple(f".{target}" for target in TARGETS)):
            a = torch.randn(RANK, module.in_features, generator=generator, dtype=torch.float64) / RANK
            b = torch.randn(module.out_features, RANK, generator=generator, dtype=torch.float64) / 8
            pairs[name] = (a.float().double(), b.float().double())  # so that fp32 holds the same numbers
    assert len(pairs) == 136
    return pairs


def reference_step(tiny_base, matrices, batch, prediction_type, snr_gamma):
    """Return the losses of the samples, and the gradient of their mean by each A and B, all in float64."""
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").double().requires_grad_(False)
    leaves = {name: tuple(matrix.clone().requires_grad_() for matrix in pair) for name, pair in matrices.items()}
    weights = {
        f"{name}.weight": unet.get_submodule(name).weight + LORA_ALPHA / RANK * b @ a
        for name, (a, b) in leaves.items()
    }
    alpha = ALPHAS_CUMPROD.double()[batch["timesteps"]]
    signal, sigma = (root[:, None, None, None] for root in (alpha**0.5, (1 - alpha) ** 0.5))
    noisy_latents = signal * batch["latents"] + sigma * batch["noise"]
    added = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
    arguments = (noisy_latents, batch["timesteps"], batch["prompt_embeds"])
    model_pred = torch.func.functional_call(unet, weights, arguments, {"added_cond_kwargs": added}).sample
    velocity = signal * batch["noise"] - sigma * batch["latents"]
    target = batch["noise"] if prediction_type == "epsilon" else velocity
    losses = ((model_pred - target) ** 2).flatten(1).mean(1)
    if snr_gamma is not None:
        snr = alpha / (1 - alpha)
        assert snr.min() < snr_gamma < snr.max()
        losses = (
            losses
            * torch.minimum(snr, torch.full_like(snr, snr_gamma))
            / (snr if prediction_type == "epsilon" else snr + 1)
        )
    flat = [leaf for pair in leaves.values() for leaf in pair]
    names = [f"{name}.lora_{part}" for name in leaves for part in "AB"]
    return losses.detach(), dict(zip(names, torch.autograd.grad(losses.mean(), flat), strict=True))


def adapted_unet(tiny_base, matrices, dtype, dropout=0.0):
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=TARGETS, lora_dropout=dropout))
    unet.to(dtype).train()
    for name, pair in matrices.items():
        for part, matrix in zip("AB", pair, strict=True):
            unet.get_submodule(f"{name}.lora_{part}.default").weight.data.copy_(matrix)
    return unet


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("snr_gamma", [None, SNR_GAMMA])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_every_gradient_equal_the_plain_reference(tiny_base, matrices, prediction_type, snr_gamma):
    expected_losses, expected = reference_step(tiny_base, matrices, make_batch(), prediction_type, snr_gamma)
    assert len(expected) == 272
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        unet = adapted_unet(tiny_base, matrices, dtype)
        losses = step.compute_losses(unet, make_batch(dtype), ALPHAS_CUMPROD, prediction_type, snr_gamma, dtype)
        losses.mean().backward()
        assert losses.shape == (3,)
        assert losses.dtype == dtype
        assert difference(losses.detach(), expected_losses) < tolerance
        found = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
        assert len(found) == len(expected)
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            assert difference(found[f"{name}.default.weight"], gradient) < tolerance, (name, dtype)


def test_the_gradient_of_a_batch_is_the_mean_of_its_samples(tiny_base, matrices):
    unet = adapted_unet(tiny_base, matrices, torch.float64)
    batch = make_batch()
    arguments = (ALPHAS_CUMPROD, "epsilon", SNR_GAMMA, torch.float64)
    together = step.compute_losses(unet, batch, *arguments)
    alone = [step.compute_losses(unet, {k: v[i : i + 1] for k, v in batch.items()}, *arguments) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-9, atol=0)


def test_sizes_over_2048_px_reach_their_embedding_exactly_in_half_precision(tiny_base, matrices):
    unet = adapted_unet(tiny_base, matrices, torch.bfloat16)
    seen = []
    unet.add_time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    batch = make_batch(torch.float32)
    losses = step.compute_losses(unet, batch, ALPHAS_CUMPROD, "epsilon", None, torch.bfloat16)
    assert torch.equal(seen[0].long(), batch["time_ids"].flatten())
    # What the model predicted is compared in the precision of the noise.
    assert losses.dtype == torch.float32
    exact = adapted_unet(tiny_base, matrices, torch.float32)
    expected = step.compute_losses(exact, batch, ALPHAS_CUMPROD, "epsilon", None, torch.float32)
    assert 0 < difference(losses.detach(), expected.detach()) < 0.02


def test_dropout_follows_from_seed_step_and_process_alone(tiny_base, matrices):
    unet = adapted_unet(tiny_base, matrices, torch.float32, dropout=0.5)
    batch = make_batch(torch.float32)

    def loss_at(seed, global_step, rank):
        step.seed_step(seed, global_step, rank)
        return step.compute_losses(unet, batch, ALPHAS_CUMPROD, "epsilon", None, torch.float32).mean().item()

    first = loss_at(7, 3, 0)
    torch.randn(5)  # something else draws from the global generator
    others = [loss_at(8, 3, 0), loss_at(7, 4, 0), loss_at(7, 3, 1), loss_at(73, 0, 0)]
    assert loss_at(7, 3, 0) == first
    assert len({first, *others}) == 5


def test_one_process_leaves_its_gradient_as_it_is():
    gradient = torch.randn(5)
    before = gradient.clone()
    processes.average(gradient)
    assert torch.equal(gradient, before)


# --- TrainingStep ---


def training_step(tiny_base, samples):
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=TARGETS))
    for name, parameter in unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    flat = lora.flatten_parameters([p for p in unet.parameters() if p.requires_grad])

    def compute(batch):
        return step.compute_losses(unet, batch, ALPHAS_CUMPROD, "epsilon", SNR_GAMMA, torch.float32)

    made = step.TrainingStep(compute, torch.Tensor.backward, flat, as_graph=False)
    made.samples = samples
    return made


def test_micro_batches_add_up_to_the_batch(tiny_base):
    batch = make_batch(torch.float32) | {"name": ["a", "b", "c"]}
    whole, parts = training_step(tiny_base, 3), training_step(tiny_base, 3)
    losses = whole(batch)
    found = [parts({k: v[part] for k, v in batch.items()}) for part in (slice(0, 2), slice(2, 3))]
    torch.testing.assert_close(torch.cat(found), losses, rtol=1e-5, atol=0)
    assert not losses.requires_grad
    assert (parts.flat.grad - whole.flat.grad).norm() < 1e-5 * whole.flat.grad.norm()


class Captured:
    """Stands for a graph where there is no card."""

    def __init__(self, run):
        self.run = run
        self.graph = SimpleNamespace(pool=lambda: None)

    def __call__(self, inputs):
        return self.run(inputs)


@pytest.mark.parametrize("micro_batch_size", [3, 2], ids=["while it is captured", "in a rare size, without a graph"])
def test_a_shape_for_which_the_graphs_leave_no_memory_runs_without_any(tiny_base, monkeypatch, micro_batch_size):
    batch = make_batch(torch.float32)
    first = {name: tensor[:2] for name, tensor in batch.items()}
    expected = training_step(tiny_base, 3)
    expected(first)
    losses = expected(batch)
    made = training_step(tiny_base, 3)
    made.as_graph, made.micro_batch_size = True, 2
    run = made.run

    def capture(run, inputs, pool, after_warm_up):
        run(inputs)
        if made.graphs:
            raise torch.OutOfMemoryError
        after_warm_up()
        return Captured(run)

    def run_beside_graphs(batch):
        losses = run(batch)
        if made.graphs and len(losses) != 2:
            raise torch.OutOfMemoryError
        return losses

    monkeypatch.setattr(graphs, "capture", capture)
    made.run = run_beside_graphs
    made(first)
    made.micro_batch_size = micro_batch_size
    torch.testing.assert_close(made(batch), losses, rtol=0, atol=0)
    assert torch.equal(made.flat.grad, expected.flat.grad)
    assert not made.graphs
    made.run = run
    made(first)
    assert not made.graphs


def test_the_only_shape_must_fit(tiny_base, monkeypatch):
    def capture(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(graphs, "capture", capture)
    made = training_step(tiny_base, 3)
    made.as_graph = True
    with pytest.raises(torch.OutOfMemoryError):
        made(make_batch(torch.float32))


# --- how the UNet runs ---


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_unet_runs_fused_where_it_can_and_its_blocks_are_recomputed_either_way(dropout, tiny_base, caplog):
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").requires_grad_(False)
    lora.stack_weights(unet, torch.device("cpu"))
    lora.add_lora(unet, lora.lora_config(RANK, LORA_ALPHA, TARGETS, dropout=dropout))
    unet.train()
    flat = lora.flatten_parameters(lora.flat_order(unet))
    found = step.prepare_unet(unet, flat, LORA_ALPHA / RANK, torch.float32, deterministic=False)
    assert found.is_fused == (dropout == 0)
    assert (len(caplog.messages), found.blocks == 1) == ((0, False) if found.is_fused else (1, True))
    assert all("The UNet runs as PEFT wrote it, more slowly: " in message for message in caplog.messages)

    def kept_bytes(recomputed):
        found.recompute_blocks(recomputed)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            step.compute_losses(unet, make_batch(torch.float32), ALPHAS_CUMPROD, "epsilon", None, torch.float32)
        return sum(sizes)

    assert kept_bytes(found.blocks) < 0.7 * kept_bytes(0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_unet_that_is_not_fused_upsamples_deterministically_where_that_is_asked_for(deterministic, tiny_base):
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet").requires_grad_(False)
    lora.add_lora(unet, lora.lora_config(RANK, LORA_ALPHA, TARGETS, dropout=0.5))
    flat = lora.flatten_parameters(lora.flat_order(unet))
    step.prepare_unet(unet, flat, LORA_ALPHA / RANK, torch.float32, deterministic)
    upsamplers = [module for module in unet.modules() if isinstance(module, Upsample2D)]
    assert upsamplers
    assert all(("forward" in vars(module)) == deterministic for module in upsamplers)


@pytest.mark.parametrize(
    ("device", "is_fused", "trains_text", "why"),
    [
        ("cuda", True, False, None),
        ("cuda", True, True, "the text encoders are trained"),
        ("cuda", False, False, "the UNet runs as PEFT wrote it"),
        ("mps", True, False, "the device is mps"),
        ("cpu", True, True, "the device is cpu"),
    ],
)
def test_why_steps_are_no_graphs(device, is_fused, trains_text, why):
    run = step.UNetRun(is_fused, 1, lambda count: None)
    assert step.why_eager(torch.device(device), run, trains_text) == why
