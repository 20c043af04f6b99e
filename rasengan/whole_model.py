"""Write a whole model as a pipeline folder or as one file of the original layout, adapters merged into it or not."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import SchedulerMixin
from safetensors import safe_open

from rasengan import UserError, components, locks, merging, single_file, tensor_files
from rasengan.adapters import Adapter, fit_names
from rasengan.files import give_default_mode, sync, write_atomically, writing
from rasengan.safetensors_header import DTYPES
from rasengan.sources import COMPONENTS, TEXT_ENCODERS, TOKENIZERS, component_files


# Empty tensors of a single file, as ComfyUI reads them, and what a scheduler's configuration says in their place.
MARKERS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
KEPT_DTYPES = {name: DTYPES[name] for name in ("F32", "F16", "BF16")}


class Opened(NamedTuple):
    """A whole model that can be written in another layout, one component at a time."""

    component: Callable[[str], object]  # loads one of `COMPONENTS`
    dtypes: dict[str, torch.dtype]  # of each model that it loads
    left_out: tuple[str, ...] = ()  # tensors of a single file that no SDXL of this configuration has


def save(place: Path, folders: dict[str, Path], opened: Opened, flag: str) -> None:
    """Write a whole model, one component in memory at a time, and compare what was written bit for bit.

    Args:
        place: that does not exist; one that ends in `.safetensors` becomes one file, for ComfyUI and A1111.
        folders: of each component, whose configuration gives the shapes.
        opened: the model.
        flag: that named the place.

    Raises:
        UserError: the place exists, another run writes it, or it cannot be written.
    """
    with locks.only_writer(place, flag) as unfinished:
        if place.suffix == ".safetensors":
            skeletons = {name: components.skeleton(name, folders[name]) for name in single_file.COMPONENTS}
            settings = opened.component("scheduler").config
            markers = [marker for marker, (name, value) in MARKERS.items() if settings.get(name) == value]
            how = skeletons, opened.dtypes, lambda name: opened.component(name).state_dict(), markers
            single_file.write_single_file(unfinished, *how)
        else:
            _save_folder(unfinished, opened.component, place, components.forces_zeros(folders))


def save_tuned(
    place: Path,
    folders: dict[str, Path],
    variant: str | None,
    dtype: torch.dtype,
    scheduler: SchedulerMixin,
    adapters: list[tuple[Adapter, float]],
    on_merge: Callable[[str, merging.MergeReport], object] = lambda name, change: None,
) -> None:
    """Write a base with adapters merged into its weights, as `save` does.

    Args:
        place: as in `save`.
        folders: of the base's components, as `sources.fetch` returns them.
        variant: of their weight files.
        dtype: of the UNet and the text encoders; the VAE is fp32.
        scheduler: with the prediction type of the training.
        adapters: each with its scale, as `merging.merge` takes them.
        on_merge: called with each component that was merged, and what that changed.

    Raises:
        UserError: an adapter does not fit, or changes nothing; or as `save` does.
    """
    tuned = partial(_tuned_component, folders, variant, dtype, scheduler, adapters, on_merge)
    save(place, folders, Opened(tuned, _dtypes(dtype)), "--save_merged")


def _tuned_component(folders, variant, dtype, scheduler, adapters, on_merge, name: str):
    if name == "scheduler":
        return scheduler
    model = components.load(name, folders[name], dtype, variant)
    if any(name in adapter.weights for adapter, _ in adapters):
        model, change = merging.merge(model, adapters, name)
        on_merge(name, change)
    return model


def open_folders(folders: dict[str, Path], variant: str | None, dtype: torch.dtype | None) -> Opened:
    """Open a model whose components are in folders of their own.

    Args:
        folders: as `sources.fetch` returns them.
        variant: of their weight files.
        dtype: of the UNet and the text encoders; None keeps each one's. The VAE is fp32.

    Raises:
        UserError: weights are stored in a dtype that is not to be kept.
    """
    dtypes = _dtypes(dtype)
    for name in dtypes:
        files = component_files(name, folders[name], variant)
        stored = [tensor_files.stored(file) for file in files if file.suffix == ".safetensors"]
        tensor_files.check_plain(folders[name], [key for part in stored for key in part])
        if dtype is not None:
            continue
        # Not of what older versions of transformers saved besides, such as position_ids, which are whole numbers.
        known = {key.removeprefix("text_model.") for key in components.skeleton(name, folders[name]).state_dict()}
        found = {
            kind for part in stored for key, (kind, _) in part.items() if key.removeprefix("text_model.") in known
        }
        dtypes[name] = _widest(folders[name], name, found)

    def component(name: str):
        model = components.load(name, folders[name], dtypes.get(name, torch.float32), variant)
        return model if dtype is None or name not in components.MODELS else _finite(model, name, dtype)

    return Opened(component, dtypes)


def open_file(file: Path, folders: dict[str, Path], dtype: torch.dtype | None) -> Opened:
    """Open a model that is one file of the original layout.

    Args:
        file: the model's.
        folders: of a model of the same architecture, for what such a file does not hold: configurations, tokenizers
            and the scheduler; with `weights=False` is enough.
        dtype: as in `open_folders`.

    Raises:
        UserError: the file is damaged, lacks tensors, or holds them in other shapes or in a dtype not to be kept.
    """
    stored, dtypes, known = tensor_files.stored(file), _dtypes(dtype), set(MARKERS)
    tensor_files.check_plain(file, stored)
    for name in single_file.COMPONENTS:
        expected = single_file.original_weights(name, components.skeleton(name, folders[name]).state_dict())
        wrong = [key for key, tensor in expected.items() if key not in stored or stored[key][1] != tensor.shape]
        if wrong:
            raise UserError(
                f"{file} lacks {len(wrong)} of the {len(expected)} tensors of SDXL's {name}, or has them in other "
                f"shapes, such as {wrong[0]}. Give an SDXL in the original checkpoint's layout, and the --base whose "
                "architecture it has."
            )
        if dtype is None:
            dtypes[name] = _widest(file, name, {stored[key][0] for key in expected})
        known |= expected.keys()

    def component(name: str):
        if name == "scheduler":
            scheduler = components.load(name, folders[name])
            changes = dict(setting for marker, setting in MARKERS.items() if marker in stored)
            return scheduler.from_config(scheduler.config, **changes)
        if name not in components.MODELS:
            return components.load(name, folders[name])
        model = components.skeleton(name, folders[name])
        weights = {}
        for key, tensor in model.state_dict().items():
            found = single_file.read_tensor(file, name, key.removeprefix("text_model."), tensor.shape)
            # A copy, since safetensors writes no views of one tensor.
            weights[key] = found.to(dtypes[name], copy=True, memory_format=torch.contiguous_format)
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False)
        return model if dtype is None else _finite(model, name, dtype)

    return Opened(component, dtypes, tuple(sorted(stored.keys() - known)))


def _finite(model: torch.nn.Module, component: str, dtype: torch.dtype) -> torch.nn.Module:
    wrong = next((name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()), None)
    if wrong:
        raise UserError(
            f"The {component}'s {wrong} is not finite in {str(dtype).removeprefix('torch.')}. Give another --dtype, "
            "fp32 say; if it is so there too, the model is damaged."
        )
    return model


def _dtypes(dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    return {name: torch.float32 if name == "vae" else dtype for name in single_file.COMPONENTS}


def _widest(place: Path, component: str, stored: set[str]) -> torch.dtype:
    """Return the least dtype that holds what is stored; the VAE's is fp32."""
    dtypes = {torch.float32} if component == "vae" else {KEPT_DTYPES.get(name) for name in stored}
    if None in dtypes:
        unknown = sorted(stored - KEPT_DTYPES.keys())
        raise UserError(f"{place}: the {component} is stored in {', '.join(unknown)}. Give a --dtype.")
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _save_folder(folder: Path, tuned: Callable[[str], object], place: Path, forces_zeros: bool) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": diffusers.__version__}
    index["force_zeros_for_empty_prompt"] = forces_zeros
    for name in COMPONENTS:
        model = tuned(name)
        with writing(place, "Make room, or give another place."):
            model.save_pretrained(folder / name)
            if name in components.MODELS:
                _verify(folder / name, model)
        library = "transformers" if name in (*TOKENIZERS, *TEXT_ENCODERS) else "diffusers"
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
                is_equal = expected is not None and (found.dtype, found.shape) == (expected.dtype, expected.shape)
                if not (is_equal and torch.equal(*(single_file.as_bytes(t, found.dtype) for t in (found, expected)))):
                    raise RuntimeError(
                        f"{file.name}: {key} does not read back as it was written. The disk may be damaged."
                    )
    if weights:
        raise RuntimeError(f"{folder.name}: {next(iter(weights))} was not written.")
