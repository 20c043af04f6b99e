"""Checkpoints: written whole under another name, verified, renamed, and only then are old ones removed.

A `checkpoint-N` holds

    optimizer.bin, scaler.pt              as accelerate's `save_state` writes them
    pytorch_lora_weights.safetensors      the adapter; in ema/ its running average, where there is one
    trainer_state.json                    where the run was, and its settings
    manifest.json                         the size and digest of each of these
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import OPTIMIZER_NAME, SCALER_NAME
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.utils._pytree import tree_flatten, tree_unflatten

from rasengan import UserError, export, first_line
from rasengan.files import give_default_mode, sync, sync_folder, write_atomically


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
MANIFEST_FILE = "manifest.json"
EMA_FOLDER = "ema"
# What the weights and the optimizer's state mean hangs on these.
BOUND_SETTINGS = {
    *("rank", "lora_alpha", "lora_target_modules", "train_text_encoder", "optimizer", "use_8bit_adam"),
    *("mixed_precision", "prediction_type", "resolution", "seed", "data_digest"),
}
# What is trained does not hang on these: where things are, how long and how a run is split, what it shows and keeps.
FREE_SETTINGS = {
    *("output_dir", "logging_dir", "cache_dir", "conditioning_cache_dir", "config", "local_rank", "plan_only"),
    *("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "caption_column", "max_train_samples"),
    *(
        "skip_bad_images",
        "total_steps",
        "max_train_steps",
        "num_train_epochs",
        "max_train_minutes",
        "train_batch_size",
    ),
    *("gradient_accumulation_steps", "dataloader_num_workers", "gradient_checkpointing", "vram_budget_gib"),
    *("cuda_graph", "validation_prompt", "num_validation_images", "validation_epochs", "validation_inference_steps"),
    *("checkpointing_steps", "checkpointing_minutes", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("resume_with_changes", "logging_steps", "report_to", "debug_loss", "push_to_hub", "hub_token", "hub_model_id"),
}
RUN_LENGTH = ("total_steps",)
CONSTANT_SCHEDULES = {"constant", "constant_with_warmup", "piecewise_constant"}


# --- finding ---


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the `checkpoint-N` folders that this program wrote, whole or not, the oldest first."""
    marks = (STATE_FILE, MANIFEST_FILE)  # diffusers' own scripts leave others
    return [path for path in _numbered(output_dir) if any((path / name).is_file() for name in marks)]


def _numbered(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def last_name(output_dir: Path, before: int | None = None) -> str:
    """Return the name of the newest checkpoint, or of the newest before a step; empty where there is none."""
    found = [path for path in list_checkpoints(output_dir) if before is None or _step_of(path) < before]
    return found[-1].name if found else ""


def find_damage(path: Path) -> str | None:
    """Say what a checkpoint lacks of what its manifest says, after reading all of it; None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        listed = {name: (int(size), str(digest)) for name, (size, digest) in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (AttributeError, OSError, OverflowError, TypeError, ValueError):  # the third of a size beyond all numbers
        return f"{MANIFEST_FILE} is damaged"
    # Its names are compared with what is there before one is opened: a stranger's may lead anywhere.
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST_FILE}
    needed = listed.keys() | {STATE_FILE, f"{OPTIMIZER_NAME}.bin", export.DIFFUSERS_FILE}
    if missing := sorted(needed - there):
        return f"{missing[0]} is missing"
    if strange := sorted(there - listed.keys()):
        return f"{strange[0]} is not in {MANIFEST_FILE}"
    for name, (size, digest) in listed.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if _digest(path / name) != digest:
                return f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
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
    foreign = [path.name for path in _numbered(output_dir) if path not in checkpoints]
    if foreign:
        raise UserError(
            f"--output_dir {output_dir} holds {foreign[0]}, which another program wrote, and which this run might "
            "overwrite. Move it, or give another --output_dir."
        )
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
    return UserError(f"{path} is damaged: {reason}. Remove it, and resume from the checkpoint before it.")


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# --- writing ---


class CheckpointWriter:
    """Writes a run's checkpoints, one after the other, in a thread of its own.

    The loop waits only while its state is copied to the host. A write that fails is told at the next call.

    The checkpoint before the newest one stays until the next is written, over the limit: that a loss after the newest
    was finite is known only then.
    """

    def __init__(
        self,
        output_dir: Path,
        total_limit: int | None,
        *,
        models: dict[str, torch.nn.Module],
        flat: torch.nn.Parameter,
        ema: EMAModel | None,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ):
        """Take what is saved, and where.

        Args:
            output_dir: the run's.
            total_limit: how many checkpoints to keep there; None keeps all.
            models: the adapted components by name, whose adapters are views of the flat parameter.
            flat: the parameter.
            ema: its running average, or None.
            optimizer: of the flat parameter.
            scaler: of the gradients, or None.
        """
        self.output_dir, self.total_limit = output_dir, total_limit
        self.models, self.flat, self.ema, self.optimizer, self.scaler = models, flat, ema, optimizer, scaler
        self.layout, self.buffers = export.AdapterLayout.of(models, flat), []
        self.pool, self.pending = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None

    def save(self, global_step: int, state: dict, keep_all: bool = False) -> Path:
        """Begin to write `checkpoint-N`, and return its path; the one before it is finished first.

        Args:
            global_step: N, the optimizer steps done.
            state: JSON values that a resume needs.
            keep_all: remove no older one for it; it may prove to be no good.

        Raises:
            UserError: the adapter is not finite, and nothing is written; or the last write failed.
        """
        self.wait()
        path = self.output_dir / f"checkpoint-{global_step}"
        if path in list_checkpoints(self.output_dir) and find_damage(path) is None:
            return path  # the one that was resumed from: no other is there under a number to come
        if not torch.isfinite(self.flat).all():
            export.check_finite(self.models, last_name(self.output_dir))
        parts = {"optimizer": self.optimizer.state_dict(), "flat": self.flat}
        if self.scaler is not None:
            parts["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            parts["ema"] = self.ema.shadow_params[0]
        content = json.dumps({"global_step": global_step} | state, indent=2).encode()
        self.pending = self.pool.submit(self._write, path, self._on_host(parts), content, keep_all)
        return path

    def _on_host(self, parts: dict) -> dict:
        """Return a copy of some state on the host, of this moment; those of the card go into buffers that are kept."""
        tensors, shape = tree_flatten(parts)
        on_card = [value for value in tensors if torch.is_tensor(value) and value.is_cuda]
        if [(b.shape, b.dtype) for b in self.buffers] != [(t.shape, t.dtype) for t in on_card]:
            # Pinned memory takes a copy at the bus's full speed, and long to get.
            self.buffers = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in on_card]
        free = iter(self.buffers)
        copies = []
        for value in tensors:
            if torch.is_tensor(value):
                value = (
                    next(free).copy_(value.detach(), non_blocking=True) if value.is_cuda else value.detach().clone()
                )
            copies.append(value)
        if on_card:
            torch.cuda.synchronize()
        return tree_unflatten(copies, shape)

    def check(self) -> None:
        """Raise what kept the last write from ending well, if it has ended."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last write has ended.

        Raises:
            UserError: it failed.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait until the last write has ended, and tell of it if it failed: for a run that ends by another error."""
        try:
            self.wait()
        except UserError as error:
            logger.error("%s", error)
        self.pool.shutdown()

    def _write(self, path: Path, parts: dict, state: bytes, keep_all: bool) -> None:
        # A run that dies here leaves a folder that nothing takes for a checkpoint.
        unfinished = path.with_name(f".saving-{path.name.split('-')[1]}")
        try:
            for left_behind in [*path.parent.glob(".saving-*"), *path.parent.glob(".removing-*")]:
                shutil.rmtree(left_behind, ignore_errors=True)
            unfinished.mkdir()  # not its parents: where a mount went, they would be another disk's
            for name, part in ((f"{OPTIMIZER_NAME}.bin", "optimizer"), (SCALER_NAME, "scaler")):
                if part in parts:
                    content = io.BytesIO()
                    torch.save(parts[part], content)
                    (unfinished / name).write_bytes(content.getbuffer())
            for folder, part in ((".", "flat"), (EMA_FOLDER, "ema")):
                if part in parts:
                    export.write_diffusers(unfinished / folder, self.layout.adapter(parts[part]))
            (unfinished / STATE_FILE).write_bytes(state)
            write_manifest(unfinished)
            if damage := find_damage(unfinished):
                raise OSError(0, f"what was written reads otherwise: {damage}")
            if path.exists():
                _remove(path)
            unfinished.rename(path)
            sync_folder(path.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(_not_written(path, error, parts)) from error
        if self.total_limit is not None and not keep_all:
            self._remove_old(path, self.total_limit + 1)

    def finish(self) -> None:
        """Wait until the last write has ended, and keep no more than the limit: for a run that ended well."""
        self.wait()
        there = list_checkpoints(self.output_dir)
        if there and self.total_limit is not None:
            self._remove_old(there[-1], self.total_limit)

    def _remove_old(self, path: Path, keep: int) -> None:
        others = [other for other in list_checkpoints(self.output_dir) if other != path]
        # A later one is what a resume left out as damaged: it goes first.
        others.sort(key=lambda other: (_step_of(other) < _step_of(path), _step_of(other)))
        for old in others[: max(0, len(others) + 1 - keep)]:
            try:
                _remove(old)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", old, error.strerror)


def write_manifest(folder: Path) -> None:
    """Write the size and digest of each file into `manifest.json`, with all of them on the disk before it."""
    manifest = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        give_default_mode(file)
        manifest[str(file.relative_to(folder))] = [file.stat().st_size, _digest(file)]
        sync(file)
        _forget_content(file)
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_folder(inner)
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=2).encode())


def _forget_content(file: Path) -> None:
    # So that reading it back reads the disk, not the kernel's memory of what was written.
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as content:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _remove(path: Path) -> None:
    # Under another name first: half a checkpoint must not be taken for one.
    removed = path.with_name(f".removing-{path.name.split('-')[1]}")
    shutil.rmtree(removed, ignore_errors=True)  # of a removal that was not finished
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _not_written(path: Path, error: Exception, parts: dict) -> str:
    tensors = [value for value in tree_flatten(parts)[0] if torch.is_tensor(value)]
    needed_mib = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1024**2
    try:
        there = f"{shutil.disk_usage(path.parent).free / 1024**2:,.0f} MiB are free there"
    except OSError:
        there = f"{path.parent} cannot be looked at"
    last = last_name(path.parent)
    reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
    return (
        f"{path} cannot be written: {reason}. It takes {needed_mib:,.0f} MiB, and {there}. Make room, or mend the "
        f"folder, and go on from {last or 'the start'} with --resume_from_checkpoint latest."
    )


# --- reading ---


def read_state(path: Path) -> dict:
    """Return the `trainer_state.json` of a checkpoint.

    Raises:
        UserError: it is damaged.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if not all(isinstance(state.get(name), int) for name in ("global_step", "samples_seen", "seed")):
            raise ValueError("it does not say where the run was")
    except (AttributeError, OSError, ValueError) as error:
        raise _damaged(path, f"{STATE_FILE}: {first_line(error)}") from error
    return state


def check_resumable(path: Path, settings: dict, allow_changes: bool = False) -> None:
    """Check that a checkpoint is gone on with by the settings that it was written with, but for `FREE_SETTINGS`.

    Args:
        path: the checkpoint.
        settings: all of a run's, or only those that are known by now; None stands for one that is not known.
        allow_changes: warn of changed settings, but for `BOUND_SETTINGS`.

    Raises:
        UserError: some have changed; they are listed.
    """
    state = read_state(path)
    names = [name for name in settings if name in state and name not in FREE_SETTINGS]
    unknown = {n for n in names if n in BOUND_SETTINGS and None in (state[n], settings[n])}
    changed = [n for n in names if n not in unknown and _plain(state[n]) != _plain(settings[n])]
    bound = "; ".join(_change(name, state, settings) for name in changed if name in BOUND_SETTINGS)
    if bound:
        raise UserError(
            f"{path} cannot be resumed with other settings: {bound}. Give the former, or start afresh in another "
            "--output_dir."
        )
    others = "; ".join(_change(name, state, settings) for name in changed)
    if others and not allow_changes:
        raise UserError(
            f"{path} was written with other settings: {others}. Give the former, or --resume_with_changes to go on "
            "as another run would."
        )
    if others:
        logger.warning("%s was written with other settings: %s", path, others)
    length = [n for n in RUN_LENGTH if n in state and settings.get(n) is not None and state[n] != settings[n]]
    if length and settings.get("lr_scheduler", "constant") not in CONSTANT_SCHEDULES:
        listed = "; ".join(_change(name, state, settings) for name in length)
        logger.warning("%s: --lr_scheduler %s goes on over the new length", listed, settings["lr_scheduler"])


def _plain(value):
    # The order of a list of modules means nothing.
    return sorted(value, key=str) if isinstance(value, list) else value


def _change(name: str, state: dict, settings: dict) -> str:
    if name == "data_digest":
        return "the pictures or captions are not those that it saw (some were added, removed, changed or reordered)"
    if name == "global_batch":
        return (
            f"a step took {state[name]} samples, and takes {settings[name]} (--train_batch_size x "
            "--gradient_accumulation_steps x processes)"
        )
    if name == "total_steps":
        return f"the run was to have {state[name]} steps, and is to have {settings[name]}"
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
        accelerator.load_state(str(path))  # weights only: nothing that it unpickles can run
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch.load raises half a dozen unrelated classes for what it does not know
        raise _damaged(path, f"{OPTIMIZER_NAME}.bin: {first_line(error)}") from error


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
