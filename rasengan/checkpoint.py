"""Checkpoints: written whole under another name, verified, renamed, and only then are old ones removed.

A `checkpoint-N` holds

    optimizer.bin, scaler.pt              as accelerate's `save_state` writes them
    pytorch_lora_weights.safetensors      the adapter; in ema/ its running average, where there is one
    trainer_state.json                    where the run was, and its settings
    manifest.json                         the size and digest of each of these

Beside them `best/` may hold the adapter of the lowest validation loss, and in `best.json` its step and loss.
"""

import json
import logging
import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import OPTIMIZER_NAME
from diffusers.training_utils import EMAModel

from rasengan import UserError, adapter_reader, adapters, export, first_line
from rasengan.diagnosis import SKIPPED
from rasengan.files import read_json_or_empty
from rasengan.manifest import MANIFEST_FILE, digest_of


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
EMA_FOLDER = "ema"
BEST_FOLDER, BEST_FILE = "best", "best.json"
# What nothing here opens: hidden files and folders, which a look by macOS's Finder or by Jupyter leaves, those of
# Windows and of Drive's program, and the copies that Drive makes.
BYSTANDER = re.compile(r"\..*|desktop\.ini|Thumbs\.db|.* \(\d+\)(\.\w+)?")
# PyTorch saves what a user chose together with the state; the learning rate, also saved, is set at every step.
OPTIMIZER_OPTIONS = ("betas", "weight_decay", "eps")
# Likewise, where the optimizer has them: how it computes, which hangs on the device.
OPTIMIZER_OPTIONS += ("fused", "foreach", "capturable")

# --- finding ---


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the `checkpoint-N` folders that this program wrote, whole or not, the oldest first."""
    marks = (STATE_FILE, MANIFEST_FILE)  # diffusers' own scripts leave others
    return [path for path in _numbered(output_dir) if any((path / name).is_file() for name in marks)]


def _numbered(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the optimizer steps of a `checkpoint-N`, from its name."""
    return int(path.name.split("-")[1])


def best_step(output_dir: Path) -> int | None:
    """Return after how many steps the adapter in `best/` was written; None where there is none, or nothing says so."""
    step = read_json_or_empty(output_dir / BEST_FOLDER / BEST_FILE).get("step")
    return step if type(step) is int and step > 0 else None


def last_name(output_dir: Path, before: int | None = None) -> str:
    """Return the name of the newest checkpoint, or of the newest before a step; empty where there is none."""
    found = [path for path in list_checkpoints(output_dir) if before is None or step_of(path) < before]
    return found[-1].name if found else ""


def find_damage(path: Path) -> str | None:
    """Say what a checkpoint lacks of what its manifest says, after reading all of it; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        listed = {name: (int(size), str(digest)) for name, (size, digest) in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    # OverflowError of a size beyond all numbers, RecursionError of brackets in brackets
    except (AttributeError, OSError, OverflowError, RecursionError, TypeError, ValueError):
        return f"{MANIFEST_FILE} is damaged"
    # Its names are compared with what is there before one is opened: a stranger's may lead anywhere.
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    there = {str(file) for file in files if not any(map(BYSTANDER.fullmatch, file.parts))} - {MANIFEST_FILE}
    needed = listed.keys() | {STATE_FILE, f"{OPTIMIZER_NAME}.bin", adapters.DIFFUSERS_FILE}
    if missing := sorted(needed - there):
        return f"{missing[0]} is missing"
    if strange := sorted(there - listed.keys()):
        return f"{strange[0]} is not in {MANIFEST_FILE}"
    for name, (size, digest) in listed.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if digest_of(path / name) != digest:
                return f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    try:
        step = read_state(path)["global_step"]
    except UserError:
        return f"{STATE_FILE} is damaged"
    if NAME.fullmatch(path.name) and step != step_of(path):  # it has another while it is written
        return f"{STATE_FILE} says that it is of step {step}"
    return None


def find_checkpoint(output_dir: Path, name: str | None) -> Path | None:
    """Return the checkpoint to resume from; None for a fresh run, and for "latest" where there is none.

    Args:
        output_dir: the run's.
        name: "latest", which is the newest that is whole; or the name or path of one in `output_dir`; None for a
            fresh run.

    Raises:
        UserError: the named one, or every one, is not there or not whole; or the run would mix its checkpoints with
            others.
    """
    checkpoints = list_checkpoints(output_dir)
    others = [path for path in _numbered(output_dir) if path not in checkpoints]
    empty = [path for path in others if path.is_dir() and not any(path.iterdir())]
    if foreign := [path.name for path in others if path not in empty]:
        raise UserError(
            f"--output_dir {output_dir} holds {foreign[0]}, which has neither {STATE_FILE} nor {MANIFEST_FILE}: "
            "another program wrote it, or it lost them, and this run might overwrite it. Move it, or give another "
            "--output_dir."
        )
    for path in empty:
        logger.warning("%s is left out, since it is empty", path)
    if name is None:
        if checkpoints:
            raise UserError(
                f"--output_dir {output_dir} holds {len(checkpoints)} checkpoints of an earlier run, up to "
                f"{checkpoints[-1].name}. Go on with it by --resume_from_checkpoint latest, or give another "
                "--output_dir."
            )
        return None
    if name == "latest":
        for path in reversed(checkpoints):
            damage = find_damage(path)
            if damage is None:
                return path
            logger.warning("%s is left out, since it is damaged: %s", path, damage)
        if checkpoints:
            raise UserError(
                f"Every checkpoint in {output_dir} is damaged ({', '.join(path.name for path in checkpoints)}). "
                "Remove them, or give another --output_dir, to start afresh."
            )
        return None
    path = output_dir / Path(name).name
    if path not in checkpoints or (len(Path(name).parts) > 1 and Path(name).resolve() != path.resolve()):
        there = ", ".join(checkpoint.name for checkpoint in checkpoints) or "none"
        raise UserError(
            f"--resume_from_checkpoint {name}: there is no such checkpoint in {output_dir}; there are: {there}. "
            "Name one of these, or 'latest'."
        )
    if damage := find_damage(path):
        raise _damaged(path, damage)
    if path != checkpoints[-1]:
        raise UserError(
            f"{path} is not the last one: {checkpoints[-1].name} is there too, and would mix with what comes now. "
            f"Move what is later than {path.name}, or give another --output_dir that holds a copy of it."
        )
    return path


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged: {reason}. Remove it, and resume from the one before it, or else begin anew.")


# --- reading ---


def is_record(losses: object) -> bool:
    """Say whether something can be a record of validation losses: the best one finite and with its step.

    The base's and the last one may be of a model that overflows, or of a run that went wrong.
    """
    if not isinstance(losses, dict) or losses.keys() != {"base", "last", "best", "best_step"}:
        return False
    best, step = losses["best"], losses["best_step"]
    is_best = (best is step is None) or (is_loss(best) and type(step) is int and step >= 0)
    return is_best and all(
        value is None or is_loss(value) or (type(value) is float and not math.isfinite(value))
        for value in (losses["base"], losses["last"])
    )


def is_loss(value: object) -> bool:
    """Say whether something can be a finite loss."""
    return type(value) in {int, float} and 0 < value <= sys.float_info.max  # which NaN is not either


def read_state(path: Path) -> dict:
    """Return the `trainer_state.json` of a checkpoint.

    Raises:
        UserError: it is damaged.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        for name, end in (("global_step", math.inf), ("samples_seen", math.inf), ("seed", 2**32)):
            value = state.get(name)
            if type(value) is not int or not 0 <= value < end:  # true and false are integers too
                raise ValueError(f"it does not say where the run was: {name} is {value!r}"[:200])
        losses = state.get("validation_losses")
        if losses is not None and not is_record(losses):
            raise ValueError(f"validation_losses is {losses!r}"[:200])
        plan = state.get("memory_plan")
        if plan is not None and not (len(plan) == 3 and all(type(number) is int for number in plan) and plan[0] > 0):
            raise ValueError(f"memory_plan is {plan!r}"[:200])
        for name in SKIPPED:
            if type(state.get(name, 0)) is not int:
                raise ValueError(f"{name} is {state[name]!r}"[:200])
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
        raise _damaged(path, f"{STATE_FILE}: {first_line(error)}") from error
    return state


def load_checkpoint(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    path: Path,
    models: dict[str, torch.nn.Module],
    flat: torch.nn.Parameter,
    ema: EMAModel | None = None,
    check_state: Callable[[], object] = lambda: None,
) -> None:
    """Put a checkpoint's adapter, running average, optimizer's state and scaler into the live ones, in place.

    Args:
        accelerator: which prepared the optimizer.
        optimizer: it takes its state from the checkpoint, but keeps its own `OPTIMIZER_OPTIONS`.
        path: the checkpoint.
        models: the adapted components by name.
        flat: the parameter that holds their adapters.
        ema: its running average, or None. In a checkpoint that has none it begins with the adapter.
        check_state: called once the optimizer's state is loaded; raises where that is none of its own.

    Raises:
        UserError: an adapter in it is not of these models, or the optimizer's state is damaged.
    """
    if ema is not None:
        _load_adapter(path / EMA_FOLDER if (path / EMA_FOLDER).is_dir() else path, models)
        ema.shadow_params[0].copy_(flat.detach())
        ema.optimization_step = read_state(path)["global_step"]
    _load_adapter(path, models)
    options = [{name: group[name] for name in OPTIMIZER_OPTIONS if name in group} for group in optimizer.param_groups]
    try:
        accelerator.load_state(str(path))  # weights only: nothing that it unpickles can run
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
        check_state()
    except torch.OutOfMemoryError:
        raise
    except pickle.UnpicklingError as error:  # whose text advises to load it all the same
        reason = "it holds more than numbers and tensors, or is cut off, and was not read"
        raise _damaged(path, f"{OPTIMIZER_NAME}.bin: {reason}") from error
    except Exception as error:  # torch.load raises half a dozen unrelated classes for what it does not know
        raise _damaged(path, f"{OPTIMIZER_NAME}.bin: {first_line(error)}") from error
    if not torch.isfinite(flat).all():
        raise _damaged(path, "its adapter is not finite")


@torch.no_grad()
def _load_adapter(path: Path, models: dict[str, torch.nn.Module]) -> None:
    adapter = adapter_reader.read_adapter(path)
    for name, model in models.items():
        live, saved = export.adapter_weights(model), adapters.fit_names(adapter.weights.get(name, {}), model)
        shapes = {key: tensor.shape for key, tensor in live.items()}
        if shapes != {key: tensor.shape for key, tensor in saved.items()}:
            raise UserError(
                f"{path} holds an adapter with other modules or another rank than this run's for the {name}. Resume "
                "with the arguments of the run that wrote it."
            )
        for key, tensor in live.items():
            tensor.copy_(saved[key])
