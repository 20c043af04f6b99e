import errno
import io
import json
import os
import random
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm.auto import tqdm

from rasengan import UserError, captions, components, data, demo, imaging, miniature
from rasengan.loader import collate
from rasengan.samples import TrainingSamples, first_batch, sample_stream


RES = 32
PILLOW_FILTERS = {"lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5, "nearest": 0, "nearest_exact": 0}


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def load_folder(folder, cache_dir, image_column="image", caption_column="text"):
    return data.load_pictures(None, None, str(folder), image_column, caption_column, str(cache_dir))


@pytest.fixture(scope="module")
def dataset(picture_set, tmp_path_factory):
    return load_folder(picture_set, tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def pictures(dataset, tmp_path_factory):
    return imaging.inspect_pictures(dataset["image"], tmp_path_factory.mktemp("memory"))


@pytest.fixture
def make_samples(dataset, pictures):
    def make(**changes):
        options = {
            "seed": 0,
            "sizes": [(RES, RES)],
            "interpolation": "lanczos",
            "center_crop": True,
            "noise_offset": 0.0,
        }
        options |= {"random_flip": False, "scaling_factor": 0.5, "num_train_timesteps": 1000}
        options |= {"latents": None, "prompts": None, "captions": [[text] for text in dataset["text"][:]]} | changes
        return TrainingSamples(dataset["image"], pictures, **options)

    return make


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k] for k, v in one.items())


# --- captions ---


def test_a_long_caption_is_seen_to_the_last_token_before_the_end(tiny_base):
    tokenizer = components.load("tokenizer", tiny_base / "tokenizer")
    assert len(tokenizer("word word").input_ids) == 2 + 2 * 3  # begin and end, and three tokens a word
    texts = [["word " * 30], ["short", "word " * 25, "word " * 40], ["word " * 26]]
    pictures = [imaging.Picture(f"{number}.png", "", 8, 8, None) for number in range(3)]
    found = captions.find_long_captions(texts, pictures, tokenizer)
    assert [(one.name, one.token_count) for one in found] == [("1.png", 122), ("0.png", 92), ("2.png", 80)]
    for one, words in zip(found, (40, 30, 26), strict=True):
        assert one.seen.split() == ["word"] * 25
        assert one.unseen.split() == ["word"] * (words - 25)


@pytest.mark.parametrize(
    "words", ["🦊" * 40, "é猫🦊" * 20, "a " + "🦊" * 40, "ab " + "🦊" * 40, "\ufffd🦊" * 30], ids=range(5)
)
def test_a_long_caption_is_cut_between_whole_characters(words):
    tokenizer = components.load("tokenizer", miniature.ASSETS / "miniature" / "tokenizer")
    (found,) = captions.find_long_captions([[words]], [imaging.Picture("1.png", "", 8, 8, None)], tokenizer)
    assert found.seen
    assert words.replace(" ", "") == (found.seen + found.unseen).replace(" ", "")


# --- files of formats that are not known ---

COMPANIONS = ["README", "README.md", "LICENSE", "info.json", "tags.csv", "a.npz", "a.caption", "Thumbs.db"]
COMPANIONS += ["a.safetensors", "notes.txt", ".DS_Store", "dataset.toml", "desktop.ini", "train.log"]


def test_files_of_no_known_format_are_told_of_and_their_captions_are_no_strays(tmp_path, caplog):
    for name in ("a.png", "b.png"):
        noise_image(20, 30).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("fine")
    unknown = ["photo.heic", "noext", "tw.jpg_large", "print.eps"]
    for name in [*unknown, *COMPANIONS]:
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "photo.txt").write_text("of a picture that cannot be read")
    files = data.list_files(str(tmp_path))
    assert [file.name for file in captions.find_beside(files).strays] == ["notes.txt"]
    assert {file.name for file in captions.unknown_files(files)} == set(unknown)
    assert read(tmp_path, tmp_path / "cache") == [["fine"], ["fine"]]
    assert "4 files of" in caplog.text
    assert "of a known format, and are left out: noext, photo.heic, print.eps, tw.jpg_large. Convert" in caplog.text


def test_a_folder_of_unknown_formats_alone_is_refused_by_their_names(tmp_path):
    for name in ("photo.heic", "other.heic"):
        (tmp_path / name).write_bytes(b"?")
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    said = r"holds no pictures of a known format, but 2 other files: other\.heic, photo\.heic\. Convert them to"
    with pytest.raises(UserError, match=said):
        load_folder(tmp_path, tmp_path / "cache")


# --- sizes and crops, after torchvision's formulas ---


def torchvision_size(height, width, size):
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    return new_height, new_width


def test_sizes_and_center_crops_are_torchvisions():
    rng = random.Random(0)
    for _ in range(2000):
        height, width, size = rng.randint(1, 3000), rng.randint(1, 3000), rng.choice([64, 512, 1000, 1024])
        new = torchvision_size(height, width, size)
        assert imaging.resized_size(height, width, (size, size)) == new
        assert imaging.center_crop_top_left(new, (size, size)) == tuple(
            int(round((side - size) / 2.0)) for side in new
        )
    assert imaging.resized_size(768, 1024, (512, 512)) == (512, 682)
    assert imaging.center_crop_top_left((512, 682), (512, 512)) == (0, 85)
    assert [imaging.center_crop_top_left((side, 64), (64, 64))[0] for side in (65, 67, 69, 71)] == [
        0,
        2,
        2,
        4,
    ]  # half to even


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", PILLOW_FILTERS)
def test_cropped_pixels_are_those_of_plain_pillow_and_numpy(name, flip):
    assert imaging.INTERPOLATIONS.keys() == PILLOW_FILTERS.keys()
    for size in ((100, 61), (61, 100), (50, 50), (20, 27)):
        image = noise_image(*size)
        height, width = torchvision_size(image.height, image.width, RES)
        pixels = np.asarray(image.resize((width, height), PILLOW_FILTERS[name]))
        top, left = height - RES, (width - RES) // 3
        pixels = (pixels[:, ::-1] if flip else pixels)[top : top + RES, left : left + RES]
        expected = torch.tensor((pixels / 255 - 0.5) / 0.5, dtype=torch.float32).permute(2, 0, 1)
        result = imaging.crop_pixels(image, (RES, RES), name, flip, (top, left))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


# --- decoding ---


def test_transparency_is_laid_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 3] = np.arange(0, 256, 17).reshape(4, 4)  # black, ever less transparent
    pixels = np.asarray(imaging.decode(encoded(Image.fromarray(rgba))))
    assert np.abs(pixels.astype(int) - (255 - rgba[..., 3:])).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert np.asarray(imaging.decode(encoded(palette, transparency=0))).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    gray = Image.fromarray(np.array([[[0, 0], [40, 255]]], np.uint8), "LA")
    assert np.asarray(imaging.decode(encoded(gray))).tolist() == [[[255, 255, 255], [40, 40, 40]]]


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (2, 201)])
def test_a_strip_that_would_be_scaled_to_gigabytes_is_refused(size):
    with pytest.raises(ValueError, match=f"it has {size[0]} x {size[1]} px, one side more than 100 times the other"):
        imaging.decode(encoded(Image.new("RGB", size)))
    assert imaging.decode(encoded(Image.new("RGB", (2, 200)))).size == (2, 200)


def test_postscript_is_no_picture_whatever_its_name():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with pytest.raises(UnidentifiedImageError):
        imaging.decode(file.getvalue())
    assert not imaging.is_picture_name(Path("a.eps"))
    assert imaging.is_picture_name(Path("a.JPG"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_comes_upright(orientation):
    upright = np.asarray(noise_image(7, 5))
    turns = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.transpose(1, 0, 2)]
    turns += [lambda a: np.rot90(a, 1), lambda a: np.rot90(a, 2).transpose(1, 0, 2), lambda a: np.rot90(a, -1)]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation - 1](upright)))
    assert np.array_equal(imaging.decode(encoded(stored, exif=exif)), upright)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257, 128 * 257, 40000, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(imaging.decode(encoded(Image.fromarray(values), kind)))
        assert pixels.shape == (1, 5, 3)
        assert np.abs(pixels - values[..., None] / 257).max() < 1


def test_the_transparent_level_of_sixteen_bits_becomes_white():
    levels = np.array([[0, 1000, 65535]], dtype=np.uint16)
    content = encoded(Image.fromarray(levels), transparency=1000)
    with Image.open(io.BytesIO(content)) as stored:
        assert (stored.mode, stored.info["transparency"]) == ("I;16", 1000)
    assert np.asarray(imaging.decode(content))[0, :, 0].tolist() == [0, 255, 255]


def test_other_modes_become_rgb():
    red = np.asarray(imaging.decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))).astype(int)
    assert np.abs(red - [255, 0, 0]).max() < 10
    assert np.asarray(imaging.decode(encoded(Image.new("L", (1, 1), 90)))).tolist() == [[[90, 90, 90]]]
    assert np.asarray(imaging.decode(encoded(Image.new("1", (1, 1), 1)))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_picture_fails(kind):
    content = encoded(noise_image(64, 64), kind)
    imaging.decode(content)
    with pytest.raises(Exception, match=r"truncat|unrecognized|decod|cannot identify"):
        imaging.decode(content[: len(content) // 2])


# --- finding and inspecting ---


def write_folder(folder, count=3):
    folder.mkdir(parents=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        noise_image(20 + number, 30, number).save(folder / name)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": n}) + "\n" for n in names))
    return folder


def test_broken_files_are_found_and_remembered(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", 5)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (folder / "1.png").write_bytes(encoded(noise_image(64, 48), "JPEG")[:1500])
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_text("<html>404</html>")
    noise_image(64, 48).save(folder / "4.png", exif=exif)
    column, calls = load_folder(folder, tmp_path / "cache")["image"], []
    found = imaging.inspect_pictures(column, tmp_path / "memory", lambda: calls.append(1))
    assert [(Path(p.name).name, p.height_px, p.width_px, p.error is None) for p in found] == [
        ("0.png", 30, 20, True),
        *((f"{broken}.png", 0, 0, False) for broken in (1, 2, 3)),
        ("4.png", 64, 48, True),  # upright
    ]
    assert len({picture.digest for picture in found}) == len(calls) == 5
    assert not any("object at 0x" in (picture.error or "") for picture in found)
    decoded, decode = [], imaging.decode
    with monkeypatch.context() as patch:
        patch.setattr(imaging, "decode", lambda content: decoded.append(content) or decode(content))
        assert imaging.inspect_pictures(column, tmp_path / "memory") == found
    assert sorted(decoded) == sorted((folder / f"{broken}.png").read_bytes() for broken in (1, 2, 3))

    # A changed picture is seen, even of the same length and age; so is one that has gone.
    before = (folder / "0.png").stat()
    (folder / "0.png").write_bytes(encoded(noise_image(10, 10)).ljust(before.st_size, b"\0"))
    os.utime(folder / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "4.png").unlink()
    again = imaging.inspect_pictures(column, tmp_path / "memory")
    assert (folder / "0.png").stat().st_size == before.st_size
    assert again[0][1:] != found[0][1:]
    assert again[0].width_px == 10
    assert again[1:4] == found[1:4]
    assert again[4].error == "cannot be read: No such file or directory"


def test_a_picture_that_a_drive_did_not_give_is_not_remembered_as_broken(dataset, pictures, tmp_path, monkeypatch):
    reads, read_bytes = [], imaging.read_bytes

    def lose_the_drive(record):
        reads.append(record)
        if len(reads) > len(dataset):  # when each has been read once, and none was decoded
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return read_bytes(record)

    with monkeypatch.context() as patch:
        patch.setattr(imaging, "read_bytes", lose_the_drive)
        found = imaging.inspect_pictures(dataset["image"], tmp_path)
    assert {picture.error for picture in found} == {"cannot be read: Transport endpoint is not connected"}
    assert imaging.inspect_pictures(dataset["image"], tmp_path) == pictures


def test_captions_are_texts_or_lists_of_texts():
    assert [captions.texts_of(value) for value in ("a", ["b", "c"])] == [["a"], ["b", "c"]]
    assert [captions.fault_of(value) for value in ("", "a", ["b", "c"])] == [None] * 3
    for value in (5, [], ["a", None], {"en": "a"}):
        assert captions.fault_of(value).startswith(f"has {value!r} in the caption column")
    assert captions.fault_of(None).startswith("has no caption")


def test_wrong_captions_are_named_with_their_place_in_the_data_set():
    pictures = [imaging.Picture(f"{n}.jpg", str(n), 9, 9, None, position) for n, position in enumerate((7, 40, 2))]
    dataset = datasets.Dataset.from_dict({"text": ["a", None, None]})
    with pytest.raises(UserError, match="2 of 3 captions cannot be used") as error:
        captions.read_captions(dataset, "text", pictures)
    first, second = str(error.value).splitlines()[1:]
    assert first.startswith("  picture 40, 1.jpg, has no caption")
    assert second.startswith("  picture 2, 2.jpg, has no caption")
    assert captions.read_captions(dataset.select([0]), "text", pictures[:1]) == [["a"]]


def test_samples_are_drawn_as_the_datasets_library_shuffles(dataset):
    drawn, positions = data.draw_samples(dataset, 5, seed=3)
    assert drawn["text"][:] == dataset.shuffle(3).select(range(5))["text"][:]
    assert [dataset["text"][position] for position in positions] == drawn["text"][:]
    assert data.draw_samples(dataset, None, 3) == (dataset, list(range(64)))
    assert len(data.draw_samples(dataset, 1000, 3)[0]) == 64


def test_pictures_are_found_drawn_and_looked_at_by_the_names_of_the_flags(dataset, pictures, picture_set, tmp_path):
    settings = {"dataset_name": None, "dataset_config_name": None, "train_data_dir": str(picture_set)}
    settings |= {"image_column": "image", "caption_column": "text", "max_train_samples": 5, "seed": 3}
    settings |= {"cache_dir": str(tmp_path / "datasets"), "conditioning_cache_dir": str(tmp_path / "memory")}
    bars = []

    def make_bar(description, total):
        bars.append((description, total))
        return tqdm(disable=True)

    whole, drawn, found = data.find_pictures(settings, make_bar)
    assert whole["text"][:] == dataset["text"][:]
    expected, positions = data.draw_samples(dataset, 5, seed=3)
    assert drawn["text"][:] == expected["text"][:]
    assert found == [pictures[position] for position in positions]
    assert bars == [("Checking pictures", 5)]


def test_broken_pictures_are_left_out_with_their_rows(dataset, pictures, caplog):
    broken = [*pictures[:2], pictures[2]._replace(error="is missing"), *pictures[3:]]
    with pytest.raises(UserError, match="1 of 64 pictures cannot be used.*--skip_bad_images"):
        data.leave_out_broken(dataset, broken, skip=False)
    rows, kept = data.leave_out_broken(dataset, broken, skip=True)
    assert rows["text"][:] == dataset["text"][:2] + dataset["text"][3:]
    assert kept == pictures[:2] + pictures[3:]
    assert [picture.position for picture in kept] == [0, 1, *range(3, 64)]
    assert "leaves out 1 of 64" in caplog.text


def test_a_warm_start_reads_each_picture_once(dataset, pictures, tmp_path):
    class Column:
        def __len__(self):
            return len(dataset)

        def __getitem__(self, row):
            read.append(row)
            return dataset["image"][row]

    read = []
    assert imaging.inspect_pictures(Column(), tmp_path) == pictures
    read.clear()
    assert imaging.inspect_pictures(Column(), tmp_path) == pictures
    assert sorted(read) == list(range(64))


def test_a_memory_of_another_form_is_not_believed(dataset, pictures, tmp_path):
    assert imaging.inspect_pictures(dataset["image"], tmp_path) == pictures
    (file,) = tmp_path.glob("pictures-*.json")
    for damage in ([1], [1, 2, 3], ["1", "2"], [9, 9, None], {"a": 1}, "text", [0, 9], [True, 9]):
        file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), damage)))
        assert imaging.inspect_pictures(dataset["image"], tmp_path) == pictures


def test_a_picture_that_cannot_be_decoded_is_looked_at_again_by_the_next_run(tmp_path, monkeypatch):
    column = [{"bytes": encoded(noise_image(20, 30)), "path": "a.png"}, {"bytes": b"none", "path": "b.png"}]

    def fail(content):
        raise OSError(errno.EIO, "transient")

    with monkeypatch.context() as patch:
        patch.setattr(imaging, "decode", fail)
        assert "transient" in imaging.inspect_pictures(column, tmp_path)[0].error
    assert [picture.error for picture in imaging.inspect_pictures(column, tmp_path)] == [
        None,
        "is no picture of a known format",
    ]


def test_too_little_memory_is_no_fault_of_a_picture(tmp_path, monkeypatch):
    column = [{"bytes": encoded(noise_image(20, 30)), "path": "a.png"}]

    def fail(content):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(imaging, "decode", fail)
        with pytest.raises(UserError, match="There is too little memory to decode a.png. Close other programs"):
            imaging.inspect_pictures(column, tmp_path)
    assert imaging.inspect_pictures(column, tmp_path)[0].error is None


def test_one_picture_more_is_the_only_one_that_is_decoded(tmp_path, monkeypatch):
    column = [{"bytes": encoded(noise_image(20, 30, seed)), "path": f"{seed}.png"} for seed in range(4)]
    imaging.inspect_pictures(column[:3], tmp_path)
    decoded, decode = [], imaging.decode
    monkeypatch.setattr(imaging, "decode", lambda content: decoded.append(content) or decode(content))
    imaging.inspect_pictures(column, tmp_path)
    assert decoded == [column[3]["bytes"]]
    decoded.clear()
    imaging.inspect_pictures(column[:1], tmp_path)
    imaging.inspect_pictures(column, tmp_path)
    assert decoded == []


def test_what_an_older_form_remembers_of_pictures_is_not_read(tmp_path, monkeypatch):
    column = [{"bytes": encoded(noise_image(20, 30)), "path": "a.png"}]
    imaging.inspect_pictures(column, tmp_path)
    decoded, decode = [], imaging.decode
    monkeypatch.setattr(imaging, "decode", lambda content: decoded.append(content) or decode(content))
    monkeypatch.setattr(imaging, "FORMAT", imaging.FORMAT + 1)
    imaging.inspect_pictures(column, tmp_path)
    assert decoded == [column[0]["bytes"]]


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_what_is_written_lies_outside_of_the_data_whichever_flag_gives_them(tmp_path, flag):
    settings = {"train_data_dir": None, "dataset_name": None, "output_dir": str(tmp_path / "set" / "run")}
    settings |= {"conditioning_cache_dir": str(tmp_path / "cache"), "cache_dir": None}
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=f"--output_dir .*run lies in --{flag} .*set: .* Give one outside of it."):
        data.check_outside(settings | {flag: str(tmp_path / "set")})
    data.check_outside(settings | {flag: str(tmp_path / "set"), "output_dir": str(tmp_path / "run")})


def test_a_hub_dataset_has_no_folder_to_lie_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"train_data_dir": None, "dataset_name": "org/name", "output_dir": "org/name/run"}
    data.check_outside(settings)


def test_captions_beside_pictures_that_have_metadata_too_are_told_of(tmp_path, caplog):
    folder = write_folder(tmp_path / "set")
    (folder / "1.txt").write_text("another caption")
    load_folder(folder, tmp_path / "cache")
    assert re.search("1 .txt beside pictures of .*set are not read, since its metadata has the captions", caplog.text)


def test_a_changed_caption_is_seen_also_when_the_time_of_change_comes_back(tmp_path):
    folder = write_folder(tmp_path / "set")
    assert load_folder(folder, tmp_path / "cache")["text"][:] == ["0.png", "1.png", "2.png"]
    file = folder / "metadata.jsonl"
    before = file.stat()
    file.write_text(file.read_text().replace('"text": "1.png"', '"text": "other"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_folder(folder, tmp_path / "cache")["text"][:] == ["0.png", "other", "2.png"]


def test_hidden_files_and_folders_are_no_pictures(tmp_path, caplog):
    folder = write_folder(tmp_path / ".hidden" / "set")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "0.png", folder / ".thumbnails" / "0.png")
    shutil.copy(folder / "0.png", folder / ".0.png")
    assert {path.name for path in data.list_files(str(folder))} == {"0.png", "1.png", "2.png", "metadata.jsonl"}
    assert len(load_folder(folder, tmp_path / "cache")) == 3
    assert "left out" not in caplog.text


def test_the_digest_of_the_data_follows_contents_captions_and_order(pictures):
    captions = [["a"]] * 64
    digest = data.data_digest(pictures, captions)
    assert data.data_digest([p._replace(name="moved") for p in pictures], captions) == digest
    others = [(pictures[::-1], captions), (pictures, [*captions[:-1], ["b"]]), (pictures[:-1], captions[:-1])]
    assert len({digest, *(data.data_digest(*other) for other in others)}) == 4


@pytest.mark.parametrize("name", ["[artist] style", "50% *star*", "Where?"])
def test_a_folder_of_any_name_is_read_in_order_and_undecoded(tmp_path, name):
    write_folder(tmp_path / name.translate(dict.fromkeys(map(ord, "*?[]"), "x")))  # a pattern might match it too
    found = load_folder(write_folder(tmp_path / name), tmp_path / "cache")
    assert [row["path"] for row in found["image"]] == [str(tmp_path / name / f"{n}.png") for n in range(3)]
    assert found["text"][:] == ["0.png", "1.png", "2.png"]
    assert imaging.read_bytes(found["image"][1]) == (tmp_path / name / "1.png").read_bytes()


def test_a_local_copy_of_a_hub_dataset_is_read(tmp_path):
    contents = [encoded(noise_image(20, 30, seed)) for seed in range(3)]
    rows = {"image": [{"bytes": c, "path": f"{n}.png"} for n, c in enumerate(contents)], "text": ["a", "b", "c"]}
    (tmp_path / "set" / "data").mkdir(parents=True)
    written = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    written.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    found = data.load_pictures(str(tmp_path / "set"), None, None, "image", "text", str(tmp_path / "cache"))
    assert found["text"][:] == ["a", "b", "c"]
    assert [imaging.read_bytes(row) for row in found["image"]] == contents
    picture = imaging.inspect_pictures(found["image"], tmp_path / "memory")[2]
    assert (picture.name, picture.height_px, picture.width_px, picture.error) == ("2.png", 30, 20, None)


def write_paths(file, paths):
    """Write a parquet file of pictures that are not in it, as a hub data set may be."""
    rows = {"image": [{"bytes": None, "path": str(path)} for path in paths], "text": ["a"] * len(paths)}
    file.parent.mkdir(parents=True)
    written = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    pyarrow.parquet.write_table(written.data.table, file)  # to_parquet would put the pictures in


def test_a_data_file_names_no_picture_outside_of_its_data_set(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(encoded(noise_image(20, 30)))
    monkeypatch.chdir(tmp_path)
    leading_out = [tmp_path / "secret.png", "secret.png", "set-0/../secret.png", "zip://a.png::/etc/a.zip"]
    leading_out += [f"https://elsewhere/x.png::{tmp_path}/set-4/a.png"]
    leading_out += ["http://127.0.0.1/secret.png", f"{tmp_path}/set-5-of-another/a.png"]
    for number, path in enumerate(leading_out):
        write_paths(tmp_path / f"set-{number}" / "train.parquet", [tmp_path / f"set-{number}" / "a.png", path])
        with pytest.raises(
            UserError, match=rf"--dataset_name set-{number} names pictures outside of it, 1 in all"
        ) as error:
            data.load_pictures(f"set-{number}", None, None, "image", "text", str(tmp_path / "cache"))
        assert str(error.value).endswith(f":\n  {path}")


@pytest.mark.parametrize("place", ["{private}/*.parquet", "../private/*.parquet", "http://127.0.0.1:9/a.parquet"])
def test_the_settings_of_a_local_data_set_name_no_files_outside_of_it(tmp_path, place):
    private, stranger = tmp_path / "private", tmp_path / "stranger"
    write_paths(private / "train.parquet", [private / "a.png"])
    stranger.mkdir()
    place = place.format(private=private)
    (stranger / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(place)}\n---\n"
    )
    with pytest.raises(
        UserError, match="takes its data from .*a.parquet|takes its data from .*train.parquet"
    ) as error:
        data.load_pictures(str(stranger), None, None, "image", "text", str(tmp_path / "cache"))
    assert "which is outside of it" in str(error.value)
    circle = "---\nconfigs: &a\n- *a\n- data_files: simplecache::/x.parquet\n---\n"
    (stranger / "README.md").write_text(circle)
    with pytest.raises(UserError, match="repeat themselves by YAML aliases"):
        data.load_pictures(str(stranger), None, None, "image", "text", str(tmp_path / "cache"))
    (stranger / "README.md").write_text(circle.replace("- *a\n", ""))
    with pytest.raises(UserError, match="takes its data from simplecache::/x.parquet"):
        data.load_pictures(str(stranger), None, None, "image", "text", str(tmp_path / "cache"))
    # The same settings of files of its own are followed.
    write_paths(stranger / "own" / "train.parquet", [stranger / "a.png"])
    (stranger / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: own/*.parquet\n---\n")
    assert len(data.load_pictures(str(stranger), None, None, "image", "text", str(tmp_path / "cache"))) == 1


@pytest.mark.parametrize("with_cache_dir", [False, True])
def test_a_data_file_may_name_pictures_of_its_own_or_that_were_downloaded(tmp_path, monkeypatch, with_cache_dir):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "down")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "extracted")
    cache_dir = tmp_path / "cache"
    downloads = [cache_dir / "downloads"] if with_cache_dir else [tmp_path / "down", tmp_path / "extracted"]
    paths = [folder / "x" / "a.png" for folder in (tmp_path / "real", tmp_path / "link", tmp_path / "hub", *downloads)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "link").exists() or (tmp_path / "link").symlink_to(tmp_path / "real")
        path.write_bytes(encoded(noise_image(20, 30)))
    (tmp_path / "real" / "a-link.png").symlink_to(tmp_path / "hub" / "x" / "a.png")
    write_paths(tmp_path / "real" / "data" / "train.parquet", [*paths, tmp_path / "real" / "a-link.png"])
    if not with_cache_dir:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache_dir)
    place = str(cache_dir) if with_cache_dir else None
    found = data.load_pictures(str(tmp_path / "link"), None, None, "image", "text", place)
    pictures = imaging.inspect_pictures(found["image"], tmp_path / "memory")
    assert [picture.error for picture in pictures] == [None] * len(found)


def test_an_archive_is_not_looked_into(tmp_path):
    folder = write_folder(tmp_path / "set")
    (tmp_path / "packed").mkdir()
    shutil.make_archive(str(tmp_path / "packed" / "set"), "zip", folder)
    with pytest.raises(UserError, match="holds no pictures but in archives such as set.zip. Unpack them there"):
        load_folder(tmp_path / "packed", tmp_path / "cache")
    shutil.copy(tmp_path / "packed" / "set.zip", folder)  # from which they were unpacked
    assert read(folder, tmp_path / "cache") == read(write_folder(tmp_path / "other"), tmp_path / "cache")


def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path):
    folder = write_folder(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no picture")
    shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("*.jsonl"))
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": \n')
    for arguments, words in (
        ((tmp_path / "none",), "--train_data_dir .*none is no folder"),
        ((tmp_path / "empty",), "--train_data_dir .*empty holds no pictures"),
        ((tmp_path / "text",), "--train_data_dir .*text holds no pictures"),
        (
            (tmp_path / "damaged",),
            "--train_data_dir .*damaged cannot be read: .*metadata.jsonl, line 1: this is no JSON",
        ),
        ((tmp_path / "plain",), r"--caption_column text .*columns are: image\..*metadata.jsonl"),
        ((folder, "picture"), "--image_column picture .*columns are: image, text"),
        ((folder, "image", "caption"), "--caption_column caption .*columns are: image, text"),
        ((folder, "text"), "--image_column text .*not pictures"),
    ):
        with pytest.raises(UserError, match=words) as error:
            load_folder(arguments[0], tmp_path / "cache", *arguments[1:])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--dataset_name .*none cannot be read"):
        data.load_pictures(str(tmp_path / "none"), None, None, "image", "text", str(tmp_path / "cache"))


def test_captions_may_stand_beside_the_pictures(tmp_path, picture_set):
    names = ["b/one.png", "two.JPG", "a.b.webp"]
    (tmp_path / "b").mkdir()
    for number, name in enumerate(names):
        noise_image(20 + number, 30).save(tmp_path / name)
        text = f"caption  {number}, 東京\n" if number else "\ufeffwith a mark\r\nand two lines"
        (tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.txt").write_text("of no picture")
    found = load_folder(tmp_path, tmp_path / "cache")
    read = {Path(row["image"]["path"]).relative_to(tmp_path).as_posix(): row["text"] for row in found}
    assert read == dict(zip(names, ["with a mark and two lines", "caption 1, 東京", "caption 2, 東京"], strict=True))
    pictures = imaging.inspect_pictures(found["image"], tmp_path / "memory")
    assert {picture.width_px for picture in pictures} == {20, 21, 22}
    assert not any(picture.error for picture in pictures)

    # Where there is metadata, it counts.
    line = {"file_name": "two.JPG", "text": "from the metadata"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert load_folder(tmp_path, tmp_path / "cache")["text"][:] == ["from the metadata"]


@pytest.mark.parametrize("name", ["metadata.png", "metadata.json"])
def test_only_what_is_metadata_counts_for_it(tmp_path, name):
    noise_image(20, 30).save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a caption")
    noise_image(20, 30).save(tmp_path / name, "png")
    (tmp_path / "metadata.txt").write_text("another")
    assert load_folder(tmp_path, tmp_path / "cache")["text"][-1] == "a caption"


@pytest.mark.parametrize("has_metadata", [True, False])
def test_names_that_are_not_utf8_are_refused_with_one_of_them(tmp_path, has_metadata):
    folder = write_folder(tmp_path / "set")
    if not has_metadata:
        (folder / "metadata.jsonl").unlink()
        [(folder / f"{number}.txt").write_text("a caption") for number in range(3)]
    shutil.copy(folder / "0.png", os.fsencode(folder) + b"/na\xefve.png")
    with pytest.raises(UserError, match=r"1 names of files in .*set are not UTF-8, such as .*na.udcefve.png'. Rename"):
        load_folder(folder, tmp_path / "cache")


def test_a_full_disk_of_the_datasets_library_is_no_fault_of_the_pictures(tmp_path, monkeypatch):
    def load_dataset(*arguments, **options):
        raise DatasetGenerationError("An error occurred") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"cache cannot be written: No space left .*, or give another --cache_dir"):
        load_folder(write_folder(tmp_path / "set"), tmp_path / "cache")


def read(folder, cache_dir):
    dataset = load_folder(folder, cache_dir)
    pictures = imaging.inspect_pictures(dataset["image"], cache_dir)
    dataset, pictures = data.leave_out_broken(dataset, pictures, skip=False)
    return captions.read_captions(dataset, "text", pictures)


def test_captions_in_files_that_end_in_capitals_are_read_and_what_is_no_file_is_told_of(tmp_path):
    for name in ("a.png", "b.PNG", "c.png"):
        (tmp_path / name).write_bytes(encoded(noise_image(20, 30)))
    (tmp_path / "a.TXT").write_text("one")
    (tmp_path / "b.Txt").write_text("two")
    (tmp_path / "c.txt").mkdir()
    columns = captions.read_beside(captions.find_beside(data.list_files(str(tmp_path))))
    assert columns["text"] == ["one", "two", None]
    assert columns[captions.FAULTS][2] == "has no c.txt beside it, but something of that name that is no file"


def test_captions_beside_some_of_the_pictures_or_that_are_no_text_are_all_named(tmp_path, caplog):
    for name in ("one.png", "two.png", "three.png"):
        noise_image(20, 30).save(tmp_path / name)
    (tmp_path / "one.txt").write_bytes(b"caf\xe9")
    (tmp_path / "three.txt").write_text("fine")
    (tmp_path / "four.txt").write_text("of no picture")
    with pytest.raises(UserError, match="2 of 3 captions cannot be used") as error:
        read(tmp_path, tmp_path / "cache")
    one, two = str(error.value).splitlines()[1:]
    assert one.endswith("one.png, has a caption that is no text in UTF-8, in one.txt")
    assert two.endswith("two.png, has no two.txt beside it")
    assert "1 .txt of" in caplog.text
    assert "stand beside no picture of their name: four.txt" in caplog.text
    (tmp_path / "two.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"two.png, has a caption that cannot be read, in two.txt: No such file"):
        read(tmp_path, tmp_path / "cache")
    (tmp_path / "two.txt").unlink()
    (tmp_path / "two.txt").write_text("")
    (tmp_path / "one.txt").write_text("good")
    assert read(tmp_path, tmp_path / "cache") == [["good"], ["fine"], [""]]


@pytest.mark.parametrize("has_metadata", [True, False])
def test_a_link_to_a_picture_that_is_gone_is_named(tmp_path, has_metadata):
    folder = write_folder(tmp_path / "set")
    if not has_metadata:
        (folder / "metadata.jsonl").unlink()
        [(folder / f"{number}.txt").write_text("a caption") for number in range(3)]
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"1 of 3 pictures cannot be used.*\n.*1.png cannot be read: No such file"):
        read(folder, tmp_path / "cache")


def test_what_a_terminal_would_act_on_is_escaped_in_names_of_pictures_and_captions(tmp_path):
    (tmp_path / "a\x1b[31m.png").write_bytes(b"no picture")
    (tmp_path / "a\x1b[31m.txt").write_text("a caption")
    with pytest.raises(UserError, match="1 of 1 pictures cannot be used") as error:
        read(tmp_path, tmp_path / "cache")
    assert str(error.value).splitlines()[1].endswith(r"a\x1b[31m.png is no picture of a known format")


def test_a_picture_that_has_two_lines_is_told_of(tmp_path, caplog):
    folder = write_folder(tmp_path / "set")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "1.png", "text": "again"}\n')
    assert len(load_folder(folder, tmp_path / "cache")) == 4
    assert re.search("1 pictures of .*set have several lines, and count as often: 1.png", caplog.text)


# --- order and randomness ---


def stream(size, batch, accumulation, processes, steps, seed=0):
    """The samples of each step, over all micro-batches and processes."""
    by_step = {step: [] for step in steps}
    for process in range(processes):
        first_sample = steps[0] * batch * accumulation * processes
        micro_batches = sample_stream(
            [0] * size, seed, batch, accumulation, processes, process, first_sample, len(steps)
        )
        for number, samples in enumerate(micro_batches):
            assert len(samples) == batch
            by_step[steps[0] + number // accumulation] += samples
    return by_step


@pytest.mark.parametrize("size", [7, 25])  # less and more than a step's 12 samples
def test_a_step_sees_the_same_samples_however_it_is_split(size):
    steps = range(2 * size)
    whole = stream(size, 12, 1, 1, steps)
    for batch, accumulation, processes in ((6, 2, 1), (6, 1, 2), (3, 2, 2), (1, 3, 4), (2, 1, 6), (1, 12, 1)):
        split = stream(size, batch, accumulation, processes, steps)
        assert {step: sorted(s) for step, s in split.items()} == {step: sorted(s) for step, s in whole.items()}

    # 2 x size steps of 12 samples are 24 whole epochs: every picture comes once in each, and in a new order.
    flat = [sample for samples in whole.values() for sample in samples]
    assert sorted(flat) == [(epoch, index) for epoch in range(24) for index in range(size)]
    assert [epoch for epoch, _ in flat] == sorted(epoch for epoch, _ in flat)
    orders = {tuple(index for epoch, index in flat if epoch == number) for number in range(24)}
    assert len(orders) == 24
    assert stream(size, 12, 1, 1, steps, seed=1) != whole


@pytest.mark.parametrize("first", [1, 3, 10])
def test_a_stream_from_a_later_step_is_the_tail_of_the_whole(first):
    for process in range(2):
        whole = list(sample_stream([0] * 7, 5, 3, 2, 2, process, 0, 12))
        assert list(sample_stream([0] * 7, 5, 3, 2, 2, process, 12 * first, 12 - first)) == whole[2 * first :]
        assert len(whole) == 24


# --- aspect-ratio buckets ---


def test_buckets_are_the_largest_shapes_of_that_area():
    assert imaging.crop_sizes(512, None) == [(512, 512)]
    assert imaging.crop_sizes(512, 64) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    sizes = imaging.crop_sizes(1024, 64)
    assert {(1024, 1024), (832, 1216), (768, 1344), (704, 1408), (1152, 896)} <= set(sizes)  # of SDXL's own training
    assert sizes == [(width, height) for height, width in reversed(sizes)]
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.5 <= width / height <= 2
        assert height * width <= 1024**2
        assert max((height + 64) * width, height * (width + 64)) > 1024**2  # no step more would fit
    assert (1000, 1000) in imaging.crop_sizes(1000, 64)


def test_a_picture_goes_to_the_nearest_shape_and_covers_it():
    sizes, rng = imaging.crop_sizes(512, 64), random.Random(0)
    assert imaging.crop_size(4000, 100, sizes) == (640, 384)
    assert imaging.crop_size(100, 100, sizes) == (512, 512)
    for _ in range(2000):
        height, width = rng.randint(1, 3000), rng.randint(1, 3000)
        crop = imaging.crop_size(height, width, sizes)
        ratios = [max(h * width / (w * height), w * height / (h * width)) for h, w in sizes]
        assert sizes.index(crop) == ratios.index(min(ratios))
        resized = imaging.resized_size(height, width, crop)
        # One side fits exactly; the other is as long as the shape asks for, in whole px, and never too short.
        assert any(side == kept for side, kept in zip(resized, crop, strict=True))
        assert all(side >= kept for side, kept in zip(resized, crop, strict=True))
        scale = max(crop[0] / height, crop[1] / width)
        assert resized == pytest.approx((height * scale, width * scale), abs=1)


BUCKETS = [0] * 23 + [1] * 11 + [2] * 2 + [3]


@pytest.mark.parametrize("batch", [1, 4, 12, 37, 50])
def test_with_buckets_every_sample_comes_once_an_epoch_and_few_steps_mix(batch):
    size, mixed, orders = len(BUCKETS), 0, set()
    whole = list(sample_stream(BUCKETS, 0, batch, 1, 1, 0, 0, size))
    flat = [sample for part in whole for sample in part]
    assert len(flat) == batch * size
    assert sorted(flat) == [(epoch, index) for epoch in range(batch) for index in range(size)]
    for part in whole:
        assert len({BUCKETS[index] for _, index in part}) == 1
    # Joined again into steps: those that mix stand where one epoch ends and the next begins.
    steps, step = [], []
    for part in whole:
        step += part
        if len(step) == batch:
            steps.append(step)
            step = []
    assert not step
    for number, step in enumerate(steps):
        if len({BUCKETS[index] for _, index in step}) > 1:
            mixed += 1
            places = range(number * batch, (number + 1) * batch)
            assert any(min(place % size, size - 1 - place % size) < 4 * batch for place in places)
    if batch == 1:
        assert mixed == 0
    if batch == 4:
        assert mixed <= 4 * batch  # in an epoch of 9 steps, at most 4: one of 3 left over for each bucket and epoch
    orders = {tuple(index for epoch, index in flat if epoch == number) for number in range(min(batch, 8))}
    assert len(orders) == min(batch, 8)


@pytest.mark.parametrize("first", [0, 1, 9, 10])
def test_with_buckets_too_a_step_sees_the_same_samples_however_it_is_split_and_resumed(first):
    def steps_of(batch, accumulation, processes, first_step):
        steps = {}
        for process in range(processes):
            split = (batch, accumulation, processes, process, first_step * 12, 25 - first_step)
            left, number = 12 // processes, first_step
            for part in sample_stream(BUCKETS, 5, *split):
                assert len({BUCKETS[index] for _, index in part}) == 1
                steps.setdefault(number, []).extend(part)
                left -= len(part)
                if not left:
                    left, number = 12 // processes, number + 1
            assert left == 12 // processes
        return {number: sorted(samples) for number, samples in steps.items()}

    whole = {number: samples for number, samples in steps_of(12, 1, 1, 0).items() if number >= first}
    for batch, accumulation, processes in ((12, 1, 1), (6, 2, 1), (6, 1, 2), (3, 2, 2), (1, 3, 4), (1, 12, 1)):
        assert steps_of(batch, accumulation, processes, first) == whole


def test_samples_of_a_bucket_have_its_shape_and_sizes(make_samples, pictures):
    sizes = imaging.crop_sizes(RES, 8)
    for center_crop in (True, False):
        samples = make_samples(sizes=sizes, center_crop=center_crop, random_flip=True)
        buckets = samples.buckets()
        assert len(set(buckets)) > 2
        for index in range(0, 64, 3):
            sample = samples[0, index]
            height, width = sizes[buckets[index]]
            assert (height, width) == imaging.crop_size(pictures[index].height_px, pictures[index].width_px, sizes)
            assert sample["pixel_values"].shape == (3, height, width)
            assert sample["noise"].shape == sample["latent_noise"].shape == (4, height // 8, width // 8)
            original, corner, target = sample["time_ids"].view(3, 2).tolist()
            assert original == [pictures[index].height_px, pictures[index].width_px]
            assert target == [height, width]
            resized = imaging.resized_size(*map(int, original), (height, width))
            assert all(0 <= c <= r - t for c, r, t in zip(corner, resized, target, strict=True))
    shape = first_batch(samples, 5)["pixel_values"].shape
    areas = [sizes[bucket][0] * sizes[bucket][1] for bucket in buckets]
    assert shape[:2] == (5, 3)
    assert shape[2] * shape[3] == max(areas)


def test_a_sample_depends_on_its_key_alone(make_samples):
    options = {"random_flip": True, "center_crop": False, "noise_offset": 0.1}
    samples, keys = make_samples(**options), [(epoch, index) for epoch in range(2) for index in range(0, 64, 9)]
    first = {key: samples[key] for key in keys}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = torch.get_rng_state()
    again = make_samples(**options)
    assert all(equal(first[key], again[key]) for key in reversed(keys))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0, 0]["noise"], first[1, 0]["noise"])
    assert not torch.equal(first[0, 0]["noise"], first[0, 9]["noise"])
    assert not torch.equal(first[0, 0]["noise"], make_samples(seed=1, **options)[0, 0]["noise"])


def test_worker_processes_give_the_same_batches(make_samples):
    samples = make_samples(random_flip=True, center_crop=False)
    batches = []
    for workers in (0, 2):
        keys = sample_stream(samples.buckets(), 0, 4, 1, 1, 0, 14 * 4, 4)  # across the end of an epoch
        loader = torch.utils.data.DataLoader(samples, batch_sampler=keys, num_workers=workers, collate_fn=collate)
        batches.append(list(loader))
    assert len(batches[0]) == 4
    assert all(equal(one, other) for one, other in zip(*batches, strict=True))
    assert {k: tuple(v.shape) for k, v in batches[0][0].items() if torch.is_tensor(v)} == {
        "noise": (4, 4, RES // 8, RES // 8),
        "latent_noise": (4, 4, RES // 8, RES // 8),
        "pixel_values": (4, 3, RES, RES),
        "timesteps": (4,),
        "time_ids": (4, 6),
    }
    assert all(len(batches[0][0][name]) == 4 for name in ("name", "caption"))


def rows(pictures, mean, std):
    return {picture.digest: {"mean": torch.tensor(mean), "std": torch.tensor(std)} for picture in pictures}


def test_no_flag_changes_what_another_one_draws(make_samples, pictures):
    flags = {"random_flip": True, "center_crop": False, "captions": [["a", "b", "c"]] * 64, "interpolation": "box"}
    flags |= {"latents": rows(pictures, [0.0], [1.0])}
    for flag, value in flags.items():
        for key in ((0, 3), (7, 20)):
            changed, expected = make_samples(**{flag: value})[key], make_samples()[key]
            latent_noise = changed["latents"] / 0.5 if flag == "latents" else changed["latent_noise"]
            assert torch.equal(latent_noise, expected["latent_noise"])
            assert all(torch.equal(changed[name], expected[name]) for name in ("noise", "timesteps"))
    offset = make_samples(noise_offset=0.3)[0, 3]["noise"] - make_samples()[0, 3]["noise"]
    assert offset.std(dim=(1, 2)).max() < 1e-6  # one number for each channel
    assert offset.abs().min() > 1e-4


def test_noise_is_normal_and_timesteps_flips_and_captions_are_uniform(make_samples, pictures):
    captions = [[f"{index} {number}" for number in range(3)] for index in range(64)]
    samples = make_samples(
        latents=rows(pictures, [0.0, 1.0], [0.0, 0.0]),  # as it is 0, flipped 1
        prompts={text: {"prompt": text} for texts in captions for text in texts},
        captions=captions,
        random_flip=True,
    )
    drawn = [(index, samples[epoch, index]) for epoch in range(30) for index in range(64)]
    noise = torch.stack([sample["noise"] for _, sample in drawn])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    timesteps = torch.stack([sample["timesteps"] for _, sample in drawn])
    assert timesteps.min() >= 0
    tenths = torch.bincount(timesteps // 100)
    assert len(tenths) == 10
    assert tenths.min() > 140  # of 192 expected, with a deviation of 13
    flips = torch.stack([sample["latents"] for _, sample in drawn])
    assert set(flips.flatten().tolist()) == {0.0, 0.5}
    assert abs(flips.mean() - 0.25) < 0.03
    assert all(sample["prompt"].startswith(f"{index} ") for index, sample in drawn)
    for number in range(3):
        assert abs(sum(sample["prompt"].endswith(f" {number}") for _, sample in drawn) - 640) < 90


@pytest.mark.parametrize("center_crop", [True, False])
def test_pixels_sizes_and_crops_of_a_sample_belong_together(make_samples, dataset, center_crop):
    samples, corners, flips = make_samples(center_crop=center_crop, random_flip=True), set(), 0
    for epoch, index in [(epoch, index) for epoch in range(3) for index in range(0, 64, 5)]:
        sample = samples[epoch, index]
        image = imaging.decode(Path(dataset[index]["image"]["path"]).read_bytes())
        height, width, top, left, *target = map(int, sample["time_ids"])
        size = torchvision_size(image.height, image.width, RES)
        assert (height, width, target) == (image.height, image.width, [RES, RES])
        assert 0 <= top <= size[0] - RES
        assert 0 <= left <= size[1] - RES
        crops = [imaging.crop_pixels(image, (RES, RES), "lanczos", flip, (top, left)) for flip in (False, True)]
        found = [torch.equal(sample["pixel_values"], crop) for crop in crops]
        assert any(found)
        assert sample["name"] == dataset[index]["image"]["path"]
        assert sample["caption"] == dataset[index]["text"]
        corners.add((index, top, left))
        flips += found[1]
    assert 8 < flips < 31
    assert (len(corners) == 13) == center_crop


@pytest.mark.parametrize("record", [None, {"bytes": None, "path": None}, {"bytes": None, "path": ""}], ids=str)
def test_a_row_without_a_picture_is_told_of_as_missing(record, tmp_path):
    (picture,) = imaging.inspect_pictures([record], tmp_path)
    assert (picture.name, picture.error) == ("picture 0", "is missing")


def test_a_column_with_spaces_around_it_is_shown_with_them(tmp_path):
    demo.draw_picture_set(tmp_path, count=1)
    (name,) = (json.loads(line)["file_name"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines())
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name, text\n{name}, a star\n")
    with pytest.raises(UserError, match="its columns are: image, ' text'"):
        data.load_pictures(None, None, str(tmp_path), "image", "text", str(tmp_path / "cache"))


def test_metadata_behind_a_link_that_leads_nowhere_are_named(tmp_path):
    folder = write_folder(tmp_path / "set")
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"metadata.jsonl: No such file or directory\."):
        load_folder(folder, tmp_path / "cache")


def test_a_column_of_any_name_is_a_users_own(tmp_path):
    folder = write_folder(tmp_path / "set")
    lines = [json.dumps({"file_name": f"{n}.png", "text": "a", "caption_fault": "none"}) + "\n" for n in range(3)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    assert read(folder, tmp_path / "cache") == [["a"]] * 3
