import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from rasengan import UserError, objective


TIMESTEPS = torch.tensor([0, 1, 17, 250, 500, 731, 998, 999])
# SDXL's schedule.
SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def latents_and_noise(dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (len(TIMESTEPS), 4, 8, 6)
    return (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noisy_latents_are_those_of_diffusers(dtype):
    latents, noise = latents_and_noise(dtype)
    noisy = objective.add_noise(latents, noise, TIMESTEPS, SCHEDULER.alphas_cumprod)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    assert noisy.dtype == dtype
    torch.testing.assert_close(noisy, SCHEDULER.add_noise(latents, noise, TIMESTEPS), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_velocity_is_that_of_diffusers(dtype):
    latents, noise = latents_and_noise(dtype)
    target = objective.make_target(latents, noise, TIMESTEPS, SCHEDULER.alphas_cumprod, "v_prediction")
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    assert target.dtype == dtype
    torch.testing.assert_close(target, SCHEDULER.get_velocity(latents, noise, TIMESTEPS), **tolerance)


def test_the_target_of_epsilon_is_the_noise():
    latents, noise = latents_and_noise(torch.float32)
    target = objective.make_target(latents, noise, TIMESTEPS, SCHEDULER.alphas_cumprod, "epsilon")
    assert torch.equal(target, noise)


def test_the_latents_come_back_from_noisy_latents_and_velocity():
    latents, noise = latents_and_noise(torch.float64)
    alphas = SCHEDULER.alphas_cumprod
    noisy = objective.add_noise(latents, noise, TIMESTEPS, alphas)
    velocity = objective.make_target(latents, noise, TIMESTEPS, alphas, "v_prediction")
    alpha = alphas[TIMESTEPS].double()[:, None, None, None]
    torch.testing.assert_close(alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity, latents)
    torch.testing.assert_close((1 - alpha).sqrt() * noisy + alpha.sqrt() * velocity, noise)


@pytest.mark.parametrize("snr_gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_min_snr_weights_follow_the_formula_of_the_paper(snr_gamma, prediction_type, dtype, rtol):
    timesteps = torch.arange(1000)
    weights = objective.snr_weights(timesteps, SCHEDULER.alphas_cumprod, snr_gamma, prediction_type, dtype)
    snrs = [alpha / (1 - alpha) for alpha in SCHEDULER.alphas_cumprod.tolist()]
    extra = 0 if prediction_type == "epsilon" else 1
    expected = [min(snr, snr_gamma) / (snr + extra) for snr in snrs]
    assert min(snrs) < snr_gamma < max(snrs)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64).to(dtype), rtol=rtol, atol=0)


def test_min_snr_weights_agree_with_the_snr_of_diffusers():
    snr = compute_snr(SCHEDULER, TIMESTEPS)
    for prediction_type, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        weights = objective.snr_weights(TIMESTEPS, SCHEDULER.alphas_cumprod, 5.0, prediction_type, torch.float32)
        torch.testing.assert_close(weights, snr.clamp(max=5.0) / divisor, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_snr_of_zero_or_infinity_gives_the_limit_and_no_nan(dtype):
    alphas = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod
    alphas = torch.cat([torch.ones(1), alphas])
    ends = torch.tensor([len(alphas) - 1, 0])
    assert alphas[ends].tolist() == [0, 1]
    for prediction_type, limits in (("epsilon", [1, 0]), ("v_prediction", [0, 0])):
        weights = objective.snr_weights(ends, alphas, 5.0, prediction_type, dtype)
        assert weights.tolist() == limits

    latents, noise = (part[:2] for part in latents_and_noise(dtype))
    assert torch.equal(objective.add_noise(latents, noise, ends, alphas)[0], noise[0])
    assert torch.equal(objective.make_target(latents, noise, ends, alphas, "v_prediction")[0], -latents[0])


def test_a_prediction_type_without_a_target_is_refused():
    with pytest.raises(UserError, match="prediction type is 'sample'.*--prediction_type epsilon or v_prediction"):
        objective.check_prediction_type("sample")
    with pytest.raises(UserError, match="'sample'"):
        objective.make_target(None, None, None, None, "sample")
