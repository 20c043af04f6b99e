"""Draw pairs of a base and a tuned picture, request after request, from one model that stays in memory."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from PIL import Image

from rasengan import UserError, cache, components, drawing, memory, merging, sdxl
from rasengan.adapters import Adapter
from rasengan.pipeline import Pipeline, SwitchableWeights
from rasengan.sources import TEXT_ENCODERS, TOKENIZERS


REMEMBERED = 8  # base pictures
MOST_STEPS, MOST_SCALE, MOST_GUIDANCE, MOST_SEED, MOST_CHARACTERS = 150, 2.0, 30.0, 2**32 - 1, 4000
SIDES = range(64, 2048 + 1, 8)  # in px

Adapters = list[tuple[Adapter, float]]
T = TypeVar("T")


class Settings(NamedTuple):
    """What both pictures of a pair are drawn with, by the names of infer.py's flags."""

    prompt: str
    negative_prompt: str | None
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    scheduler: str | None


class Pair(NamedTuple):
    """A base and a tuned picture, and what the merge changed in each component."""

    base: Image.Image
    tuned: Image.Image
    changes: dict[str, merging.MergeReport]


def check_settings(settings: Settings, lora_scale: float) -> None:
    """Check values that come from outside.

    Raises:
        UserError: one is none that can be drawn with.
    """
    for name in ("prompt", "negative_prompt", "scheduler"):
        if not isinstance(getattr(settings, name), str | None):
            raise UserError(f"The {_words(name)} is {getattr(settings, name)!r:.80}. Give a text.")
    if not (settings.prompt or "").strip():
        raise UserError("The prompt is empty. Say what to draw.")
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(settings, name) or "")
        if length > MOST_CHARACTERS:
            raise UserError(f"The {_words(name)} has {length} characters. Give {MOST_CHARACTERS} at most.")
    bounds = {
        "seed": (int, 0, MOST_SEED),
        "num_inference_steps": (int, 1, MOST_STEPS),
        "guidance_scale": (int | float, 0, MOST_GUIDANCE),
        "height": (int, SIDES[0], SIDES[-1]),
        "width": (int, SIDES[0], SIDES[-1]),
        "lora_scale": (int | float, 0, MOST_SCALE),
    }
    for name, (kind, least, most) in bounds.items():
        value = lora_scale if name == "lora_scale" else getattr(settings, name)
        if not isinstance(value, kind) or not least <= value <= most:  # as NaN is not
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"The {_words(name)} is {value!r}. Give {what} from {least:g} to {most:.10g}.")
    for name in ("height", "width"):
        if getattr(settings, name) not in SIDES:
            raise UserError(f"The {name} is {getattr(settings, name)} px. Give a multiple of 8.")
    if settings.scheduler is not None and settings.scheduler not in sdxl.SAMPLERS:
        raise UserError(f"There is no sampler {settings.scheduler!r}. Choose one of {', '.join(sdxl.SAMPLERS)}.")
    if settings.negative_prompt is not None and settings.guidance_scale <= 1:
        raise UserError(
            f"A negative prompt does nothing at a guidance scale of {settings.guidance_scale:g}. Empty it, or give "
            "more than 1."
        )


def _words(name: str) -> str:
    return name.replace("num_inference_steps", "number of steps").replace("_", " ").replace("lora", "LoRA")


class PairDrawer:
    """An SDXL that stays in memory with its text encoders, and draws one pair after another.

    The text encoders stay beside the UNet where they fit, else on the CPU. Requests of several threads take turns.
    """

    def __init__(self, pipeline: Pipeline, prediction_type: str | None = None):
        """Take the pipeline to draw with, and the training's prediction type where the base has another.

        No model is loaded before it is needed.

        Raises:
            UserError: there is no target for the base's prediction type.
        """
        self.pipeline = pipeline
        self.scheduler = components.load_scheduler(pipeline.folders["scheduler"], prediction_type)
        self.tokenizers = [components.load(name, pipeline.folders[name]) for name in TOKENIZERS]
        self.text_encoders = {}  # the weights of each, by its name
        self.bases = OrderedDict()  # the last pictures of the base, by their settings
        self.lock = threading.Lock()

    @property
    def side(self) -> int:
        """The side in px that the base was made for."""
        return 8 * (components.read_config("unet", self.pipeline.folders["unet"]).get("sample_size") or 128)

    @property
    def most_steps(self) -> int:
        """The most denoising steps that can be taken."""
        return min(MOST_STEPS, drawing.most_steps(self.scheduler))

    def warnings(self, settings: Settings) -> list[str]:
        """Return a sentence for each text that SDXL's text encoders will not see to its end."""
        sentences = []
        for name in ("prompt", "negative_prompt"):
            text = getattr(settings, name) or ""
            length = max(sdxl.count_tokens(text, tokenizer) for tokenizer in self.tokenizers)
            most = self.tokenizers[0].model_max_length
            if length > most:
                sentences.append(f"Only the first {most} of the {length} tokens of the {_words(name)} are used.")
        return sentences

    def draw(
        self,
        settings: Settings,
        adapter: Adapter,
        lora_scale: float,
        on_step: Callable[[str, int], object] = lambda picture, step: None,
    ) -> Pair:
        """Return a pair; a base picture that was drawn lately is not drawn again.

        At scale 0 both are the base's. The pictures are those of infer.py with the same settings.

        Args:
            settings: of both pictures.
            adapter: of the tuned one.
            lora_scale: of the adapter, as `merging.merge` takes it.
            on_step: called with "tuned" or "base" and the number of denoising steps of it that are done, from 0.

        Raises:
            UserError: a setting cannot be drawn with, the adapter does not fit or changes nothing, a picture is not
                finite, or something does not fit into the card's memory. Another pair can be drawn after each.
        """
        check_settings(settings, lora_scale)
        if settings.num_inference_steps > self.most_steps:
            raise UserError(
                f"The number of steps is {settings.num_inference_steps}. This base takes {self.most_steps} at most."
            )
        with self.lock, torch.no_grad():
            # The tuned one first: an adapter that does not fit is refused before anything is drawn.
            latents, changes = {}, {}
            if lora_scale:
                changes, latents["tuned"] = self._denoise(settings, [(adapter, lora_scale)], partial(on_step, "tuned"))
            if settings not in self.bases:
                latents["base"] = self._denoise(settings, [], partial(on_step, "base"))[1]
            pictures = {name: self._decode(part) for name, part in latents.items()}
            if "base" in pictures:
                self.bases[settings] = pictures["base"]
            self.bases.move_to_end(settings)
            while len(self.bases) > REMEMBERED:
                self.bases.popitem(last=False)
            base = self.bases[settings]
            return Pair(base, pictures.get("tuned", base), changes)

    def _denoise(
        self, settings: Settings, adapters: Adapters, on_step: Callable[[int], object]
    ) -> tuple[dict[str, merging.MergeReport], torch.Tensor]:
        """Return what merging the adapters changed, and the latents (1, 4, h, w), on the CPU."""
        on_step(0)
        if not self.text_encoders:
            self._with_room(self._load_text_encoders)
        changes = {}
        for name, weights in self.text_encoders.items():
            merge = partial(weights.merge, [pair for pair in adapters if name in pair[0].weights])
            changes[name] = self._with_room(merge)
        changes["unet"] = self._with_room(partial(self.pipeline.use, adapters))
        text = components.negative_prompt(settings.negative_prompt, self.pipeline.folders)
        negative = None if text is None else self._encode(text)
        prompts = sdxl.conditioning(self._encode(settings.prompt), negative, 1)
        scheduler = sdxl.make_sampler(self.scheduler, settings.scheduler)
        names = ("height", "width", "num_inference_steps", "guidance_scale")
        options = {name: getattr(settings, name) for name in names}

        def draw() -> torch.Tensor:
            steps = itertools.count(1)
            return self.pipeline.draw(
                scheduler, prompts, [settings.seed], on_step=lambda: on_step(next(steps)), **options
            )

        latents = self._with_room(draw).cpu()
        return {name: change for name, change in changes.items() if change is not None}, latents

    def _encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings (T, D) and the pooled ones (P,) of a text, by the encoders as they are merged now."""
        models = [weights.model for weights in self.text_encoders.values()]
        rows = self._with_room(partial(cache.encode_captions, [text], self.tokenizers, models))
        return rows["prompt_embeds"][0], rows["pooled_prompt_embeds"][0]

    def _decode(self, latents: torch.Tensor) -> Image.Image:
        """Return the picture of latents (1, 4, h, w); the text encoders make room for it before the UNet does."""
        try:
            return self._with_room(partial(self.pipeline.decode, latents, can_drop_unet=False))[0]
        except memory.DoesNotFit:
            pass
        return self.pipeline.decode(latents)[0]

    # --- memory ---

    def _load_text_encoders(self) -> None:
        pipeline = self.pipeline
        _, models = components.load_text_encoders(pipeline.folders, pipeline.variant, pipeline.device, pipeline.dtype)
        named = zip(TEXT_ENCODERS, models, strict=True)
        self.text_encoders = {name: SwitchableWeights(model, name) for name, model in named}

    def _with_room(self, call: Callable[[], T]) -> T:
        """Return what a call returns; where the card has no room for it, the text encoders first go to the CPU.

        Raises:
            DoesNotFit: there is no room even so.
        """
        try:
            return _refused_memory(call)
        except memory.DoesNotFit:
            models = [weights.model for weights in self.text_encoders.values()]
            if not any(model.device.type == "cuda" for model in models):
                raise
        # Outside of the clause above, whose error keeps what was loaded in part.
        for model in models:
            model.to("cpu")
        memory.give_back()
        return _refused_memory(call)


def _refused_memory(call: Callable[[], T]) -> T:
    try:
        return call()
    except torch.OutOfMemoryError as error:
        raise memory.DoesNotFit(
            "This takes more memory than the card has left. Give a smaller picture, or free some of the card's memory."
        ) from error
