import errno
import hashlib
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from rasengan import UserError, cache, components, endings, imaging, memory, row_file, sharded_cache
from rasengan.sources import COMPONENTS, TEXT_ENCODERS, TOKENIZERS


CPU = torch.device("cpu")
ITEMS = [f"item {number}" for number in range(150)]  # three shards of 64, 64 and 22


def encode(items):
    """A cheap encoder whose rows also tell which items were encoded together."""
    rows = [list(hashlib.sha256(item.encode()).digest()) for item in items]
    together = int.from_bytes(hashlib.sha256("".join(items).encode()).digest()[:4], "little")
    return {"row": torch.tensor(rows).float(), "together": torch.full((len(items), 1), together)}


def make(folder, items=ITEMS, **settings):
    return sharded_cache.ShardedCache(folder, {"setting": 1} | settings, items)


def built(folder, items=ITEMS, **settings):
    shards = make(folder, items, **settings)
    shards.build(shards.missing(), encode, batch_size=10)
    return shards


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- shards ---


def test_every_item_finds_its_own_row(tmp_path):
    sizes = []
    shards = make(tmp_path, ITEMS + ITEMS[:5])  # an item that comes twice is kept once
    shards.build(shards.missing(), encode, 10, sizes.append)
    assert sizes == [10] * 6 + [4] + [10] * 6 + [4] + [10, 10, 2]
    for item in reversed(ITEMS):
        assert torch.equal(shards[item]["row"], encode([item])["row"][0])
    with pytest.raises(KeyError):
        shards["another item"]


@pytest.mark.parametrize("was_read", [True, False])
def test_a_shard_that_is_cut_off_while_it_is_used_is_named(was_read, tmp_path):
    shards = built(tmp_path)
    if was_read:
        shards[ITEMS[0]]
    for path in tmp_path.glob("*.safetensors"):
        os.truncate(path, 200)
    with pytest.raises(imaging.PictureChanged, match=r"safetensors of the cache was changed while the run used it: "):
        shards[ITEMS[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_row_is_read_as_safetensors_reads_it_by_itself(dtype, tmp_path):
    tensors = {name: torch.randn(5, *shape).to(dtype) for name, shape in (("a", (3, 4)), ("b", ()), ("c", (7,)))}
    save_file(tensors, tmp_path / "rows.safetensors", metadata={"of": "a test"})
    rows = row_file.RowFile(tmp_path / "rows.safetensors")
    for row in range(5):
        found = rows.read(row)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor[row]) for name, tensor in tensors.items())
    before = len(os.listdir("/proc/self/fd"))
    kept = [row_file.RowFile(tmp_path / "rows.safetensors") for _ in range(50)]
    assert all(torch.equal(one.read(2)["a"], tensors["a"][2]) for one in kept)
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(ValueError, match="cut off"):
        rows.read(9)
    (tmp_path / "rows.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]")
    with pytest.raises(ValueError, match="header is damaged"):
        row_file.RowFile(tmp_path / "rows.safetensors")


def test_a_row_takes_its_own_bytes_from_the_disk_and_no_more(tmp_path):
    save_file({"a": torch.randn(64, 2**18)}, tmp_path / "rows.safetensors")  # of a MiB each
    rows, counts = row_file.RowFile(tmp_path / "rows.safetensors"), Path("/proc/self/io")
    read = lambda: int(re.search(r"rchar: (\d+)", counts.read_text())[1])  # noqa: E731
    before = read()
    rows.read(63)
    assert 2**20 <= read() - before < 2 * 2**20


def test_a_second_cache_with_the_same_settings_has_nothing_missing(tmp_path):
    assert make(tmp_path).missing() == [0, 1, 2]
    built(tmp_path)
    again = make(tmp_path)
    assert again.missing() == []
    assert all(torch.equal(again[item]["row"], encode([item])["row"][0]) for item in ITEMS)


@pytest.mark.parametrize(
    ("items", "missing"),
    [
        (["another", *ITEMS[1:]], [0]),
        ([*ITEMS[:64], "another", *ITEMS[65:]], [1]),
        ([*ITEMS, "another"], [2]),
        (ITEMS[:149], [2]),
        (ITEMS[:128], []),
        ([*ITEMS[:10], ITEMS[11], ITEMS[10], *ITEMS[12:]], [0]),  # in the batch, order counts
        (ITEMS[1:], [0, 1, 2]),
    ],
)
def test_changed_items_are_missing_in_their_shards_alone(tmp_path, items, missing):
    built(tmp_path)
    before = contents(tmp_path)
    changed = make(tmp_path, items)
    assert changed.missing() == missing
    changed.build(missing, encode, 10)
    assert all(torch.equal(changed[item]["row"], encode([item])["row"][0]) for item in items)
    assert before.items() <= contents(tmp_path).items()  # the others stay for who uses them
    assert make(tmp_path).missing() == []


def test_a_changed_setting_is_another_cache_in_the_same_folder(tmp_path):
    built(tmp_path)
    for changes in ({"setting": 2}, {"another": 1}):
        assert make(tmp_path, **changes).missing() == [0, 1, 2]
    built(tmp_path, setting=2)
    assert make(tmp_path).missing() == make(tmp_path, setting=2).missing() == []
    assert len(contents(tmp_path)) == 6


@pytest.mark.parametrize(
    ("function", "options", "changes"),
    [
        (
            lambda *a, **o: cache.latent_caches(*a, device=CPU, **o)[0],
            {"vae_digest": "a", "sizes": [(64, 64)], "interpolation": "box", "random_flip": False, "batch_size": 8},
            {"vae_digest": "b", "sizes": [(72, 72)], "interpolation": "lanczos", "random_flip": True, "batch_size": 4},
        ),
        (
            lambda folder, pictures, **o: cache.prompt_cache(folder, [p.digest for p in pictures], device=CPU, **o),
            {"encoders_digest": "a", "dtype": torch.float32, "batch_size": 8},
            {"encoders_digest": "b", "dtype": torch.float16, "batch_size": 4},
        ),
    ],
    ids=["latents", "prompts"],
)
def test_all_that_changes_a_result_is_in_its_key(tmp_path, function, options, changes):
    pictures = [imaging.Picture("name", str(number), 9, 9, None) for number in range(70)]
    shards = function(tmp_path, pictures, **options)
    shards.build(shards.missing(), encode, 8)
    assert function(tmp_path, pictures, **options).missing() == []
    for name, value in changes.items():
        assert function(tmp_path, pictures, **options | {name: value}).missing() == [0, 1], name
    pictures[66] = pictures[66]._replace(digest="changed")
    assert function(tmp_path, pictures, **options).missing() == [1]
    moved = [picture._replace(name="elsewhere") for picture in pictures[:64]]
    assert function(tmp_path, moved, **options).missing() == []  # the content counts, not the place


DAMAGE = [lambda b: b"", lambda b: b[:100], lambda b: b[:-1], lambda b: b"\xff" * len(b)]
# A name, a kind and a shape in the header.
DAMAGE += [lambda b: b.replace(b'"row"', b'"rov"'), lambda b: b.replace(b"F32", b"I32")]
DAMAGE += [lambda b: b.replace(b"[64,32]", b"[32,64]")]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_missing_and_is_rebuilt(tmp_path, damage):
    built(tmp_path)
    before = contents(tmp_path)
    path = make(tmp_path, ITEMS[64:128])._paths[0]
    assert make(tmp_path)._paths[1] == path
    path.write_bytes(damage(path.read_bytes()))
    assert make(tmp_path).missing() == [1]
    built(tmp_path)
    assert contents(tmp_path) == before


def test_an_interrupted_build_goes_on_where_it_was(tmp_path):
    shards, done = make(tmp_path / "a"), []

    def stop_in_the_second_shard(items):
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(items)
        return encode(items)

    with pytest.raises(KeyboardInterrupt):
        shards.build(shards.missing(), stop_in_the_second_shard, 10)
    assert make(tmp_path / "a").missing() == [1, 2]
    built(tmp_path / "a")
    built(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_full_disk_says_what_the_cache_takes_and_what_is_free(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sharded_cache, "write_atomically", full)
    said = rf"{tmp_path} cannot be written: No space left on device\. It takes 9\.4 MiB, and .* MiB are free there\."
    with pytest.raises(UserError, match=said):  # 150 rows of 64 KiB
        make(tmp_path).build([2], lambda items: {"row": torch.zeros(len(items), 2**14)}, batch_size=10)


def test_shares_of_two_processes_build_what_one_builds(tmp_path):
    built(tmp_path / "one")
    shares = [make(tmp_path / "two"), make(tmp_path / "two")]
    missing = [shards.missing() for shards in shares]
    for rank in (1, 0):
        shares[rank].build(missing[rank][rank::2], encode, 10)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")  # what was encoded together included
    assert torch.equal(shares[0][ITEMS[70]]["row"], shares[1][ITEMS[70]]["row"])


def test_a_cache_travels_to_another_process(tmp_path):
    shards = built(tmp_path)
    assert shards[ITEMS[3]]["row"].shape == (32,)  # a file is open now
    copy = pickle.loads(pickle.dumps(shards))
    assert all(torch.equal(copy[item]["row"], shards[item]["row"]) for item in ITEMS)
    loader = torch.utils.data.DataLoader(shards, sampler=ITEMS, num_workers=2, batch_size=50)
    assert torch.equal(torch.cat([batch["row"] for batch in loader]), encode(ITEMS)["row"])


# --- what is encoded ---


@pytest.mark.parametrize("random_flip", [False, True])
@torch.no_grad()
def test_cached_latents_are_the_vaes_for_the_same_batch(tiny_base, column, pictures, tmp_path, random_flip):
    options = {"sizes": [(48, 48)], "interpolation": "lanczos", "random_flip": random_flip}
    (shards,) = cache.latent_caches(tmp_path, pictures[:20], "digest", batch_size=8, device=CPU, **options)
    positions = {picture.digest: position for position, picture in enumerate(pictures)}
    options |= {"column": column, "positions": positions}
    shards.build(shards.missing(), cache.load_picture_encoder(tiny_base / "vae", None, CPU, **options), 8)

    vae = components.load("vae", tiny_base / "vae")
    for start in (0, 8, 16):
        for flip in range(1 + random_flip):
            pixels = []
            for record in column[start : min(start + 8, 20)]:
                image = imaging.decode(imaging.read_bytes(record))
                top_left = imaging.center_crop_top_left(
                    imaging.resized_size(image.height, image.width, (48, 48)), (48, 48)
                )
                pixels.append(imaging.crop_pixels(image, (48, 48), "lanczos", bool(flip), top_left))
            mean, log_variance = vae.quant_conv(vae.encoder(torch.stack(pixels))).chunk(2, dim=1)
            rows = [shards[picture.digest] for picture in pictures[start : start + len(pixels)]]
            assert torch.equal(torch.stack([row["mean"][flip] for row in rows]), mean)
            assert torch.equal(torch.stack([row["std"][flip] for row in rows]), (log_variance / 2).exp())
    assert rows[0]["mean"].shape == rows[0]["std"].shape == (1 + random_flip, 4, 6, 6)


@torch.no_grad()
def test_each_bucket_has_a_cache_and_all_are_looked_up_as_one(tiny_base, column, pictures, tmp_path):
    options = {"sizes": imaging.crop_sizes(48, 16), "interpolation": "box", "random_flip": False}
    caches = cache.latent_caches(tmp_path, pictures, "digest", batch_size=8, device=CPU, **options)
    assert len(caches) > 2
    # The square's is the one of a run without buckets.
    squares = [p for p in pictures if imaging.crop_size(p.height_px, p.width_px, options["sizes"]) == (48, 48)]
    alone = options | {"sizes": [(48, 48)]}
    (square,) = cache.latent_caches(tmp_path, squares, "digest", batch_size=8, device=CPU, **alone)
    assert square._paths in [shards._paths for shards in caches]
    assert len({path for shards in caches for path in shards._paths}) == sum(len(shards._paths) for shards in caches)

    options |= {"column": column, "positions": {p.digest: position for position, p in enumerate(pictures)}}
    encode = cache.load_picture_encoder(tiny_base / "vae", None, CPU, **options)
    for shards in caches:
        shards.build(shards.missing(), encode, 8)
    latents = cache.together(caches)
    for picture in pictures:
        height, width = imaging.crop_size(picture.height_px, picture.width_px, options["sizes"])
        assert latents[picture.digest]["mean"].shape == (1, 4, height // 8, width // 8)
    with pytest.raises(KeyError):
        latents["another"]
    copy = pickle.loads(pickle.dumps(latents))  # as data workers get it
    assert torch.equal(copy[pictures[0].digest]["std"], latents[pictures[0].digest]["std"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_cached_prompts_are_the_encoders_states(tiny_base, tmp_path, dtype):
    captions = ["a red star", "", "a blue heart " * 40, "らせんがん", "a green square"]
    folders = {name: tiny_base / name for name in (*TOKENIZERS, *TEXT_ENCODERS)}
    shards = cache.prompt_cache(tmp_path, captions, "digest", dtype, 2, CPU)
    shards.build(shards.missing(), cache.load_caption_encoder(folders, None, CPU, dtype), 2)
    tokenizers, text_encoders = components.load_text_encoders(folders, None, CPU, dtype)
    for start in (0, 2, 4):
        states = []
        for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
            tokens = tokenizer(captions[start : start + 2], padding="max_length", truncation=True, return_tensors="pt")
            output = text_encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        rows = [shards[caption] for caption in captions[start : start + 2]]
        assert torch.equal(torch.stack([row["prompt_embeds"] for row in rows]), torch.cat(states, dim=-1))
        assert torch.equal(torch.stack([row["pooled_prompt_embeds"] for row in rows]), output.text_embeds)
    assert rows[0]["prompt_embeds"].dtype == rows[0]["pooled_prompt_embeds"].dtype == dtype


def test_latents_that_are_not_finite_name_their_picture(tiny_base, column, pictures):
    options = {"sizes": [(48, 48)], "interpolation": "box", "random_flip": False, "column": column}
    options["positions"] = {picture.digest: position for position, picture in enumerate(pictures)}
    vae = components.load("vae", tiny_base / "vae")
    vae.encoder.register_forward_hook(lambda m, i, output: output.index_fill(0, torch.tensor([2]), torch.inf))
    with pytest.raises(UserError, match="non-finite") as error:
        cache.encode_pictures([picture.digest for picture in pictures[10:14]], vae=vae, **options)
    assert pictures[12].name in str(error.value)


def test_a_picture_that_changed_since_it_was_looked_at_is_not_cached_as_what_it_was(tiny_base, column, pictures):
    record = {"path": "a.png", "bytes": imaging.read_bytes(column[1])}
    vae = components.load("vae", tiny_base / "vae")
    with pytest.raises(UserError, match=r"a\.png was changed while the run used it: it has other content"):
        cache.encode_pictures(
            [pictures[0].digest], [record], {pictures[0].digest: 0}, vae, [(64, 64)], "lanczos", False
        )


def test_the_encoder_is_loaded_only_where_something_is_missing(tmp_path):
    totals = []

    def bar(total):
        totals.append(total)
        return tqdm(total=total, disable=True)

    caches = [built(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "b", ["one", "two"])]
    caches[0]._paths[2].unlink()
    sharded_cache.fill((0, 1), caches, 10, lambda: encode, bar, "items")
    assert totals == [22 + 150 + 2]
    assert [shards.missing() for shards in caches] == [[], [], []]
    sharded_cache.fill((0, 1), caches, 10, lambda: pytest.fail("nothing is missing"), bar, "items")
    # Of two processes on a machine, each takes every other shard.
    shutil.rmtree(tmp_path / "a")
    sharded_cache.fill((0, 2), caches, 10, lambda: encode, bar, "items")
    assert caches[0].missing() == [1]
    shutil.rmtree(tmp_path / "a")
    sharded_cache.fill((1, 2), caches, 10, lambda: encode, bar, "items")
    assert caches[0].missing() == [0, 2]


class Full(torch.nn.Module):
    """An encoder for which the card has no room."""

    def forward(self, items):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB, and a hundred words more")


@pytest.mark.parametrize(
    ("of", "at_once", "budget_gib", "under", "helps"),
    [
        ("pictures at 96 px", 8, 4.0, "under --vram_budget_gib 4", "give --encode_batch_size 1, or "),
        ("pictures at 96 px", 8, None, "in what the card has left", "give --encode_batch_size 1, or "),
        ("pictures at 96 px", 1, 2.5, "under --vram_budget_gib 2.5", "lower --resolution, or "),
        ("captions or prompts", 8, 0.5, "under --vram_budget_gib 0.5", ""),
        ("captions or prompts", 1, None, "in what the card has left", ""),
    ],
)
def test_memory_that_does_not_suffice_to_encode_is_told_with_what_helps(
    of, at_once, budget_gib, under, helps, tiny_base, column, pictures, tmp_path, monkeypatch, capsys
):
    folders = {name: tiny_base / name for name in COMPONENTS}
    how = {"variant": None, "device": CPU, "share": (0, 1), "make_bar": lambda total: tqdm(total=total, disable=True)}
    how |= {"batch_size": at_once, "budget_gib": budget_gib}
    sized = {"sizes": imaging.crop_sizes(96, 16), "interpolation": "lanczos", "random_flip": False}

    def encode():
        if of.startswith("pictures"):
            cache.cached_latents(tmp_path, column, pictures, folders["vae"], **how, **sized)
        else:
            cache.cached_prompts(tmp_path, [ITEMS], folders, dtype=torch.float32, **how)

    def error_where(load_encoder):
        for name in ("load_picture_encoder", "load_caption_encoder"):
            monkeypatch.setattr(cache, name, lambda *_, **options: load_encoder())
        assert endings.in_one_line(encode, "--here") == 2
        return capsys.readouterr().err

    more = "free some of the card's memory" if budget_gib is None else "raise --vram_budget_gib"
    said = f"error: Out of memory while encoding {of}, {at_once} at once, {under}. To make it fit: {helps}{more}.\n"
    assert error_where(Full) == said
    # Where the weights do not fit, it does not matter how many are encoded at once.
    said = f"error: Out of memory while loading what encodes {of}, {under}. To make it fit: {more}.\n"
    assert error_where(lambda: Full()([])) == said


def test_memory_that_does_not_suffice_to_encode_asks_for_no_quantized_base(tmp_path):
    bar = lambda total: tqdm(total=total, disable=True)  # noqa: E731
    with pytest.raises(UserError) as caught:
        sharded_cache.fill((0, 1), [make(tmp_path)], 8, Full, bar, "pictures")
    assert not isinstance(caught.value, memory.DoesNotFit)  # at which a training of `auto` would quantize the UNet
    assert make(tmp_path).missing() == [0, 1, 2]


# --- the digest of weights ---


def test_the_digest_of_weights_follows_their_content_and_is_remembered(tmp_path):
    files, memory = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "memory" / "weights.json"
    for file in files:
        file.write_bytes(b"weights of " + file.name.encode())
    digest = cache.weights_digest(files, memory)
    assert cache.weights_digest(files, memory) == digest
    assert cache.weights_digest(files[:1], memory) != digest
    assert cache.weights_digest(files, tmp_path / "no memory" / "weights.json") == digest
    copies = [shutil.copy(file, file.with_suffix(".copy")) for file in files]
    assert cache.weights_digest(copies, memory) == digest

    # Unchanged in size and time, a file is not read again: a copy of gigabytes on a Drive would take a minute.
    before = files[0].stat()
    files[0].write_bytes(b"WEIGHTS of a.safetensors")
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.weights_digest(files, memory) == digest
    os.utime(files[0])
    assert cache.weights_digest(files, memory) != digest
    files[0].write_bytes(b"weights of a.safetensors")
    assert cache.weights_digest(files, memory) == digest
