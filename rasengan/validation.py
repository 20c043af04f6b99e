"""Pictures drawn while training."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers import SchedulerMixin
from PIL import Image

from rasengan import UserError, drawing, memory, processes, sdxl
from rasengan.stopping import Interrupted


logger = logging.getLogger(__name__)

NOT_FINITE = (
    "came out with non-finite values, and is shown in grey: the UNet overflows in this precision, or the run "
    "diverges. Train with --mixed_precision no, or lower --learning_rate"
)
DOES_NOT_FIT = (
    "does not fit into the card's memory, and is shown in grey: lower --resolution, or train without "
    "--validation_prompt"
)


@contextmanager
def adapters_disabled(models: list[torch.nn.Module]) -> Iterator[None]:
    """Run the models without their adapters for a while, as the base model."""
    for model in models:
        model.disable_adapters()
    try:
        yield
    finally:
        for model in models:
            model.enable_adapters()


@contextmanager
def evaluating(models: list[torch.nn.Module]) -> Iterator[None]:
    """Run the models in evaluation mode for a while: no dropout, no gradient checkpointing."""
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            model.train()


@torch.no_grad()
def prompt_embeds(
    accelerator: Accelerator,
    prompts: list[str],
    cached: Mapping[str, dict[str, torch.Tensor]] | None,
    tokenizers: list,
    text_encoders: list,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each prompt's embeddings (T, D) and pooled ones (P,), on the device.

    They come from the cache; where there is none, from the encoders in memory, as they are by now.
    """
    if cached is not None:
        embeds = [(cached[prompt]["prompt_embeds"], cached[prompt]["pooled_prompt_embeds"]) for prompt in prompts]
    else:
        with accelerator.autocast():
            embeds = list(zip(*sdxl.encode_prompts(prompts, tokenizers, text_encoders), strict=True))
    return [tuple(part.to(accelerator.device) for part in pair) for pair in embeds]


def draw_share(
    accelerator: Accelerator,
    unet: torch.nn.Module,
    vae: torch.nn.Module,
    scheduler: SchedulerMixin,
    prompts: list[tuple[torch.Tensor, torch.Tensor]],
    negative: tuple[torch.Tensor, torch.Tensor] | None,
    seeds: list[int],
    side_px: int,
    num_inference_steps: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """Draw each prompt with each seed, prompt by prompt; each process draws its share, so that none waits for long.

    A picture that comes out with non-finite values, or that does not fit into memory, is grey, and is warned of: the
    run goes on. The VAE visits the device only for the time of drawing.

    Args:
        accelerator: whose processes share the work, and whose precision is used.
        unet: as it is, with its adapter or without.
        vae: fp32.
        scheduler: a sampler.
        prompts: embeddings (T, D) and pooled embeddings (P,) of each, on the device.
        negative: likewise, of the negative prompt; None for zeros.
        seeds: one for each picture of a prompt.
        side_px: of the square pictures.
        num_inference_steps: denoising steps.
        should_stop: says whether the run was asked to end.

    Returns:
        All the pictures, on every process.

    Raises:
        Interrupted: a process was asked to end.
    """

    def look() -> None:
        if should_stop():
            raise Interrupted

    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    home = vae.device
    vae.to(accelerator.device)
    denoiser, drawn = drawing.Denoiser(unet), []
    for job in range(accelerator.process_index, len(jobs), accelerator.num_processes):
        prompt, seed = jobs[job]
        row = sdxl.conditioning(prompt, negative, 1)
        try:
            with accelerator.autocast():
                size = (side_px, side_px, num_inference_steps)
                latents = drawing.draw(denoiser, scheduler, row, [seed], *size, 5.0, on_step=look)
            images = drawing.decode(vae, latents)
        # No further: another process may be waiting for this one's share.
        except UserError:  # its one reason
            images = [Image.new("RGB", (side_px, side_px), "grey")]
            logger.warning("The validation picture of seed %d %s", seed, NOT_FINITE)
        except torch.OutOfMemoryError:
            images = [Image.new("RGB", (side_px, side_px), "grey")]
            logger.warning("The validation picture of seed %d %s", seed, DOES_NOT_FIT)
        except Interrupted:
            break
        drawn.append((job, images[0]))
    vae.to(home)
    memory.give_back()
    drawn = processes.gather(drawn)
    if len(drawn) < len(jobs):
        raise Interrupted
    return [image for _, image in sorted(drawn, key=lambda item: item[0])]


def log_settings(trackers: list[GeneralTracker], settings: dict[str, object]) -> None:
    """Show the run's arguments as a table in TensorBoard."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text("arguments", f"| argument | value |\n|---|---|\n{rows}")


def log_image(trackers: list[GeneralTracker], name: str, image: Image.Image, global_step: int) -> None:
    """Show a picture in those of accelerate's trackers that can."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(image), global_step, dataformats="HWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [image]}, step=global_step)
