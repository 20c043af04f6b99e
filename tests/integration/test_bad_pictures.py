"""Pictures and captions that cannot be used are named before anything is loaded."""

import json
import shutil

import pytest

from rasengan import UserError, demo


ADAPTER = "pytorch_lora_weights.safetensors"


# --- captions ---


def test_a_missing_caption_column_is_refused_with_those_there_are(train, refused):
    refused(r"--caption_column prompt .*columns are: image, text", train, "--caption_column", "prompt")
    refused(r"--image_column text .*not pictures", train, "--image_column", "text")


def test_pictures_without_captions_are_refused(train, refused, picture_set, tmp_path):
    shutil.copy(picture_set / "0000.jpg", tmp_path)
    refused(r"--caption_column text .*metadata\.jsonl", train, "--train_data_dir", tmp_path)


def test_metadata_that_names_a_missing_picture_is_refused(train, loaded, tmp_path):
    demo.draw_picture_set(tmp_path, count=4)
    (tmp_path / "0002.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 pictures cannot be used.*\n.*0002.png cannot be read: No such file"):
        train("--train_data_dir", tmp_path)
    assert loaded == []


# --- pictures ---


@pytest.fixture
def partly_broken(tmp_path):
    """Folder of twelve pictures, of which three are broken."""
    demo.draw_picture_set(tmp_path, count=12)
    jpeg = (tmp_path / "0003.jpg").read_bytes()
    (tmp_path / "0003.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "0004.png").write_bytes(b"this is no picture")
    (tmp_path / "0006.png").write_bytes(b"")
    return tmp_path


def test_broken_pictures_are_named_all_at_once(train, partly_broken, loaded):
    with pytest.raises(UserError) as caught:
        train("--train_data_dir", partly_broken)
    first, *others = str(caught.value).splitlines()
    assert first.startswith("3 of 12 pictures cannot be used.")
    assert "--skip_bad_images" in first
    for name, line in zip(("0003.jpg", "0004.png", "0006.png"), others, strict=True):
        assert line.startswith(f"  {partly_broken / name} ")
    assert loaded == []


def test_broken_pictures_can_be_left_out_and_are_counted(train, partly_broken, caplog):
    output_dir = train("--train_data_dir", partly_broken, "--skip_bad_images", "--max_train_steps", 2)
    assert "--skip_bad_images leaves out 3 of 12 pictures" in caplog.text
    assert "9 pictures" in caplog.text
    assert (output_dir / ADAPTER).is_file()


def test_a_folder_of_broken_pictures_alone_is_refused(train, refused, tmp_path):
    demo.draw_picture_set(tmp_path, count=2)
    for file in ("0000.jpg", "0001.png"):
        (tmp_path / file).write_bytes(b"?")
    refused("Not one picture can be used", train, "--train_data_dir", tmp_path, "--skip_bad_images")


def test_a_wrong_caption_names_its_picture(train, loaded, tmp_path):
    demo.draw_picture_set(tmp_path, count=4)
    (tmp_path / "0001.png").write_bytes(b"?")  # left out, which changes no other's place
    metadata = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    metadata[3]["text"] = None
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metadata))
    name = metadata[3]["file_name"]
    with pytest.raises(UserError, match=rf"1 of 3 captions cannot be used.*:\n  picture 3, .*{name}, has no caption"):
        train("--train_data_dir", tmp_path, "--skip_bad_images")
    assert loaded == []
