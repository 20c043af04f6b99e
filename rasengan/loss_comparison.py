"""The losses of a tuned model beside the base's, picture by picture, and what those of a run's checkpoints show.

Losses are fp64 on the CPU, (pictures, BANDS), as `ValidationLoss` measures them: with the same noise for every model,
so that differences are taken picture by picture, and their standard error is that of such differences.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch

from rasengan.samples import TrainingSamples
from rasengan.validation_loss import named_means


KINDS = ("base", "tuned")


class Losses(NamedTuple):
    """A model's losses."""

    held_out: torch.Tensor
    trained: torch.Tensor  # of as many pictures that were trained on; of none where these are not known


class Point(NamedTuple):
    """The losses after so many optimizer steps, 0 for the base's."""

    step: int
    losses: Losses


def change(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Return by how much the mean loss changed, as a share of what it was, and the standard error of that.

    The error is NaN of a single picture.
    """
    differences = (after - before).mean(dim=1)
    error = differences.std() / len(differences) ** 0.5 if len(differences) > 1 else torch.tensor(math.nan)
    return {name: (value / before.mean()).item() for name, value in (("change", differences.mean()), ("error", error))}


def compare(base: torch.Tensor, tuned: torch.Tensor, num_train_timesteps: int) -> dict[str, object]:
    """Return both models' mean losses, of all and of each band by the names of their plots, and the change."""
    means = {"base": named_means(base, num_train_timesteps), "tuned": named_means(tuned, num_train_timesteps)}
    return {"pictures": len(base)} | means | change(base, tuned)


def loss_figures(
    held_out: TrainingSamples,
    losses: dict[str, Losses],
    points: list[Point],
    num_train_timesteps: int,
    best_step: int | None = None,
) -> dict[str, object]:
    """Return what there is to say of the losses.

    Args:
        held_out: of whose rows the losses are.
        losses: of both `KINDS`.
        points: of the base, the tuned model and the checkpoints, in any order.
        num_train_timesteps: of the schedule.
        best_step: as `curve` takes it.

    Returns:
        `held_out` and `trained`, as `compare` has them, the latter None of no pictures; `pictures`, as `each_picture`
        has them; and `curve`, None where there are no checkpoints.
    """
    found = {}
    for name in Losses._fields:
        base, tuned = (getattr(losses[kind], name) for kind in KINDS)
        found[name] = compare(base, tuned, num_train_timesteps) if len(base) else None
    found["pictures"] = each_picture(held_out, losses["base"].held_out, losses["tuned"].held_out)
    points = sorted(points, key=lambda point: point.step)
    return found | {"curve": curve(points, best_step) if len(points) > 2 else None}


def each_picture(measured: TrainingSamples, base: torch.Tensor, tuned: torch.Tensor) -> list[dict[str, object]]:
    """Return each picture's losses with their change, the most improved first, NaN last."""
    found = []
    for place, row in enumerate(measured.rows):
        losses = base[place].mean().item(), tuned[place].mean().item()
        about = {"row": row, "name": measured.pictures[row].name, "captions": measured.captions[row]}
        about |= {"base": losses[0], "tuned": losses[1], "change": losses[1] / losses[0] - 1}
        found.append(about | {"base_bands": base[place].tolist(), "tuned_bands": tuned[place].tolist()})
    return sorted(found, key=lambda about: (math.isnan(about["change"]), about["change"]))


def no_curve(points: list[Point]) -> str:
    """Say why so few points are no curve."""
    steps = [point.step for point in points if point.step]
    return (
        f"--checkpoints: there is no curve, since no step {f'but {steps[0]} ' if steps else ''}is left to measure. "
        "Train with more checkpoints (a larger --checkpoints_total_limit) or with --save_best."
    )


def curve(points: list[Point], best_step: int | None = None) -> dict[str, object]:
    """Return the mean losses by step, where the held-out one is lowest, and whether it rises after that.

    It rises where the last one is higher than the lowest by more than two standard errors of the pictures'
    differences, as it would by chance in one of forty, and more often where the lowest is that of many points.

    Args:
        points: by step, the base's first, two at least.
        best_step: after which training found the lowest loss of these pictures, whatever else it measured; None where
            that is not known.
    """
    means = [
        {"step": at, "held_out": _mean(losses.held_out), "trained": _mean(losses.trained)} for at, losses in points
    ]
    finite = [place for place, mean in enumerate(means) if math.isfinite(mean["held_out"])]
    if not finite:
        return {"points": means, "lowest_step": None, "rises": False, "verdict": "No loss is finite."}
    lowest, last = min(finite, key=lambda place: means[place]["held_out"]), points[-1]
    rise = change(points[lowest].losses.held_out, last.losses.held_out)
    rises = rise["change"] > 2 * rise["error"]  # not so for a NaN
    steps = [point.step for point in points]
    known, gap = best_step in steps, max(pairwise(steps), key=lambda ends: ends[1] - ends[0])
    if known or gap[1] - gap[0] <= last.step / 2:
        gap = None
    said = _verdict(points[lowest].step, last.step, rise, rises, len(last.losses.held_out), gap)
    if rises and len(last.losses.trained):
        of_trained = change(points[lowest].losses.trained, last.losses.trained)
        if of_trained["change"] > 2 * of_trained["error"]:
            said = said.rpartition(": overfitting")[0]
            said += ": the run went wrong, since the loss of pictures trained on rises too,"
            said += f" by {signed(of_trained['change'])}. Lower --learning_rate."
        else:
            said += f" Meanwhile that of pictures trained on changed by {signed(of_trained['change'])}."
    said += f" {_range(steps[1:], gap, best_step if known else None)}"
    return {"points": means, "lowest_step": points[lowest].step, "rises": rises, "verdict": said}


def _verdict(
    lowest: int, last: int, rise: dict[str, float], rises: bool, pictures: int, gap: tuple[int, int] | None
) -> str:
    if lowest == last:
        said = f"The held-out loss is lowest at the last step, {last}"
        if pictures == 1:
            return f"{said}, but of a single picture, which does not tell it from chance."
        return f"{said}, of those measured." if gap else f"{said}: no overfitting is seen."
    where = f"after step {lowest}" if lowest else "without the adapter"
    if not math.isfinite(rise["change"]):
        return f"The held-out loss is lowest {where}, and not finite after step {last}: the run diverged."
    found = f"The held-out loss is lowest {where}, and {signed(rise['change'])} from there after step {last}"
    if not rises:
        return f"{found}, which so few pictures do not tell from chance."
    if gap:
        return f"{found}: overfitting is seen."
    return f"{found}: overfitting starts {'there' if lowest else 'at once'}."


def _range(steps: list[int], gap: tuple[int, int] | None, best_step: int | None) -> str:
    several = f"{len(steps)} steps from {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    said = f"Measured were the base and {several}"
    if best_step is not None:
        return f"{said}, that of the lowest loss in training, {best_step}, among them."
    if gap is None:
        return f"{said}."
    return (
        f"{said}, but none between {gap[0]} and {gap[1]}, where the loss may be lower: more checkpoints (a larger "
        "--checkpoints_total_limit) or training with --save_best would show it."
    )


def _mean(losses: torch.Tensor) -> float:
    return losses.mean(dim=0).mean().item()  # as `named_means` has it, to the bit; NaN of none


def signed(share: float) -> str:
    """Return a change as text, in percent."""
    return f"{100 * share:+.1f} %"
