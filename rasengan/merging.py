"""Prove that an adapter fits a model, merge it hard, and prove that the merge changed what it should.

Weights are named as `export` names them.
"""

import copy
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from rasengan import UserError, export


class MergeReport(NamedTuple):
    """What a merge changed: how many modules, and the norm of all changes over the norm of what they changed."""

    modules: int
    relative_change: float


def check_adapter(
    weights: dict[str, torch.Tensor], config: LoraConfig, model: torch.nn.Module, component: str
) -> list[str]:
    """Return the names of the modules that the adapter changes, once every key is shown to fit the model.

    Args:
        weights: of one component, by name.
        config: the LoRA's.
        model: the component, or its skeleton on the meta device.
        component: its name, for messages.

    Raises:
        UserError: a key is unknown, half of a pair is missing, a shape does not fit, or a targeted module has none.
    """
    weights, model_modules = export.fit_names(weights, model), dict(model.named_modules())
    pairs, problems = {}, []
    for key, tensor in weights.items():
        module, _, part = key.rpartition(".lora_")
        if part not in {"A.weight", "B.weight"}:
            problems.append(f"{key} is no lora_A or lora_B weight")
        elif not isinstance(model_modules.get(module), torch.nn.Linear):
            problems.append(f"{key} has no linear layer in the model")
        else:
            pairs.setdefault(module, {})[part[0]] = tensor.shape
    for module, shapes in pairs.items():
        layer, rank = model_modules[module], _of_module(config.rank_pattern, module, config.r)
        if shapes.keys() != {"A", "B"}:
            problems.append(f"{module} has no lora_{'A' if 'B' in shapes else 'B'}")
        elif not (shapes["A"] == (rank, layer.in_features) and shapes["B"] == (layer.out_features, rank)):
            problems.append(
                f"{module} is {layer.out_features} x {layer.in_features} at rank {rank}, but its lora_B and "
                f"lora_A are {' x '.join(map(str, shapes['B']))} and {' x '.join(map(str, shapes['A']))}"
            )
    for module, layer in model_modules.items():
        targeted = isinstance(layer, torch.nn.Linear) and bool(check_target_module_exists(config, module))
        if targeted and module not in pairs:
            problems.append(f"{module} is targeted, but has no weights")
    if problems or not pairs:
        shown = "; ".join(problems[:5]) or "it holds no weights"
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"The adapter does not fit the {component}: {shown}{more}. Give the base model that it was trained on, "
            "or export it again."
        )
    return list(pairs)


def _of_module(pattern: dict, module: str, default: float) -> float:
    # A pattern's keys are ends of names, or regular expressions for them.
    return pattern.get(get_pattern_key(pattern.keys(), module), default)


@torch.no_grad()
def merge(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], config: LoraConfig, component: str, scale: float = 1.0
) -> tuple[torch.nn.Module, MergeReport]:
    """Merge an adapter into the model's own weights through PEFT, and prove that it changed them.

    W + scale * alpha / rank * B A is computed in fp32 and rounded once to the model's dtype. While it runs, the
    weights that it changes are held twice.

    Args:
        model: the component, on any device.
        weights: of this component, by name, fp32.
        config: the LoRA's.
        component: its name, for messages.
        scale: on the whole change; 0 leaves the model as it is.

    Raises:
        UserError: the adapter does not fit, or changes nothing, or not all that it should, or makes a weight
            non-finite.
    """
    modules, weights = check_adapter(weights, config, model, component), export.fit_names(weights, model)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in modules}
    config = copy.deepcopy(config)
    config.target_modules = modules
    # What they left out in the training has no weights here; PEFT would leave out more.
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.lora_alpha *= scale
    config.alpha_pattern = {name: alpha * scale for name, alpha in config.alpha_pattern.items()}
    with tempfile.TemporaryDirectory() as folder:
        export.write_peft(Path(folder), {key: tensor.float().contiguous() for key, tensor in weights.items()}, config)
        # safe_merge would round the change to the model's dtype before adding it; finiteness is checked below.
        model = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=False)

    squared_change, squared_norm, changed, unmerged = 0.0, 0.0, 0, []
    for name, old in before.items():
        new = model.get_submodule(name).weight
        if not torch.equal(new, old):
            changed += 1
        elif not torch.equal((old.float() + _weight_change(weights, config, name, old.device)).to(old.dtype), old):
            unmerged.append(name)
        if not torch.isfinite(new).all():
            raise UserError(
                f"Merging makes {component}.{name} non-finite: the adapter is damaged, or overflows in {new.dtype}. "
                "Give another checkpoint, or a smaller --lora_scale."
            )
        squared_change += (new.float() - old.float()).square().sum(dtype=torch.float64).item()
        squared_norm += old.float().square().sum(dtype=torch.float64).item()
    if unmerged:
        raise UserError(
            f"The merge left out {len(unmerged)} of {len(modules)} modules of the {component}, such as {unmerged[0]}, "
            "though the adapter changes them. Export the adapter again with no other settings than r, lora_alpha "
            "and target_modules."
        )
    if squared_change == 0 and scale != 0:
        raise UserError(
            f"The adapter changes nothing in the {component}: every weight is the same after the merge. It was saved "
            "before it was trained, or its lora_B is zero."
        )
    return model.requires_grad_(False), MergeReport(changed, (squared_change / squared_norm) ** 0.5)


def _weight_change(
    weights: dict[str, torch.Tensor], config: LoraConfig, module: str, device: torch.device
) -> torch.Tensor:
    a, b = (weights[f"{module}.lora_{part}.weight"].to(device).float() for part in "AB")
    strength = _of_module(config.alpha_pattern, module, config.lora_alpha)
    return strength / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0]) * (b @ a)
