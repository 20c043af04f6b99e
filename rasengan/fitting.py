"""Does an adapter fit a model: are its modules there, and its weights of the shapes that PEFT's are for them?

Weights are named as in `adapters`.
"""

from collections.abc import Sequence

import torch
from peft import PeftConfig, get_peft_model

from rasengan import UserError
from rasengan.adapters import (
    KINDS,
    Adapter,
    Config,
    alpha_of,
    by_module,
    endings,
    fit_names,
    kind_of,
    rank_of,
    shown,
    split_key,
)
from rasengan.families import guess_family


Layer = torch.nn.Linear | torch.nn.Conv2d
LAYER = (torch.nn.Linear, torch.nn.Conv2d)

# What else than rank, alpha and modules a merge hangs on. How an adapter was begun (on the base as it is: the reader
# refuses others), trained, or told which modules to leave out, no longer matters.
MERGED_BY = {
    "LORA": ("use_rslora", "use_dora"),
    "LOHA": ("use_effective_conv2d",),
    "LOKR": ("use_effective_conv2d", "decompose_both", "decompose_factor"),
}


def check_adapter(
    weights: dict[str, torch.Tensor], config: Config, model: torch.nn.Module, component: str
) -> list[str]:
    """Return the names of the modules that the adapter changes, once every key is shown to fit the model.

    Args:
        weights: of one component, by name.
        config: its settings.
        model: the component, or its skeleton on the meta device.
        component: its name, for messages.

    Raises:
        UserError: a key is unknown, half of a pair is missing, a shape does not fit, or a targeted module has none.
    """
    fitted, layers = fit_names(weights, model), dict(model.named_modules())
    problems = []
    for key in fitted:
        found = split_key(key)
        if found is None:
            problems.append(f"{key} is no lora_A or lora_B weight")
        elif not isinstance(layers.get(found[0]), LAYER):
            problems.append(f"{key} has no linear layer in the model")
    modules = {module: parts for module, parts in by_module(fitted).items() if isinstance(layers.get(module), LAYER)}
    for module, parts in modules.items():
        problems += _shape_problems(module, parts, config, layers[module])
    targets = set(config.target_modules)  # names or their ends
    for module, layer in layers.items():
        if isinstance(layer, LAYER) and module not in modules and not targets.isdisjoint(endings(module)):
            problems.append(f"{module} is targeted, but has no weights")
    if problems or not modules:
        shown = "; ".join(problems[:5]) or "it holds no weights"
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        family = guess_family(weights)
        guess = f"It looks as if made for {family}. " if family else ""
        raise UserError(
            f"The adapter does not fit the {component}: {shown}{more}. {guess}Give the base model that it was "
            "trained on, or export it again."
        )
    return list(modules)


def check_fits(adapter: Adapter, models: dict[str, torch.nn.Module]) -> None:
    """Check that all parts of an adapter fit their components, which `models` holds by name, as skeletons or whole.

    Raises:
        UserError: one does not, as `check_adapter` says.
    """
    for name, weights in adapter.weights.items():
        check_adapter(weights, adapter.configs[name], models[name], name)


def _shape_problems(module: str, parts: dict[str, torch.Tensor], config: Config, layer: Layer) -> list[str]:
    """Return what of a module's weights does not fit its layer."""
    rank, (out_size, in_size, *kernel) = rank_of(config, module), layer.weight.shape
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    if kind_of(config) != "LORA":
        expected = {key: tuple(shape) for key, shape in _expected_shapes(config, module, layer).items()}
        wrong = sorted(part for part in shapes.keys() | expected.keys() if shapes.get(part) != expected.get(part))
        return [
            f"{module}.{part} is {_shown(shapes.get(part))} at rank {rank}, where PEFT's is "
            f"{_shown(expected.get(part))}"
            for part in wrong
        ]
    names = {"lora_A.weight", "lora_B.weight"}
    if missing := sorted(names - shapes.keys()):
        return [f"{module} has no {missing[0].removesuffix('.weight')}"]
    expected = [(out_size, rank, *(1 for _ in kernel)), (rank, in_size, *kernel)]
    found = [shapes["lora_B.weight"], shapes["lora_A.weight"]]
    problems = []
    if found != expected:
        problems.append(
            f"{module} is {_shown(layer.weight.shape)} at rank {rank}, but its lora_B and lora_A are "
            f"{_shown(found[0])} and {_shown(found[1])}"
        )
    magnitude = shapes.get("lora_magnitude_vector")
    if (magnitude is not None) != config.use_dora:
        problems.append(f"{module} {'lacks the' if config.use_dora else 'has a'} magnitude vector of a DoRA")
    elif magnitude is not None and magnitude != ((1, out_size, 1, 1) if kernel else (out_size,)):
        problems.append(f"{module} has {out_size} outputs, but its magnitude vector is {_shown(magnitude)}")
    return problems


def _shown(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else shown(shape)


def _expected_shapes(config: Config, module: str, layer: Layer) -> dict[str, torch.Size]:
    """Return the shape of each part as PEFT makes it for a layer."""
    with torch.device("meta"):
        peft_model = get_peft_model(torch.nn.ModuleDict({"0": shell(layer)}), layer_config(config, module, 1.0))
    keys = {key.replace(".default", ""): tensor.shape for key, tensor in peft_model.state_dict().items()}
    return {found[1]: shape for key, shape in keys.items() if (found := split_key(key))}


def shell(layer: Layer) -> Layer:
    """Return a layer of the same sizes, without a bias: a merge changes none."""
    if isinstance(layer, torch.nn.Linear):
        return torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    return torch.nn.Conv2d(*sizes, bias=False)


def layer_config(config: Config, module: str, scale: float) -> PeftConfig:
    """Return the settings of layers that have this module's rank and alpha, and numbers for names."""
    kind = kind_of(config)
    options = {name: getattr(config, name) for name in MERGED_BY[kind]}
    options["lora_alpha" if kind == "LORA" else "alpha"] = alpha_of(config, module) * scale
    return KINDS[kind](r=rank_of(config, module), target_modules=r"\d+", inference_mode=True, **options)
