from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

from rasengan import cache, components, conditioning, imaging, samples, sdxl, sharded_cache
from rasengan.safetensors_header import read_header
from rasengan.sources import COMPONENTS


CPU = torch.device("cpu")
SIZES = [(64, 64)]


@pytest.fixture
def settings(tmp_path):
    """Those of a run that caches all it can."""
    return {
        "cache_conditioning": True,
        "center_crop": True,
        "plan_only": False,
        "train_text_encoder": False,
        "conditioning_cache_dir": str(tmp_path / "cache"),
        "encode_batch_size": None,
        "resolution": 64,
        "image_interpolation_mode": "lanczos",
        "random_flip": False,
        "variant": None,
        "vram_budget_gib": None,
    }


@pytest.fixture
def bars():
    """What progress bars were made for, and the function that makes them."""
    made = []

    def make_bar(description, total):
        made.append((description, total))
        return tqdm(total=total, disable=True)

    return made, make_bar


def written(settings) -> list[str]:
    """The folders of the cache that hold rows."""
    return sorted({path.parent.name for path in Path(settings["conditioning_cache_dir"]).rglob("*.safetensors")})


# --- pictures ---


@torch.no_grad()
def test_latents_are_encoded_to_disk_once_as_the_vae_has_them(settings, bars, tiny_base, column, pictures):
    some, (made, make_bar) = pictures[:5], bars
    how = (column, some, SIZES, tiny_base / "vae", CPU, (0, 1), make_bar)
    rows, vae = conditioning.prepare_latents(settings, *how)
    assert vae is None
    assert made == [("Encoding pictures", 5)]
    assert written(settings) == ["latents"]
    reference = components.load("vae", tiny_base / "vae")
    for record, picture in zip(column, some, strict=False):
        image = imaging.decode(imaging.read_bytes(record))
        top_left = imaging.center_crop_top_left(imaging.resized_size(image.height, image.width, SIZES[0]), SIZES[0])
        pixels = imaging.crop_pixels(image, SIZES[0], "lanczos", False, top_left)
        mean = reference.encode(pixels[None]).latent_dist.mean
        torch.testing.assert_close(rows[picture.digest]["mean"], mean)
    again, _ = conditioning.prepare_latents(settings, *how)
    assert torch.equal(again[some[4].digest]["mean"], rows[some[4].digest]["mean"])
    assert len(made) == 1


@pytest.mark.parametrize("changed", [{"encode_batch_size": 2}, {"random_flip": True}, {"resolution": 512}])
def test_what_changes_the_latents_is_another_cache(changed, settings, bars, tiny_base, column, pictures):
    made, make_bar = bars
    for asked in (settings, settings | changed):  # of 64 px, 128 are encoded together; of 512 px, 2
        conditioning.prepare_latents(asked, column, pictures[:2], SIZES, tiny_base / "vae", CPU, (0, 1), make_bar)
    assert made == [("Encoding pictures", 2)] * 2


@pytest.mark.parametrize("in_loop", [{"cache_conditioning": False}, {"center_crop": False}])
@pytest.mark.parametrize("plan_only", [False, True])
def test_the_vae_comes_where_latents_cannot_be_cached(in_loop, plan_only, settings, bars, tiny_base, column, pictures):
    asked, (made, make_bar) = settings | in_loop | {"plan_only": plan_only}, bars
    rows, vae = conditioning.prepare_latents(asked, column, pictures, SIZES, tiny_base / "vae", CPU, (0, 1), make_bar)
    assert rows is None
    reference = components.load("vae", tiny_base / "vae").state_dict()
    assert all(torch.equal(weight, reference[name]) for name, weight in vae.state_dict().items())
    assert made == written(settings) == []


# --- captions ---


@torch.no_grad()
def test_embeddings_are_encoded_to_disk_once_as_the_encoders_have_them(settings, bars, tiny_base):
    folders = {name: tiny_base / name for name in COMPONENTS}
    how = ([["a star", "a heart"], ["a star"]], ["a cat", ""], folders, torch.float32, CPU, (0, 1), bars[1])
    prompts = conditioning.prepare_prompts(settings, *how)
    assert prompts.tokenizers == prompts.text_encoders == []
    assert bars[0] == [("Encoding captions", 4)]
    assert written(settings) == ["prompts"]
    encoders = components.load_text_encoders(folders, None, CPU, torch.float32)
    for text, rows in {"a heart": prompts.captions, "a cat": prompts.validation, "": prompts.validation}.items():
        (embeds,), (pooled,) = sdxl.encode_prompts([text], *encoders)
        torch.testing.assert_close(rows[text]["prompt_embeds"], embeds)
        torch.testing.assert_close(rows[text]["pooled_prompt_embeds"], pooled)
    with pytest.raises(KeyError):  # what is drawn changes nothing in what is trained on
        prompts.captions["a cat"]
    conditioning.prepare_prompts(settings, *how)
    assert len(bars[0]) == 1


@pytest.mark.parametrize("in_loop", [{"cache_conditioning": False}, {"train_text_encoder": True}])
@pytest.mark.parametrize("plan_only", [False, True])
def test_the_text_encoders_come_where_embeddings_are_not_to_be_cached(in_loop, plan_only, settings, bars, tiny_base):
    folders = {name: tiny_base / name for name in COMPONENTS}
    asked = settings | in_loop | {"plan_only": plan_only}
    prompts = conditioning.prepare_prompts(asked, [["a star"]], [], folders, torch.bfloat16, CPU, (0, 1), bars[1])
    assert prompts.captions is prompts.validation is None
    assert [len(prompts.tokenizers), len(prompts.text_encoders)] == [2, 2]
    assert {encoder.dtype for encoder in prompts.text_encoders} == {torch.bfloat16}
    assert bars[0] == written(settings) == []


# --- a run that is only planned ---


def test_a_plan_encodes_nothing(settings, tiny_base, column, pictures):
    folders, asked = {name: tiny_base / name for name in COMPONENTS}, settings | {"plan_only": True}
    no_bar = lambda *_: pytest.fail("nothing is encoded")  # noqa: E731
    rows, vae = conditioning.prepare_latents(asked, column, pictures, SIZES, folders["vae"], CPU, (0, 1), no_bar)
    prompts = conditioning.prepare_prompts(
        asked, [["a star"]], ["", "a cat"], folders, torch.half, CPU, (0, 1), no_bar
    )
    assert vae is None
    assert prompts.tokenizers == prompts.text_encoders == []
    assert rows.keys() == {picture.digest for picture in pictures}
    assert (prompts.captions.keys(), prompts.validation.keys()) == ({"a star"}, {"", "a cat"})
    assert not Path(settings["conditioning_cache_dir"]).exists()


@pytest.mark.parametrize(
    ("bucket_step_px", "random_flip", "dtype"),
    [(None, False, torch.float32), (16, True, torch.bfloat16), (24, False, torch.float16)],
)
def test_blank_rows_give_a_batch_of_the_shapes_of_cached_ones(
    bucket_step_px, random_flip, dtype, tiny_base, column, pictures, tmp_path
):
    sizes = imaging.crop_sizes(96, bucket_step_px)
    some, column = [*pictures[:9], pictures[0], *pictures[9:12]], [*column[:9], column[0], *column[9:12]]
    captions = [[f"a star {number}", "a star"] for number in range(len(some))]
    texts = [[text for several in captions for text in several], ["a heart", ""]]
    folders = {name: tiny_base / name for name in COMPONENTS}
    how, bar = (None, CPU), lambda total: tqdm(total=total, disable=True)
    options = {"sizes": sizes, "interpolation": "lanczos", "random_flip": random_flip}
    real = cache.cached_latents(tmp_path, column, some, folders["vae"], *how, (0, 1), bar, 4, **options)
    real_prompts = cache.cached_prompts(tmp_path, texts, folders, *how, dtype, (0, 1), bar)
    blank, blank_prompts = (
        conditioning.blank_latents(some, sizes, random_flip),
        conditioning.blank_prompts(texts, folders, dtype),
    )

    def shapes(rows):
        return {name: (row.shape, row.dtype) for name, row in rows.items()}

    assert all(shapes(blank[picture.digest]) == shapes(real[picture.digest]) for picture in some)
    for rows, expected, group in zip(blank_prompts, real_prompts, texts, strict=True):
        assert all(shapes(rows[text]) == shapes(expected[text]) for text in group)
    options |= {"seed": 0, "center_crop": True, "scaling_factor": 0.5, "noise_offset": 0.0}
    batches = [
        samples.first_batch(
            samples.TrainingSamples(column, some, captions, *caches, num_train_timesteps=1000, **options), 3
        )
        for caches in ((blank, blank_prompts[0]), (real, real_prompts[0]))
    ]
    names = [batch.pop("name") for batch in batches]
    assert names[0] == names[1]
    assert shapes(batches[0]) == shapes(batches[1])
    # What they will take on the disk, but for the headers of the files.
    written, headers = sorted(tmp_path.rglob("*.safetensors")), 0
    for path in written:
        with open(path, "rb") as file:
            headers += 8 + read_header(file)[1]
    took = sum(path.stat().st_size for path in written)
    assert conditioning.disk_bytes(blank, *blank_prompts) == took - headers
    assert conditioning.disk_bytes(real, *real_prompts) == took
    assert headers < 0.01 * took


def test_what_caches_take_on_the_disk_is_counted_once(tmp_path):
    items = [f"item {number}" for number in range(150)]
    one, other = (sharded_cache.ShardedCache(tmp_path / name, {}, items) for name in ("one", "other"))
    for shards in (one, other):
        shards.build(shards.missing(), lambda batch: {"row": torch.zeros(len(batch), 7)}, batch_size=10)
    whole = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert conditioning.disk_bytes(cache.together([one, other]), None, one) == whole > 0
    assert conditioning.disk_bytes(None) == 0
