"""What a training's output folder says to who evaluates it: its adapters by step, and what they were trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rasengan import UserError, checkpoint, data, held_out
from rasengan.adapter_reader import read_adapter
from rasengan.imaging import Picture
from rasengan.samples import derive_seed


class Rows(NamedTuple):
    """The rows of the pictures that are measured on."""

    held_out: list[int]
    trained: list[int]  # none where nothing says what was trained on
    is_runs: bool  # the run's own split of its own pictures


# --- adapters ---


def find_run(place: str) -> Path | None:
    """Return the output folder of the training that an adapter lies in; None where it says nothing of one."""
    path = Path(place).resolve()
    places = (path, *path.parents[:2]) if path.exists() else ()
    return next((folder for folder in places if (folder / "args.json").is_file()), None)


def steps_of_adapter(place: str, run: Path | None, settings: Mapping[str, object]) -> int | None:
    """Return how many optimizer steps an adapter has; None where nothing says so.

    Args:
        place: of the adapter.
        run: what `find_run` returned.
        settings: of the run.
    """
    path = Path(place).resolve()
    if path.name.startswith("checkpoint-") and path in checkpoint.list_checkpoints(path.parent):
        return checkpoint.step_of(path)
    if path.name == checkpoint.BEST_FOLDER:
        return checkpoint.best_step(path.parent)
    step = settings.get("optimizer_steps") if run in (path, path.parent) else None
    return step if type(step) is int and step > 0 else None


def saved_adapters(run: Path, measured: int | None) -> tuple[dict[int, Path], list[str]]:
    """Return a run's adapters by step, those of its checkpoints and the best one, and why others are left out.

    Args:
        run: its output folder.
        measured: a step whose adapter is not needed.
    """
    found, notes, best = {}, [], checkpoint.best_step(run)
    if best not in (None, measured):
        try:
            read_adapter(run / checkpoint.BEST_FOLDER)
            found[best] = run / checkpoint.BEST_FOLDER
        except UserError as error:
            notes.append(f"{checkpoint.BEST_FOLDER} is left out: {error}")
    for path in checkpoint.list_checkpoints(run):
        if checkpoint.step_of(path) == measured:
            continue
        if damage := checkpoint.find_damage(path):
            notes.append(f"{path.name} is left out, since it is damaged: {damage}.")
            continue
        average = path / checkpoint.EMA_FOLDER
        found[checkpoint.step_of(path)] = average if average.is_dir() else path
    return dict(sorted(found.items())), notes


# --- pictures ---


def choose_rows(
    pictures: list[Picture],
    captions: list[list[str]],
    validation_split: float | int,
    seed: int,
    settings: Mapping[str, object] | None,
) -> tuple[Rows, list[str]]:
    """Return which pictures are measured on, and notes on which of them the training saw.

    Args:
        pictures: all of the data set.
        captions: theirs.
        validation_split: a share or a number of pictures to hold out.
        seed: of the split.
        settings: of the run; None where the adapter is of none.

    Raises:
        UserError: the split leaves nothing to train on.
    """
    rows = held_out.split(pictures, validation_split, seed).held_out
    notes, trained, is_runs = [], [], False
    if settings is None:
        notes.append(
            "No run says what was held out: a held-out picture may have been trained on, unless the training had this "
            "--validation_split and --seed."
        )
    elif settings.get("data_digest") != data.data_digest(pictures, captions):
        notes.append("These are not the pictures and captions of the training: it may have seen held-out ones.")
    else:
        of_run = held_out.split(pictures, settings.get("validation_split"), settings.get("seed", 0))
        is_runs = of_run.held_out == rows
        chosen, known = ({pictures[row].digest for row in some} for some in (rows, of_run.trained))
        trained = [row for row in of_run.trained if pictures[row].digest not in chosen]
        if met := len(chosen & known):
            notes.append(f"{met} of {len(chosen)} held-out pictures were trained on: their loss tells less.")
    return Rows(rows, trained_sample(pictures, trained, len(rows), seed), is_runs), notes


def trained_sample(pictures: list[Picture], rows: list[int], count: int, seed: int) -> list[int]:
    """Return `count` of the rows, or all if there are no more, chosen by the seed and their contents alone."""
    first = {pictures[row].digest: row for row in reversed(rows)}
    chosen = sorted(first, key=lambda digest: derive_seed("trained", seed, digest))[:count]
    return sorted(first[digest] for digest in chosen)
