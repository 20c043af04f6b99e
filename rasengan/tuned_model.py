"""Write a model with adapters merged into its weights, as a pipeline folder or as one file of the original layout."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin
from safetensors import SafetensorError, safe_open

from rasengan import UserError, components, first_line, locks, merging, single_file
from rasengan.adapters import Adapter, fit_names
from rasengan.files import give_default_mode, sync, write_atomically


def save(
    place: Path,
    folders: dict[str, Path],
    variant: str | None,
    dtype: torch.dtype,
    scheduler: SchedulerMixin,
    adapters: list[tuple[Adapter, float]],
    on_merge: Callable[[str, merging.MergeReport], object] = lambda name, change: None,
) -> None:
    """Write the tuned model, one component in memory at a time.

    Args:
        place: that does not exist; one that ends in `.safetensors` becomes one file, for ComfyUI and A1111.
        folders: of the base's components, as `components.fetch` returns them.
        variant: of their weight files.
        dtype: of the UNet and the text encoders; the VAE is fp32.
        scheduler: with the prediction type of the training.
        adapters: each with the scale on its whole change.
        on_merge: called with each component that was merged, and what that changed.

    Raises:
        UserError: an adapter does not fit, or changes nothing; the place exists, or another run writes it.
    """
    tuned = partial(_tuned_component, folders, variant, dtype, scheduler, adapters, on_merge)
    with locks.only_writer(place, "--save_merged") as unfinished:
        if place.suffix == ".safetensors":
            skeletons = {name: components.skeleton(name, folders[name]) for name in single_file.COMPONENTS}
            dtypes = {name: torch.float32 if name == "vae" else dtype for name in single_file.COMPONENTS}
            how = skeletons, dtypes, lambda name: tuned(name).state_dict(), scheduler.config.prediction_type
            single_file.write_single_file(unfinished, *how)
        else:
            _save_folder(unfinished, tuned, place)


def _tuned_component(folders, variant, dtype, scheduler, adapters, on_merge, name: str):
    if name == "scheduler":
        return scheduler
    model = components.load(name, folders[name], dtype, variant)
    if any(name in adapter.weights for adapter, _ in adapters):
        model, change = merging.merge(model, adapters, name)
        on_merge(name, change)
    return model


def _save_folder(folder: Path, tuned: Callable[[str], object], place: Path) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": diffusers.__version__}
    index["force_zeros_for_empty_prompt"] = True
    for name in components.COMPONENTS:
        model = tuned(name)
        try:
            model.save_pretrained(folder / name)
            if name in components.MODELS:
                _verify(folder / name, model)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
            raise UserError(f"{place} cannot be written: {reason}. Make room, or give another place.") from error
        library = "transformers" if name in (*components.TOKENIZERS, *components.TEXT_ENCODERS) else "diffusers"
        index[name] = [library, type(model).__name__]
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2).encode())


def _verify(folder: Path, model: torch.nn.Module) -> None:
    """Compare what a component's files hold with the model bit for bit, once they are on the disk."""
    weights = fit_names(model.state_dict(), model)
    for file in folder.glob("*.safetensors"):
        give_default_mode(file)
        sync(file)
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118
                ((name, found),) = fit_names({key: content.get_tensor(key)}, model).items()
                expected = weights.pop(name, None)
                if expected is None or not torch.equal(found, expected.cpu()):
                    raise RuntimeError(
                        f"{file.name}: {key} does not read back as it was written. The disk may be damaged."
                    )
    if weights:
        raise RuntimeError(f"{folder.name}: {next(iter(weights))} was not written.")
