"""The live adapter of a training, and its publication: written in two layouts, read back and compared."""

import copy
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError

from rasengan import UserError
from rasengan.adapter_reader import read_adapter
from rasengan.adapter_writer import same_adapter, write_diffusers, write_peft_folders
from rasengan.adapters import ADAPTABLE, DIFFUSERS_FILE, Adapter
from rasengan.files import give_default_mode, room, sync, write_failure
from rasengan.naming import encoder_name


def adapter_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's weights by name; they share the memory of the live ones."""
    return get_peft_model_state_dict(model)


def live_adapter(models: dict[str, torch.nn.Module]) -> Adapter:
    """Return the adapters of some components by name, the weights by their names in diffusers' files.

    The weights share the memory of the live ones.
    """
    weights, configs = {}, {}
    for name, model in models.items():
        found = {key: tensor.detach() for key, tensor in adapter_weights(model).items()}
        weights[name] = found if name == "unet" else {encoder_name(key): tensor for key, tensor in found.items()}
        configs[name] = _config_of(model)
    return Adapter(weights, configs)


class AdapterLayout(NamedTuple):
    """Where the weights of some components' adapters lie in the flat parameter: by name, first element and shape."""

    places: dict[str, dict[str, tuple[int, torch.Size]]]
    configs: dict[str, LoraConfig]

    @classmethod
    def of(cls, models: dict[str, torch.nn.Module], flat: torch.nn.Parameter) -> "AdapterLayout":
        """Return the layout of the adapted components by name, whose adapters' weights are views of `flat`."""
        weights, configs = live_adapter(models)
        places = {
            component: {
                name: ((weight.data_ptr() - flat.data_ptr()) // flat.element_size(), weight.shape)
                for name, weight in named.items()
            }
            for component, named in weights.items()
        }
        return cls(places, configs)

    def adapter(self, values: torch.Tensor) -> Adapter:
        """Return the adapters with other values in the flat parameter's place, as views of them."""
        weights = {
            component: {name: values[start : start + shape.numel()].view(shape) for name, (start, shape) in at.items()}
            for component, at in self.places.items()
        }
        return Adapter(weights, self.configs)


def _config_of(model: torch.nn.Module) -> LoraConfig:
    config = copy.deepcopy(model.peft_config["default"])
    # A set, whose order follows the hash seed, would make equal runs write different files.
    config.target_modules = sorted(config.target_modules)
    config.inference_mode = True
    config.base_model_name_or_path = None
    return config


def check_finite(models: dict[str, torch.nn.Module], last_good: str = "") -> None:
    """Check that the adapters can be saved over good ones.

    Args:
        models: the adapted components by name.
        last_good: the name of the last checkpoint; empty where there is none.

    Raises:
        UserError: a weight is not finite.
    """
    go_on = f"resume from {last_good}, the last good checkpoint" if last_good else "start again"
    for name, model in models.items():
        if not all(torch.isfinite(weight).all() for weight in adapter_weights(model).values()):
            raise UserError(
                f"The trained {name} adapter has non-finite weights: the run diverged. Nothing was overwritten; lower "
                f"--learning_rate, and {go_on}."
            )


def publish(directory: Path, models: dict[str, torch.nn.Module], last_good: str = "") -> None:
    """Write both kinds of adapter into a folder, `pytorch_lora_weights.safetensors` and `peft/`, and verify them.

    Each file appears under its name whole, and in place of an older one. An older text encoder that is not trained now
    is removed from `peft/` at the end.

    Args:
        directory: it exists.
        models: the adapted components by name.
        last_good: the name of the last checkpoint, for the error; empty where there is none.

    Raises:
        UserError: the adapter is not finite, or the folder cannot be written.
        RuntimeError: reading back gave another adapter.
    """
    check_finite(models, last_good)
    adapter = live_adapter(models)
    try:
        _publish(directory, adapter)
    except (OSError, SafetensorError) as error:
        reason = write_failure(error)
        go_on = f"go on from {last_good} with --resume_from_checkpoint latest" if last_good else "run it again"
        weights = [tensor for named in adapter.weights.values() for tensor in named.values()]
        needed_bytes = 2 * sum(tensor.numel() * tensor.element_size() for tensor in weights)
        raise UserError(
            f"The adapter cannot be written to {directory}: {reason}. {room(directory, needed_bytes)}. Make room, and "
            f"{go_on}."
        ) from error
    for path in (directory / DIFFUSERS_FILE, directory / "peft"):
        if not same_adapter(read_adapter(path), adapter):
            raise RuntimeError(
                f"{path} does not hold the trained adapter: reading it back gave another. The disk may be full or "
                "damaged; the last checkpoint holds the weights."
            )


def _publish(directory: Path, adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory(prefix=".export-", dir=directory) as unfinished:
        write_diffusers(Path(unfinished), adapter)
        write_peft_folders(Path(unfinished) / "peft", adapter)
        for file in sorted(path for path in Path(unfinished).rglob("*") if path.is_file()):
            final = directory / file.relative_to(unfinished)
            final.parent.mkdir(parents=True, exist_ok=True)
            give_default_mode(file)
            sync(file)
            file.replace(final)
        # Of an older run: readers would take them for parts of this adapter. They go last, each at once.
        for name in ADAPTABLE[1:]:
            if name not in adapter.weights and (stale := directory / "peft" / name).is_dir():
                stale.rename(Path(unfinished) / name)
