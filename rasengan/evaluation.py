"""A base with one adapter after another merged into it: the losses that are measured, and what is drawn with each."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin

from rasengan import components, data_survey, loader, merging, prompts, samples, sdxl, step
from rasengan.adapters import Adapter
from rasengan.pipeline import Pipeline
from rasengan.sources import TEXT_ENCODERS
from rasengan.validation_loss import BANDS, ValidationLoss


EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")
DRAWN_TOGETHER = 4


class Drawn(NamedTuple):
    """A picture to draw."""

    prompt: str
    group: int  # of the user's seeds, that it belongs to
    seed: int  # of its noise, the same for both models


def to_draw(texts: list[str], count: int, seeds: list[int]) -> list[Drawn]:
    """Return `count` pictures for each of the user's seeds: of some texts, evenly spread, or of each several."""
    places = [number % len(texts) for number in range(count)]
    places = data_survey.spread(len(texts), count) if count < len(texts) else places
    return [
        Drawn(texts[place], group, group * count + number) for group in seeds for number, place in enumerate(places)
    ]


class Bench:
    """The base with one adapter after another merged into it, and what is measured and drawn with each."""

    def __init__(
        self,
        pipeline: Pipeline,
        scheduler: SchedulerMixin,
        embeds: Mapping[str, Mapping[str, torch.Tensor]],
        lora_scale: float,
        batch_size: int,
        negative_prompt: str | None = None,
    ):
        """Take the model, and what it is asked.

        Args:
            pipeline: of the base.
            scheduler: the base's, with the prediction type of the training.
            embeds: rows of a prompt cache, by text: of all captions and prompts, the negative one too.
            lora_scale: on the change of each adapter.
            batch_size: samples that are measured at once, fewer where these do not fit.
            negative_prompt: None for zeros.
        """
        self.negative_prompt = negative_prompt
        self.pipeline, self.scheduler, self.lora_scale, self.batch_size = pipeline, scheduler, lora_scale, batch_size
        self.base_embeds = self.embeds = dict(embeds)
        self.alphas_cumprod = components.noise_levels(scheduler).to(pipeline.device)

    def use(self, adapter: Adapter | None) -> merging.MergeReport | None:
        """Merge an adapter, or none, in place of the one before; return what that changed in the UNet.

        Raises:
            UserError: it does not fit, or changes nothing; or the UNet does not fit into the card's memory.
        """
        adapters, pipeline = [(adapter, self.lora_scale)] if adapter else [], self.pipeline
        self.embeds = self.base_embeds
        if adapter and any(name in adapter.weights for name in TEXT_ENCODERS):
            how = (pipeline.folders, pipeline.variant, pipeline.device, pipeline.dtype)
            tuned, _ = prompts.encode_tuned(list(self.base_embeds), *how, adapters)
            self.embeds = {text: dict(zip(EMBEDS, parts, strict=True)) for text, parts in tuned.items()}
        return pipeline.use(adapters)

    def measure(self, measured: samples.TrainingSamples) -> torch.Tensor:
        """Return the losses of samples with cached latents, (pictures, `BANDS`), fp64 on the CPU.

        Raises:
            UserError: one sample alone does not fit.
        """
        if not len(measured):
            return torch.zeros(0, BANDS, dtype=torch.float64)
        measured.prompts = self.embeds
        denoiser, device, dtype = self.pipeline.denoiser, self.pipeline.device, self.pipeline.dtype
        how = {"alphas_cumprod": self.alphas_cumprod, "prediction_type": self.scheduler.config.prediction_type}
        compute = partial(step.compute_losses, denoiser.unet, **how, snr_gamma=None, weight_dtype=dtype)
        without_encoders = {"vae": None, "tokenizers": [], "text_encoders": [], "trains_text": False}
        encode = partial(loader.encode_in_loop, device=device, **without_encoders, autocast_dtype=dtype)
        options = {"device": device, "share": (0, 1), "batch_size": self.batch_size, "every": 1}
        return ValidationLoss(measured, encode, compute, denoiser.release, **options).measure_each()

    def draw(
        self, sampler: SchedulerMixin, jobs: list[Drawn], on_pictures: Callable[[int], object], **options
    ) -> list[torch.Tensor]:
        """Return the latents (4, h, w) of pictures, on the CPU.

        Args:
            sampler: as `sdxl.make_sampler` returns it.
            jobs: what to draw.
            on_pictures: called with how many are done.
            options: of `drawing.draw`.
        """
        latents = []
        for start in range(0, len(jobs), DRAWN_TOGETHER):
            part = jobs[start : start + DRAWN_TOGETHER]
            texts = [self._embeds(one.prompt) for one in part]
            negative = None if self.negative_prompt is None else self._embeds(self.negative_prompt)
            rows = loader.collate([sdxl.conditioning(text, negative, 1) for text in texts])
            rows = {name: tensor.flatten(0, 1) for name, tensor in rows.items()}
            latents += self.pipeline.draw(sampler, rows, [one.seed for one in part], **options).cpu()
            on_pictures(len(part))
        return latents

    def _embeds(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(self.embeds[prompt][name] for name in EMBEDS)
