"""What TensorBoard shows of a run."""

import io
import json

import pytest
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def shown(train):
    """Output folder of a run of five steps over two epochs of pictures, with pictures of two prompts."""
    return train(
        *("--max_train_samples", 4, "--max_train_steps", 5, "--checkpointing_steps", 9, "--random_flip"),
        *("--validation_prompt", "a red star", "ein blauer Kreis – ü", "--num_validation_images", 2),
        *("--validation_inference_steps", 2, "--learning_rate", 0.01),
    )


def test_every_step_has_a_loss_a_gradient_norm_a_rate_and_a_speed(shown, read_scalars):
    for name in ("train_loss", "grad_norm", "lr", "images_per_second", "host_peak_rss_gib", "peak_reserved_gib"):
        values = read_scalars(shown, name)
        assert sorted(values) == [1, 2, 3, 4, 5], name
        if name != "peak_reserved_gib":
            assert min(values.values()) > 0, name
    assert 0.1 < min(read_scalars(shown, "host_peak_rss_gib").values()) < 64  # GiB, not KiB or bytes
    assert list(read_scalars(shown, "lr").values()) == pytest.approx([0.01] * 5)


def test_losses_of_steps_between_two_readings_are_shown_too(train, read_scalars):
    output_dir = train("--max_train_samples", 4, "--max_train_steps", 5, "--logging_steps", 3)
    assert sorted(read_scalars(output_dir, "train_loss")) == [1, 2, 3, 4, 5]
    assert sorted(read_scalars(output_dir, "lr")) == [2, 4, 5]  # a checkpoint, every second step, reads them too


def test_each_validation_shows_a_grid_of_base_and_tuned_pictures(shown, read_log):
    images = read_log(shown).Images("validation")
    assert [event.step for event in images] == [2, 4, 5]  # after each epoch, and at the end
    grids = [Image.open(io.BytesIO(event.encoded_image_string)) for event in images]
    assert grids[-1].tobytes() == Image.open(shown / "validation.png").convert(grids[-1].mode).tobytes()
    assert grids[0].tobytes() != grids[-1].tobytes()
    assert grids[0].height > 4 * 256  # four rows: two prompts with two seeds each


def test_the_arguments_are_shown_as_a_table(shown, read_log):
    log = read_log(shown)
    (event,) = log.Tensors("arguments/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    settings = json.loads((shown / "args.json").read_text())
    assert "| learning_rate | 0.01 |" in table
    assert all(f"| {name} |" in table for name in settings.keys() - {"optimizer_steps"})  # no argument
    assert "hub_token" not in table


def test_the_log_can_go_elsewhere_inside_the_output_folder(train):
    output_dir = train("--logging_dir", "board", "--max_train_samples", 4, "--max_train_steps", 1)
    assert list((output_dir / "board").rglob("events.out.tfevents*"))
    assert not (output_dir / "logs").exists()


def test_report_to_none_trains_without_a_log(train):
    output_dir = train("--report_to", "none", "--max_train_samples", 4, "--max_train_steps", 1)
    assert not list(output_dir.rglob("events.out.tfevents*"))
    assert load_file(output_dir / "pytorch_lora_weights.safetensors")
