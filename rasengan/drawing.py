"""Draw pictures: the loop of denoising steps, from noise or from a picture, and the UNet's share of it.

Shapes: B pictures, T tokens, h and w the latents' size, an eighth of the picture's.
"""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps, UnidentifiedImageError

from rasengan import UserError, decoding, first_line, graphs, imaging, memory, sdxl


MOST_GRAPHS = 4  # of batches and sizes; they share their memory


class Denoiser:
    """A UNet's predictions for one prompt after another, eagerly or by replaying a CUDA graph of its forward."""

    def __init__(self, unet: UNet2DConditionModel, as_graph: bool = False, fused_unet=None):
        """Take what draws.

        Args:
            unet: on the device to draw on, in evaluation mode.
            as_graph: capture its forward; needs a CUDA device.
            fused_unet: the `fused.FusedUNet` of a UNet without a LoRA, which then computes but once for each prompt
                what all steps share.
        """
        self.unet, self.as_graph, self.fused_unet = unet, as_graph, fused_unet
        self.graphs, self.pool, self.condition, self.text_shape = {}, None, None, None

    def set_condition(self, prompts: dict[str, torch.Tensor], height: int, width: int, guided: bool) -> None:
        """Take the embeddings of a batch, as `sdxl.conditioning` returns them, and the size of its pictures in px.

        With `guided` each prediction is made twice, without and with the prompt, in one batch.
        """
        texts, pooled = prompts["prompt_embeds"], prompts["pooled_prompt_embeds"]
        if guided:
            texts = torch.cat([prompts["negative_prompt_embeds"], texts])
            pooled = torch.cat([prompts["negative_pooled_prompt_embeds"], pooled])
        time_ids = torch.tensor([sdxl.compute_time_ids((height, width), (0, 0), (height, width))] * len(texts))
        device, dtype = self.unet.device, self.unet.dtype
        condition = {
            "encoder_hidden_states": texts.to(device, dtype),
            "text_embeds": pooled.to(device, dtype),
            # Sizes over 2048 px are not exact in fp16: they stay fp32 until their sinusoidal embedding.
            "time_ids": time_ids.to(device, torch.float32),
        }
        self.text_shape = texts.shape
        if self.fused_unet is not None:
            self.fused_unet.hold_condition(**condition)
            condition = {}
        self.condition = condition

    def __call__(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        """Return the prediction for a sample (B, 4, h, w) at a timestep; a graph overwrites it at its next call."""
        timesteps = torch.full((len(sample),), timestep, dtype=torch.float32, device=sample.device)
        inputs = self.condition | {"sample": sample.to(self.unet.dtype), "timestep": timesteps}
        if not self.as_graph:
            return self._predict(inputs)
        shapes = (self.text_shape, *graphs.shapes_of(inputs))
        if shapes not in self.graphs:
            if len(self.graphs) == MOST_GRAPHS:
                self._drop_graphs()
            self.graphs[shapes] = graphs.capture(self._predict, inputs, self.pool)
            self.pool = self.graphs[shapes].graph.pool()
        return self.graphs[shapes](inputs)

    def _predict(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        text = inputs.get("encoder_hidden_states")  # None: what the condition says is held
        added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
        return self.unet(inputs["sample"], inputs["timestep"], text, added_cond_kwargs=added, return_dict=False)[0]

    def _drop_graphs(self) -> None:
        self.graphs.clear()
        self.pool = None
        memory.give_back()

    def release(self) -> None:
        """Give the memory of graphs and condition back; the next prediction needs a condition, and captures anew."""
        self._drop_graphs()
        self.condition = None
        if self.fused_unet is not None:
            self.fused_unet.forget_conditions()
            memory.give_back()


def most_steps(scheduler: SchedulerMixin) -> int:
    """Return the most denoising steps that a scheduler has timesteps for."""
    # Of a latent consistency model's, those that it was distilled for; others made from it keep the setting unused.
    name = "original_inference_steps"
    takes = name in inspect.signature(type(scheduler).__init__).parameters
    return scheduler.config[name] if takes else scheduler.config.num_train_timesteps


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Check that a scheduler has a timestep for each step.

    Raises:
        UserError: it has fewer.
    """
    timesteps = most_steps(scheduler)
    if num_inference_steps > timesteps:
        raise UserError(
            f"--num_inference_steps is {num_inference_steps}, but the scheduler has {timesteps} timesteps. "
            "Give fewer; 30 is usual."
        )


def timesteps_of(scheduler: SchedulerMixin, num_inference_steps: int, strength: float | None) -> torch.Tensor:
    """Set a sampler's steps, and return the timesteps of those that are done, the last ones where a picture is given.

    Args:
        scheduler: the sampler.
        num_inference_steps: that a picture from noise takes.
        strength: the share that is done from a picture on; None for noise.
    """
    scheduler.set_timesteps(num_inference_steps)  # on the CPU: indexing by one on the card would wait for it
    done = num_inference_steps if strength is None else int(num_inference_steps * strength)
    if not done:  # PNDM has a timestep more than steps
        return scheduler.timesteps[:0]
    return scheduler.timesteps[(num_inference_steps - done) * scheduler.order :]


class LinearSampler:
    """The steps of a sampler that is linear, by numbers that are known before the first.

    UniPC solves a small system on the card in each step, and the host waits for it: that takes half as long again as a
    step at 512 px. Each of its results is a sum of what it began with and the predictions so far, so the sampler
    itself is asked for the factors: it runs once on the host, with a place for each of them in place of pixels.
    """

    def __init__(self, sampler: SchedulerMixin, timesteps: torch.Tensor, start: torch.Tensor):
        """Take a sampler whose steps are set, the timesteps to be done, and what they begin with (B, 4, h, w)."""
        sampler, places = copy.deepcopy(sampler), torch.eye(len(timesteps) + 1)[:, None, :, None, None]
        sample, factors = places[0], []
        for place, timestep in zip(places[1:], timesteps, strict=True):
            sample = sampler.step(place, timestep, sample, return_dict=False)[0]
            factors.append(sample.flatten())
        self.factors = torch.stack(factors or [places[0].flatten()]).to(start.device)[..., None, None, None, None]
        self.seen = start.new_empty(len(timesteps) + 1, *start.shape)
        self.seen[0] = start
        self.done = 0

    def scale_model_input(self, sample: torch.Tensor, _timestep: torch.Tensor) -> torch.Tensor:
        """Return what the UNet is asked about: the sample."""
        return sample

    def step(self, prediction: torch.Tensor, _timestep: torch.Tensor, _sample: torch.Tensor, **_options) -> tuple:
        """Return the next sample; in a sum of products rather than a product of matrices, which TF32 would round."""
        self.done += 1
        self.seen[self.done] = prediction
        known = slice(0, self.done + 1)
        return ((self.factors[self.done - 1, known] * self.seen[known]).sum(0),)


@torch.no_grad()
def draw(
    denoiser: Denoiser,
    scheduler: SchedulerMixin,
    prompts: dict[str, torch.Tensor],
    seeds: list[int],
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    init: tuple[torch.Tensor, torch.Tensor] | None = None,
    strength: float = 1.0,
    on_step: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Return the latents (B, 4, h, w), fp32 on the UNet's device, of one picture for each seed, for `decode_latents`.

    A picture's noise comes from its own CPU generator, in fp32: it is the same on every device and in every batch.
    The steps are those of diffusers' pipelines, but that latents and guidance are fp32 whatever the UNet's dtype, and
    that the loop does not wait for the card, but where a sampler brings the noise of each step to it, as euler_a does.

    Args:
        denoiser: of the UNet, in this precision.
        scheduler: a sampler, as `sdxl.make_sampler` returns it.
        prompts: what `sdxl.conditioning` returned, a row for each seed.
        seeds: one for each picture.
        height: in px, a multiple of 8.
        width: in px, a multiple of 8.
        num_inference_steps: denoising steps.
        guidance_scale: 1 or less draws without classifier-free guidance.
        init: mean and standard deviation (1, 4, h, w) of a picture to begin with, as `sdxl.encode_pictures` gives
            them, times the VAE's scaling factor; None begins with noise.
        strength: the share of the steps that are done from `init` on, 0 to 1.
        on_step: called after each denoising step.
    """
    device, guided = denoiser.unet.device, guidance_scale > 1
    denoiser.set_condition(prompts, height, width, guided)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    timesteps = timesteps_of(scheduler, num_inference_steps, None if init is None else strength)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
    shape = (len(seeds), 4, height // 8, width // 8)
    if init is not None:
        mean, std = (part.to(device) for part in init)
        start = mean + std * randn_tensor(shape, generators, device, torch.float32)
    latents = randn_tensor(shape, generators, device, torch.float32)
    if init is None:
        latents = latents * scheduler.init_noise_sigma
    elif len(timesteps):
        latents = scheduler.add_noise(start, latents, timesteps[:1].repeat(len(seeds)))
    else:
        latents = start
    if isinstance(scheduler, UniPCMultistepScheduler) and not scheduler.config.thresholding:
        scheduler = LinearSampler(scheduler, timesteps, latents)
    # TCD's own eta is another than the pipelines'.
    options, known = {"generator": generators, "eta": 0.0}, inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in options.items() if name in known}
    for timestep in timesteps:
        sample = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        # A copy, since samplers keep predictions, and a graph overwrites its own.
        prediction = denoiser(sample, float(timestep)).to(torch.float32, copy=True)
        if guided:
            without, with_prompt = prediction.chunk(2)
            prediction = without + guidance_scale * (with_prompt - without)
        latents = scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
        on_step()
    return latents


def read_picture(file: str, height: int | None, width: int | None, side: int) -> torch.Tensor:
    """Return the pixels (1, 3, H, W), fp32 in [-1, 1], of a picture to begin with.

    Args:
        file: the picture's.
        height: in px; None, for both, keeps the picture's shape at the area of a square of `side` px. Otherwise it is
            cropped to the size that was asked for.
        width: likewise; None for one of them takes `side`.
        side: in px.

    Raises:
        UserError: there is no such picture, or it is broken.
    """
    try:
        image = imaging.decode(Path(file).read_bytes())
    except Exception as error:  # Pillow's plugins raise what they like
        reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
        if isinstance(error, UnidentifiedImageError):  # whose message names the bytes
            reason = "it is no picture of a known format"
        raise UserError(f"--init_image {file} cannot be read: {reason}. Give a picture.") from error
    if height is None and width is None:
        scale = side / (image.width * image.height) ** 0.5
        height, width = (max(8, round(length * scale / 8) * 8) for length in (image.height, image.width))
    image = ImageOps.fit(image, (width or side, height or side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Return the pictures of latents (B, 4, h, w).

    Raises:
        UserError: a picture came out with non-finite values.
    """
    pixels = decoding.decode_latents(vae, latents.to(vae.device))
    if not torch.isfinite(pixels).all():
        raise UserError(
            "A picture came out with non-finite values: the UNet or the adapter overflows in this precision. "
            "Use --mixed_precision no, or a smaller --lora_scale."
        )
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in levels]
