"""An SDXL that draws with one adapter after another: one model in memory, base and tuned drawn from it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from PIL import Image

from rasengan import components, decoding, drawing, fitting, fused, lora, memory, merging, nvrtc, sdxl
from rasengan.adapters import Adapter


T = TypeVar("T")

VAE_GIB = 0.32  # its weights


class SwitchableWeights:
    """A model's weights with one set of adapters merged into them after another, each into those of the base."""

    def __init__(self, model: torch.nn.Module, component: str):
        self.model, self.component, self.base = model, component, {}

    @torch.no_grad()
    def merge(self, adapters: list[tuple[Adapter, float]], is_last: bool = False) -> merging.MergeReport | None:
        """Merge adapters, each with the scale on its change, in place of those before; none gives the base.

        The weights that change are kept on the host, unless this `is_last`, after which the base is lost. All weights
        stay where they are on the card, so that a CUDA graph that reads them sees the new ones.
        """
        for name, weight in self.base.items():
            self.model.get_submodule(name).weight.copy_(weight)
        if not adapters:
            return None
        if not is_last:
            for adapter, _ in adapters:
                of = adapter.weights[self.component], adapter.configs[self.component]
                for name in fitting.check_adapter(*of, self.model, self.component):
                    if name not in self.base:
                        self.base[name] = self.model.get_submodule(name).weight.detach().to("cpu", copy=True)
        return merging.merge(self.model, adapters, self.component)[1]


class Pipeline:
    """A UNet and a VAE, each brought to the device when it is first needed."""

    def __init__(self, folders: dict[str, Path], variant: str | None, device: torch.device, dtype: torch.dtype):
        """Take where the components are.

        Args:
            folders: of each component, as `sources.fetch` returns them.
            variant: of the weight files.
            device: to draw on.
            dtype: of the UNet; the VAE is fp32.
        """
        self.folders, self.variant, self.device, self.dtype = folders, variant, device, dtype
        self.weights = self.denoiser = self.vae = None
        # The adapters that are merged, or will be when the UNet comes back; None once a merge has failed.
        self.used, self.change = [], None
        self.most_at_once = None  # pictures, once more were found not to fit
        for each in (dtype, torch.float32):  # the UNet's and the VAE's
            nvrtc.begin_to_compile(each, device)

    # --- the UNet ---

    def use(self, adapters: list[tuple[Adapter, float]], is_last: bool = False) -> merging.MergeReport | None:
        """Merge those of the adapters that change the UNet into it, as `SwitchableWeights.merge` does.

        Raises:
            UserError: one does not fit, or changes nothing; or the UNet does not fit into the card's memory.
        """
        adapters = [(adapter, scale) for adapter, scale in adapters if "unet" in adapter.weights and scale]
        if self.denoiser is None:
            self._load_unet()
        elif self.used is not None and _keys(adapters) == _keys(self.used):
            return self.change  # they are merged already
        self.used = None
        self.change = self.weights.merge(adapters, is_last)
        self.used = adapters
        return self.change

    def _load_unet(self) -> None:
        unet, fused_unet = components.load("unet", self.folders["unet"], self.dtype, self.variant), None
        try:
            if self.device.type == "cuda" and fused.why_not(unet) is None:
                lora.stack_weights(unet, self.device)
                fused_unet = fused.FusedUNet(unet.to(self.device))
            unet.to(self.device)
        except torch.OutOfMemoryError as error:
            raise memory.DoesNotFit(
                "The UNet does not fit into what this card, or --vram_budget_gib, leaves. Free or allow more."
            ) from error
        self.denoiser = drawing.Denoiser(unet, self.device.type == "cuda", fused_unet)
        self.weights = SwitchableWeights(unet, "unet")

    def drop_unet(self) -> None:
        """Give the UNet's memory back; the next `use` or `draw` loads it anew."""
        self.weights = self.denoiser = None
        memory.give_back()

    def draw(
        self, scheduler: SchedulerMixin, prompts: dict[str, torch.Tensor], seeds: list[int], **options
    ) -> torch.Tensor:
        """Return the latents of one picture for each seed, as `drawing.draw` does, in as large batches as fit.

        Raises:
            UserError: not even one picture fits into the card's memory.
        """
        if self.denoiser is None:  # a decode took its place
            self.use(self.used or [])
        drawn = []
        while len(drawn) < len(seeds):
            part = slice(len(drawn), len(drawn) + (self.most_at_once or len(seeds)))
            rows = {name: tensor[part] for name, tensor in prompts.items()}
            had_graphs = bool(self.denoiser.graphs)  # whose memory nothing else can use
            latents = _within_memory(partial(drawing.draw, self.denoiser, scheduler, rows, seeds[part], **options))
            if latents is not None:
                drawn += latents
                continue
            self.denoiser.release()
            if had_graphs:
                continue
            if len(seeds[part]) == 1:
                raise memory.DoesNotFit(
                    "One picture takes more memory than this card, or --vram_budget_gib, leaves. Give a smaller "
                    "--height and --width."
                )
            self.most_at_once = len(seeds[part]) // 2
        return torch.stack(drawn)

    # --- the VAE ---

    def load_vae(self) -> AutoencoderKL:
        """Return the VAE, on the device."""
        if self.vae is None:
            vae = components.load("vae", self.folders["vae"], variant=self.variant).to(self.device)
            # Without TF32, convolutions are not known to be faster in channels_last.
            if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0):
                decoding.use_channels_last(vae)
            self.vae = vae
        return self.vae

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of a picture's latents, for `drawing.draw` to begin with.

        Args:
            pixels: (1, 3, H, W), as `drawing.read_picture` returns them.
        """
        vae = self.load_vae()
        with torch.no_grad():
            moments = sdxl.encode_pictures(vae, pixels)
        memory.give_back()
        return tuple(part * vae.config.scaling_factor for part in moments)

    def decode_fits(self, height: int, width: int, budget_gib: float) -> bool:
        """Say whether a decode fits into a budget beside the UNet and what drawing with it has taken so far."""
        if self.device.type != "cuda":
            return True
        memory.give_back()
        taken_gib = torch.cuda.memory_reserved(self.device) / memory.GIB + (VAE_GIB if self.vae is None else 0)
        return taken_gib + decoding.decode_gib(height, width) <= budget_gib

    def decode(self, latents: torch.Tensor, can_drop_unet: bool = True) -> list[Image.Image]:
        """Return the pictures of latents (B, 4, h, w); where they do not fit, the UNet leaves the device first.

        Raises:
            UserError: a picture is not finite, or a decode does not fit.
        """
        decode = partial(_within_memory, lambda: drawing.decode(self.load_vae(), latents))
        pictures = decode()
        if pictures is None and can_drop_unet:
            self.drop_unet()
            pictures = decode()
        if pictures is None:
            raise memory.DoesNotFit(
                "A picture cannot be decoded in what this card, or --vram_budget_gib, leaves. Give a smaller "
                "--height and --width."
            )
        return pictures


def _keys(adapters: list[tuple[Adapter, float]]) -> list[tuple[int, float]]:
    return [(id(adapter), scale) for adapter, scale in adapters]


def _within_memory(call: Callable[[], T]) -> T | None:
    """Return what a call returns, or None where the card's memory did not suffice.

    What the caller does then, it does when the error, and with it what the call had computed, is gone.
    """
    try:
        return call()
    except torch.OutOfMemoryError:
        return None
