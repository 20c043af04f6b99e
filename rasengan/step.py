"""One training step: the loss of a micro-batch and its gradient, run eagerly or replayed as a CUDA graph."""

import logging
import traceback
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rasengan import fused, graphs, memory, nvrtc, objective
from rasengan.memory_plan import recompute_whole
from rasengan.samples import derive_seed


logger = logging.getLogger(__name__)


def seed_step(seed: int, global_step: int, rank: int) -> None:
    """Seed what is drawn inside a step (LoRA dropout) from the step itself, so that a resumed run draws the same."""
    torch.manual_seed(derive_seed("step", seed, global_step, rank))


def compute_losses(
    unet: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    snr_gamma: float | None,
    weight_dtype: torch.dtype,
    autocast: bool = False,
) -> torch.Tensor:
    """Return the loss of each sample (B,), in fp32 or, for fp64 latents, in fp64.

    Args:
        unet: with its LoRA.
        batch: `latents` and `noise` (B, 4, h, w), `timesteps` (B,), `prompt_embeds` (B, T, D),
            `pooled_prompt_embeds` (B, P), `time_ids` (B, 6).
        alphas_cumprod: (1000,), the noise scheduler's, on the same device.
        prediction_type: "epsilon" or "v_prediction".
        snr_gamma: of the min-SNR weights, or None for none.
        weight_dtype: of the frozen UNet.
        autocast: run the UNet under autocast, which PEFT's own forward needs where its LoRA is fp32 and the UNet not.
    """
    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    noisy_latents = objective.add_noise(latents, noise, timesteps, alphas_cumprod)
    target = objective.make_target(latents, noise, timesteps, alphas_cumprod, prediction_type)
    with torch.autocast(latents.device.type, weight_dtype, enabled=autocast):
        model_pred = unet(
            noisy_latents.to(weight_dtype),
            timesteps,
            batch["prompt_embeds"].to(weight_dtype),
            # Sizes over 2048 px are not exact in fp16: they stay fp32 until their sinusoidal embedding.
            added_cond_kwargs={
                "text_embeds": batch["pooled_prompt_embeds"].to(weight_dtype),
                "time_ids": batch["time_ids"],
            },
            return_dict=False,
        )[0]
    losses = F.mse_loss(model_pred.to(target.dtype), target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        losses = losses * objective.snr_weights(timesteps, alphas_cumprod, snr_gamma, prediction_type, losses.dtype)
    return losses


class UNetRun(NamedTuple):
    """How a UNet runs in a step."""

    is_fused: bool
    blocks: int  # that its backward pass can recompute
    recompute_blocks: Callable[[int], object]  # sets how many it does


def prepare_unet(
    unet: torch.nn.Module, flat: torch.nn.Parameter, lora_scale: float, weight_dtype: torch.dtype, deterministic: bool
) -> UNetRun:
    """Let a UNet run as the project's fused kernels where it can, or else as PEFT wrote it, which is warned of.

    Args:
        unet: with its LoRA, on its device, in training mode.
        flat: the parameter that holds the LoRA.
        lora_scale: alpha / rank.
        weight_dtype: of the frozen UNet.
        deterministic: equal runs are to give equal bits.
    """
    slow_because = fused.why_not(unet)
    if slow_because is None:
        nvrtc.prepare(weight_dtype, flat.device)
        fused_unet = fused.FusedUNet(unet, flat, lora_scale)
        return UNetRun(True, len(fused_unet.units()), fused_unet.recompute)
    logger.warning("The UNet runs as PEFT wrote it, more slowly: %s", slow_because)
    if deterministic:
        fused.upsample_deterministically(unet)
    return UNetRun(False, 1, partial(recompute_whole, unet))


def why_eager(device: torch.device, unet_run: UNetRun, trains_text: bool) -> str | None:
    """Say what keeps steps from being captured as CUDA graphs; None where nothing does."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if trains_text:
        return "the text encoders are trained"
    return None if unet_run.is_fused else "the UNet runs as PEFT wrote it"


class TrainingStep:
    """Forward and backward of a micro-batch; the gradient is added to the flat parameter's.

    As a CUDA graph, the thousands of kernels of a step are started by one call, which is what makes small batches
    fast: started one by one they leave the card idle most of the time. Each shape of batch has a graph of its own; all
    share one memory pool, since only one runs at a time. What runs without a graph, a warm-up too, cannot use that
    pool: where the memory does not suffice for both, all steps run without graphs from then on.
    """

    def __init__(
        self,
        compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        backward: Callable[[torch.Tensor], object],
        flat: torch.nn.Parameter,
        as_graph: bool,
    ):
        """Take what a step does.

        Args:
            compute: returns the losses (B,) of a batch.
            backward: runs the backward pass of a scalar loss, scaled where the precision needs it.
            flat: whose gradient, which exists, is added to.
            as_graph: capture it; only device work whose shapes hang on the batch's alone can be.
        """
        self.compute, self.backward, self.flat, self.as_graph = compute, backward, flat, as_graph
        self.samples = 1  # whose gradients a step of this process averages; to be set before the first call
        self.micro_batch_size = None  # of other sizes, which are rare, there are no graphs; None: of all there are
        self.graphs, self.pool = {}, None

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the losses (B,) of a micro-batch; a graph overwrites them at its next call."""
        batch = {name: tensor for name, tensor in batch.items() if torch.is_tensor(tensor)}
        if not self.as_graph:
            return self.run(batch)
        shapes = graphs.shapes_of(batch)
        if shapes in self.graphs:
            return self.graphs[shapes](batch)
        gradient = self.flat.grad.to("cpu", copy=True)  # a warm-up adds to it, and so does a step that fails half way
        try:
            if self.micro_batch_size not in (None, len(batch["timesteps"])):
                return self.run(batch)
            self.graphs[shapes] = graphs.capture(
                self.run, batch, self.pool, after_warm_up=lambda: self.flat.grad.copy_(gradient)
            )
            self.pool = self.graphs[shapes].graph.pool()
            return self.graphs[shapes](batch)
        except torch.OutOfMemoryError as error:
            if not self.graphs:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what the step computed
        logger.warning("The memory does not suffice for CUDA graphs of several shapes: steps run without them now")
        self.as_graph = False
        self.release()
        self.flat.grad.copy_(gradient)
        return self.run(batch)

    def run(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the losses (B,) of a micro-batch, without a graph."""
        losses = self.compute(batch)
        self.backward(losses.sum() / self.samples)
        return losses.detach()

    def release(self) -> None:
        """Give the graphs' memory back, to draw pictures for example; the next step captures anew."""
        self.graphs.clear()
        self.pool = None
        memory.give_back()
