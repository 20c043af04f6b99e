"""A run that ends between two checkpoints: the steps that it has done are saved first, and how to go on is said."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from rasengan import UserError, loader, processes
from rasengan.checkpoint import last_name
from rasengan.checkpoint_writer import CheckpointWriter
from rasengan.imaging import PictureChanged
from rasengan.memory_plan import Plan, Planner
from rasengan.progress import Progress


class Rescue:
    """Saves the steps that are done where a run is to end, or where an error ends it."""

    def __init__(
        self,
        accelerator: Accelerator,
        writer: CheckpointWriter,
        progress: Progress,
        state: dict,
        release: Callable[[], object],
        planner: Planner | None,
        plan: Plan,
    ):
        """Take what is saved, and how.

        Args:
            accelerator: whose main process saves, and whose trackers are given the steps that were not read yet.
            writer: of the checkpoints.
            progress: of the steps.
            state: what every checkpoint says of the run, as JSON values.
            release: gives the memory back that a step keeps.
            planner: of the run's steps; None on a CPU, of whose memory PyTorch says nothing.
            plan: theirs.
        """
        self.accelerator, self.writer, self.progress, self.state = accelerator, writer, progress, state
        self.release, self.planner, self.plan = release, planner, plan

    def save(self, **changes) -> str:
        """Save the steps that are done, and return the name of the last checkpoint; empty for none.

        Args:
            changes: of what the checkpoint says of the run.
        """
        if self.progress.unread:
            self.progress.log(self.accelerator)
        if self.accelerator.is_main_process and not self.progress.is_stuck():
            self.writer.save(self.progress.steps(), self.state | self.progress.kept() | changes, keep_all=True)
            self.writer.wait()
        return last_name(self.writer.output_dir)

    @contextmanager
    def before_errors(self, is_whole: bool = True) -> Iterator[None]:
        """Keep the steps that are done where what is computed or read inside of this fails.

        Args:
            is_whole: nothing inside changes what a checkpoint holds. Of an update that ends half way none is saved.

        Raises:
            UserError: it failed; the message says how to go on.
        """
        save = self.save if is_whole else self._without_saving
        try:
            yield
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold what the step computed
            self.release()
            saved = save(memory_plan=None)
            if self.planner is None:
                go_on = f"{saved or 'the start'} is where to resume, with --resume_from_checkpoint latest"
                raise UserError(f"Out of memory; {go_on}.") from error
            is_alone = self.accelerator.num_processes == 1  # others may be computing on the card, or wait for this one
            facts = (self.plan, self.progress.steps(), saved)
            raise UserError(self.planner.out_of_memory(*facts, can_measure=is_alone)) from error
        except loader.WorkerDied as error:
            raise UserError(loader.worker_died(error, self.progress.steps(), save())) from error
        except PictureChanged as error:
            raise UserError(loader.picture_changed(error, save())) from error
        except UserError as error:
            saved = self._without_saving() if processes.holds_up_the_card(error) else save()
            raise UserError(f"{error} The last checkpoint is {saved}." if saved else str(error)) from error

    def _without_saving(self, **_) -> str:
        """Return what `save` does, but save nothing; a checkpoint that is being written is waited for."""
        self.writer.close()
        return last_name(self.writer.output_dir)
