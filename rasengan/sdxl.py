"""Encode prompts and pictures, and draw, with the components in memory.

Shapes: B batch, T tokens (77), D text width (2048 = 768 + 1280), P pooled width (1280), H and W picture size in px.
"""

from collections.abc import Callable

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
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from transformers import CLIPTokenizer

from rasengan import UserError


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


# --- drawing ---


def make_sampler(scheduler: SchedulerMixin, name: str | None) -> SchedulerMixin:
    """Return the sampler `name` of `SAMPLERS` for the model of `scheduler`, or `scheduler` itself for None."""
    if name is None:
        return scheduler
    sampler, options = SAMPLERS[name]
    return sampler.from_config(scheduler.config, **options)


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


@torch.no_grad()
def draw(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler: SchedulerMixin,
    prompts: dict[str, torch.Tensor],
    seeds: list[int],
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    on_step: Callable[[], object] = lambda: None,
) -> list[Image.Image]:
    """Draw one picture for each seed, through diffusers' own pipeline.

    Each picture's noise comes from its own CPU generator: it is the same on every device and in every batch.

    Args:
        unet: on the device to draw on, with or without an adapter.
        vae: fp32, on the same device.
        scheduler: a sampler, as `make_sampler` returns it.
        prompts: what `conditioning` returned, a row for each seed.
        seeds: one for each picture.
        height: in px, a multiple of 8.
        width: in px, a multiple of 8.
        num_inference_steps: denoising steps.
        guidance_scale: 1 or less draws without classifier-free guidance.
        on_step: called after each denoising step.

    Raises:
        UserError: a picture came out with non-finite values.
    """
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def end_of_step(pipeline, step, timestep, tensors):
        on_step()
        return tensors

    latents = pipeline(
        **prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        output_type="latent",
        callback_on_step_end=end_of_step,
    ).images
    pixels = decode_latents(vae, latents)
    if not torch.isfinite(pixels).all():
        raise UserError(
            "A picture came out with non-finite values: the UNet or the adapter overflows in this precision. "
            "Use --mixed_precision no, or a smaller --lora_scale."
        )
    return pipeline.image_processor.postprocess(pixels, output_type="pil")


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, tile_px: int = 512) -> torch.Tensor:
    """Return pixels (B, 3, H, W), fp32 in [-1, 1], of latents (B, 4, H/8, W/8) in any dtype, outside autocast.

    One picture at a time, in overlapping tiles where it is larger than `tile_px`: that bounds the memory of a decode
    to 1.2 GiB at 512 px tiles. `enable_tiling` by itself does nothing at 1024 px, the tile of SDXL's VAE.
    """
    vae.enable_tiling()
    vae.tile_sample_min_size = tile_px
    vae.tile_latent_min_size = tile_px // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    try:
        with torch.autocast(latents.device.type, enabled=False):
            pixels = torch.cat([vae.decode(latent[None], return_dict=False)[0] for latent in latents])
    finally:
        vae.disable_tiling()  # which would also tile the encoding of training pictures
    return pixels.clamp(-1, 1)
