import math
import random
import shutil
import statistics

import pytest
import torch
from safetensors.torch import save_file

from rasengan import UserError, miniature, scores, world


# --- by the judge ---


def test_the_shares_are_of_what_was_asked_for():
    scenes = world.held_out_scenes(4)
    answers = [scene._asdict() | {"style": "ink", "style_score": 0.9} for scene in scenes]
    assert set(scores.judge_shares(answers, scenes).values()) == {1.0}
    answers[0] |= {"style": "photo", "style_score": 0.5}
    answers[1]["thing"] = answers[2]["count"] = answers[3]["ground"] = "nothing"
    answers[3]["position"] = "nowhere"
    found = scores.judge_shares(answers, scenes)
    assert found == {
        "style": 0.75, "content": 0.5, "thing": 0.75, "color": 1.0, "position": 0.75, "count": 0.75, "pattern": 1.0,
        "ground": 0.75,
    }  # fmt: skip


def test_each_seed_has_its_shares_and_the_models_are_compared_by_their_means():
    scenes = world.held_out_scenes(4)
    right = [scene._asdict() | {"style": "photo", "style_score": 0.1} for scene in scenes]
    wrong = [answer | {"thing": "nothing", "style_score": 0.9} for answer in right]
    answers = {"base": [*right, *right[:2], *wrong[2:]], "tuned": [*wrong[:3], right[3], *wrong[:2], *right[2:]]}
    found = scores.judge_by_seed(answers, scenes, [3, 8])
    assert [found["base"]["seeds"][seed]["content"] for seed in (3, 8)] == [1.0, 0.5]
    assert [found["tuned"]["seeds"][seed]["content"] for seed in (3, 8)] == [0.25, 0.5]
    assert [found["tuned"]["seeds"][seed]["style"] for seed in (3, 8)] == [0.75, 0.5]
    assert (found["base"]["mean"]["content"], found["tuned"]["mean"]["content"]) == (0.75, 0.375)
    assert (found["base"]["mean"]["style"], found["content_kept"]) == (0.25, 0.5)
    assert math.isnan(scores.judge_by_seed({"base": wrong, "tuned": right}, scenes, [0])["content_kept"])


def test_a_judge_is_read_from_a_file_or_its_folder(tmp_path):
    torch.manual_seed(0)
    judge = miniature.Judge()
    save_file({name: weight.half() for name, weight in judge.state_dict().items()}, tmp_path / "judge.safetensors")
    images = [world.draw(scene, "photo", random.Random(0)) for scene in world.held_out_scenes(2)]
    expected = miniature.judge_pictures(judge.half().float().eval(), images)
    assert miniature.judge_pictures(miniature.load_judge(tmp_path), images) == expected
    assert miniature.judge_pictures(miniature.load_judge(tmp_path / "judge.safetensors"), images) == expected


@pytest.mark.parametrize("content", [None, b"none", {"features.0.weight": torch.zeros(1)}])
def test_what_is_no_judge_is_refused(content, tmp_path):
    file = tmp_path / "judge.safetensors"
    if isinstance(content, dict):
        save_file(content, file)
    elif content:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"judge\.safetensors holds no weights of a judge: .*\. Give the folder that"):
        miniature.load_judge(tmp_path)


# --- by a CLIP ---


def test_embeddings_are_clips_own(tiny_clip):
    scores.check_clip(str(tiny_clip))
    clip = scores.load_clip(str(tiny_clip), torch.device("cpu"))
    scenes = world.held_out_scenes(20)  # of two batches
    images = [world.draw(scene, "photo", random.Random(0)) for scene in scenes]
    texts = [scene.caption for scene in scenes[:-1]] + ["word " * 100]
    tokens = clip.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    pixels = clip.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(**tokens, **pixels)
    found = scores.embed_images(clip, images), scores.embed_texts(clip, texts)
    assert found[0].dtype == torch.float64
    for embeds, expected in zip(found, (output.image_embeds, output.text_embeds), strict=True):
        assert torch.allclose(torch.nn.functional.normalize(embeds, dim=1).float(), expected, atol=1e-6)
    # What CLIP itself gives for each pair, before its temperature.
    cosines = output.logits_per_image.diag() / clip.model.logit_scale.exp()
    assert scores.clip_score(*found) == pytest.approx(100 * cosines.mean().item(), abs=1e-4)


def reference_mmd(drawn, others):
    """The squared discrepancy by its definition, pair by pair."""

    def kernel(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 200)

    def mean(xs, ys):
        return sum(kernel(x, y) for x in xs for y in ys) / (len(xs) * len(ys))

    return 1000 * (mean(drawn, drawn) + mean(others, others) - 2 * mean(drawn, others))


@pytest.mark.parametrize("length", [1.0, 20.0])
def test_cmmd_is_the_mean_discrepancy_of_all_pairs(length):
    torch.manual_seed(0)
    drawn, others = torch.randn(7, 5).double(), torch.randn(4, 5).double() + 0.5
    drawn, others = (torch.nn.functional.normalize(rows, dim=1) for rows in (drawn, others))
    expected = reference_mmd(drawn.tolist(), others.tolist())
    drawn, others = length * drawn, length * others  # their length does not count
    assert scores.cmmd(drawn, others) == pytest.approx(expected, rel=1e-9)
    assert scores.cmmd(others, drawn) == pytest.approx(expected, rel=1e-9)
    assert scores.cmmd(drawn, drawn.flip(0)) == pytest.approx(0, abs=1e-12)
    assert expected > 0.1


def reference_kid(drawn, others):
    """The unbiased estimate by its definition, pair by pair."""

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(xs):
        return (
            sum(kernel(x, y) for i, x in enumerate(xs) for j, y in enumerate(xs) if i != j) / len(xs) / (len(xs) - 1)
        )

    between = sum(kernel(x, y) for x in drawn for y in others) / len(drawn) / len(others)
    return within(drawn) + within(others) - 2 * between


def test_kid_is_the_discrepancy_of_its_definition():
    torch.manual_seed(0)
    drawn, others = torch.randn(7, 5).double(), torch.randn(7, 5).double() + 1
    expected = reference_kid(drawn.tolist(), others.tolist())
    state = torch.get_rng_state()
    found, deviation = scores.kid(drawn, others)
    assert found == pytest.approx(expected, rel=1e-9)
    assert math.isnan(deviation)  # of a single subset
    assert torch.equal(torch.get_rng_state(), state)
    # Of sets of two sizes, the mean over subsets as large as the smaller one.
    more = torch.cat([others, torch.randn(60, 5).double() + 1])
    found, deviation = scores.kid(drawn, more)
    assert (found, deviation) == scores.kid(drawn, more)
    assert found == pytest.approx(reference_kid(drawn.tolist(), more.tolist()), rel=0.25)
    assert scores.kid(others, others)[0] < 0 < found
    subsets = [reference_kid(drawn.tolist(), more[torch.randperm(67)[:7]].tolist()) for _ in range(100)]
    assert deviation == pytest.approx(statistics.pstdev(subsets), rel=0.25)


def test_without_torchmetrics_it_says_what_to_install(tiny_clip, monkeypatch):
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--clip_model needs torchmetrics: `pip install -e '.\[metrics\]'`"):
        scores.check_clip(str(tiny_clip))


def test_what_is_no_clip_is_refused(tiny_clip, tiny_base, tmp_path):
    with pytest.raises(UserError, match="--clip_model .* cannot be used: it is a clip_text_model. Give a folder"):
        scores.check_clip(str(tiny_base / "text_encoder"))
    with pytest.raises(UserError, match="--clip_model .*nowhere cannot be used: .* Give a folder or a hub id"):
        scores.check_clip(str(tmp_path / "nowhere"))
    shutil.copytree(tiny_clip, tmp_path, dirs_exist_ok=True)
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="tensors are missing"):
        scores.load_clip(str(tmp_path), torch.device("cpu"))
