"""One training step: the loss of a micro-batch."""

import math

import torch
import torch.nn.functional as F

from rasengan import UserError, objective
from rasengan.data import derive_seed


def seed_step(seed: int, global_step: int, rank: int) -> None:
    """Seed what is drawn inside a step (LoRA dropout) from the step itself, so that a resumed run draws the same."""
    torch.manual_seed(derive_seed("step", seed, global_step, rank))


def compute_losses(
    unet: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    snr_gamma: float | None,
    weight_dtype: torch.dtype,
) -> torch.Tensor:
    """Return the loss of each sample (B,), in fp32 or, for fp64 latents, in fp64.

    Args:
        unet: with its LoRA.
        batch: `latents` and `noise` (B, 4, h, w), `timesteps` (B,), `prompt_embeds` (B, T, D),
            `pooled_prompt_embeds` (B, P), `time_ids` (B, 6).
        alphas_cumprod: (1000,), the noise scheduler's, on the same device.
        prediction_type: "epsilon" or "v_prediction".
        snr_gamma: of the min-SNR weights, or None for none.
        weight_dtype: of the frozen UNet.
    """
    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    noisy_latents = objective.add_noise(latents, noise, timesteps, alphas_cumprod)
    target = objective.make_target(latents, noise, timesteps, alphas_cumprod, prediction_type)
    model_pred = unet(
        noisy_latents.to(weight_dtype),
        timesteps,
        batch["prompt_embeds"].to(weight_dtype),
        # Sizes over 2048 px are not exact in fp16: they stay fp32 until their sinusoidal embedding.
        added_cond_kwargs={
            "text_embeds": batch["pooled_prompt_embeds"].to(weight_dtype),
            "time_ids": batch["time_ids"],
        },
        return_dict=False,
    )[0]
    losses = F.mse_loss(model_pred.to(target.dtype), target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * objective.snr_weights(timesteps, alphas_cumprod, snr_gamma, prediction_type, losses.dtype)
    return losses


def check_finite(train_loss: float, global_step: int) -> None:
    """Stop a run that diverged.

    Raises:
        UserError: the loss is not finite.
    """
    if not math.isfinite(train_loss):
        raise UserError(
            f"The loss of step {global_step} is {train_loss}: the run diverged. Lower --learning_rate, and go on "
            "from an earlier checkpoint."
        )
