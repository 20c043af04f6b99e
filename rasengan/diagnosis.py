"""Why a run's numbers stopped being finite: which step, samples and module, and what mends it."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from rasengan import UserError
from rasengan.imaging import PictureChanged


# In fp16 the gradient scaler may have to halve its scale this often before the first step that counts.
MOST_SKIPPED = 25
SKIPPED = ("skipped_steps", "skipped_in_a_row")  # what a checkpoint keeps of the steps without a finite gradient


@torch.no_grad()
def first_non_finite_module(model: torch.nn.Module, run: Callable[[], object]) -> str | None:
    """Return the name of the first module whose output is not finite while something runs the model; None for none.

    The model runs in evaluation mode, so that its modules run as they were written.
    """
    found, handles = [], []

    def look(name):
        def hook(_module, _inputs, output):
            tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(t)]
            if not found and not all(torch.isfinite(tensor).all() for tensor in tensors):
                found.append(name)

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(look(name or type(model).__name__)))
    was_training = model.training
    model.eval()
    try:
        run()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.no_grad()
def check_not_ruined(
    compute_loss: Callable[[], torch.Tensor], without_adapter: Callable[[], AbstractContextManager], output_dir: Path
) -> None:
    """Check that the adapter, as it is after the last update, has a loss where the base alone has one.

    What cannot be computed, since memory or a picture is missing, is not looked at.

    Args:
        compute_loss: of a sample of the training, encoded anew, with the models in evaluation mode.
        without_adapter: within which they run as the base.
        output_dir: of the run, for the message.

    Raises:
        UserError: it has none.
    """
    try:
        tuned = compute_loss().mean().item()
        if math.isfinite(tuned):
            return
        with without_adapter():
            base = compute_loss().mean().item()
    except (torch.OutOfMemoryError, PictureChanged):
        return
    refuse_ruined(tuned, base, output_dir)


def refuse_ruined(tuned: float, base: float, output_dir: Path) -> None:
    """Raise where the loss of a trained model is no number, and the base's is one.

    Raises:
        UserError: so it is.
    """
    if math.isfinite(base) and not math.isfinite(tuned):
        raise UserError(
            f"After the last step the loss is {tuned} with the adapter, and {base:.4f} without it: the adapter is "
            f"ruined, and is not written over what {output_dir} holds. Lower --learning_rate, and start anew or "
            "resume from an older checkpoint."
        )


def explain(
    unet: torch.nn.Module,
    flat: torch.nn.Parameter,
    batch: dict,
    names: list[str],
    compute_losses: Callable[[dict], torch.Tensor],
    weight_dtype: torch.dtype,
    global_step: int,
    in_a_row: int,
    last_good: str,
) -> str:
    """Return the error for a run that stands still, because its loss or gradient is not finite any more.

    Args:
        unet: with its LoRA.
        flat: the trained parameter.
        batch: the last one, on the device.
        names: of the files of this process's last step, of which the batch may be a part.
        compute_losses: of a batch, with the UNet in evaluation mode.
        weight_dtype: of the frozen UNet.
        global_step: optimizer steps done.
        in_a_row: how many of the last steps were skipped.
        last_good: name of the last checkpoint; empty for none.
    """
    precision = " or --mixed_precision no (bf16 on newer cards)" if weight_dtype == torch.float16 else ""
    tensors = {name: tensor for name, tensor in batch.items() if torch.is_tensor(tensor)}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not torch.isfinite(flat).all():
        cause = "the run diverged: lower --learning_rate, or give the default --adam_epsilon if that was changed"
        where = "the LoRA's weights are not finite"
    elif damaged := next((n for n, weight in unet.named_parameters() if not torch.isfinite(weight).all()), None):
        where, cause = f"the UNet's {damaged} is not finite", "the base is damaged: fetch it again"
    elif "noise" in broken:
        where, cause = "the noise is not finite", "--noise_offset is too great: lower it"
    elif "latents" in broken:
        where, cause = "the latents are not finite", "the VAE is damaged: give another by its flag"
    elif broken:
        where = f"{broken[0]} is not finite"
        cause = f"the text encoders overflow or are damaged: give others by their flags{precision}"
    elif module := first_non_finite_module(unet, lambda: compute_losses(tensors)):
        where = f"{module} is the first of the UNet's modules whose output is not finite"
        cause = f"it overflows: lower --learning_rate{precision}"
    else:
        where = "the forward pass is finite, and its gradient is not"
        cause = f"the gradient overflows: lower --learning_rate{precision}"
    files = ", ".join(map(str, names))
    go_on = f"go on from {last_good}, the last good checkpoint" if last_good else "start again"
    return (
        f"{in_a_row} steps in a row had no finite gradient, up to step {global_step} with {files}, and were skipped; "
        f"{where}. Likely {cause}, and {go_on}."
    )
