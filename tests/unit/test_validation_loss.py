import json
import math
from contextlib import nullcontext

import pytest
import torch

from rasengan import UserError, imaging, memory, stopping, validation_loss
from rasengan.imaging import Picture, crop_size
from rasengan.samples import TrainingSamples


PICTURES = [Picture(f"{n}.png", f"digest {n}", 64, 64, None, n) for n in range(100)]


def digests(rows, pictures=PICTURES):
    return {pictures[row].digest for row in rows}


# --- what is drawn ---


def samples_of(rows, pictures=PICTURES, captions=("one", "two", "three"), sizes=((64, 64),)):
    shapes = {p.digest: (1, 4, *(side // 8 for side in crop_size(p.height_px, p.width_px, sizes))) for p in pictures}
    latents = {digest: {"mean": torch.ones(s), "std": torch.full(s, 2.0)} for digest, s in shapes.items()}
    options = {"seed": 0, "sizes": list(sizes), "interpolation": "lanczos", "center_crop": True, "random_flip": True}
    options |= {"scaling_factor": 0.5, "noise_offset": 3.0, "num_train_timesteps": 1000}
    return TrainingSamples([], pictures, [list(captions)] * len(pictures), latents, None, rows=rows, **options)


def test_a_sample_is_a_function_of_seed_picture_and_band():
    held, turned = samples_of([50, 3]), samples_of([96], PICTURES[::-1])
    state = torch.get_rng_state()
    for band in range(validation_loss.BANDS):
        one, other = validation_loss.fixed_sample(held, 1, band), validation_loss.fixed_sample(turned, 0, band)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name
    assert torch.equal(torch.get_rng_state(), state)


def test_each_band_has_its_timesteps_and_noise_without_an_offset():
    held, captions, noises = samples_of(list(range(100))), set(), []
    for band in range(validation_loss.BANDS):
        drawn = [validation_loss.fixed_sample(held, index, band) for index in range(100)]
        timesteps = torch.stack([sample["timesteps"] for sample in drawn])
        assert timesteps.dtype == torch.int64
        assert 250 * band <= timesteps.min() < 250 * band + 15
        assert 250 * band + 235 < timesteps.max() < 250 * (band + 1)
        captions |= {sample["caption"] for sample in drawn}
        noises += [sample["noise"] for sample in drawn]
        latent_noise = torch.stack([(sample["latents"] / 0.5 - 1) / 2 for sample in drawn])
        assert abs(latent_noise.std() - 1) < 0.02
    assert captions == {"one", "two", "three"}
    noises = torch.stack(noises)
    assert noises.mean(dim=(2, 3)).std() < 0.2  # an offset of 3 would show here
    assert len(noises.unique(dim=0)) == 400


# --- measuring ---


def measurer(rows, batch_size=3, compute=None, share=(0, 1), **options):
    compute = compute or (lambda batch: batch["timesteps"].float() + batch["noise"].mean(dim=(1, 2, 3)))
    room = options.pop("make_room", lambda: None)
    options = {"device": torch.device("cpu"), "share": share, "batch_size": batch_size, "every": 5} | options
    return validation_loss.ValidationLoss(samples_of(rows), lambda batches: batches, compute, room, **options)


def test_the_mean_and_those_of_the_bands_are_of_all_samples():
    rows = [4, 8, 15]
    values = measurer(rows).measure()
    drawn = [[validation_loss.fixed_sample(samples_of(rows), i, band) for i in range(3)] for band in range(4)]
    expected = [sum(float(s["timesteps"] + s["noise"].mean()) for s in band) / 3 for band in drawn]
    names = ["validation_loss/t0-249", "validation_loss/t250-499", "validation_loss/t500-749"]
    assert list(values) == ["validation_loss", *names, "validation_loss/t750-999"]
    assert list(values.values()) == pytest.approx([sum(expected) / 4, *expected], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_samples_of_several_shapes_are_met_apart_and_each_counts_once(batch_size):
    shapes = [(64, 64), (64, 128), (100, 50), (70, 66), (60, 130)]
    pictures = [Picture(f"{n}.png", f"digest {n}", h, w, None, n) for n, (h, w) in enumerate(shapes)]
    held = samples_of(list(range(5)), pictures, sizes=[(88, 40), (64, 64), (40, 88)])
    seen, options = [], {"device": torch.device("cpu"), "batch_size": batch_size, "every": 1}

    def compute(batch):
        seen.append(batch["noise"].shape)
        return batch["timesteps"].float() + batch["noise"].mean(dim=(1, 2, 3))

    drawn = [[validation_loss.fixed_sample(held, i, band) for i in range(5)] for band in range(4)]
    expected = [sum(float(s["timesteps"] + s["noise"].mean()) for s in band) / 5 for band in drawn]
    for processes in (1, 2):
        parts = [
            validation_loss.ValidationLoss(
                held, lambda b: b, compute, lambda: None, share=(n, processes), **options
            ).measure()
            for n in range(processes)
        ]
        found = [sum(part[name] for part in parts) for name in parts[0]]
        assert found == pytest.approx([sum(expected) / 4, *expected], rel=1e-6)
    assert {tuple(shape[2:]) for shape in seen} == {(11, 5), (8, 8), (5, 11)}


def test_the_losses_of_each_picture_and_band_make_the_means_to_the_bit():
    rows = [4, 8, 15, 16, 23, 42, 77]
    each = measurer(rows).measure_each()
    assert (each.shape, each.dtype) == ((7, 4), torch.float64)
    for index in range(7):
        for band in range(4):
            sample = validation_loss.fixed_sample(samples_of(rows), index, band)
            assert each[index, band].item() == pytest.approx(float(sample["timesteps"] + sample["noise"].mean()))
    values = list(measurer(rows).measure().values())
    by_band = each.mean(dim=0)
    assert values == [by_band.mean().item(), *by_band.tolist()]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_no_batch_size_leaves_a_sample_out(batch_size):
    assert measurer([4, 8, 15], batch_size).measure() == pytest.approx(measurer([4, 8, 15]).measure(), rel=1e-6)


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_the_shares_of_several_processes_are_together_that_of_one(processes, monkeypatch):
    shares = []
    monkeypatch.setattr(validation_loss, "add_up", lambda losses: shares.append(losses.clone()))
    whole = measurer([4, 8, 15]).measure()
    (expected,) = shares
    shares.clear()
    for number in range(processes):
        measurer([4, 8, 15], share=(number, processes)).measure()
    assert torch.equal(sum(shares), expected)  # to the bit, as the boundaries of the batches are the same
    monkeypatch.setattr(validation_loss, "add_up", lambda losses: losses.copy_(expected))
    assert measurer([4, 8, 15], share=(1, processes)).measure() == whole


def test_a_batch_that_does_not_fit_is_taken_in_parts_once_room_was_made():
    sizes, room = [], []

    def compute(batch):
        sizes.append(len(batch["noise"]))
        if sizes[-1] > 2 or not room:
            raise torch.OutOfMemoryError
        return batch["timesteps"].float()

    values = measurer([4, 8, 15], 8, compute, make_room=lambda: room.append(1)).measure()
    assert values == measurer([4, 8, 15], 8, lambda batch: batch["timesteps"].float()).measure()
    assert sizes == [8, 8, 4, 2, 2, 2, 2, 2, 2]
    assert room


def test_a_sample_that_does_not_fit_alone_is_an_error_with_the_remedy():
    def compute(batch):
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="one picture does not fit.*Lower --resolution, or train without"):
        measurer([4], 8, compute).measure()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (stopping.Interrupted(), ", since the run was to end"),
        (imaging.PictureChanged("a.png was changed."), ": a.png was changed."),
        (memory.DoesNotFit("It does not fit."), ": It does not fit."),
    ],
)
def test_what_cannot_be_measured_after_the_last_step_is_warned_of(error, why, caplog):
    with measurer([4]).after_last_step():
        raise error
    assert caplog.messages == [f"The validation loss after the last step was not measured{why}"]
    is_of_all = isinstance(error, stopping.Interrupted)  # else the others wait for this one
    with nullcontext() if is_of_all else pytest.raises(type(error)), measurer([4], share=(0, 2)).after_last_step():
        raise error


def test_a_ruined_adapter_is_an_error_after_the_last_step_too():
    with pytest.raises(UserError, match="ruined"), measurer([4]).after_last_step():
        raise UserError("The adapter is ruined.")


def test_measuring_keeps_no_gradient_and_draws_from_no_global_generator():
    state = torch.get_rng_state()
    weight = torch.ones((), requires_grad=True)
    seen = []

    def compute(batch):
        seen.append(batch["timesteps"] * weight)
        return seen[-1]

    measurer([4], 8, compute).measure()
    assert not any(losses.requires_grad for losses in seen)
    assert torch.equal(torch.get_rng_state(), state)


# --- the record ---


def test_steps_are_due_where_something_is_held_out():
    assert [step for step in range(16) if measurer([4]).due(step)] == [5, 10, 15]
    assert not any(measurer([]).due(step) for step in range(16))


def test_the_record_knows_the_base_the_last_and_the_lowest(monkeypatch):
    loss = measurer([4])
    losses = iter([3.0, math.nan, 2.0, 1.0, 1.0, math.nan, 4.0])
    monkeypatch.setattr(loss, "measure", lambda: {"validation_loss": next(losses)})
    assert loss.shown() == {}
    loss.measure_base()
    best = []
    for step in range(1, 7):
        loss.measure_tuned(step)
        best.append(loss.is_best(step))
    assert best == [False, True, True, False, False, False]
    assert loss.record == {"base": 3.0, "last": 4.0, "best": 1.0, "best_step": 3}
    assert loss.shown() == {"validation_loss": "4.0000"}
    assert loss.summary() == (
        "Validation loss of 1 held-out pictures: base 3.0000, tuned 4.0000 (+33.3 %); the lowest was 1.0000, after "
        "step 3"
    )
    loss.record["base"] = 0.5
    assert loss.summary().endswith("the lowest was 1.0000, after step 3, above the base's: lower --learning_rate")


RECORD = {"base": 3.0, "last": 2.5, "best": 2.0, "best_step": 4}
SETTINGS = {"validation_split": 0.1, "base_digest": "a", "base_quantization": "none", "center_crop": True}
SETTINGS |= {"image_interpolation_mode": "lanczos"}
STATE = SETTINGS | {"validation_losses": RECORD, "global_step": 8}


def put_best(folder, step, loss):
    (folder / "best").mkdir()
    (folder / "best" / "pytorch_lora_weights.safetensors").touch()
    (folder / "best" / "best.json").write_text(json.dumps({"step": step, "loss": loss}))


@pytest.mark.parametrize(
    ("state", "changed"),
    [
        ({}, {}),
        ({"global_step": 8}, {}),
        (STATE, {"validation_split": 0.2}),
        (STATE, {"validation_split": None}),
        (STATE, {"base_digest": "b"}),
        (STATE, {"base_quantization": "nf4"}),
        (STATE, {"center_crop": False}),
        (STATE, {"image_interpolation_mode": "bicubic"}),
    ],
)
def test_a_record_that_does_not_compare_is_not_gone_on_with(state, changed, tmp_path):
    assert validation_loss.resumed_record(state, SETTINGS | changed, tmp_path) is None


def test_the_record_of_an_older_checkpoint_that_says_less_is_gone_on_with():
    state = {name: STATE[name] for name in ("validation_losses", "validation_split")}
    assert validation_loss.resumed_record(state, SETTINGS, None) == RECORD


@pytest.mark.parametrize(
    ("step", "loss", "best"),
    [(4, 2.0, (2.0, 4)), (10, 1.5, (1.5, 10)), (8, 1.5, (1.5, 8)), (2, 2.5, (None, None)), (4, "2", (None, None))],
    ids=["its own", "of a step that was lost", "measured after the checkpoint", "worse", "damaged"],
)
def test_the_best_that_is_on_the_disk_is_compared_with_the_checkpoints(step, loss, best, tmp_path, caplog):
    put_best(tmp_path, step, loss)
    record = validation_loss.resumed_record(STATE, SETTINGS, tmp_path)
    assert record == RECORD | {"best": best[0], "best_step": best[1]}
    assert ("--save_best begins anew" in caplog.text) == (best[0] is None)


def test_a_best_that_is_gone_begins_anew_and_is_told(tmp_path, caplog):
    assert validation_loss.resumed_record(STATE, SETTINGS, None) == RECORD
    assert validation_loss.resumed_record(STATE, SETTINGS, tmp_path) == RECORD | {"best": None, "best_step": None}
    assert "does not hold the adapter of step 4" in caplog.text


def test_a_step_that_is_measured_again_and_is_worse_is_not_the_best(monkeypatch):
    loss = measurer([4])
    monkeypatch.setattr(loss, "measure", lambda: {"validation_loss": 0.9})
    loss.record |= {"base": 1.0, "best": 0.5, "best_step": 150}
    loss.measure_tuned(150)
    assert not loss.is_best(150)
    assert (loss.record["best"], loss.record["best_step"]) == (0.5, 150)
