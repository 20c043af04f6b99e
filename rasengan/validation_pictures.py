"""Pictures drawn while training."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from PIL import Image

from rasengan import UserError, drawing, logs, memory, picture_files, processes, sdxl, sheets
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


class ValidationPictures:
    """Draws some prompts with the base and with the current adapter, by the same seeds, and shows both."""

    def __init__(
        self,
        accelerator: Accelerator,
        unet: torch.nn.Module,
        vae: torch.nn.Module,
        scheduler: SchedulerMixin,
        embed: Callable[[list[str]], list[tuple[torch.Tensor, torch.Tensor]]],
        *,
        prompts: list[str],
        negative: str | None,
        seeds: list[int],
        side_px: int,
        num_inference_steps: int,
        file: Path,
    ):
        """Take what is drawn, and how.

        Args:
            accelerator: as `draw_share` takes it, and so are the UNet, the VAE and the scheduler.
            unet: likewise.
            vae: likewise.
            scheduler: likewise.
            embed: returns the embeddings of prompts as `prompt_embeds` does.
            prompts: each is drawn with each seed.
            negative: the negative prompt; None for zeros.
            seeds: of the pictures of a prompt.
            side_px: of the square pictures.
            num_inference_steps: denoising steps.
            file: where both are shown, PNG.
        """
        self.accelerator, self.embed, self.file = accelerator, embed, file
        self.prompts, self.negative = prompts, negative
        how = {"seeds": seeds, "side_px": side_px, "num_inference_steps": num_inference_steps}
        self.draw_share = partial(draw_share, accelerator, unet, vae, scheduler, **how)
        self.of_base = None

    def draw(self, should_stop: Callable[[], bool] = lambda: False) -> list[Image.Image]:
        """Return all pictures, of the models as they run now, on every process.

        Raises:
            Interrupted: a process was asked to end.
        """
        rows = self.embed([*self.prompts, *({self.negative} - {None})])
        prompts, negatives = rows[: len(self.prompts)], rows[len(self.prompts) :]
        return self.draw_share(prompts, negatives[0] if negatives else None, should_stop=should_stop)

    def draw_base(self, should_stop: Callable[[], bool]) -> None:
        """Draw with the models, which run without their adapters now, and keep the pictures."""
        self.of_base = self.draw(should_stop)

    def show(self, global_step: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Draw with the models as they run now, and show that beside the base's, in the trackers and in the file."""
        images = self.draw(should_stop)
        if self.accelerator.is_main_process:
            grid = sheets.pair_grid(self.of_base, images, self.prompts, f"step {global_step}")
            picture_files.save_png(self.file, grid)
            logs.log_image(self.accelerator.trackers, "validation", grid, global_step)


@torch.no_grad()
def prompt_embeds(
    prompts: list[str],
    accelerator: Accelerator,
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
