"""Checkpoints: written whole under another name, then renamed, and only then are old ones removed."""

import json
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from rasengan import UserError, export
from rasengan.files import sync, write_atomically
from rasengan.processes import wait_for_everyone


STATE_FILE = "trainer_state.json"
# What the weights and the optimizer's state mean hangs on these.
BOUND_SETTINGS = (
    "rank",
    "lora_alpha",
    "lora_target_modules",
    "train_text_encoder",
    "use_8bit_adam",
    "mixed_precision",
    "prediction_type",
    "resolution",
    "seed",
)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the `checkpoint-N` folders, the oldest first."""
    if not output_dir.is_dir():
        return []
    named = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    found = [path for path in named if (path / STATE_FILE).is_file()]  # diffusers' own scripts leave others
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """Return the checkpoint to resume from; None for "latest" where there is none.

    Args:
        output_dir: the run's.
        name: "latest", or the name or path of one in `output_dir`.

    Raises:
        UserError: the named one is not there, or not whole.
    """
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        return checkpoints[-1] if checkpoints else None
    path = output_dir / Path(name).name
    if not (path / STATE_FILE).is_file():
        there = ", ".join(checkpoint.name for checkpoint in checkpoints) or "none"
        raise UserError(
            f"--resume_from_checkpoint {name}: there is no such checkpoint in {output_dir}; there are: {there}. "
            "Name one of these, or 'latest'."
        )
    return path


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    global_step: int,
    models: dict[str, torch.nn.Module],
    state: dict,
    total_limit: int | None = None,
) -> Path:
    """Write `checkpoint-N` on all processes together, then remove the oldest over the limit, and return its path.

    It holds what accelerate saves (optimizer, gradient scaler), the adapter as `pytorch_lora_weights.safetensors`,
    and `trainer_state.json`.

    Args:
        accelerator: which optimizers were prepared with.
        output_dir: the run's.
        global_step: N, the optimizer steps done.
        models: the adapted components by name.
        state: JSON values that a resume needs.
        total_limit: how many to keep; None keeps all.
    """
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
        state = {"global_step": global_step} | state
        write_atomically(unfinished / STATE_FILE, json.dumps(state, indent=2).encode())
        for file in unfinished.iterdir():
            sync(file)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        others = [other for other in list_checkpoints(output_dir) if other != path]
        for old in others[: max(0, len(others) + 1 - total_limit) if total_limit else 0]:
            shutil.rmtree(old)
    wait_for_everyone()
    return path


def read_state(path: Path) -> dict:
    """Return the `trainer_state.json` of a checkpoint."""
    return json.loads((path / STATE_FILE).read_text())


def check_resumable(path: Path, settings: dict) -> None:
    """Check that the settings that a checkpoint's weights and optimizer hang on are those it was written with.

    Raises:
        UserError: some are not; they are listed.
    """
    state = read_state(path)
    changed = [
        f"--{name} was {state[name]}, and is {settings[name]}"
        for name in BOUND_SETTINGS
        if name in state and state[name] != settings[name]
    ]
    if changed:
        raise UserError(
            f"{path} cannot be resumed with other settings: {'; '.join(changed)}. Give the former, or start afresh in "
            "another --output_dir."
        )


@torch.no_grad()
def load_checkpoint(accelerator: Accelerator, path: Path, models: dict[str, torch.nn.Module]) -> None:
    """Put a checkpoint's adapter, optimizer and scaler into the live ones, in place.

    Raises:
        UserError: the adapter in it is not of these models.
    """
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
    accelerator.load_state(str(path))
