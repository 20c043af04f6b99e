import json
import re
import time

import pytest
import torch
from accelerate import Accelerator

from rasengan import UserError, checkpoint, checkpoint_writer, imaging, loader, memory_plan, processes, rescue
from rasengan.memory_plan import Plan, Planner
from rasengan.progress import STUCK, Progress


CPU, GIB = torch.device("cpu"), 1024**3
PLAN = Plan(2, 1, 4 * GIB)


@pytest.fixture
def make(run, accelerator, tmp_path, monkeypatch):
    """Function that makes the rescue of a run that has resumed at step 3 and done further steps."""
    monkeypatch.setattr(memory_plan, "limit", lambda budget_gib, *_: budget_gib)
    monkeypatch.setattr(memory_plan, "left_gib", lambda *_: 2.0)
    room = []

    def make(losses):
        progress = Progress(3, 4, CPU, {"samples_seen": 12})
        for loss in losses:
            progress.add(torch.tensor(loss), torch.tensor(loss))
        writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **run)
        how = {"samples": 4, "batch_size": 2, "blocks": 5, "recompute": None, "budget_gib": 6.0}
        how |= {"sharing": 1, "update_bytes": 0, "can_quantize": True}
        planner = Planner(lambda size: None, lambda count: None, run["flat"], run["optimizer"], **how)
        planner.plan = lambda budget_gib: Plan(1, 2, int(budget_gib * GIB))
        state = {"seed": 0, "memory_plan": list(PLAN)}
        made = rescue.Rescue(accelerator, writer, progress, state, lambda: room.append(1), planner, PLAN)
        made.room = room
        return made

    return make


def state_of(path):
    return json.loads((path / checkpoint.STATE_FILE).read_text())


def test_the_steps_that_were_not_read_are_saved_and_shown(make, notes, tmp_path):
    saved = make([0.5, 0.25])
    assert saved.save() == "checkpoint-5"
    assert [step for step, _ in notes.kept] == [4, 5]
    (path,) = checkpoint.list_checkpoints(tmp_path)
    assert checkpoint.find_damage(path) is None
    found = state_of(path)
    kept = {"global_step": 5, "seed": 0, "samples_seen": 20, "skipped_steps": 0, "memory_plan": list(PLAN)}
    assert kept.items() <= found.items()


def test_without_a_step_the_checkpoint_is_of_where_the_run_began(make, notes):
    assert make([]).save() == "checkpoint-3"
    assert notes.kept == []


def test_steps_without_a_finite_loss_are_no_checkpoint(make, notes, tmp_path):
    assert make([float("nan")] * STUCK).save() == ""
    assert [step for step, _ in notes.kept] == [4, 5, 6]
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_another_process_than_the_main_one_writes_nothing(make, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    assert make([0.5]).save() == ""
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_where_nothing_fails_nothing_is_saved(make, tmp_path):
    with make([0.5]).before_errors():
        pass
    assert checkpoint.list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            loader.WorkerDied("killed by signal 9"),
            "A process that loads samples ended in step 6: killed by signal 9. Resume from checkpoint-5, with .*",
        ),
        (
            imaging.PictureChanged("a.png was changed while the run used it."),
            "a.png was changed while the run used it. Put back .*, and resume from checkpoint-5 with .*",
        ),
        (UserError("It is wrong."), r"It is wrong\. The last checkpoint is checkpoint-5\."),
    ],
    ids=["a worker", "a picture", "else"],
)
def test_an_error_ends_the_run_with_a_checkpoint(error, said, make, tmp_path):
    with pytest.raises(UserError) as caught, make([0.5, 0.25]).before_errors():
        raise error
    assert re.fullmatch(said, str(caught.value))
    assert caught.value.__cause__ is error
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_an_error_before_the_first_checkpoint_is_said_as_it_is(make):
    with pytest.raises(UserError, match=r"^It is wrong\.$"), make([float("nan")] * STUCK).before_errors():
        raise UserError("It is wrong.")


def test_a_bug_saves_nothing_and_stays_one(make, tmp_path):
    with pytest.raises(ZeroDivisionError), make([0.5]).before_errors():
        raise ZeroDivisionError
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_a_card_that_waits_for_ever_is_not_read(make, notes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    waiting = make([0.5])
    with pytest.raises(UserError, match=r"^It has ended\.$"), waiting.before_errors():
        raise processes.OtherEnded("It has ended.")
    assert notes.kept == []
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_out_of_memory_makes_room_saves_and_says_what_fits(make, tmp_path):
    full = make([0.5])
    said = "Out of memory in step 5, with 2 pictures at once and 1 blocks recomputed; checkpoint-4 is where to resume"
    with pytest.raises(UserError, match=said) as caught, full.before_errors():
        raise torch.OutOfMemoryError
    assert "with --vram_budget_gib 2.00: as measured, 1 pictures at once with 2 of 5 blocks" in str(caught.value)
    assert full.room == [1]
    (path,) = checkpoint.list_checkpoints(tmp_path)
    assert state_of(path)["memory_plan"] is None  # so that a resume plans anew


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(), "Out of memory in step 6, with .*; checkpoint-4 is where to resume"),
        (loader.WorkerDied("killed by signal 9"), "Resume from checkpoint-4, with"),
        (imaging.PictureChanged("a.png was changed while the run used it."), "resume from checkpoint-4 with"),
        (UserError("It is wrong."), r"It is wrong\. The last checkpoint is checkpoint-4\."),
    ],
    ids=["memory", "a worker", "a picture", "else"],
)
def test_an_error_in_an_update_saves_nothing_of_it_and_waits_for_the_checkpoint_before(
    error, said, make, tmp_path, monkeypatch
):
    full, write = make([0.5]), checkpoint_writer.CheckpointWriter._write

    def write_slowly(*arguments):
        time.sleep(0.5)
        write(*arguments)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_write", write_slowly)
    full.writer.save(4, full.state | full.progress.kept())
    full.progress.add(torch.tensor(0.25), torch.tensor(0.25))
    with pytest.raises(UserError, match=said), full.before_errors(is_whole=False):
        raise error
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_out_of_memory_without_a_card_is_said_too(make):
    full = make([0.5])
    full.planner = None
    with (
        pytest.raises(UserError, match="^Out of memory; checkpoint-4 is where to resume, with "),
        full.before_errors(),
    ):
        raise torch.OutOfMemoryError


def test_out_of_memory_beside_other_processes_measures_nothing(make, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    full = make([0.5])
    full.planner.plan = lambda budget_gib: pytest.fail("others may be computing on the card")
    with pytest.raises(UserError, match=r"and with --vram_budget_gib 2\.0, say, for a smaller plan"):
        with full.before_errors():
            raise torch.OutOfMemoryError
