"""Checkpoints: written whole under another name, then renamed, and only then are old ones removed."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from rasengan import UserError, export, first_line
from rasengan.files import give_default_mode, sync, write_atomically
from rasengan.processes import wait_for_everyone


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
EMA_FOLDER = "ema"
# What the weights and the optimizer's state mean hangs on these.
BOUND_SETTINGS = (
    "rank",
    "lora_alpha",
    "lora_target_modules",
    "train_text_encoder",
    "optimizer",
    "use_8bit_adam",
    "mixed_precision",
    "prediction_type",
    "resolution",
    "seed",
    "data_digest",
)
# A resume may change these, and then goes on as another run.
FREE_SETTINGS = (
    *("pretrained_model_name_or_path", "pretrained_unet_name_or_path", "center_crop", "random_flip"),
    *("image_interpolation_mode", "lora_dropout", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps"),
    *("lr_num_cycles", "lr_power", "lr_step_rules", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
    *("max_grad_norm", "snr_gamma", "noise_offset", "base_quantization", "use_ema", "ema_decay"),
)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the `checkpoint-N` folders, the oldest first."""
    if not output_dir.is_dir():
        return []
    named = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    found = [path for path in named if (path / STATE_FILE).is_file()]  # diffusers' own scripts leave others
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def last_name(output_dir: Path) -> str:
    """Return the name of the newest checkpoint, empty where there is none."""
    return next((path.name for path in reversed(list_checkpoints(output_dir))), "")


def find_checkpoint(output_dir: Path, name: str | None) -> Path | None:
    """Return the checkpoint to resume from; None for a fresh run, and for "latest" where there is none.

    Args:
        output_dir: the run's.
        name: "latest", or the name or path of one in `output_dir`; None for a fresh run.

    Raises:
        UserError: the named one is not there, or not whole; or a fresh run would mix its checkpoints with others.
    """
    checkpoints = list_checkpoints(output_dir)
    if name is None:
        if checkpoints:
            raise UserError(
                f"--output_dir {output_dir} holds {len(checkpoints)} checkpoints of an earlier run, up to "
                f"{checkpoints[-1].name}. Go on with it by --resume_from_checkpoint latest, or give another "
                "--output_dir."
            )
        return None
    if name == "latest":
        return checkpoints[-1] if checkpoints else None
    path = output_dir / Path(name).name
    if not (path / STATE_FILE).is_file():
        there = ", ".join(checkpoint.name for checkpoint in checkpoints) or "none"
        raise UserError(
            f"--resume_from_checkpoint {name}: there is no such checkpoint in {output_dir}; there are: {there}. "
            "Name one of these, or 'latest'."
        )
    if checkpoints and path != checkpoints[-1]:
        logger.warning(
            "%s is not the last one: %s is there too. Remove those after it, or a later 'latest' takes them",
            path,
            checkpoints[-1].name,
        )
    return path


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    global_step: int,
    models: dict[str, torch.nn.Module],
    state: dict,
    total_limit: int | None = None,
    averaged: Callable[[], AbstractContextManager] | None = None,
) -> Path:
    """Write `checkpoint-N` on all processes together, then remove the oldest over the limit, and return its path.

    It holds what accelerate saves (optimizer, gradient scaler), the adapter as `pytorch_lora_weights.safetensors`,
    its running average as the same in `ema/`, where there is one, and `trainer_state.json`.

    Args:
        accelerator: which optimizers were prepared with.
        output_dir: the run's.
        global_step: N, the optimizer steps done.
        models: the adapted components by name.
        state: JSON values that a resume needs.
        total_limit: how many to keep; None keeps all.
        averaged: puts the running average in the adapter's place for a while; None where there is none.

    Raises:
        UserError: the adapter is not finite; nothing is written or removed.
    """
    export.check_finite(models, last_name(output_dir))
    # A run that dies here leaves a folder that nothing takes for a checkpoint.
    unfinished = output_dir / f".saving-{global_step}"
    if accelerator.is_main_process:
        for left_behind in output_dir.glob(".saving-*"):
            shutil.rmtree(left_behind)
        unfinished.mkdir(parents=True)
    wait_for_everyone()
    accelerator.save_state(str(unfinished))
    wait_for_everyone()
    path = output_dir / f"checkpoint-{global_step}"
    if accelerator.is_main_process:
        export.save_diffusers(unfinished, models)
        if averaged is not None:
            with averaged():
                export.save_diffusers(unfinished / EMA_FOLDER, models)
        state = {"global_step": global_step} | state
        write_atomically(unfinished / STATE_FILE, json.dumps(state, indent=2).encode())
        for file in [path for path in unfinished.rglob("*") if path.is_file()]:
            give_default_mode(file)
            sync(file)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        others = [other for other in list_checkpoints(output_dir) if other != path]
        for old in others[: max(0, len(others) + 1 - total_limit) if total_limit else 0]:
            shutil.rmtree(old)
    wait_for_everyone()
    return path


def read_state(path: Path) -> dict:
    """Return the `trainer_state.json` of a checkpoint.

    Raises:
        UserError: it is damaged.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if not {"global_step", "samples_seen", "seed"} <= state.keys():
            raise ValueError("it does not say where the run was")
    except (AttributeError, OSError, ValueError) as error:
        raise _damaged(path / STATE_FILE, error) from error
    return state


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} is damaged: {first_line(error)}. Remove {file.parent}, and resume from the checkpoint before it."
    )


def check_resumable(path: Path, settings: dict) -> None:
    """Check that the settings that a checkpoint's weights and optimizer hang on are those it was written with.

    Other settings that have changed are warned of.

    Args:
        path: the checkpoint.
        settings: all of a run's, or only those that are known by now; None stands for one that is not known.

    Raises:
        UserError: some are not; they are listed.
    """
    state = read_state(path)
    bound = [name for name in BOUND_SETTINGS if None not in {_plain(state.get(name)), _plain(settings.get(name))}]
    changed = [_change(name, state, settings) for name in bound if _plain(state[name]) != _plain(settings[name])]
    if changed:
        raise UserError(
            f"{path} cannot be resumed with other settings: {'; '.join(changed)}. Give the former, or start afresh in "
            "another --output_dir."
        )
    free = [name for name in FREE_SETTINGS if name in state and name in settings]
    changed = [_change(name, state, settings) for name in free if state[name] != settings[name]]
    if changed:
        logger.warning("%s was written with other settings: %s", path, "; ".join(changed))


def _plain(value):
    # The order of a list of modules means nothing.
    return tuple(sorted(value)) if isinstance(value, list) else value


def _change(name: str, state: dict, settings: dict) -> str:
    if name == "data_digest":
        return "the pictures or captions are not those that it saw (some were added, removed, changed or reordered)"
    return f"--{name} was {state[name]}, and is {settings[name]}"


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    models: dict[str, torch.nn.Module],
    flat: torch.nn.Parameter,
    ema: EMAModel | None = None,
) -> None:
    """Put a checkpoint's adapter, running average, optimizer and scaler into the live ones, in place.

    Args:
        accelerator: which optimizers were prepared with.
        path: the checkpoint.
        models: the adapted components by name.
        flat: the parameter that holds their adapters.
        ema: its running average, or None. In a checkpoint that has none it begins with the adapter.

    Raises:
        UserError: an adapter in it is not of these models, or the optimizer's state is damaged.
    """
    if ema is not None:
        _load_adapter(path / EMA_FOLDER if (path / EMA_FOLDER).is_dir() else path, models)
        ema.shadow_params[0].copy_(flat.detach())
        ema.optimization_step = read_state(path)["global_step"]
    _load_adapter(path, models)
    try:
        accelerator.load_state(str(path))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch.load raises half a dozen unrelated classes for a file that was cut
        raise _damaged(path / "optimizer.bin", error) from error


@torch.no_grad()
def _load_adapter(path: Path, models: dict[str, torch.nn.Module]) -> None:
    adapter = export.read_adapter(path)
    for name, model in models.items():
        live, saved = export.adapter_weights(model), export.fit_names(adapter.weights.get(name, {}), model)
        shapes = {key: tensor.shape for key, tensor in live.items()}
        if shapes != {key: tensor.shape for key, tensor in saved.items()}:
            raise UserError(
                f"{path} holds an adapter with other modules or another rank than this run's for the {name}. Resume "
                "with the arguments of the run that wrote it."
            )
        for key, tensor in live.items():
            tensor.copy_(saved[key])
