"""Pictures and metadata of every kind: each works as a person would expect, or is named before training starts."""

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rasengan import UserError, demo


ADAPTER = "pytorch_lora_weights.safetensors"
SHORT = ["--max_train_steps", 1, "--report_to", "none", "--lora_target_modules", "attn2.to_v"]


def picture(width=96, height=80, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write_set(folder: Path, names: list[str], captions: list | None = None) -> None:
    captions = captions or [f"picture {number}" for number in range(len(names))]
    lines = [json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in zip(names, captions, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def fingerprint(folder: Path) -> dict:
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- what works ---


def animated(file):
    frames = [picture().rotate(angle) for angle in (0, 90)]
    frames[0].save(file, save_all=True, append_images=frames[1:])


GOOD = {
    "cmyk.jpg": lambda file: picture(mode="CMYK").save(file),
    "grey.jpg": lambda file: picture(mode="L").save(file),
    "palette.png": lambda file: picture(mode="P").save(file, transparency=3),
    "alpha.png": lambda file: picture(mode="RGBA").save(file),
    "grey alpha.png": lambda file: picture(mode="LA").save(file),
    "one bit.png": lambda file: picture(mode="1").save(file),
    "16 bit.png": lambda file: Image.fromarray(np.arange(96 * 80, dtype=np.uint16).reshape(80, 96)).save(file),
    "animated.gif": animated,
    "animated.webp": animated,
    "animated.png": animated,
    "1x1.png": lambda file: picture(1, 1).save(file),
    "wide.png": lambda file: picture(2000, 30).save(file),
    "turned.jpg": lambda file: picture().save(
        file, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
    "a png.jpg": lambda file: picture().save(file, format="PNG"),
    "picture.bmp": lambda file: picture().save(file),
    "picture.tiff": lambda file: picture().save(file),
    "日本語 ナルト.png": lambda file: picture().save(file),
    "عربى.png": lambda file: picture().save(file),
    "😀 'quotes' \"and\" 100%.png": lambda file: picture().save(file),
    "CAPITALS.PNG": lambda file: picture().save(file, format="PNG"),
    "folder/below.png": lambda file: picture().save(file),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_picture_of_this_kind_is_trained_on_and_left_as_it_is(name, train, caplog, tmp_path):
    caplog.set_level(logging.WARNING)
    folder = tmp_path / "set"
    (folder / name).parent.mkdir(parents=True)
    GOOD[name](folder / name)
    write_set(folder, [name])
    before = fingerprint(folder)
    train(*SHORT, "--train_data_dir", folder, output_dir=tmp_path / "run")
    assert (tmp_path / "run" / ADAPTER).is_file()
    assert fingerprint(folder) == before
    assert "left out" not in caplog.text


CAPTIONS = {
    "empty": ("", "1 of 1 captions are empty, such as that of 0.png"),
    "spaces": ("  \t ", "1 of 1 captions are empty"),
    "10,000 characters": ("a \x1b[31m word " * 1000, "1 of 1 captions are longer than the 77 tokens"),
    "control characters": ("a\x00b\x1b[31m\x07\u202e star", None),
    "every script": ("ナルト Наруто ناروتو 나루토 🍥", None),
    "a list": (["one", "two"], None),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_of_this_kind_is_trained_on(kind, train, caplog, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    picture().save(folder / "0.png")
    caption, said = CAPTIONS[kind]
    write_set(folder, ["0.png"], [caption])
    train(*SHORT, "--train_data_dir", folder, output_dir=tmp_path / "run")
    assert (tmp_path / "run" / ADAPTER).is_file()
    warnings = [r.getMessage() for r in caplog.records if r.name == "rasengan.captions"]
    if said:
        assert said in warnings[0]
        assert "\x1b" not in warnings[0]
    else:
        assert not [w for w in warnings if "empty" in w]


METADATA = {
    "BOM": lambda content: b"\xef\xbb\xbf" + content,
    "CRLF": lambda content: content.replace(b"\n", b"\r\n"),
    "no last newline": lambda content: content.rstrip(b"\n"),
    "lines twice": lambda content: content * 2,
    "blank lines": lambda content: content.replace(b"\n", b"\n\n"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_of_this_kind_is_read(kind, train, tmp_path):
    demo.draw_picture_set(tmp_path / "set", count=4)
    file = tmp_path / "set" / "metadata.jsonl"
    file.write_bytes(METADATA[kind](file.read_bytes()))
    train(*SHORT, "--train_data_dir", tmp_path / "set", output_dir=tmp_path / "run")
    assert (tmp_path / "run" / ADAPTER).is_file()


# --- what is refused, by its name ---


BAD_PICTURES = {
    "zero.png": (b"", "is empty"),
    "text.jpg": (b"this is no picture", "is no picture of a known format"),
    "page.png": (b"<html><body>404 not found</body></html>", "is no picture of a known format"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture of a known format"),
    "header.png": (b"\x89PNG\r\n\x1a\n", "cannot be decoded|is no picture"),
    "header.jpg": (b"\xff\xd8\xff\xe0", "cannot be decoded|is no picture"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_file_that_is_no_picture_is_named(name, train, loaded, tmp_path):
    content, said = BAD_PICTURES[name]
    (tmp_path / name).write_bytes(content)
    check_named(train, loaded, tmp_path, name, said)


def check_named(train, loaded, folder, name, said):
    picture().save(folder / "good.png")
    write_set(folder, [name, "good.png"])
    before = fingerprint(folder)
    with pytest.raises(UserError, match=rf"1 of 2 pictures cannot be used.*--skip_bad_images:\n  .*{name} ({said})"):
        train(*SHORT, "--train_data_dir", folder)
    assert loaded == []
    assert fingerprint(folder) == before


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "gif", "tiff"])
def test_a_truncated_picture_is_named(kind, train, loaded, tmp_path):
    picture(200, 200).save(tmp_path / f"cut.{kind}")
    content = (tmp_path / f"cut.{kind}").read_bytes()
    (tmp_path / f"cut.{kind}").write_bytes(content[: len(content) * 2 // 3])
    check_named(train, loaded, tmp_path, f"cut.{kind}", "cannot be decoded|is no picture")


@pytest.mark.parametrize("side", [9500, 20000])
def test_a_decompression_bomb_is_named_and_not_unpacked(side, train, loaded, tmp_path):
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    check_named(train, loaded, tmp_path, "bomb.png", "cannot be decoded: .* pixels, and 89,478,485 are read at most")


def test_what_is_no_file_is_named_and_not_waited_for(train, loaded, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    picture().save(folder / "good.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    write_set(folder, ["good.png", "pipe.png", "device.png", "a\0.png"])
    with pytest.raises(UserError, match="3 of 4 pictures cannot be used") as error:
        train(*SHORT, "--train_data_dir", folder)
    assert all(line.endswith("cannot be read: This is no file") for line in str(error.value).splitlines()[1:])
    assert loaded == []


def test_a_file_of_gigabytes_is_named_and_not_read(train, loaded, tmp_path):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**34)
    picture().save(tmp_path / "good.png")
    write_set(tmp_path, ["sparse.png", "good.png"])
    with pytest.raises(
        UserError, match=r"sparse.png cannot be read: It has 17,179,869,184 bytes, and 1,073,741,824 are"
    ):
        train(*SHORT, "--train_data_dir", tmp_path)
    assert loaded == []


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_of_32_bits_which_say_nothing_of_white_are_named(kind, train, loaded, tmp_path):
    Image.fromarray((np.eye(64) * 200).astype(kind)).save(tmp_path / "deep.tiff")
    check_named(train, loaded, tmp_path, "deep.tiff", "cannot be decoded: its numbers have 32 bits")


BAD_METADATA = {
    "a path outside": ('{"file_name": "../secret.png", "text": "a"}', "Invalid metadata file_name '../secret.png'"),
    "an absolute path": ('{"file_name": "/etc/passwd", "text": "a"}', "Invalid metadata file_name '/etc/passwd'"),
    "an address": ('{"file_name": "http://example.org/a.png", "text": "a"}', "Invalid metadata file_name 'http:"),
    "a chained address": ('{"file_name": "zip://a::/etc/passwd", "text": "a"}', "line 1: a file's name holds ::"),
    "a CSV": ("file_name,text\ngood.png,a", "metadata.jsonl, line 1: this is no JSON"),
    "a cut line": ('{"file_name": "good.png", "te', "metadata.jsonl, line 1: this is no JSON: .* at character 27"),
    "a number for a caption": (
        '{"file_name": "good.png", "text": 5}',
        "\n  picture 0, .*good.png, has 5 in the caption column",
    ),
    "null for a caption": ('{"file_name": "good.png", "text": null}', "has no caption"),
    "an empty list for a caption": ('{"file_name": "good.png", "text": []}', "in the caption column"),
    "no caption": ('{"file_name": "good.png"}', "--caption_column text is no column"),
    "no file name": ('{"text": "a"}', "cannot be read|no column"),
    "a missing file": ('{"file_name": "none.png", "text": "a"}', "none.png cannot be read: No such file"),
    "a list": ("[1, 2]", "metadata.jsonl, line 1: this is a list, not an object in braces"),
    "UTF-16": (
        '{"file_name": "good.png", "text": "a"}'.encode("utf-16"),
        "metadata.jsonl, line 1: this is no text in UTF-8",
    ),
    "nothing": ("", "metadata.jsonl is empty. Write a line"),
    "blank lines alone": ("\n \n", "metadata.jsonl is empty. Write a line"),
    "Latin-1": (b'{"file_name": "good.png", "text": "caf\xe9"}', "metadata.jsonl, line 1: this is no text in UTF-8"),
    "a text and a list": (
        '{"file_name": "good.png", "text": "a"}\n{"file_name": "good.png", "text": ["a"]}',
        "metadata.jsonl, line 2: text is a list, and a text in line 1",
    ),
    "a broken second line": (
        '{"file_name": "good.png", "text": "a"}\n\n{"file_name" "good.png"}',
        "metadata.jsonl, line 3: this is no JSON",
    ),
    "a number of many digits": (
        f'{{"file_name": "good.png", "text": {"9" * 5000}}}',
        "has inf in the caption column|metadata.jsonl, line 1: this cannot be read",
    ),
    "a number for a name": ('{"file_name": 5, "text": "a"}', "cannot be read: |file_name 5"),
}


@pytest.mark.parametrize("kind", BAD_METADATA)
def test_metadata_of_this_kind_is_refused_in_words(kind, train, loaded, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    picture().save(folder / "good.png")
    picture().save(tmp_path / "secret.png")
    content, said = BAD_METADATA[kind]
    (folder / "metadata.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode() + b"\n")
    with pytest.raises(UserError, match=said):
        train(*SHORT, "--train_data_dir", folder, output_dir=tmp_path / "run")
    assert loaded == []
    assert not (tmp_path / "run").exists()
