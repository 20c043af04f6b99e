import json
import logging

import pytest

from rasengan import UserError, checkpoint


STATE = {"global_step": 2, "samples_seen": 4, "seed": 0, "rank": 16, "lora_target_modules": ["to_q", "to_k"]}
STATE |= {"prediction_type": None, "data_digest": "a", "noise_offset": 0.0, "snr_gamma": None, "output_dir": "here"}


@pytest.fixture
def saved(tmp_path):
    """A folder with the states of two checkpoints, and with one of another program."""
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.STATE_FILE).write_text(json.dumps(STATE))
    (tmp_path / "checkpoint-500").mkdir()
    return tmp_path


def test_a_fresh_run_does_not_mix_its_checkpoints_with_those_of_another(saved, tmp_path):
    with pytest.raises(UserError, match=r"2 checkpoints .* checkpoint-10\..*--resume_from_checkpoint latest.*another"):
        checkpoint.find_checkpoint(saved, None)
    assert checkpoint.find_checkpoint(saved, "latest") == saved / "checkpoint-10"
    assert checkpoint.last_name(saved) == "checkpoint-10"


def test_folders_of_other_programs_are_no_checkpoints(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    assert checkpoint.find_checkpoint(tmp_path, None) is None
    assert checkpoint.last_name(tmp_path) == ""


def test_an_earlier_checkpoint_by_name_warns_of_the_later_ones(saved, caplog):
    checkpoint.find_checkpoint(saved, "checkpoint-10")
    assert caplog.text == ""
    assert checkpoint.find_checkpoint(saved, "checkpoint-2") == saved / "checkpoint-2"
    assert "checkpoint-10 is there too" in caplog.text


@pytest.mark.parametrize("content", ["", '{"global_step": 2,', "[]", '{"global_step": 2}', b"\xff\xfe"])
def test_a_damaged_state_is_an_error_with_the_remedy(saved, content):
    file = saved / "checkpoint-10" / checkpoint.STATE_FILE
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"{file} is damaged: .*Remove {file.parent}, and resume from") as error:
        checkpoint.read_state(file.parent)
    assert "\n" not in str(error.value)


def test_what_the_weights_hang_on_must_be_the_same(saved):
    path = saved / "checkpoint-2"
    checkpoint.check_resumable(path, STATE | {"lora_target_modules": ["to_k", "to_q"], "prediction_type": "epsilon"})
    checkpoint.check_resumable(path, {"prediction_type": None})
    for changes, words in (
        ({"rank": 4}, "--rank was 16, and is 4"),
        ({"lora_target_modules": ["to_q"]}, "--lora_target_modules was"),
        ({"data_digest": "b"}, "the pictures or captions are not those that it saw"),
    ):
        with pytest.raises(UserError, match=f"cannot be resumed with other settings: {words}.*another --output_dir"):
            checkpoint.check_resumable(path, STATE | changes)


def test_other_changed_settings_are_warned_of_once(saved, caplog):
    path = saved / "checkpoint-2"
    checkpoint.check_resumable(path, STATE | {"output_dir": "there"})
    assert caplog.records == []
    checkpoint.check_resumable(path, STATE | {"noise_offset": 0.1, "snr_gamma": 5.0})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "--snr_gamma was None, and is 5.0; --noise_offset was 0.0, and is 0.1" in record.getMessage()
