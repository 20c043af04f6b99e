"""Pictures drawn while training, and grids that set pictures side by side."""

import io
import logging
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from diffusers import SchedulerMixin
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from rasengan import UserError, drawing, sdxl
from rasengan.components import free_memory
from rasengan.files import write_atomically


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
    seeds: list[int],
    side_px: int,
    num_inference_steps: int,
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
        seeds: one for each picture of a prompt.
        side_px: of the square pictures.
        num_inference_steps: denoising steps.

    Returns:
        All the pictures, on every process.
    """
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    home = vae.device
    vae.to(accelerator.device)
    denoiser, drawn = drawing.Denoiser(unet), []
    for job in range(accelerator.process_index, len(jobs), accelerator.num_processes):
        prompt, seed = jobs[job]
        row = sdxl.conditioning(prompt, None, 1)
        try:
            with accelerator.autocast():
                latents = drawing.draw(denoiser, scheduler, row, [seed], side_px, side_px, num_inference_steps, 5.0)
            images = drawing.decode(vae, latents)
        # No further: another process may be waiting for this one's share.
        except UserError:  # its one reason
            images = [Image.new("RGB", (side_px, side_px), "grey")]
            logger.warning("The validation picture of seed %d %s", seed, NOT_FINITE)
        except torch.OutOfMemoryError:
            images = [Image.new("RGB", (side_px, side_px), "grey")]
            logger.warning("The validation picture of seed %d %s", seed, DOES_NOT_FIT)
        drawn.append((job, images[0]))
    vae.to(home)
    free_memory()
    return [image for _, image in sorted(gather_object(drawn), key=lambda item: item[0])]


def pair_grid(
    base_images: list[Image.Image], images: list[Image.Image], prompts: list[str], label: str
) -> Image.Image:
    """Return a grid of base and tuned pictures side by side, as many rows for each prompt; `label` is the tuned's."""
    rows = [list(pair) for pair in zip(base_images, images, strict=True)]
    row_labels = [prompt for prompt in prompts for _ in range(len(rows) // len(prompts))]
    return image_grid(rows, row_labels, ["base", label])


def image_grid(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """Return one picture of rows of pictures, all of one size, with a label over each column and row.

    Args:
        rows: pictures, as many in each row as there are column labels.
        row_labels: one for each row, wrapped to its width.
        column_labels: one for each column.
    """
    width, height = rows[0][0].size
    cell, margin = max(width, 256), max(width, 256) // 32
    font = ImageFont.load_default(size=cell // 18)
    line_height = round(cell / 18 * 1.4)
    total_width = len(column_labels) * (cell + margin) + margin
    height = round(height * cell / width)
    labels = [wrap(label, font, total_width - 2 * margin) for label in row_labels]

    header = line_height + margin
    total_height = header + sum(len(lines) * line_height + height + 2 * margin for lines in labels)
    grid = Image.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(grid)
    lefts = [margin + column * (cell + margin) for column in range(len(column_labels))]
    for left, label in zip(lefts, column_labels, strict=True):
        draw.text((left + cell / 2, margin), wrap(label, font, cell, max_lines=1)[0], "black", font, anchor="ma")
    top = header
    for row, lines in zip(rows, labels, strict=True):
        top += margin
        for line in lines:
            draw.text((margin, top), line, "#444444", font)
            top += line_height
        for left, image in zip(lefts, row, strict=True):
            grid.paste(image.convert("RGB").resize((cell, height), Image.Resampling.LANCZOS), (left, top))
        top += height + margin
    return grid


def wrap(text: str, font: ImageFont.FreeTypeFont, width_px: float, max_lines: int = 3) -> list[str]:
    """Return the text in at most `max_lines` lines that fit a width, cut with an ellipsis where it is longer.

    Pillow's own font has ASCII only: accents are dropped, and what is left over becomes a question mark.
    """
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    plain = plain.replace("\u2014", "-").replace("\u2013", "-").encode("ascii", "replace").decode()
    lines, rest = [], " ".join(plain.split())
    while rest and len(lines) < max_lines:
        ellipsis = " ..." if len(lines) == max_lines - 1 and font.getlength(rest) > width_px else ""
        fits = len(rest)
        while fits > 1 and font.getlength(rest[:fits] + ellipsis) > width_px:
            fits -= 1
        if fits < len(rest) and rest[fits] != " ":
            fits = rest.rfind(" ", 0, fits) if " " in rest[:fits] else fits  # a word longer than a line is cut
        lines.append(rest[:fits] + ellipsis)
        rest = rest[fits:].lstrip()
    return lines or [""]


def save_png(path: Path, image: Image.Image, about: PngImagePlugin.PngInfo | None = None) -> None:
    """Write a picture whole or not at all, with what it was made from in its metadata."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=about)
    write_atomically(path, file.getvalue())


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
