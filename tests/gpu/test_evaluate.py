import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_losses_in_fp16_are_what_training_logged(run_script, train_arguments, tmp_path):
    split = ["--max_train_samples", 9, "--validation_split", 3, "--validation_loss_steps", 8]
    steps = ["--max_train_steps", 16, "--mixed_precision", "fp16"]
    finished = run_script("train_lora_sdxl", *train_arguments, *steps, *split, "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stderr
    few = ["--num_pictures", 2, "--num_inference_steps", 2]
    finished = run_script("evaluate", "--lora_weights", tmp_path, "--checkpoints", *few)
    assert finished.returncode == 0, finished.stderr

    log = EventAccumulator(str(tmp_path / "logs" / "text2image-fine-tune"))
    log.Reload()
    logged = {event.step: event.value for event in log.Scalars("validation_loss")}
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["loss"]["held_out"]
    # fp16 rounds the merged weights once, and training's adapter products otherwise.
    assert found["base"]["validation_loss"] == pytest.approx(logged[0], rel=1e-4)
    assert found["tuned"]["validation_loss"] == pytest.approx(logged[16], rel=2e-3)
