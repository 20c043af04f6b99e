import io

import numpy as np
import pytest
from PIL import Image

from rasengan.near_duplicates import MOST_BITS, MOST_LEVELS, Fingerprint, fingerprint, similar_groups


def smooth(seed, width=160, height=120):
    """A picture of large soft patches, as a photograph has and noise has not."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def recompressed(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


CHANGES = {
    "recompressed": lambda image: recompressed(image, 50),
    "cropped": lambda image: image.crop((1, 1, image.width - 1, image.height - 1)),
    "smaller": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
}


def test_the_fingerprint_is_its_definition():
    image = smooth(0, 36 * 5, 32 * 3)
    pixels = np.asarray(image).astype(float)
    grey = (pixels @ [0.299, 0.587, 0.114]).reshape(8, 12, 9, 20).mean((1, 3))
    steps = grey[:, 1:] - grey[:, :-1]
    found = fingerprint(image)
    bits = np.array([digit == "1" for digit in f"{found.difference_hash:064b}"])
    is_clear = np.abs(steps.ravel() - 2) > 1.5  # by more than the rounding
    assert (bits == (steps.ravel() > 2))[is_clear].all()
    assert is_clear.sum() > 50
    colors = pixels.reshape(4, 24, 4, 45, 3).mean((1, 3))
    assert np.abs(np.array(list(found.colors)) - colors.ravel()).max() <= 1.5


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_looks_alike_and_another_picture_does_not(change):
    pictures = [smooth(seed) for seed in range(40)]
    copies = [CHANGES[change](picture) for picture in pictures]
    groups = similar_groups([fingerprint(image) for image in pictures + copies])
    assert groups == [[place, place + 40] for place in range(40)]


def test_plain_grounds_are_told_apart_by_color_and_found_under_compression():
    plain = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "white")]
    copies = [recompressed(image, 40) for image in plain]
    assert similar_groups([fingerprint(image) for image in plain + copies]) == [[0, 3], [1, 4], [2, 5]]


def test_noise_on_a_plain_ground_decides_nothing():
    rng = np.random.default_rng(0)
    noisy = [Image.fromarray(rng.integers(127, 130, (8, 9), dtype=np.uint8)) for _ in range(6)]
    fingerprints = [fingerprint(image.resize((90, 80), Image.Resampling.NEAREST).convert("RGB")) for image in noisy]
    assert similar_groups(fingerprints) == [list(range(6))]


def flipped(value, bits):
    return value ^ ((1 << bits) - 1)


@pytest.mark.parametrize(("bits", "levels", "are_alike"), [(4, 4, True), (5, 0, False), (0, 5, False), (0, 0, True)])
def test_the_limits_hold_for_bits_and_for_levels(bits, levels, are_alike):
    assert (MOST_BITS, MOST_LEVELS) == (4, 4)
    one = Fingerprint(2**64 - 1, bytes([100] * 48))
    other = Fingerprint(flipped(one.difference_hash, bits), bytes([100 + levels] * 48))
    assert similar_groups([one, other]) == ([[0, 1]] if are_alike else [])


def test_groups_are_those_of_all_pairs_compared_one_by_one():
    rng = np.random.default_rng(0)
    hashes = [int(rng.integers(2**63))]
    while len(hashes) < 300:  # chains, whose neighbours differ in three bits
        changed = sum(1 << int(bit) for bit in rng.choice(64, 3, replace=False))
        hashes.append(hashes[-1] ^ changed if rng.random() < 0.9 else int(rng.integers(2**63)))
    rng.shuffle(hashes)
    expected = {place: {place} for place in range(300)}
    for place, value in enumerate(hashes):
        for other in range(place):
            if (int(value) ^ int(hashes[other])).bit_count() <= 4 and expected[place] is not expected[other]:
                expected[place] |= expected[other]
                for member in expected[place]:
                    expected[member] = expected[place]
    groups = sorted({tuple(sorted(group)) for group in expected.values() if len(group) > 1})
    found = similar_groups([Fingerprint(int(value), bytes(48)) for value in hashes])
    assert found == [list(group) for group in groups]
    assert len(found) > 10


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_like_nothing(count):
    assert similar_groups([Fingerprint(0, bytes(48))] * count) == []
