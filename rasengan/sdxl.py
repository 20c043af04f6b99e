"""Encode prompts and pictures with the components in memory, and choose a sampler.

Shapes: B batch, T tokens (77), D text width (2048 = 768 + 1280), P pooled width (1280), H and W picture size in px.
"""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from transformers import CLIPTokenizer


SAMPLERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}


# --- conditioning ---


def encode_prompts(prompts: list[str], tokenizers: list, text_encoders: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `prompt_embeds` (B, T, D) and `pooled_prompt_embeds` (B, P), in the encoders' dtype and on their device.

    Source: section 2.1 of the SDXL paper (arXiv 2307.01952): the penultimate states of both encoders side by side,
    and the pooled output of the second. Tokens over the tokenizer's length are cut off.
    """
    hidden_states = []
    for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])
    return torch.cat(hidden_states, dim=-1), output.text_embeds


def encode_pictures(vae: AutoencoderKL, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents' mean and standard deviation, each (B, 4, H/8, W/8), unscaled, in the VAE's dtype.

    Args:
        vae: fp32; autocast is disabled around it, since SDXL's overflows in fp16.
        pixel_values: (B, 3, H, W) in [-1, 1].
    """
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def count_tokens(prompt: str, tokenizer: CLIPTokenizer) -> int:
    """Return how many tokens a prompt takes, the start and end tokens included, before any is cut off."""
    return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)


def compute_time_ids(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]
) -> list[int]:
    """Return SDXL's six micro-conditioning numbers from (height, width), (top, left) and (height, width), in px.

    Source: section 2.2 of the SDXL paper (arXiv 2307.01952).
    """
    return [*original_size, *crop_top_left, *target_size]


# --- what drawing needs ---


def make_sampler(scheduler: SchedulerMixin, name: str | None) -> SchedulerMixin:
    """Return the sampler `name` of `SAMPLERS` for the model of `scheduler`, or `scheduler` itself for None."""
    if name is None:
        return scheduler
    sampler, options = SAMPLERS[name]
    # Told by itself: from a configuration diffusers leaves out what it did not say when it was read.
    return sampler.from_config(scheduler.config, prediction_type=scheduler.config.prediction_type, **options)


def conditioning(
    prompt: tuple[torch.Tensor, torch.Tensor], negative: tuple[torch.Tensor, torch.Tensor] | None, batch_size: int
) -> dict[str, torch.Tensor]:
    """Return the embeddings of one prompt, repeated for a batch, by the names of the pipeline's arguments.

    Args:
        prompt: embeddings (T, D) and pooled embeddings (P,).
        negative: of the negative prompt; None gives zeros, as SDXL's `force_zeros_for_empty_prompt` does.
        batch_size: pictures to draw of it.
    """
    negative = negative or tuple(torch.zeros_like(part) for part in prompt)
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    parts = (*prompt, *negative)
    return {name: torch.stack([part] * batch_size) for name, part in zip(names, parts, strict=True)}
