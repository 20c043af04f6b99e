"""The embeddings of prompts to draw: from a cache on disk, or from text encoders with adapters merged into them."""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from rasengan import cache, components, memory, merging, sdxl
from rasengan.adapters import Adapter
from rasengan.sources import TEXT_ENCODERS, TOKENIZERS


Embeds = tuple[torch.Tensor, torch.Tensor]  # prompt_embeds (T, D) and pooled_prompt_embeds (P,)


def too_long(prompts: list[str], folders: dict[str, Path]) -> list[tuple[str, int, int]]:
    """Return the prompts that are cut off, each with its tokens and with how many are used."""
    tokenizers = [components.load(name, folders[name]) for name in TOKENIZERS]
    most = tokenizers[0].model_max_length
    lengths = [(prompt, max(sdxl.count_tokens(prompt, tokenizer) for tokenizer in tokenizers)) for prompt in prompts]
    return [(prompt, length, most) for prompt, length in lengths if length > most]


def encode_once(
    texts: list[str],
    folders: dict[str, Path],
    variant: str | None,
    device: torch.device,
    dtype: torch.dtype,
    directory: Path,
    share: tuple[int, int],
    make_bar: Callable[[int], tqdm],
    budget_gib: float | None,
) -> dict[str, Embeds]:
    """Return the embeddings of each text by the base's encoders, on the CPU; these are loaded for new texts alone.

    Args:
        texts: prompts and negative prompts.
        folders: of the components.
        variant: of their weight files.
        device: to encode on.
        dtype: of the encoders.
        directory: of the cache, which training shares.
        share: as `sharded_cache.fill` takes it.
        make_bar: likewise.
        budget_gib: likewise.
    """
    # One for each text: which others a run draws must not matter.
    groups = [[text] for text in texts]
    how = (folders, variant, device, dtype, share, make_bar)
    caches = cache.cached_prompts(directory, groups, *how, batch_size=1, budget_gib=budget_gib)
    rows = [(text, prompts[text]) for text, prompts in zip(texts, caches, strict=True)]
    return {text: (row["prompt_embeds"], row["pooled_prompt_embeds"]) for text, row in rows}


@torch.no_grad()
def encode_tuned(
    texts: list[str],
    folders: dict[str, Path],
    variant: str | None,
    device: torch.device,
    dtype: torch.dtype,
    adapters: list[tuple[Adapter, float]],
) -> tuple[dict[str, Embeds], dict[str, merging.MergeReport]]:
    """Return the embeddings of each text by encoders with adapters merged into them, and what the merges changed.

    The encoders leave memory again. Arguments are as in `encode_once`; each adapter has the scale on its change.
    """
    tokenizers, text_encoders = components.load_text_encoders(folders, variant, device, dtype)
    reports = {}
    for name, model in zip(TEXT_ENCODERS, text_encoders, strict=True):
        if any(name in adapter.weights for adapter, _ in adapters):
            reports[name] = merging.merge(model, adapters, name)[1]
    encoded = {text: cache.encode_captions([text], tokenizers, text_encoders).values() for text in texts}
    del text_encoders, model
    memory.give_back()
    return {text: tuple(part[0].cpu() for part in parts) for text, parts in encoded.items()}, reports
