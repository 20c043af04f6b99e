"""What the model is asked to predict, and how far off it is.

Shapes: B batch, latents (B, 4, h, w) with h = height / 8.
"""

import torch

from rasengan import UserError


PREDICTION_TYPES = ("epsilon", "v_prediction")


def check_prediction_type(prediction_type: str) -> str:
    """Return the prediction type, once it is one that there is a target for.

    Raises:
        UserError: it is another.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"The scheduler's prediction type is {prediction_type!r}, for which there is no target here. Give the one "
            "that the model was trained with by --prediction_type epsilon or v_prediction."
        )
    return prediction_type


def expand(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return values (B,) in the dtype of `like`, shaped (B, 1, 1, 1) to broadcast over it."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """Return the latents at their timesteps, sqrt(a) x + sqrt(1 - a) e, in the latents' dtype.

    Args:
        latents: (B, 4, h, w), scaled by the VAE's factor.
        noise: of the same shape.
        timesteps: (B,), int64.
        alphas_cumprod: (T,), the noise scheduler's.

    Source: equation 4 of DDPM (arXiv 2006.11239).
    """
    alpha = expand(alphas_cumprod[timesteps], latents)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def make_target(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """Return what the model should predict: the noise, or the velocity sqrt(a) e - sqrt(1 - a) x.

    Source: section 2.4 of "Progressive Distillation" (arXiv 2202.00512) for the velocity.
    """
    if check_prediction_type(prediction_type) == "epsilon":
        return noise
    alpha = expand(alphas_cumprod[timesteps], latents)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


def snr_weights(
    timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, snr_gamma: float, prediction_type: str, dtype: torch.dtype
) -> torch.Tensor:
    """Return min-SNR loss weights (B,): min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for velocity.

    Written so that a signal-to-noise ratio of zero gives 1 for epsilon and 0 for velocity, never a NaN.

    Source: section 3.4 of arXiv 2303.09556.
    """
    alpha = alphas_cumprod[timesteps].to(dtype)
    snr = alpha / (1 - alpha)
    if prediction_type == "epsilon":
        return (snr_gamma / snr).clamp(max=1)
    return snr.clamp(max=snr_gamma) / (snr + 1)
