import copy
import json
import logging
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rasengan import UserError, adapter_writer, checkpoint, checkpoint_writer, manifest, optim, resuming


STATE = {"global_step": 2, "samples_seen": 4, "seed": 0, "rank": 16, "lora_target_modules": ["to_q", "to_k"]}
STATE |= {"prediction_type": None, "data_digest": "a", "noise_offset": 0.0, "snr_gamma": None, "output_dir": "here"}
WHERE = {"samples_seen": 4, "seed": 0}
STATE |= {"global_batch": 4, "max_train_steps": 4, "validation_epochs": 1}


@pytest.fixture
def saved(tmp_path):
    """A folder with the states of two checkpoints."""
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.STATE_FILE).write_text(json.dumps(STATE | {"global_step": step}))
        for name in ("optimizer.bin", "pytorch_lora_weights.safetensors"):
            (tmp_path / f"checkpoint-{step}" / name).write_bytes(b"content")
        manifest.write_manifest(tmp_path / f"checkpoint-{step}")
    return tmp_path


def test_a_fresh_run_does_not_mix_its_checkpoints_with_those_of_another(saved, tmp_path):
    with pytest.raises(UserError, match=r"2 checkpoints .* checkpoint-10\..*--resume_from_checkpoint latest.*another"):
        checkpoint.find_checkpoint(saved, None)
    assert checkpoint.find_checkpoint(saved, "latest") == saved / "checkpoint-10"
    assert checkpoint.last_name(saved) == "checkpoint-10"


def test_the_checkpoints_of_other_programs_are_not_mixed_with(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "optimizer.bin").write_bytes(b"of diffusers' example")
    for name in (None, "latest", "checkpoint-500"):
        with pytest.raises(
            UserError, match="holds checkpoint-500, which has neither .*: another program wrote it.*Move"
        ):
            checkpoint.find_checkpoint(tmp_path, name)
    assert checkpoint.last_name(tmp_path) == ""


def test_an_empty_folder_of_a_checkpoint_is_left_out(saved, caplog):
    (saved / "checkpoint-40").mkdir()  # of a mounted Drive that has the folder, and not yet what is in it
    (saved / "checkpoint-1").mkdir()
    assert checkpoint.find_checkpoint(saved, "latest") == saved / "checkpoint-10"
    assert "checkpoint-40 is left out, since it is empty" in caplog.text
    assert checkpoint.find_checkpoint(saved, "checkpoint-10") == saved / "checkpoint-10"
    assert checkpoint.last_name(saved) == "checkpoint-10"


def test_an_earlier_checkpoint_is_not_gone_on_with_beside_the_later_ones(saved, tmp_path_factory):
    assert checkpoint.find_checkpoint(saved, "checkpoint-10") == saved / "checkpoint-10"
    with pytest.raises(UserError, match="checkpoint-2 is not the last one: checkpoint-10 is there too"):
        checkpoint.find_checkpoint(saved, "checkpoint-2")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "checkpoint-10"
    elsewhere.mkdir()
    with pytest.raises(UserError, match="there is no such checkpoint in"):
        checkpoint.find_checkpoint(saved, str(elsewhere))
    assert checkpoint.find_checkpoint(saved, str(saved / "checkpoint-10")) == saved / "checkpoint-10"


@pytest.mark.parametrize(
    "content", ["", '{"global_step": 2,', "[]", '{"global_step": 2}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_state_is_an_error_with_the_remedy(saved, content):
    file = saved / "checkpoint-10" / checkpoint.STATE_FILE
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"{file.parent} is damaged: {file.name}: .*Remove it, and resume") as error:
        checkpoint.read_state(file.parent)
    assert "\n" not in str(error.value)


def cut(folder):
    file = folder / checkpoint.STATE_FILE
    file.write_bytes(file.read_bytes()[:-1])


def change(folder):
    file = folder / checkpoint.STATE_FILE
    file.write_text(file.read_text().replace("16", "17"))


DAMAGE = {
    "trainer_state.json has": cut,
    "trainer_state.json has other content than was written": change,
    "trainer_state.json is missing": lambda folder: (folder / checkpoint.STATE_FILE).unlink(),
    "manifest.json is missing": lambda folder: (folder / manifest.MANIFEST_FILE).unlink(),
    "optimizer.bin is missing": lambda folder: (folder / "optimizer.bin").unlink(),
    "more.bin is not in manifest.json": lambda folder: (folder / "more.bin").touch(),
    "/dev/zero is missing": lambda folder: (folder / manifest.MANIFEST_FILE).write_text('{"/dev/zero": [0, "x"]}'),
    "../checkpoint-2/optimizer.bin is missing": lambda folder: (folder / manifest.MANIFEST_FILE).write_text(
        '{"../checkpoint-2/optimizer.bin": [7, "x"]}'
    ),
    "optimizer.bin is not in manifest.json": lambda folder: (folder / manifest.MANIFEST_FILE).write_text("{}"),
    "manifest.json is damaged": lambda folder: (folder / manifest.MANIFEST_FILE).write_text("[1]"),
}
BRACKETS = "[" * 100_000
TOO_LARGE = '{"optimizer.bin": [1e999, "x"]}'
DAMAGE |= {
    "manifest.json is": lambda folder: (folder / manifest.MANIFEST_FILE).write_text(TOO_LARGE),
    "manifest.json": lambda folder: (folder / manifest.MANIFEST_FILE).write_text(BRACKETS),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_latest_leaves_out_what_is_damaged_and_says_why(saved, words, caplog):
    DAMAGE[words](saved / "checkpoint-10")
    assert checkpoint.find_checkpoint(saved, "latest") == saved / "checkpoint-2"
    assert f"checkpoint-10 is left out, since it is damaged: {words}" in caplog.text
    with pytest.raises(UserError, match=f"checkpoint-10 is damaged: {words}.*the one before it"):
        checkpoint.find_checkpoint(saved, "checkpoint-10")


def test_a_checkpoint_under_another_number_is_left_out(saved, caplog):
    (saved / "checkpoint-10").rename(saved / "checkpoint-60")
    (saved / "checkpoint-007").mkdir()
    (saved / "checkpoint-007" / checkpoint.STATE_FILE).write_text("{}")
    assert checkpoint.find_checkpoint(saved, "latest") == saved / "checkpoint-2"
    assert (
        "checkpoint-60 is left out, since it is damaged: trainer_state.json says that it is of step 10" in caplog.text
    )


def test_hidden_files_of_file_managers_and_editors_are_no_damage(saved):
    for name in ("desktop.ini", "Thumbs.db", "optimizer (1).bin", "trainer_state (12).json"):
        (saved / "checkpoint-10" / name).write_bytes(b"\0")
    (saved / "checkpoint-10" / ".DS_Store").write_bytes(b"\0")
    (saved / "checkpoint-10" / ".ipynb_checkpoints").mkdir()
    (saved / "checkpoint-10" / ".ipynb_checkpoints" / "trainer_state-checkpoint.json").write_text("{}")
    assert checkpoint.find_checkpoint(saved, "latest") == saved / "checkpoint-10"


def test_where_all_are_damaged_nothing_starts_afresh(saved):
    for step in (2, 10):
        cut(saved / f"checkpoint-{step}")
    with pytest.raises(UserError, match=r"Every checkpoint .* is damaged \(checkpoint-2, checkpoint-10\)"):
        checkpoint.find_checkpoint(saved, "latest")


def test_what_the_weights_hang_on_must_be_the_same(saved):
    path = saved / "checkpoint-2"
    resuming.check_resumable(path, STATE | {"lora_target_modules": ["to_k", "to_q"], "prediction_type": "epsilon"})
    resuming.check_resumable(path, {"prediction_type": None})
    for changes, words in (
        ({"rank": 4}, "--rank was 16, and is 4"),
        ({"lora_target_modules": ["to_q"]}, "--lora_target_modules was"),
        ({"data_digest": "b"}, "the pictures or captions are not those that it saw"),
    ):
        with pytest.raises(UserError, match=f"cannot be resumed with other settings: {words}.*another --output_dir"):
            resuming.check_resumable(path, STATE | changes)


def with_state(path, **more):
    """Rewrite a checkpoint's state with more settings, and return all of them."""
    file = path / checkpoint.STATE_FILE
    state = json.loads(file.read_text()) | more
    file.write_text(json.dumps(state))
    return state


def test_each_difference_is_listed_whatever_becomes_of_it(saved, caplog):
    caplog.set_level(logging.INFO)
    path = saved / "checkpoint-2"
    places = {"output_dir": "a", "cache_dir": None, "conditioning_cache_dir": "a", "logging_dir": "a", "config": "a"}
    places |= {"local_rank": -1, "plan_only": False, "resume_from_checkpoint": None, "resume_with_changes": False}
    free = {"train_batch_size": 4, "cuda_graph": True, "validation_epochs": 1}
    before = with_state(path, **free, **places, hub_token="secret")
    moved = dict.fromkeys([*places, "hub_token"], "secret too")
    changed = before | moved | {"train_batch_size": 2, "cuda_graph": False, "rank": 4, "noise_offset": 0.1}
    for allow_changes in (False, True):
        caplog.clear()
        with pytest.raises(UserError, match=r"cannot be resumed with .*: --rank was 16, and is 4\. ") as error:
            resuming.check_resumable(path, changed, allow_changes)
        allowed = "And only --resume_with_changes allows this: --noise_offset was 0.0, and is 0.1."
        assert str(error.value).endswith(allowed if not allow_changes else "another --output_dir.")
        assert "--cuda_graph was True, and is False" in caplog.text
        assert "--train_batch_size was 4, and is 2" in caplog.text
        assert "--noise_offset was 0.0, and is 0.1" in caplog.text or not allow_changes
        assert "secret" not in caplog.text
        assert "secret" not in str(error.value)
        assert "validation_epochs" not in caplog.text
    caplog.clear()
    resuming.check_resumable(path, before | moved)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("seed", value) for value in (-1, 2**32, 2**40, True, 1.0)],
        *[("global_step", value) for value in (-1, "2", None, False)],
        *[("samples_seen", value) for value in (-8, None)],
        *[("validation_losses", value) for value in ("x", {}, [1])],
        *[
            ("validation_losses", dict(zip(("base", "last", "best", "best_step"), values, strict=True)))
            for values in (("x", 1, 1, 1), (0, 0, 0, 0), (10**400, 1, 1, 1), (None, 1, 1, None), (1, 1, math.nan, 1))
        ],
    ],
)
def test_a_state_that_no_run_writes_is_damage(saved, name, value):
    path = saved / "checkpoint-2"
    with_state(path, **{name: value})
    with pytest.raises(UserError, match=rf"checkpoint-2 is damaged: trainer_state\.json: .*{name}"):
        checkpoint.read_state(path)


@pytest.mark.parametrize(
    "losses",
    [
        (1.0, math.nan, 0.9, 3),  # a run that went wrong after step 3
        (math.nan, math.nan, None, None),  # a base that overflows
        (1.0, math.inf, 1e31, 0),
        (None, None, None, None),
    ],
)
def test_what_a_run_that_went_wrong_has_measured_is_no_damage(saved, losses):
    record = dict(zip(("base", "last", "best", "best_step"), losses, strict=True))
    with_state(saved / "checkpoint-2", validation_losses=record)
    assert checkpoint.read_state(saved / "checkpoint-2")["validation_losses"].keys() == record.keys()


def test_the_bounds_of_a_state_are_no_damage(saved):
    with_state(saved / "checkpoint-2", seed=2**32 - 1, global_step=0, samples_seen=0)
    assert checkpoint.read_state(saved / "checkpoint-2")["seed"] == 2**32 - 1


def test_other_changed_settings_need_a_flag_and_are_listed(saved, caplog):
    path = saved / "checkpoint-2"
    with caplog.at_level(logging.WARNING):
        resuming.check_resumable(path, STATE | {"output_dir": "there", "max_train_steps": 9, "validation_epochs": 3})
    assert caplog.records == []
    changed = STATE | {"noise_offset": 0.1, "snr_gamma": 5.0, "global_batch": 8}
    listed = (
        "--noise_offset was 0.0, and is 0.1; --snr_gamma was not given, and is 5.0; a step took 4 samples, and takes 8"
    )
    with pytest.raises(UserError, match=f"{listed}.*--resume_with_changes"):
        resuming.check_resumable(path, changed)
    resuming.check_resumable(path, changed, allow_changes=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert listed in record.getMessage()
    with pytest.raises(UserError, match="--rank was 16, and is 4"):
        resuming.check_resumable(path, STATE | {"rank": 4}, allow_changes=True)


def test_a_base_may_move_where_its_digest_is_known_and_what_is_idle_may_change(saved, caplog):
    caplog.set_level(logging.INFO)
    path, moved = saved / "checkpoint-2", {"pretrained_model_name_or_path": "b", "pretrained_unet_name_or_path": "u"}
    before = with_state(path, pretrained_model_name_or_path="a", pretrained_unet_name_or_path=None, lr_power=1.0)
    with pytest.raises(UserError, match="--pretrained_model_name_or_path was a, and is b.*--resume_with_changes"):
        resuming.check_resumable(path, before | moved)
    before = with_state(path, base_digest="one")
    resuming.check_resumable(path, before | moved)
    assert "which may change: --pretrained_model_name_or_path was a, and is b" in caplog.text
    with pytest.raises(UserError, match="the base is not the one that it saw.*--resume_with_changes"):
        resuming.check_resumable(path, before | moved | {"base_digest": "two"})
    with pytest.raises(UserError, match="--lr_power was 1.0, and is 2.0.*--resume_with_changes"):
        resuming.check_resumable(path, before | {"lr_power": 2.0})
    resuming.check_resumable(path, before | {"lr_power": 2.0}, idle=["lr_power"])
    before = with_state(path, bucket_step_px=64)
    with pytest.raises(UserError, match="--bucket_step_px was 64, and is 32"):
        resuming.check_resumable(path, before | {"bucket_step_px": 32})
    resuming.check_resumable(path, before | {"bucket_step_px": 32}, idle=["bucket_step_px"])


def test_with_dropout_a_step_that_is_split_otherwise_needs_the_flag(saved):
    path = saved / "checkpoint-2"
    before = with_state(path, train_batch_size=4, lora_dropout=0.0)
    resuming.check_resumable(path, before | {"train_batch_size": 2})
    before = with_state(path, lora_dropout=0.5)
    with pytest.raises(UserError, match="--train_batch_size was 4, and is 2.*--resume_with_changes"):
        resuming.check_resumable(path, before | {"train_batch_size": 2})


def test_with_dropout_a_plan_that_takes_other_samples_at_once_needs_the_flag(saved):
    path = saved / "checkpoint-2"
    with_state(path, memory_plan=[4, 0, 1])
    resuming.check_samples_at_once(path, 4)
    with pytest.raises(UserError, match="took 4 samples at once, and this takes 2.*--resume_with_changes"):
        resuming.check_samples_at_once(path, 2)
    with_state(path, memory_plan=None)
    resuming.check_samples_at_once(path, 2)


@pytest.mark.parametrize("plan", [5, {"a": 1}, [], [0, 0, 1], [1, 2], ["1", 0, 1], "abc"])
def test_a_memory_plan_that_is_none_is_damage(saved, plan):
    path = saved / "checkpoint-2"
    with_state(path, memory_plan=plan)
    with pytest.raises(UserError, match="checkpoint-2 is damaged: trainer_state.json: "):
        checkpoint.read_state(path)


@pytest.mark.parametrize(("schedule", "listed"), [("constant", False), ("cosine", True)])
def test_a_longer_run_is_listed_where_its_schedule_decays(saved, caplog, schedule, listed):
    settings = STATE | {"total_steps": 200, "lr_scheduler": schedule}
    state = STATE | {"total_steps": 100, "lr_scheduler": schedule}
    (saved / "checkpoint-2" / checkpoint.STATE_FILE).write_text(json.dumps(state))
    resuming.check_resumable(saved / "checkpoint-2", settings)
    assert ("the run was to have 100 steps, and is to have 200" in caplog.text) == listed


def test_a_setting_that_nobody_classed_needs_the_flag(saved):
    (saved / "checkpoint-2" / checkpoint.STATE_FILE).write_text(json.dumps(STATE | {"new": 1}))
    with pytest.raises(UserError, match="--new was 1, and is 2"):
        resuming.check_resumable(saved / "checkpoint-2", STATE | {"new": 2})


@pytest.mark.parametrize(
    ("skipped", "total_steps", "said"),
    [
        (0, 3, []),
        (4, 3, ["The 4 steps before it had no finite gradient: its weights may be ruined"]),
        (0, 2, ["It has 2 steps of 2 already: nothing is left to train"]),
    ],
)
def test_a_run_that_goes_on_says_from_where_and_what_may_be_wrong(skipped, total_steps, said, caplog):
    caplog.set_level(logging.INFO, "rasengan")
    state = {"global_step": 2, "skipped_in_a_row": skipped}
    resuming.say_resumed(Path("here/checkpoint-2"), state, total_steps)
    assert caplog.messages == ["Resuming from here/checkpoint-2", *said]


# --- writing ---


def test_an_old_checkpoint_that_lies_elsewhere_loses_its_link_alone(run, tmp_path):
    (tmp_path / "run").mkdir()
    writer = checkpoint_writer.CheckpointWriter(tmp_path / "run", 1, **run)
    elsewhere = tmp_path / "elsewhere"
    writer.save(1, WHERE)
    writer.wait()
    (tmp_path / "run" / "checkpoint-1").rename(elsewhere)
    (tmp_path / "run" / "checkpoint-1").symlink_to(elsewhere)
    writer.save(2, WHERE)
    writer.finish()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert checkpoint.find_damage(elsewhere) is None


def test_what_is_written_is_of_the_moment_of_the_call(run, tmp_path):
    writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **run)
    weights = run["flat"].detach().clone()
    path = writer.save(1, WHERE)
    with torch.no_grad():
        run["flat"].add_(1.0)  # the next step, while it is written
    run["optimizer"].step()
    writer.wait()
    assert checkpoint.find_damage(path) is None
    saved = load_file(path / "pytorch_lora_weights.safetensors")
    assert torch.equal(torch.cat([tensor.flatten() for tensor in saved.values()]), weights)
    optimizer = torch.load(path / "optimizer.bin", weights_only=True)
    assert optimizer["state"][0]["step"] == 1


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "optimizer.bin", "trainer_state.json"])
def test_a_checkpoint_that_reads_otherwise_than_it_was_written_is_none(name, run, tmp_path, monkeypatch):
    """The disk's own mistake, made before the manifest is: its digests alone would agree with it."""
    writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **run)
    writer.save(1, WHERE)
    writer.wait()
    write = checkpoint_writer.write_manifest

    def damage_and_write(folder, written):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        write(folder, written)

    if name.endswith(".safetensors"):  # which is compared as soon as it is there
        save = adapter_writer.write_diffusers

        def save_and_flip(folder, adapter):
            save(folder, adapter)
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

        monkeypatch.setattr(adapter_writer, "write_diffusers", save_and_flip)
    else:
        monkeypatch.setattr(checkpoint_writer, "write_manifest", damage_and_write)
    writer.save(2, WHERE | {"global_step": 2})
    with pytest.raises(UserError, match="checkpoint-2 cannot be written: .* reads otherwise"):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def kept_best(folder):
    saved = load_file(folder / "best" / "pytorch_lora_weights.safetensors")
    values = torch.cat([tensor.flatten() for tensor in saved.values()])
    return values, json.loads((folder / "best" / "best.json").read_text())


@pytest.mark.parametrize("has_average", [False, True])
def test_the_best_is_the_adapter_of_the_moment_or_its_average(has_average, run, tmp_path):
    run["ema"] = optim.make_ema(run["flat"], 0.9) if has_average else None
    begun = run["flat"].detach().clone()
    writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **run)
    with torch.no_grad():
        run["flat"].add_(1.0)
        writer.save_best(3, 0.5)
        run["flat"].add_(1.0)  # the next step, while it is written
    writer.wait()
    values, said = kept_best(tmp_path)
    assert torch.equal(values, begun if has_average else begun + 1)
    assert said == {"step": 3, "loss": 0.5}
    assert {path.name for path in tmp_path.iterdir()} == {"best"}


def test_a_best_that_reads_otherwise_than_it_was_written_leaves_the_former(run, tmp_path, monkeypatch):
    writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **run)
    writer.save_best(3, 0.5)
    writer.wait()
    values, said = kept_best(tmp_path)
    write = adapter_writer.write_diffusers

    def flip(folder, adapter):
        write(folder, adapter)
        file = folder / "pytorch_lora_weights.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(adapter_writer, "write_diffusers", flip)
    writer.save_best(4, 0.4)
    with pytest.raises(UserError, match="best cannot be written: what was written of the adapter reads otherwise"):
        writer.wait()
    assert torch.equal(kept_best(tmp_path)[0], values)
    assert kept_best(tmp_path)[1] == said
    assert {path.name for path in tmp_path.iterdir()} == {"best"}


def test_a_checkpoint_that_says_another_alpha_than_was_trained_with_is_none(run, tmp_path, monkeypatch):
    write = adapter_writer.write_diffusers

    def write_weaker(folder, adapter):
        configs = {name: copy.copy(config) for name, config in adapter.configs.items()}
        configs["unet"].lora_alpha /= 2
        write(folder, adapter._replace(configs=configs))

    monkeypatch.setattr(adapter_writer, "write_diffusers", write_weaker)
    writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **run)
    writer.save(1, WHERE)
    with pytest.raises(UserError, match="checkpoint-1 cannot be written: .* reads otherwise"):
        writer.wait()
    assert list(tmp_path.iterdir()) == []


def test_only_so_many_are_kept_and_one_more_until_the_run_has_ended_well(run, tmp_path):
    writer = checkpoint_writer.CheckpointWriter(tmp_path, 2, **run)
    for step in (1, 2, 9, 10):
        writer.save(step, WHERE)
    writer.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-9", "checkpoint-10"}
    writer.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-9", "checkpoint-10"}


def test_a_run_that_has_ended_keeps_a_good_one_and_removes_none_of_another_run(run, tmp_path):
    writer = checkpoint_writer.CheckpointWriter(tmp_path, 1, **run)
    for step in (2, 9):
        writer.save(step, WHERE)
    writer.wait()
    (tmp_path / "checkpoint-9" / "optimizer.bin").unlink()
    writer.check_held = lost
    with pytest.raises(UserError, match="taken over"):
        writer.finish()
    assert len(checkpoint.list_checkpoints(tmp_path)) == 2
    writer.check_held = lambda: None
    writer.finish()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_damaged_ones_that_a_resume_left_out_go_before_good_ones(run, tmp_path):
    writer = checkpoint_writer.CheckpointWriter(tmp_path, 1, **run)
    for step in (2, 9):
        writer.save(step, WHERE)
        writer.wait()
    (tmp_path / "checkpoint-9" / "optimizer.bin").unlink()
    assert checkpoint.find_checkpoint(tmp_path, "latest").name == "checkpoint-2"
    writer.save(4, WHERE)
    writer.wait()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_a_failed_write_is_told_also_by_a_run_that_ends_otherwise(run, tmp_path, caplog):
    (tmp_path / "drive").mkdir()
    writer = checkpoint_writer.CheckpointWriter(tmp_path / "drive", None, **run)
    (tmp_path / "drive").rmdir()
    writer.save(1, WHERE)
    writer.close()
    assert "checkpoint-1 cannot be written" in caplog.text


def test_a_write_that_fails_is_told_at_the_next_step_and_leaves_the_others(run, tmp_path):
    writer = checkpoint_writer.CheckpointWriter(tmp_path, 1, **run)
    writer.save(1, WHERE)
    writer.wait()
    (tmp_path / ".saving-2").write_text("in the way")  # as a disk that takes no folder
    writer.save(2, WHERE)
    while not writer.pending.done():
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"checkpoint-2 cannot be written: .*It takes .* KiB, and .*B are free there"):
        writer.check()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert checkpoint.find_damage(tmp_path / "checkpoint-1") is None
    writer.check()  # told once


def test_a_folder_that_vanished_is_not_made_again(run, tmp_path):
    folder = tmp_path / "drive"
    folder.mkdir()
    writer = checkpoint_writer.CheckpointWriter(folder, None, **run)
    folder.rmdir()
    writer.save(1, WHERE)
    with pytest.raises(UserError, match="checkpoint-1 cannot be written: No such file or directory"):
        writer.wait()
    assert not folder.exists()


def lost():
    raise UserError("taken over")


def test_nothing_is_written_into_a_folder_that_another_run_took(run, tmp_path):
    writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **run, check_held=lost)
    for save in (lambda: writer.save(1, WHERE), lambda: writer.save_best(1, 0.5)):
        with pytest.raises(UserError, match="taken over"):
            save()
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_whole_checkpoint_is_not_written_again_and_a_damaged_one_is(run, tmp_path):
    writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **run)
    path = writer.save(1, WHERE)
    writer.wait()
    before = (path / "optimizer.bin").stat().st_mtime_ns
    writer.save(1, WHERE)
    writer.wait()
    assert (path / "optimizer.bin").stat().st_mtime_ns == before
    (path / "optimizer.bin").write_bytes(b"damaged")
    writer.save(1, WHERE)
    writer.wait()
    assert checkpoint.find_damage(path) is None


def test_a_file_for_which_there_is_no_room_says_so_at_its_end_and_not_inside_of_torch_save():
    file = manifest.HashedFile(Path("/dev/full"))
    torch.save({"state": torch.zeros(10**6)}, file)
    with pytest.raises(OSError, match="No space left on device"):
        file.close()


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        ({}, True),
        ({"vram_budget_gib": 6.0}, True),
        ({"vram_budget_gib": 12.0}, False),
        ({"vram_budget_gib": 4.0}, False),
        ({"resume_with_changes": True}, False),
        ({"card": "another"}, False),
    ],
)
def test_which_plan_a_resume_keeps(changes, is_kept):
    state = {"card": "a card", "vram_budget_gib": 6.0, "memory_plan": [2, 7, 5 * 2**30]}
    settings = {"vram_budget_gib": None, "resume_with_changes": False} | changes
    kept = resuming.plan_to_keep(state, settings, changes.get("card", "a card"))
    assert kept == (state["memory_plan"] if is_kept else None)


def test_a_budget_that_is_given_for_the_first_time_is_planned_for():
    state = {"card": "a card", "vram_budget_gib": None, "memory_plan": [2, 7, 5 * 2**30]}
    assert resuming.plan_to_keep(state, {"vram_budget_gib": 6.0, "resume_with_changes": False}, "a card") is None
