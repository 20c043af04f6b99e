"""Write a run's checkpoints beside the training; what one holds stands in `checkpoint.py`."""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate.utils.constants import OPTIMIZER_NAME, SCALER_NAME
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.utils._pytree import tree_flatten, tree_unflatten

from rasengan import UserError, adapter_reader, adapter_writer, adapters, export
from rasengan.checkpoint import (
    BEST_FILE,
    BEST_FOLDER,
    EMA_FOLDER,
    STATE_FILE,
    find_damage,
    last_name,
    list_checkpoints,
    step_of,
)
from rasengan.files import give_default_mode, room, sync, sync_folder, write_failure
from rasengan.manifest import HashedFile, write_manifest


logger = logging.getLogger(__name__)


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
        check_held: Callable[[], object] = lambda: None,
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
            check_held: called before each write; raises where the folder is another run's by now.
        """
        self.output_dir, self.total_limit = output_dir, total_limit
        self.models, self.flat, self.ema, self.optimizer, self.scaler = models, flat, ema, optimizer, scaler
        self.check_held = check_held
        self.layout, self.buffers = export.AdapterLayout.of(models, flat), []
        self.pool, self.pending = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None

    def save(self, global_step: int, state: dict, keep_all: bool = False) -> Path:
        """Begin to write `checkpoint-N`, and return its path; the one before it is finished first.

        Args:
            global_step: N, the optimizer steps done.
            state: JSON values that a resume needs.
            keep_all: remove no older one for it; it may prove to be no good.

        Raises:
            UserError: the adapter is not finite, and nothing is written; the last write failed; or the folder is
                another run's.
        """
        self.wait()
        self.check_held()
        path = self.output_dir / f"checkpoint-{global_step}"
        if path in list_checkpoints(self.output_dir) and find_damage(path) is None:
            return path  # resumed from, or of this very step: no other is there under a number to come
        # By two numbers, for which even a full card has room.
        if not torch.isfinite(torch.stack(torch.aminmax(self.flat.detach()))).all():
            export.check_finite(self.models, last_name(self.output_dir))
        parts = {"optimizer": self.optimizer.state_dict(), "flat": self.flat}
        if self.scaler is not None:
            parts["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            parts["ema"] = self.ema.shadow_params[0]
        content = json.dumps({"global_step": global_step} | state, indent=2).encode()
        self.pending = self.pool.submit(self._write, path, self._on_host(parts), content, keep_all)
        return path

    def save_best(self, global_step: int, loss: float) -> None:
        """Begin to write the adapter, or its average where there is one, to `best/`; what is written now ends first.

        A checkpoint that is saved later, and knows of this step as the best, is thus on the disk after it.

        Args:
            global_step: the optimizer steps done.
            loss: the validation loss, the lowest so far.

        Raises:
            UserError: the last write failed, or the folder is another run's.
        """
        self.wait()
        self.check_held()
        values = self.flat if self.ema is None else self.ema.shadow_params[0]
        values = values.detach().to("cpu", copy=True)
        content = json.dumps({"step": global_step, "loss": loss}, indent=2).encode()
        self.pending = self.pool.submit(self._write_best, self.output_dir / BEST_FOLDER, values, content)

    def _write_best(self, folder: Path, values: torch.Tensor, content: bytes) -> None:
        # The adapter comes first: what best.json says of it is then never too good.
        unfinished, adapter = folder.with_name(f".saving-{folder.name}"), self.layout.adapter(values)
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            adapter_writer.write_diffusers(unfinished, adapter)
            _check_written(unfinished / adapters.DIFFUSERS_FILE, adapter)
            (unfinished / BEST_FILE).write_bytes(content)
            folder.mkdir(exist_ok=True)
            for file in (unfinished / adapters.DIFFUSERS_FILE, unfinished / BEST_FILE):
                give_default_mode(file)
                sync(file)
                file.replace(folder / file.name)
                sync_folder(folder)
            unfinished.rmdir()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(_not_written(folder, error, {"flat": values})) from error

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
            file = HashedFile(unfinished / STATE_FILE)
            file.write(state)
            digests = {STATE_FILE: file.close()}
            for name, part in ((f"{OPTIMIZER_NAME}.bin", "optimizer"), (SCALER_NAME, "scaler")):
                if part in parts:
                    file = HashedFile(unfinished / name)
                    torch.save(parts[part], file)
                    digests[name] = file.close()
            for folder, part in ((".", "flat"), (EMA_FOLDER, "ema")):
                if part in parts:
                    adapter = self.layout.adapter(parts[part])
                    adapter_writer.write_diffusers(unfinished / folder, adapter)
                    _check_written(unfinished / folder / adapters.DIFFUSERS_FILE, adapter)
            write_manifest(unfinished, digests)
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
        """Wait until the last write has ended, and keep no more than the limit: for a run that ended well.

        Raises:
            UserError: the last write failed, or the folder is another run's.
        """
        self.wait()
        if self.total_limit is None:
            return
        self.check_held()
        there = reversed(list_checkpoints(self.output_dir))
        if newest := next((path for path in there if find_damage(path) is None), None):
            self._remove_old(newest, self.total_limit)

    def _remove_old(self, path: Path, keep: int) -> None:
        others = [other for other in list_checkpoints(self.output_dir) if other != path]
        # A later one is what a resume left out as damaged: it goes first.
        others.sort(key=lambda other: (step_of(other) < step_of(path), step_of(other)))
        for old in others[: max(0, len(others) + 1 - keep)]:
            try:
                _remove(old)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", old, error.strerror)


def _check_written(file: Path, adapter: adapters.Adapter) -> None:
    if not adapter_writer.same_adapter(adapter_reader.read_adapter(file), adapter):
        raise OSError(0, "what was written of the adapter reads otherwise")


def _remove(path: Path) -> None:
    # Under another name first: half a checkpoint must not be taken for one.
    removed = path.with_name(f".removing-{path.name.split('-')[1]}")
    shutil.rmtree(removed, ignore_errors=True)  # of a removal that was not finished
    path.rename(removed)
    if removed.is_symlink():
        removed.unlink()
    shutil.rmtree(removed, ignore_errors=True)


def _not_written(path: Path, error: Exception, parts: dict) -> str:
    tensors = [value for value in tree_flatten(parts)[0] if torch.is_tensor(value)]
    needed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    last = last_name(path.parent)
    reason = write_failure(error)
    return (
        f"{path} cannot be written: {reason}. {room(path.parent, needed_bytes)}. Make room, or mend the folder, and "
        f"go on from {last or 'the start'} with --resume_from_checkpoint latest."
    )
