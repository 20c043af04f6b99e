"""The losses of a tuned model beside the base's, picture by picture, and what those of a run's checkpoints show.

Losses are fp64 on the CPU, (pictures, BANDS), as `ValidationLoss` measures them: with the same noise for every model,
so that differences are taken picture by picture, and their standard error is that of such differences.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin

from rasengan import UserError, checkpoint, components, data_survey, loader, merging, prompts, samples, sdxl, step
from rasengan.adapter_reader import read_adapter
from rasengan.adapters import Adapter
from rasengan.components import TEXT_ENCODERS
from rasengan.imaging import Picture
from rasengan.pipeline import Pipeline
from rasengan.validation_loss import BANDS, ValidationLoss, named_means


KINDS = ("base", "tuned")
EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")
DRAWN_TOGETHER = 4


class Losses(NamedTuple):
    """A model's losses."""

    held_out: torch.Tensor
    trained: torch.Tensor  # of as many pictures that were trained on; of none where these are not known


class Point(NamedTuple):
    """The losses after so many optimizer steps, 0 for the base's."""

    step: int
    losses: Losses


class Drawn(NamedTuple):
    """A picture to draw."""

    prompt: str
    group: int  # of the user's seeds, that it belongs to
    seed: int  # of its noise, the same for both models


def trained_sample(pictures: list[Picture], rows: list[int], count: int, seed: int) -> list[int]:
    """Return `count` of the rows, or all if there are no more, chosen by the seed and their contents alone."""
    first = {pictures[row].digest: row for row in reversed(rows)}
    chosen = sorted(first, key=lambda digest: samples.derive_seed("trained", seed, digest))[:count]
    return sorted(first[digest] for digest in chosen)


def to_draw(texts: list[str], count: int, seeds: list[int]) -> list[Drawn]:
    """Return `count` pictures for each of the user's seeds: of some texts, evenly spread, or of each several."""
    places = [number % len(texts) for number in range(count)]
    places = data_survey.spread(len(texts), count) if count < len(texts) else places
    return [
        Drawn(texts[place], group, group * count + number) for group in seeds for number, place in enumerate(places)
    ]


def saved_adapters(run: Path, measured: int | None) -> tuple[dict[int, Path], list[str]]:
    """Return a run's adapters by step, those of its checkpoints and the best one, and why others are left out.

    Args:
        run: its output folder.
        measured: a step whose adapter is not needed.
    """
    found, notes, best = {}, [], checkpoint.best_step(run)
    if best not in (None, measured):
        try:
            read_adapter(run / checkpoint.BEST_FOLDER)
            found[best] = run / checkpoint.BEST_FOLDER
        except UserError as error:
            notes.append(f"{checkpoint.BEST_FOLDER} is left out: {error}")
    for path in checkpoint.list_checkpoints(run):
        if checkpoint.step_of(path) == measured:
            continue
        if damage := checkpoint.find_damage(path):
            notes.append(f"{path.name} is left out, since it is damaged: {damage}.")
            continue
        average = path / checkpoint.EMA_FOLDER
        found[checkpoint.step_of(path)] = average if average.is_dir() else path
    return dict(sorted(found.items())), notes


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
        """Return the losses of samples with cached latents; of none there are no losses.

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


# --- what they show ---


def change(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Return by how much the mean loss changed, as a share of what it was, and the standard error of that.

    The error is NaN of a single picture.
    """
    differences = (after - before).mean(dim=1)
    error = differences.std() / len(differences) ** 0.5 if len(differences) > 1 else torch.tensor(math.nan)
    return {name: (value / before.mean()).item() for name, value in (("change", differences.mean()), ("error", error))}


def compare(base: torch.Tensor, tuned: torch.Tensor, num_train_timesteps: int) -> dict[str, object]:
    """Return both models' mean losses, of all and of each band by the names of their plots, and the change."""
    means = {"base": named_means(base, num_train_timesteps), "tuned": named_means(tuned, num_train_timesteps)}
    return {"pictures": len(base)} | means | change(base, tuned)


def loss_figures(
    held_out: samples.TrainingSamples,
    losses: dict[str, Losses],
    points: list[Point],
    num_train_timesteps: int,
    best_step: int | None = None,
) -> dict[str, object]:
    """Return what there is to say of the losses.

    Args:
        held_out: of whose rows the losses are.
        losses: of both `KINDS`.
        points: of the base, the tuned model and the checkpoints, in any order.
        num_train_timesteps: of the schedule.
        best_step: as `curve` takes it.

    Returns:
        `held_out` and `trained`, as `compare` has them, the latter None of no pictures; `pictures`, as `each_picture`
        has them; and `curve`, None where there are no checkpoints.
    """
    found = {}
    for name in Losses._fields:
        base, tuned = (getattr(losses[kind], name) for kind in KINDS)
        found[name] = compare(base, tuned, num_train_timesteps) if len(base) else None
    found["pictures"] = each_picture(held_out, losses["base"].held_out, losses["tuned"].held_out)
    points = sorted(points, key=lambda point: point.step)
    return found | {"curve": curve(points, best_step) if len(points) > 2 else None}


def each_picture(
    measured: samples.TrainingSamples, base: torch.Tensor, tuned: torch.Tensor
) -> list[dict[str, object]]:
    """Return each picture's losses with their change, the most improved first, NaN last."""
    found = []
    for place, row in enumerate(measured.rows):
        losses = base[place].mean().item(), tuned[place].mean().item()
        about = {"row": row, "name": measured.pictures[row].name, "captions": measured.captions[row]}
        about |= {"base": losses[0], "tuned": losses[1], "change": losses[1] / losses[0] - 1}
        found.append(about | {"base_bands": base[place].tolist(), "tuned_bands": tuned[place].tolist()})
    return sorted(found, key=lambda about: (math.isnan(about["change"]), about["change"]))


def no_curve(points: list[Point]) -> str:
    """Say why so few points are no curve."""
    steps = [point.step for point in points if point.step]
    return (
        f"--checkpoints: there is no curve, since no step {f'but {steps[0]} ' if steps else ''}is left to measure. "
        "Train with more checkpoints (a larger --checkpoints_total_limit) or with --save_best."
    )


def curve(points: list[Point], best_step: int | None = None) -> dict[str, object]:
    """Return the mean losses by step, where the held-out one is lowest, and whether it rises after that.

    It rises where the last one is higher than the lowest by more than two standard errors of the pictures'
    differences, as it would by chance in one of forty, and more often where the lowest is that of many points.

    Args:
        points: by step, the base's first, two at least.
        best_step: after which training found the lowest loss of these pictures, whatever else it measured; None where
            that is not known.
    """
    means = [
        {"step": at, "held_out": _mean(losses.held_out), "trained": _mean(losses.trained)} for at, losses in points
    ]
    finite = [place for place, mean in enumerate(means) if math.isfinite(mean["held_out"])]
    if not finite:
        return {"points": means, "lowest_step": None, "rises": False, "verdict": "No loss is finite."}
    lowest, last = min(finite, key=lambda place: means[place]["held_out"]), points[-1]
    rise = change(points[lowest].losses.held_out, last.losses.held_out)
    rises = rise["change"] > 2 * rise["error"]  # not so for a NaN
    steps = [point.step for point in points]
    known, gap = best_step in steps, max(pairwise(steps), key=lambda ends: ends[1] - ends[0])
    if known or gap[1] - gap[0] <= last.step / 2:
        gap = None
    said = _verdict(points[lowest].step, last.step, rise, rises, len(last.losses.held_out), gap)
    if rises and len(last.losses.trained):
        of_trained = change(points[lowest].losses.trained, last.losses.trained)
        if of_trained["change"] > 2 * of_trained["error"]:
            said = said.rpartition(": overfitting")[0]
            said += ": the run went wrong, since the loss of pictures trained on rises too,"
            said += f" by {signed(of_trained['change'])}. Lower --learning_rate."
        else:
            said += f" Meanwhile that of pictures trained on changed by {signed(of_trained['change'])}."
    said += f" {_range(steps[1:], gap, best_step if known else None)}"
    return {"points": means, "lowest_step": points[lowest].step, "rises": rises, "verdict": said}


def _verdict(
    lowest: int, last: int, rise: dict[str, float], rises: bool, pictures: int, gap: tuple[int, int] | None
) -> str:
    if lowest == last:
        said = f"The held-out loss is lowest at the last step, {last}"
        if pictures == 1:
            return f"{said}, but of a single picture, which does not tell it from chance."
        return f"{said}, of those measured." if gap else f"{said}: no overfitting is seen."
    where = f"after step {lowest}" if lowest else "without the adapter"
    if not math.isfinite(rise["change"]):
        return f"The held-out loss is lowest {where}, and not finite after step {last}: the run diverged."
    found = f"The held-out loss is lowest {where}, and {signed(rise['change'])} from there after step {last}"
    if not rises:
        return f"{found}, which so few pictures do not tell from chance."
    if gap:
        return f"{found}: overfitting is seen."
    return f"{found}: overfitting starts {'there' if lowest else 'at once'}."


def _range(steps: list[int], gap: tuple[int, int] | None, best_step: int | None) -> str:
    several = f"{len(steps)} steps from {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    said = f"Measured were the base and {several}"
    if best_step is not None:
        return f"{said}, that of the lowest loss in training, {best_step}, among them."
    if gap is None:
        return f"{said}."
    return (
        f"{said}, but none between {gap[0]} and {gap[1]}, where the loss may be lower: more checkpoints (a larger "
        "--checkpoints_total_limit) or training with --save_best would show it."
    )


def _mean(losses: torch.Tensor) -> float:
    return losses.mean(dim=0).mean().item()  # as `named_means` has it, to the bit; NaN of none


def signed(share: float) -> str:
    """Return a change as text, in percent."""
    return f"{100 * share:+.1f} %"


def as_json(value: object) -> object:
    """Return a value with None in place of what is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
