"""LoRAs of another rank: of a LoRA, or of the difference between two models, by singular value decomposition."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from rasengan import UserError, single_file, tensor_files
from rasengan.adapters import ADAPTABLE, Adapter, by_module, infer_config, kind_of, strength_of
from rasengan.components import skeleton
from rasengan.sources import component_files


# Up to this size of a weight's smaller side all singular values are computed; beyond it the greatest ones alone.
FULL_SVD_SIZE = 512


class Kept(NamedTuple):
    """What of a component's changes a rank keeps: the share of their norm; and how many tensors it cannot hold."""

    share: float
    left_out: int = 0


def resize_rank(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, Kept]]:
    """Return the LoRA of a rank that is nearest to another, and the share of its norm that this keeps.

    The strength goes into the matrices: alpha is the rank. A module of a smaller rank keeps its own. The work is done
    in float64, the result is fp32. DoRA's vector stays as it is.

    Raises:
        UserError: it is a LoHa or a LoKr, or not finite.
    """
    weights, configs, kept = {}, {}, {}
    for name, config in adapter.configs.items():
        if kind_of(config) != "LORA":
            raise UserError(f"The {name}'s adapter is a {kind_of(config)}. --resize_rank takes LoRAs alone.")
        weights[name], ranks, norms = {}, {}, []
        for module, parts in by_module(adapter.weights[name]).items():
            if not all(torch.isfinite(tensor).all() for tensor in parts.values()):
                raise UserError(f"The {name}'s {module} is not finite: the adapter is damaged. Give another.")
            resized, before, after = _resized(parts, strength_of(config, module), rank)
            ranks[module] = len(resized["lora_A.weight"])
            weights[name] |= {f"{module}.{part}": tensor for part, tensor in resized.items()}
            norms.append((before, after))
        configs[name] = infer_config(weights[name], ranks)
        kept[name] = Kept(_share(norms))
    return Adapter(weights, configs), kept


def _resized(
    parts: dict[str, torch.Tensor], strength: float, rank: int
) -> tuple[dict[str, torch.Tensor], float, float]:
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    # The product's singular values are those of a small square matrix between two orthogonal ones.
    left, small_left = torch.linalg.qr(b.double().flatten(1))
    right, small_right = torch.linalg.qr(a.double().flatten(1).T)
    u, values, v = torch.linalg.svd(strength * small_left @ small_right.T, full_matrices=False)
    size = min(rank, len(values))
    root = values[:size].sqrt()
    resized = dict(parts)
    resized["lora_B.weight"] = (left @ u[:, :size] * root).float().reshape(b.shape[0], size, *b.shape[2:]).contiguous()
    resized["lora_A.weight"] = (root[:, None] * v[:size] @ right.T).float().reshape(size, *a.shape[1:]).contiguous()
    return resized, values.norm().item(), values[:size].norm().item()


def _share(norms: Iterable[tuple[float, float]]) -> float:
    norms = list(norms)
    whole = math.hypot(*(before for before, _ in norms))
    return math.hypot(*(after for _, after in norms)) / whole if whole else 1.0


@torch.no_grad()
def extract_lora(
    tuned: dict[str, Path],
    base: dict[str, Path],
    rank: int,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    on_tensor: Callable[[], object] = lambda: None,
) -> tuple[Adapter, dict[str, Kept]]:
    """Return the LoRA of a rank that is nearest to the difference of two models' linear layers.

    A weight and its difference are in memory at a time, in fp32. Of large weights only the greatest singular values
    are computed, by a seeded random projection. Alpha is the rank.

    Args:
        tuned: the folder of each component, as `sources.fetch` returns it; or for each the same file that holds
            them all in the original layout.
        base: likewise, one of the two in folders; the components of both that can be adapted are compared.
        rank: of the LoRA; a layer smaller than it gets its own size.
        variant: of both models' weight files.
        device: where the decomposition runs.
        on_tensor: called after each tensor.

    Raises:
        UserError: the models are of different shapes, or do not differ in a linear layer.
    """
    weights, configs, kept = {}, {}, {}
    for name in ADAPTABLE:
        model = skeleton(name, tuned[name] if base[name].is_file() else base[name])
        read_new, read_old = (_tensors(name, places[name], variant, model) for places in (tuned, base))
        for read in (read_new, read_old):  # a buffer that older versions of transformers saved
            read.pop("embeddings.position_ids", None)
        if read_new.keys() != read_old.keys():
            stranger = sorted(read_new.keys() ^ read_old.keys())[0]
            raise UserError(f"The {name}s of {tuned[name]} and {base[name]} differ in what they hold, as {stranger}.")
        layers = [
            key.removeprefix("text_model.") for key, m in model.named_modules() if isinstance(m, torch.nn.Linear)
        ]
        linear = {f"{layer}.weight" for layer in layers}
        part, ranks, norms, left_out = {}, {}, [], 0
        for key in read_old:
            new, old = (read[key]().to(device).float() for read in (read_new, read_old))
            if new.shape != old.shape:
                raise UserError(
                    f"The {name}'s {key} is {tuple(new.shape)} in {tuned[name]}, but {tuple(old.shape)} in "
                    f"{base[name]}. Give the --base that the model was tuned from."
                )
            if not torch.isfinite(new - old).all():
                raise UserError(
                    f"The {name}'s {key} is not finite in {tuned[name]} or {base[name]}. Give models that draw."
                )
            if torch.equal(new, old):
                pass
            elif key in linear:
                module = key.removesuffix(".weight")
                part[f"{module}.lora_A.weight"], part[f"{module}.lora_B.weight"], after = _nearest(new - old, rank)
                ranks[module] = len(part[f"{module}.lora_A.weight"])
                norms.append(((new - old).norm().item(), after))
            else:
                left_out += 1
            on_tensor()
        if part:
            weights[name], configs[name] = part, infer_config(part, ranks)
        if part or left_out:
            kept[name] = Kept(_share(norms), left_out)
    if not weights:
        raise UserError(
            "--extract_from and --base do not differ in any linear layer, so there is no LoRA between them."
        )
    return Adapter(weights, configs), kept


def _nearest(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return lora_A and lora_B, fp32 on the CPU, and the norm of their product."""
    size = min(rank, *change.shape)
    if min(change.shape) <= max(FULL_SVD_SIZE, size):
        u, values, v = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[change.device] if change.is_cuda else []):
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(change, q=min(size + 16, *change.shape), niter=6)
        v = v.T
    root = values[:size].sqrt()
    b, a = u[:, :size] * root, root[:, None] * v[:size]
    return a.cpu().contiguous(), b.cpu().contiguous(), values[:size].norm().item()


def _tensors(component: str, place: Path, variant: str | None, model: torch.nn.Module) -> dict[str, Callable]:
    """Return what reads each tensor, by its name without text_model, of a folder or the file of a whole model."""
    if place.is_file():
        tensor_files.check_plain(place, tensor_files.stored(place))
        shapes = {name.removeprefix("text_model."): tensor.shape for name, tensor in model.state_dict().items()}
        return {name: partial(single_file.read_tensor, place, component, name, shapes[name]) for name in shapes}
    found = {}
    for file in component_files(component, place, variant):
        if file.suffix == ".safetensors":
            with tensor_files.opened(file) as content:
                tensor_files.check_plain(place, content.keys())
                found |= {key.removeprefix("text_model."): partial(_read, file, key) for key in content.keys()}  # noqa: SIM118
    return found


def _read(file: Path, name: str) -> torch.Tensor:
    with tensor_files.opened(file) as content:
        return content.get_tensor(name)
