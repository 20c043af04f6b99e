"""A run that was interrupted and resumed equals the run that was not."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rasengan import UserError, demo, manifest


ADAPTER = "pytorch_lora_weights.safetensors"


def bits(folder) -> dict[str, bytes]:
    """Return the bytes of each of the adapter's matrices."""
    return {key: tensor.numpy().tobytes() for key, tensor in load_file(folder / ADAPTER).items()}


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--no-use_8bit_adam"],
        ["--use_ema"],
        ["--optimizer", "prodigy", "--use_ema"],
        ["--lora_dropout", 0.1],
        ["--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine", "--lr_warmup_steps", 1, "--random_flip"],
        ["--train_text_encoder", "--max_train_samples", 3],
        ["--mixed_precision", "bf16"],
        ["--aspect_ratio_buckets", "--bucket_step_px", 16, "--max_train_samples", 7, "--train_batch_size", 3],
    ],
    ids=[
        "8-bit AdamW",
        "AdamW",
        "average",
        "Prodigy and average",
        "dropout",
        "accumulation, schedule and flips",
        "text encoders across an epoch",
        "bf16",
        "buckets across epochs",
    ],
)
def test_a_run_killed_after_a_checkpoint_and_resumed_equals_the_whole(flags, train, read_scalars, tmp_path, caplog):
    whole = train(*flags)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = train(*flags, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert f"Resuming from {tmp_path / 'checkpoint-2'}" in caplog.text
    assert bits(resumed) == bits(whole)
    assert bits(resumed / "checkpoint-4") == bits(whole / "checkpoint-4")
    if "--use_ema" in flags:
        assert bits(resumed / "checkpoint-4" / "ema") == bits(whole / "checkpoint-4" / "ema") == bits(whole)
        assert bits(whole) != bits(whole / "checkpoint-4")
    losses = read_scalars(whole, "train_loss")
    assert read_scalars(resumed, "train_loss") == {step: losses[step] for step in (3, 4)}


def test_an_average_that_begins_with_a_resume_begins_with_the_adapter(train, trained, caplog, tmp_path):
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    train("--resume_from_checkpoint", "latest", "--use_ema", "--resume_with_changes", output_dir=tmp_path)
    assert "--use_ema was False, and is True" in caplog.text
    assert bits(tmp_path) == bits(trained)


def test_two_steps_and_two_more_equal_four(train, trained):
    output_dir = train("--max_train_steps", 2)
    assert bits(output_dir) != bits(trained)
    train("--resume_from_checkpoint", "checkpoint-2", output_dir=output_dir)
    assert bits(output_dir) == bits(trained)
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_run_without_a_seed_resumes_with_the_seed_that_it_drew(train, tmp_path):
    whole = train("--max_train_samples", 4, without=("--seed",))
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    resume = ["--max_train_samples", 4, "--resume_from_checkpoint", "latest"]
    resumed = train(*resume, output_dir=tmp_path, without=("--seed",))
    assert bits(resumed) == bits(whole)
    seeds = [json.loads((folder / "args.json").read_text())["seed"] for folder in (whole, resumed)]
    assert seeds[0] == seeds[1] is not None


def test_a_finished_run_resumes_to_the_same_adapter_without_a_step(train, trained, tmp_path):
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert bits(tmp_path) == bits(trained)


def test_a_run_that_has_more_steps_than_it_should_says_that_nothing_is_left(train, trained, caplog, tmp_path):
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    train("--resume_from_checkpoint", "latest", "--max_train_steps", 2, output_dir=tmp_path)
    assert "It has 4 steps of 2 already: nothing is left to train" in caplog.text
    assert bits(tmp_path) == bits(trained)


def test_latest_without_a_checkpoint_starts_afresh_and_says_so(train, trained, caplog):
    output_dir = train("--resume_from_checkpoint", "latest")
    assert "starting afresh" in caplog.text
    assert bits(output_dir) == bits(trained)


def test_a_named_checkpoint_that_is_missing_is_an_error_that_lists_the_others(train, trained, loaded, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-10")
    with pytest.raises(UserError, match=r"checkpoint-7.*there are: checkpoint-2, checkpoint-10"):
        train("--resume_from_checkpoint", "checkpoint-7", output_dir=tmp_path)
    assert loaded == []


def test_an_unfinished_checkpoint_is_not_resumed_from(train, trained, caplog, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(trained / "checkpoint-4", tmp_path / ".saving-4")
    (tmp_path / ".saving-4" / "optimizer.bin").unlink()
    train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert f"Resuming from {tmp_path / 'checkpoint-2'}" in caplog.text
    assert bits(tmp_path) == bits(trained)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_resuming_with_another_rank_is_an_error_that_names_it(train, trained, loaded, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=r"checkpoint-2 cannot be resumed.*--rank was 16, and is 4"):
        train("--resume_from_checkpoint", "latest", "--rank", 4, output_dir=tmp_path)
    assert loaded == []


def test_a_resumed_run_may_split_its_batches_otherwise(train, trained, read_scalars, caplog, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    split = ["--train_batch_size", 1, "--gradient_accumulation_steps", 2]
    train("--resume_from_checkpoint", "latest", *split, output_dir=tmp_path)
    assert "--train_batch_size was 2, and is 1" in caplog.text
    losses = read_scalars(trained, "train_loss")
    resumed = read_scalars(tmp_path, "train_loss")
    assert resumed[3] == pytest.approx(losses[3], rel=1e-5)
    assert resumed[4] == pytest.approx(losses[4], rel=1e-3)  # after a step of 8-bit AdamW


# --- what a resume, or a run beside another, must not do ---


def test_a_fresh_run_into_the_folder_of_another_is_refused(train, trained, refused, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    refused("--resume_from_checkpoint latest, or give another --output_dir", train, output_dir=tmp_path)


def test_checkpoints_of_other_programs_are_refused_and_stay(train, refused, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "optimizer.bin").write_bytes(b"of diffusers' example")
    refused("holds checkpoint-500, which has neither", train, output_dir=tmp_path)
    assert (tmp_path / "checkpoint-500" / "optimizer.bin").read_bytes() == b"of diffusers' example"


def test_a_diverged_run_leaves_its_last_good_checkpoint(train, trained, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    run = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--logging_steps", 9, "--max_train_steps", 9]
    run += ["--resume_from_checkpoint", "latest", "--resume_with_changes", "--report_to", "none"]
    # The update of step 3 ruins the weights, after its loss was finite: its checkpoint is no good one.
    with pytest.raises(UserError, match=r"6 steps in a row had no finite gradient.*from checkpoint-2, the last good"):
        train(*run, "--learning_rate", 1e30, output_dir=tmp_path)
    names = [path.name for path in tmp_path.glob("*checkpoint*")]
    assert "checkpoint-2" in names
    assert "checkpoint-9" not in names
    assert bits(tmp_path / "checkpoint-2") == bits(trained / "checkpoint-2")
    assert not (tmp_path / ADAPTER).exists()


def test_resuming_with_other_pictures_or_captions_is_an_error(train, loaded, tmp_path):
    demo.draw_picture_set(tmp_path / "set", count=4)
    run = ["--train_data_dir", tmp_path / "set", "--report_to", "none"]
    train(*run, "--max_train_steps", 2, output_dir=tmp_path / "run")
    metadata = (tmp_path / "set" / "metadata.jsonl").read_text()
    (tmp_path / "set" / "metadata.jsonl").write_text(metadata.replace('"text": "a', '"text": "no', 1))
    loaded.clear()
    with pytest.raises(UserError, match="the pictures or captions are not those that it saw.*another --output_dir"):
        train(*run, "--resume_from_checkpoint", "latest", output_dir=tmp_path / "run")
    assert set(loaded) <= {"scheduler", "tokenizer"}
    (tmp_path / "set" / "metadata.jsonl").write_text(metadata)
    train(*run, "--resume_from_checkpoint", "latest", output_dir=tmp_path / "run")


def test_resuming_with_another_objective_needs_a_flag_and_warns_once(train, trained, loaded, caplog, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    changed = ["--resume_from_checkpoint", "latest", "--noise_offset", 0.1, "--max_train_steps", 3]
    with pytest.raises(UserError, match=r"--noise_offset was 0\.0, and is 0\.1\. .*--resume_with_changes"):
        train(*changed, output_dir=tmp_path)
    assert loaded == []
    train(*changed, "--resume_with_changes", output_dir=tmp_path)
    told = [record for record in caplog.records if record.name == "rasengan.resuming"]
    warnings = [record.getMessage() for record in told if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "--noise_offset was 0.0, and is 0.1" in warnings[0]


@pytest.mark.parametrize("optimizer", [["--use_8bit_adam"], ["--no-use_8bit_adam"], ["--optimizer", "prodigy"]])
def test_a_resume_with_changed_options_of_the_optimizer_goes_on_with_them(optimizer, train, tmp_path):
    whole = train(*optimizer)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    changed = ["--adam_weight_decay", 0.5, "--adam_beta1", 0.8, "--adam_epsilon", 1e-4, "--resume_with_changes"]
    train(*optimizer, *changed, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    before, after = (
        torch.load(folder / "checkpoint-4" / "optimizer.bin", weights_only=True)["param_groups"][0]
        for folder in (whole, tmp_path)
    )
    assert (after["weight_decay"], tuple(after["betas"]), after["eps"]) == (0.5, (0.8, 0.999), 1e-4)
    assert after.keys() == before.keys()
    assert bits(tmp_path) != bits(whole)


def test_resuming_with_another_global_batch_needs_a_flag(train, trained, loaded, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="a step took 2 samples, and takes 4"):
        train("--resume_from_checkpoint", "latest", "--gradient_accumulation_steps", 2, output_dir=tmp_path)
    assert loaded == []


def test_a_checkpoint_that_was_cut_is_left_out_or_refused(train, trained, caplog, tmp_path):
    for step in (2, 4):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    optimizer = tmp_path / "checkpoint-4" / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged: optimizer\.bin has 1000 bytes, not"):
        train("--resume_from_checkpoint", "checkpoint-4", output_dir=tmp_path)
    train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert f"Resuming from {tmp_path / 'checkpoint-2'}" in caplog.text
    assert bits(tmp_path) == bits(trained) == bits(tmp_path / "checkpoint-4")


def test_a_seed_that_was_drawn_is_logged(train, caplog):
    output_dir = train("--max_train_samples", 4, "--max_train_steps", 1, "--report_to", "none", without=("--seed",))
    seed = json.loads((output_dir / "args.json").read_text())["seed"]
    assert f"The seed is {seed}" in caplog.text


def test_resuming_on_another_unet_at_the_same_place_needs_a_flag(train, loaded, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    run = ["--pretrained_model_name_or_path", base, "--max_train_samples", 4, "--report_to", "none"]
    run += ["--conditioning_cache_dir", tmp_path / "cache"]
    where = {"output_dir": tmp_path / "run", "without": ("--pretrained_model_name_or_path", "--max_train_steps")}
    train(*run, "--max_train_steps", 1, **where)
    (file,) = (base / "unet").glob("*.safetensors")
    save_file({key: 1.5 * tensor for key, tensor in load_file(file).items()}, file)
    loaded.clear()
    longer = [*run, "--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match="the base is not the one that it saw.*--resume_with_changes"):
        train(*longer, **where)
    assert "unet" not in loaded
    train(*longer, "--resume_with_changes", **where)


def test_a_slash_behind_a_folder_is_no_change(train, trained, caplog, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    state = json.loads((trained / "checkpoint-2" / "trainer_state.json").read_text())
    base = ["--pretrained_model_name_or_path", f"{state['pretrained_model_name_or_path']}/"]
    train("--resume_from_checkpoint", "latest", *base, output_dir=tmp_path)
    assert "--pretrained_model_name_or_path was" not in caplog.text


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [("pytorch_lora_weights.safetensors", True), ("validation.png", True), ("README.md", True), ("peft", False)]
    + [("best", False), ("logs", False)],
)
def test_what_stands_in_the_way_of_the_adapter_is_told_before_training(name, is_folder, train, loaded, tmp_path):
    (tmp_path / name).mkdir() if is_folder else (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is a f.*, where a f.* is to be written. Move it"):
        train(output_dir=tmp_path)
    assert loaded == []


def test_a_checkpoint_whose_optimizer_state_somebody_took_out_is_refused(trained, train, tmp_path):
    path = shutil.copytree(trained / "checkpoint-2", tmp_path / "checkpoint-2")
    content = torch.load(path / "optimizer.bin", weights_only=True)
    content["state"].clear()
    torch.save(content, path / "optimizer.bin")
    (path / manifest.MANIFEST_FILE).unlink()
    manifest.write_manifest(path)
    with pytest.raises(UserError, match=r"checkpoint-2 .*optimizer\.bin: state1 is missing|step is missing"):
        train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
