"""The loss of pictures that are held out of training, and the adapter that had the lowest."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rasengan import UserError, checkpoint_writer, demo, imaging, samples, step, validation_loss


ADAPTER = "pytorch_lora_weights.safetensors"
CONFIG = Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml"
TWO = ["--config_file", str(CONFIG), "--main_process_port", "0", "--num_processes", "2"]
HELD_OUT = 3
PLOTS = ["validation_loss", *(f"validation_loss/t{low}-{low + 249}" for low in (0, 250, 500, 750))]
RUN = ["--max_train_samples", 9, "--validation_split", HELD_OUT, "--validation_loss_steps", 1]
FEW = ["--lora_target_modules", "to_v", "attn2.to_k"]  # of 136 modules 51, for speed
# At such a rate two steps help, and the third does harm.
TOO_FAST = [*FEW, "--learning_rate", 0.1, "--max_train_steps", 3, "--checkpointing_steps", 1]


def bits(folder) -> dict[str, bytes]:
    """Return the bytes of each of the adapter's matrices."""
    return {key: tensor.numpy().tobytes() for key, tensor in load_file(folder / ADAPTER).items()}


def best_of(output_dir) -> tuple[dict, dict[str, bytes]]:
    """Return what is said of the best adapter, and its bits."""
    assert {path.name for path in (output_dir / "best").iterdir()} == {ADAPTER, "best.json"}
    return json.loads((output_dir / "best" / "best.json").read_text()), bits(output_dir / "best")


def record_of(folder) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())["validation_losses"]


@pytest.fixture
def read_losses(read_scalars):
    """Function that reads the validation losses of a run, by plot and step."""
    return lambda output_dir: {name: read_scalars(output_dir, name) for name in PLOTS}


@pytest.fixture
def seen(monkeypatch) -> dict[str, list]:
    """What the training steps and the measurements of a run meet: the names of pictures, and whole samples."""
    seen, call, fixed = {"trained": [], "held_out": []}, step.TrainingStep.__call__, validation_loss.fixed_sample

    def train(self, batch):
        seen["trained"] += batch["name"]
        return call(self, batch)

    def measure(*arguments):
        seen["held_out"].append(fixed(*arguments))
        return seen["held_out"][-1]

    monkeypatch.setattr(step.TrainingStep, "__call__", train)
    monkeypatch.setattr(validation_loss, "fixed_sample", measure)
    return seen


# --- what is held out ---


@pytest.mark.parametrize("size", [HELD_OUT, 0.3])
def test_no_held_out_picture_is_trained_on_and_every_other_is(size, train, seen):
    few = ["--max_train_samples", 9, "--validation_split", size, "--max_train_steps", 4, "--train_batch_size", 3]
    train(*few, *FEW, "--report_to", "none")
    measured = {sample["name"] for sample in seen["held_out"]}
    assert len(measured) == 3
    assert len(set(seen["trained"])) == 6
    assert not measured & set(seen["trained"])
    assert len(seen["held_out"]) == 4 * 3 * 3  # bands, pictures; the base, an epoch of two steps, the end


def test_copies_of_a_held_out_picture_are_held_out_with_it(train, seen, caplog, tmp_path):
    demo.draw_picture_set(tmp_path, count=5)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    for line in list(lines):
        copy = f"copy-{line['file_name']}"
        shutil.copy(tmp_path / line["file_name"], tmp_path / copy)
        lines.append({"file_name": copy, "text": "another caption"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ["--train_data_dir", tmp_path, "--validation_split", 2, "--max_train_steps", 6, "--report_to", "none"]
    train(*run, *FEW)
    assert caplog.text.count("2 of 10 pictures are held out; left out as their copies: 2") == 1
    content = lambda names: {Path(name).name.removeprefix("copy-") for name in names}  # noqa: E731
    measured = content(sample["name"] for sample in seen["held_out"])
    assert len(measured) == 2
    assert len(content(seen["trained"])) == 3
    assert not measured & content(seen["trained"])


def test_a_split_needs_no_other_cache(train, trained, loaded):
    train(*FEW, "--validation_split", 0.1, "--max_train_steps", 1, "--report_to", "none")
    assert sorted(loaded) == ["scheduler", "tokenizer", "unet"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--validation_split", 9], r"--validation_split 9 of 9 .* leaves none to train on\. Give a smaller"),
        (["--validation_split", 0.99], r"--validation_split 0\.99 of 9 .* leaves none to train on\. Give a smaller"),
        (["--validation_split", 1, "--max_train_samples", 1], "is 1, but there is only one picture. Give more"),
        (["--save_best"], "--save_best needs a validation loss. Give --validation_split"),
    ],
    ids=["all", "nearly all", "one picture", "no split"],
)
def test_a_split_that_cannot_be_meant_is_refused(flags, said, train, refused):
    refused(said, train, "--max_train_samples", 9, *flags)


# --- the loss ---


@pytest.fixture(scope="module")
def measured(train):
    """Output folder of four steps, the loss measured after each."""
    return train(*RUN, "--save_best")


def test_the_loss_of_the_base_and_of_every_step_is_shown_and_their_bands_make_the_mean(measured, read_losses):
    losses = read_losses(measured)
    for name, values in losses.items():
        assert sorted(values) == [0, 1, 2, 3, 4], name
        assert len(set(values.values())) == 5, name
    for at in range(5):
        assert losses["validation_loss"][at] == pytest.approx(sum(losses[name][at] for name in PLOTS[1:]) / 4)


def test_the_loss_falls_and_is_told_beside_the_bases(train, read_losses, caplog, capfd):
    output_dir = train(*RUN, "--max_train_steps", 12, "--validation_loss_steps", 4)
    values = read_losses(output_dir)["validation_loss"]
    assert sorted(values) == [0, 4, 8, 12]
    change = 100 * (values[12] / values[0] - 1)
    assert change < 0
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Validation loss of")]
    assert said == (
        f"Validation loss of 3 held-out pictures: base {values[0]:.4f}, tuned {values[12]:.4f} ({change:+.1f} %); "
        f"the lowest was {values[12]:.4f}, after step 12"
    )
    assert f"validation_loss={values[4]:.4f}" in capfd.readouterr().err


@torch.no_grad()
def reference(tiny_base, picture_set, adapter, name: str, caption: str, digest: str) -> list[float]:
    """Return a picture's loss in each band in float64, by the modules and the scheduler of diffusers alone."""
    double = {"torch_dtype": torch.float64}
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet", **double).eval()
    if adapter is not None:
        unet = PeftModel.from_pretrained(unet, adapter).double().eval()
    vae = AutoencoderKL.from_pretrained(tiny_base / "vae", **double).eval()
    scheduler = DDPMScheduler.from_pretrained(tiny_base / "scheduler")
    image = imaging.decode((picture_set / Path(name).name).read_bytes())
    height, width = image.height, image.width
    factor = 64 / min(width, height)
    image = image.resize((int(width * factor), int(height * factor)), Image.Resampling.LANCZOS)
    left, top = round((image.width - 64) / 2), round((image.height - 64) / 2)
    pixels = np.array(image.crop((left, top, left + 64, top + 64)), dtype=np.float64) / 127.5 - 1
    states = []
    for number, model in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer.from_pretrained(tiny_base / f"tokenizer{number}")
        encoder = model.from_pretrained(tiny_base / f"text_encoder{number}", dtype=torch.float64).eval()
        tokens = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        output = encoder(tokens.input_ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
    added = {
        "text_embeds": output.text_embeds,
        "time_ids": torch.tensor([[height, width, top, left, 64, 64]], dtype=torch.float64),
    }
    posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
    losses = []
    for band in range(4):
        generator = torch.Generator().manual_seed(samples.derive_seed("validation", 0, digest, band))
        torch.rand((), generator=generator)  # of a caption, where there are several
        timestep = torch.randint(250 * band, 250 * (band + 1), (), generator=generator)
        latent_noise, noise = (torch.randn(1, 4, 8, 8, generator=generator).double() for _ in range(2))
        latents = (posterior.mean + posterior.std * latent_noise) * vae.config.scaling_factor
        noisy = scheduler.add_noise(latents, noise, timestep[None])
        predicted = unet(noisy, timestep, torch.cat(states, dim=-1), added_cond_kwargs=added).sample
        losses.append((predicted - noise).square().mean().item())
    return losses


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "encoded in the loop"])
def test_the_loss_is_that_of_diffusers_modules_in_float64(cached, train, seen, tiny_base, picture_set, read_losses):
    # What weighs or disturbs the training is no part of it.
    flags = ["--snr_gamma", 1, "--noise_offset", 0.5, "--random_flip", "--lora_dropout", 0.2]
    output_dir = train(*RUN, *flags, "--max_train_steps", 2, *([] if cached else ["--no-cache_conditioning"]))
    names = sorted({sample["name"] for sample in seen["held_out"]})
    lines = [json.loads(line) for line in (picture_set / "metadata.jsonl").read_text().splitlines()]
    captions = {line["file_name"]: line["text"] for line in lines}
    column = [{"bytes": Path(name).read_bytes(), "path": name} for name in names]
    pictures = imaging.inspect_pictures(column, output_dir / "memory")
    losses = read_losses(output_dir)
    for at, adapter in ((0, None), (2, output_dir / "peft")):
        rows = [
            reference(tiny_base, picture_set, adapter, picture.name, captions[Path(picture.name).name], picture.digest)
            for picture in pictures
        ]
        assert len(rows) == HELD_OUT
        expected = torch.tensor(rows, dtype=torch.float64).mean(dim=0)
        assert [losses[name][at] for name in PLOTS[1:]] == pytest.approx(expected.tolist(), rel=2e-5)
        assert losses["validation_loss"][at] == pytest.approx(expected.mean().item(), rel=2e-5)


def test_equal_runs_measure_equal_bits(train, measured, read_losses):
    again = train(*RUN, "--save_best")
    assert read_losses(again) == read_losses(measured)
    assert record_of(again / "checkpoint-4") == record_of(measured / "checkpoint-4")
    assert best_of(again) == best_of(measured)


def test_another_micro_batch_measures_the_same_within_rounding(train, read_losses):
    plain = [*RUN, *FEW, "--no-use_8bit_adam", "--adam_epsilon", 1e-4, "--max_train_steps", 2]
    whole = read_losses(train(*plain))
    halved = read_losses(train(*plain, "--train_batch_size", 1, "--gradient_accumulation_steps", 2))
    for name in PLOTS:
        assert halved[name] == pytest.approx(whole[name], rel=1e-5), name


def test_two_processes_measure_what_one_does_within_rounding(
    train, run_script, train_arguments, read_losses, tmp_path
):
    plain = [*RUN, *FEW, "--no-use_8bit_adam", "--adam_epsilon", 1e-4, "--max_train_steps", 2, "--save_best"]
    one = train(*plain)
    run = [*train_arguments, *plain, "--train_batch_size", 1, "--output_dir", tmp_path]
    finished = run_script("train_lora_sdxl", *run, launch=TWO)
    assert finished.returncode == 0, finished.stderr
    losses = read_losses(one)
    for name, values in read_losses(tmp_path).items():
        assert values == pytest.approx(losses[name], rel=1e-5), name
    mine, expected = best_of(tmp_path)[0], best_of(one)[0]
    assert mine["step"] == expected["step"]


# --- what it leaves alone ---


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lora_dropout", 0.2],
        ["--use_ema"],
        ["--train_text_encoder"],
        ["--no-center_crop", "--random_flip"],
        ["--dataloader_num_workers", 1],
        ["--mixed_precision", "bf16"],
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "plain",
)
def test_measuring_disturbs_nothing(flags, train, read_scalars, monkeypatch):
    run = [*RUN, *FEW, "--max_train_steps", 3, *flags]
    measured = train(*run)
    monkeypatch.setattr(validation_loss.ValidationLoss, "measure", lambda self: {"validation_loss": 1.0})
    left_alone = train(*run)
    assert set(read_scalars(left_alone, "validation_loss").values()) == {1.0}
    assert set(read_scalars(measured, "validation_loss").values()) != {1.0}
    for name in ("train_loss", "grad_norm"):
        assert read_scalars(measured, name) == read_scalars(left_alone, name)
    assert bits(measured) == bits(left_alone)
    assert bits(measured / "checkpoint-2") == bits(left_alone / "checkpoint-2")


# --- a resume ---


@pytest.mark.parametrize(
    "flags",
    [[], ["--use_ema", "--lora_dropout", 0.1], ["--train_text_encoder", "--learning_rate", 0.05]],
    ids=["plain", "average and dropout", "text encoders"],
)
def test_a_resumed_run_measures_what_the_whole_one_did_its_best_included(flags, train, read_losses, tmp_path):
    flags = [*RUN, *TOO_FAST, "--save_best", *flags]
    whole = train(*flags)
    assert best_of(whole)[0]["step"] == 2
    losses = read_losses(whole)
    for killed_at in (1, 2, 3):
        # The best adapter that it finds is of a step that it has lost, or of its own.
        output_dir = tmp_path / str(killed_at)
        for name in (f"checkpoint-{killed_at}", "best"):
            shutil.copytree(whole / name, output_dir / name)
        train(*flags, "--resume_from_checkpoint", "latest", output_dir=output_dir)
        expected = {name: {at: v for at, v in row.items() if at >= killed_at} for name, row in losses.items()}
        assert read_losses(output_dir) == expected
        assert best_of(output_dir) == best_of(whole)
        assert record_of(output_dir / "checkpoint-3") == record_of(whole / "checkpoint-3")
        assert bits(output_dir) == bits(whole)


def test_another_split_needs_a_flag_and_then_measures_anew(train, measured, refused, read_losses, caplog, tmp_path):
    shutil.copytree(measured / "checkpoint-2", tmp_path / "checkpoint-2")
    resume = [*RUN, "--validation_split", 4, "--resume_from_checkpoint", "latest"]
    message = refused("--validation_split was 3, and is 4", train, *resume, output_dir=tmp_path)
    assert "--resume_with_changes" in message
    train(*resume, "--resume_with_changes", output_dir=tmp_path)
    assert "--validation_split was 3, and is 4" in caplog.text
    losses = read_losses(tmp_path)["validation_loss"]
    assert sorted(losses) == [0, 2, 3, 4]
    assert losses[0] != read_losses(measured)["validation_loss"][0]


def test_other_steps_of_measurement_and_a_best_to_keep_are_free(train, measured, caplog, tmp_path):
    shutil.copytree(measured / "checkpoint-4", tmp_path / "checkpoint-4")
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", 5]
    train(*RUN, *resume, "--save_best", "--validation_loss_steps", 9, output_dir=tmp_path)
    assert f"{tmp_path / 'best'} does not hold the adapter of step" in caplog.text
    assert best_of(tmp_path)[0]["step"] == 5


# --- the best ---


@pytest.mark.parametrize("flags", [[], ["--use_ema", "--ema_decay", 0.5]], ids=["adapter", "average"])
def test_the_best_adapter_is_that_of_the_lowest_loss_of_a_run_that_gets_worse(flags, train, read_scalars):
    output_dir = train(*RUN, *TOO_FAST, *flags, "--save_best")
    losses = read_scalars(output_dir, "validation_loss")
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < losses[3]
    said, kept = best_of(output_dir)
    assert said == {"step": 2, "loss": pytest.approx(losses[2])}
    assert kept == bits(output_dir / "checkpoint-2" / ("ema" if flags else "."))
    assert kept != bits(output_dir)


def test_a_best_that_is_later_than_the_checkpoint_is_kept_where_its_step_is_not_measured_again(train, tmp_path):
    flags = [*RUN, *TOO_FAST, "--save_best"]
    whole = train(*flags)
    assert best_of(whole)[0]["step"] == 2
    for name in ("checkpoint-1", "best"):
        shutil.copytree(whole / name, tmp_path / name)
    resume = ["--resume_from_checkpoint", "latest", "--validation_loss_steps", 3]
    train(*flags, *resume, output_dir=tmp_path)
    assert best_of(tmp_path) == best_of(whole)


def test_an_adapter_that_is_ruined_is_not_written_over_a_good_one(train, tmp_path):
    output_dir = train(*RUN, *FEW, "--max_train_steps", 1, output_dir=tmp_path)
    good = bits(output_dir)
    again = ["--resume_from_checkpoint", "latest", "--resume_with_changes", "--learning_rate", 1e37]
    with pytest.raises(UserError, match=r"After the last step the loss is nan with the adapter, .*Lower --learning"):
        train(*RUN, *FEW, *again, "--max_train_steps", 2, "--validation_loss_steps", 9, output_dir=tmp_path)
    assert bits(output_dir) == good


def test_without_the_flag_no_best_is_kept(train):
    output_dir = train(*RUN, *FEW, "--max_train_steps", 1, "--report_to", "none")
    assert not (output_dir / "best").exists()


def test_what_a_checkpoint_says_of_the_best_is_on_the_disk_before_it(train, monkeypatch):
    write, pairs = checkpoint_writer.CheckpointWriter._write, []

    def look(self, path, parts, state, keep_all):
        record = json.loads(state)["validation_losses"]
        if record["best"] is not None:
            pairs.append((record["best_step"], best_of(path.parent)[0]["step"]))
        return write(self, path, parts, state, keep_all)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_write", look)
    train(*RUN, *TOO_FAST, "--save_best", "--report_to", "none")
    assert pairs == [(1, 1), (2, 2)]


@pytest.mark.parametrize("resumed_from", [1, 2])
@pytest.mark.parametrize("adapter_of", [1, 2], ids=["before the adapter", "between the adapter and best.json"])
def test_a_kill_while_the_best_is_written_loses_nothing(adapter_of, resumed_from, train, monkeypatch, tmp_path):
    flags = [*RUN, *TOO_FAST, "--save_best", "--report_to", "none"]
    whole, replace = train(*flags), Path.replace

    def die(self, target):
        if target == tmp_path / "best" / (ADAPTER if adapter_of == 1 else "best.json") and target.exists():
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            train(*flags, output_dir=tmp_path)
    said, kept = best_of(tmp_path)
    assert said["step"] == 1  # the second write was not finished
    assert kept == bits(whole / f"checkpoint-{adapter_of}")
    for lost in range(resumed_from + 1, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{lost}", ignore_errors=True)
    train(*flags, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert best_of(tmp_path) == best_of(whole)
    assert bits(tmp_path) == bits(whole)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_the_former_best_and_says_so(train, monkeypatch, tmp_path):
    synced = checkpoint_writer.sync

    def full(file):
        if (tmp_path / "best" / "best.json").exists() and file.name == ADAPTER:
            raise OSError(errno.ENOSPC, "No space left on device")
        return synced(file)

    monkeypatch.setattr(checkpoint_writer, "sync", full)
    with pytest.raises(UserError, match=r"best cannot be written: No space left on device\..* go on from checkpoint-"):
        train(*RUN, *TOO_FAST, "--save_best", "--report_to", "none", output_dir=tmp_path)
    said, kept = best_of(tmp_path)
    assert said["step"] == 1
    assert kept == bits(tmp_path / "checkpoint-1")


# --- what cannot be measured ---


@pytest.fixture
def losing_pictures(monkeypatch) -> dict[str, bytes]:
    """Files that were removed right before each measurement of a tuned model: all that are held out."""
    removed, measure = {}, validation_loss.ValidationLoss.measure_tuned

    def remove_and_measure(self, global_step):
        for row in self.held_out.rows:
            file = Path(self.held_out.pictures[row].name)
            removed[file] = file.read_bytes()
            file.unlink()
        return measure(self, global_step)

    monkeypatch.setattr(validation_loss.ValidationLoss, "measure_tuned", remove_and_measure)
    return removed


def test_a_picture_that_is_gone_costs_neither_a_step_nor_a_loss(
    train, losing_pictures, monkeypatch, picture_set, read_scalars, tmp_path
):
    pictures = shutil.copytree(picture_set, tmp_path / "set")
    run = ["--train_data_dir", pictures, "--no-center_crop", *RUN, *FEW, "--validation_loss_steps", 2]
    run += ["--checkpointing_steps", 100, "--logging_steps", 100]
    with pytest.raises(UserError, match=r"was changed while the run used it: .* resume from checkpoint-2 with"):
        train(*run, output_dir=tmp_path / "run")
    assert len(losing_pictures) == HELD_OUT
    monkeypatch.undo()
    for file, content in losing_pictures.items():
        file.write_bytes(content)
    train(*run, "--resume_from_checkpoint", "latest", output_dir=tmp_path / "run")
    whole = train(*run)
    assert bits(tmp_path / "run") == bits(whole)
    for name in ("train_loss", "validation_loss"):
        assert read_scalars(tmp_path / "run", name) == read_scalars(whole, name), name


def test_the_adapter_is_worth_more_than_its_last_loss(train, losing_pictures, picture_set, caplog, tmp_path):
    pictures = shutil.copytree(picture_set, tmp_path / "set")
    run = ["--train_data_dir", pictures, "--no-center_crop", *RUN, *FEW, "--validation_loss_steps", 100]
    output_dir = train(*run, "--max_train_steps", 2)
    assert len(losing_pictures) == HELD_OUT
    assert "The validation loss after the last step was not measured: " in caplog.text
    assert bits(output_dir) == bits(output_dir / "checkpoint-2")
    assert (output_dir / "README.md").is_file()
