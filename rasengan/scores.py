"""How well pictures show what was asked for, and how near they are to others: by the miniature's judge, or by a CLIP.

KID is that of torchmetrics, of the CLIP's embeddings in place of an Inception's, whose weights hardly anybody has at
hand; no library has CMMD.
"""

import importlib.util
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import transformers
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rasengan import UserError, first_line, miniature, world


QUESTIONS = ("thing", "color", "position", "count", "pattern", "ground")
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as its authors have them
AT_ONCE = 16  # pictures or texts that a CLIP sees together


# --- by the judge ---


def judge_shares(answers: list[dict[str, object]], scenes: list[world.Scene]) -> dict[str, float]:
    """Return the shares of pictures, 0 to 1, that are as they should be.

    Args:
        answers: of `miniature.judge_pictures`, for each picture.
        scenes: that were asked for.

    Returns:
        `style`, the share in the world's style; `content`, where thing, color and position are right; and that of each
        of `QUESTIONS`.
    """
    pairs, count = list(zip(answers, scenes, strict=True)), len(scenes)
    shares = {
        "style": sum(answer["style_score"] > 0.5 for answer in answers) / count,
        "content": sum(miniature.shows(answer, scene) for answer, scene in pairs) / count,
    }
    return shares | {name: sum(a[name] == getattr(s, name) for a, s in pairs) / count for name in QUESTIONS}


def by_judge(
    judge: miniature.Judge, images: dict[str, list[Image.Image]], scenes: list[world.Scene], seeds: list[int]
) -> dict[str, object]:
    """Return what a judge finds in each model's pictures, as `judge_by_seed` has it.

    Args:
        judge: to ask.
        images: of each model, the base's first: those of all scenes for the first seed, then for the next.
        scenes: that were asked for, with each seed.
        seeds: as many as the scenes were drawn with.
    """
    answers = {}
    for kind, drawn in images.items():
        groups = (drawn[start : start + len(scenes)] for start in range(0, len(drawn), len(scenes)))
        answers[kind] = [answer for group in groups for answer in miniature.judge_pictures(judge, group)]
    return judge_by_seed(answers, scenes, seeds)


def judge_by_seed(
    answers: dict[str, list[dict[str, object]]], scenes: list[world.Scene], seeds: list[int]
) -> dict[str, object]:
    """Return `judge_shares` of the pictures of each seed and their mean, for each model.

    Args:
        answers: of each model's pictures, the base's first: those of all scenes for the first seed, then for the next.
        scenes: that were asked for, with each seed.
        seeds: as many as the scenes were drawn with.

    Returns:
        `seeds` and `mean` of each model; and `content_kept`, the last model's content as a share of the first's, NaN
        where that has none.
    """
    found, size = {}, len(scenes)
    for kind, of in answers.items():
        by_seed = {seed: judge_shares(of[n * size : (n + 1) * size], scenes) for n, seed in enumerate(seeds)}
        names = by_seed[seeds[0]]
        mean = {name: sum(shares[name] for shares in by_seed.values()) / len(seeds) for name in names}
        found[kind] = {"seeds": by_seed, "mean": mean}
    contents = [about["mean"]["content"] for about in found.values()]
    return found | {"content_kept": contents[-1] / contents[0] if contents[0] else math.nan}


# --- by a CLIP ---


class Clip(NamedTuple):
    """A CLIP, and what prepares its texts and pictures."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    image_processor: object


def check_clip(place: str, cache_dir: str | None = None) -> None:
    """Check that a place holds a CLIP, by its configuration alone, and that torchmetrics is there.

    Raises:
        UserError: it does not, or is not.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise UserError("--clip_model needs torchmetrics: `pip install -e '.[metrics]'`.")
    try:
        config, _ = CLIPConfig.get_config_dict(place, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise _refused(place, first_line(error)) from error
    if config.get("model_type") != "clip":
        raise _refused(place, f"it is a {config.get('model_type') or 'model of no named type'}.")


def load_clip(place: str, device: torch.device, cache_dir: str | None = None) -> Clip:
    """Load a CLIP in fp32, downloading it first where it is no local folder.

    Raises:
        UserError: it is not there, not in safetensors, or damaged.
    """
    # The one without torchvision, where this version of transformers has two.
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = CLIPModel.from_pretrained(place, cache_dir=cache_dir, **options)
        if absent := sorted(report["missing_keys"]):  # which would be left at random values
            raise ValueError(f"{len(absent)} tensors are missing, such as {absent[0]}.")
        parts = [kind.from_pretrained(place, cache_dir=cache_dir) for kind in (CLIPTokenizer, processor)]
    except Exception as error:  # the loaders raise OSError, ValueError, RuntimeError and SafetensorError alike
        raise _refused(place, first_line(error)) from error
    return Clip(model.eval().requires_grad_(False).to(device), *parts)


def _refused(place: str, reason: str) -> UserError:
    return UserError(f"--clip_model {place} cannot be used: {reason} Give a folder or a hub id of a CLIP.")


@torch.no_grad()
def embed_images(clip: Clip, images: list[Image.Image]) -> torch.Tensor:
    """Return the embeddings of pictures, (N, D), fp64 on the CPU."""
    found = []
    for part in _parts(images):
        pixels = clip.image_processor(images=[image.convert("RGB") for image in part], return_tensors="pt")
        pixels = pixels["pixel_values"].to(clip.model.device)
        found.append(clip.model.visual_projection(clip.model.vision_model(pixel_values=pixels).pooler_output))
    return torch.cat(found).cpu().double()


@torch.no_grad()
def embed_texts(clip: Clip, texts: list[str]) -> torch.Tensor:
    """Return the embeddings of texts, (N, D), fp64 on the CPU; what is beyond 77 tokens is cut off."""
    most, found = clip.model.config.text_config.max_position_embeddings, []
    for part in _parts(texts):
        tokens = clip.tokenizer(part, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
        output = clip.model.text_model(**tokens.to(clip.model.device))
        found.append(clip.model.text_projection(output.pooler_output))
    return torch.cat(found).cpu().double()


def _parts(items: list) -> Iterator[list]:
    return (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))


def by_clip(
    clip: Clip, images: dict[str, list[Image.Image]], prompts: list[str], references: list[Image.Image]
) -> dict[str, object]:
    """Return how near each model's pictures are to their prompts and to other pictures.

    Args:
        clip: to see them with.
        images: of each model.
        prompts: of each picture, the same for every model.
        references: pictures to be near to.

    Returns:
        `reference_pictures`, how many these are; and of each model `score` and `cmmd`, and, where there are two
        pictures at least on both sides, `kid` and `kid_std`.
    """
    texts, others = embed_texts(clip, prompts), embed_images(clip, references)
    found = {"reference_pictures": len(references)}
    for kind, drawn in images.items():
        embeds = embed_images(clip, drawn)
        found[kind] = {"score": clip_score(embeds, texts), "cmmd": cmmd(embeds, others)}
        if min(len(embeds), len(others)) > 1:
            found[kind]["kid"], found[kind]["kid_std"] = kid(embeds, others)
    return found


def clip_score(images: torch.Tensor, texts: torch.Tensor) -> float:
    """Return the mean of 100 x the cosine of each picture with its own text, of embeddings (N, D).

    Source: arXiv 2104.08718, with 100 in place of 2.5 and without setting what is negative to 0.
    """
    return 100 * torch.nn.functional.cosine_similarity(images, texts).mean().item()


class _AsIs(torch.nn.Module):
    """What torchmetrics takes for the network, since the embeddings are there."""

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds


def kid(drawn: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return KID, the distance of two sets of pictures' embeddings (N, D) and (M, D), of two pictures at least.

    Beside it stands its standard deviation over the subsets, NaN where there is one alone.

    The squared maximum mean discrepancy with a cubic kernel, its unbiased estimate: of equal sets it is below 0, by as
    much as chance makes of sets of their size.

    Source: "Demystifying MMD GANs" (arXiv 1801.01401), by torchmetrics, over seeded random subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance  # takes a second, and is not everywhere

    size = min(len(drawn), len(reference), SUBSET_SIZE)
    subsets = 1 if len(drawn) == len(reference) == size else SUBSETS
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # of the room that it takes
        torch.default_generator.manual_seed(0)  # that of the CPU alone
        distance = KernelInceptionDistance(feature=_AsIs(), subsets=subsets, subset_size=size)
        distance.update(reference, real=True)
        distance.update(drawn, real=False)
        mean, deviation = (value.item() for value in distance.compute())
    return mean, deviation if subsets > 1 else math.nan


def cmmd(drawn: torch.Tensor, reference: torch.Tensor) -> float:
    """Return CMMD, the distance of two sets of pictures' CLIP embeddings (N, D) and (M, D); 0 for equal sets.

    The embeddings are brought to length 1.

    The squared maximum mean discrepancy with a Gaussian kernel, its biased estimate: sets of a few pictures are far
    from each other by their size alone, so compare such of equal sizes only.

    Source: "Rethinking FID" (arXiv 2401.09603), section 4, and its authors' code: sigma 10, times 1000.
    """
    drawn, reference = (torch.nn.functional.normalize(embeds.double(), dim=1) for embeds in (drawn, reference))

    def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        # Less 1, which cancels in the sum below: at sigma 10 the kernel is close to 1 everywhere.
        return torch.expm1(-squared / (2 * SIGMA**2)).mean()

    between = mean_kernel(drawn, reference)
    return (SCALE * (mean_kernel(drawn, drawn) + mean_kernel(reference, reference) - 2 * between)).item()
