"""Prove that adapters fit a model, merge them hard, and prove that the merge changed what it should.

Weights are named as in `adapters`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

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
    strength_of,
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
NOTHING_LEFT = 1e-4  # of the greatest change among several
# PEFT takes longer to set up a model than to merge a layer, but what is merged together exists three times in fp32.
GROUP_BYTES = 2**26


class MergeReport(NamedTuple):
    """What a merge changed: how many modules, and the norm of all changes over the norm of what they changed."""

    modules: int
    relative_change: float


# --- does it fit? ---


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
        shell = _shell(layer)
        peft_model = get_peft_model(torch.nn.ModuleDict({"0": shell}), _layer_config(config, module, 1.0))
    keys = {key.replace(".default", ""): tensor.shape for key, tensor in peft_model.state_dict().items()}
    return {found[1]: shape for key, shape in keys.items() if (found := split_key(key))}


def _shell(layer: Layer) -> Layer:
    """Return a layer of the same sizes, without a bias: a merge changes none."""
    if isinstance(layer, torch.nn.Linear):
        return torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    return torch.nn.Conv2d(*sizes, bias=False)


# --- the merge ---


@contextmanager
def _without_tf32() -> Iterator[None]:
    # Which PyTorch allows for convolutions by default, and PEFT merges a convolution's LoRA by one.
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
@_without_tf32()
def merge(
    model: torch.nn.Module, adapters: Sequence[tuple[Adapter, float]], component: str
) -> tuple[torch.nn.Module, MergeReport]:
    """Merge adapters into the model's own weights through PEFT, in place, and prove that they changed them.

    Copies of some layers at a time, in fp32, are given to PEFT, which adds the change of one adapter after the other,
    W + scale * alpha / rank * B A for a LoRA; the sum is rounded once, to the model's dtype. The changes of LoRAs,
    LoHas and LoKrs are sums, whatever their order; a DoRA rescales what the adapters before it have made.

    Args:
        model: the component, on any device.
        adapters: each with the scale on its change, of a DoRA on its B A alone: its vector acts in full. Those without
            weights for this component, and those at scale 0, are left out.
        component: its name, for messages.

    Raises:
        UserError: an adapter does not fit, or changes nothing, or PEFT does not change what it should, or a weight
            becomes non-finite.
    """
    parts = [_Part.of(adapter, scale, model, component) for adapter, scale in adapters if component in adapter.weights]
    parts = [part for part in parts if part.scale != 0]
    squared_change, squared_sum, squared_norm, changed = 0.0, 0.0, 0.0, 0
    acting, squared_of_each = [False] * len(parts), [0.0] * len(parts)
    for layers in _groups(model, dict.fromkeys(name for part in parts for name in part.modules)):
        exact = {name: layer.weight.detach().float() for name, layer in layers.items()}
        new = dict(exact)
        for number, part in enumerate(parts):
            for name, after in _merged_weights(layers, new, part).items():
                _check_change(part, name, component, new[name], after)
                acting[number] = acting[number] or not torch.equal(new[name], after)
                if len(parts) > 1:
                    squared_of_each[number] += _norm(after - new[name]) ** 2
                new[name] = after
        for name, layer in layers.items():
            if len(parts) > 1:
                squared_sum += _norm(new[name] - exact[name]) ** 2
            rounded = new.pop(name).to(layer.weight.dtype)
            change = _norm(rounded.float() - exact[name])
            if not math.isfinite(change):
                raise UserError(
                    f"Merging makes {component}.{name} non-finite: the adapter is damaged, or overflows in "
                    f"{rounded.dtype}. Give another checkpoint, or a smaller --lora_scale."
                )
            changed += not torch.equal(rounded, layer.weight)
            squared_change += change**2
            squared_norm += _norm(exact.pop(name)) ** 2
            layer.weight.data.copy_(rounded)
    if idle := [number + 1 for number, acts in enumerate(acting) if not acts]:
        who = f"Adapter {idle[0]} of {len(parts)}" if len(parts) > 1 else "The adapter"
        raise _idle_error(who, component, parts[idle[0] - 1], torch.float32)
    # What is left of adapters that cancel each other is rounding.
    if parts and squared_change <= NOTHING_LEFT**2 * max(squared_of_each):
        if len(parts) > 1 and squared_sum <= NOTHING_LEFT**2 * max(squared_of_each):
            raise UserError(f"The adapters cancel each other in the {component}: nothing is left. Give other weights.")
        raise _idle_error("The adapter", component, parts[0], rounded.dtype)
    return model.requires_grad_(False), MergeReport(changed, (squared_change / (squared_norm or 1.0)) ** 0.5)


def _norm(weight: torch.Tensor) -> float:
    # By rows: one fp32 sum of a million squares is wrong in the fifth digit, one in fp64 takes five times as long.
    return weight.flatten(1).norm(dim=1).norm().item()


class _Part(NamedTuple):
    """One adapter's share of a merge."""

    modules: dict[str, dict[str, torch.Tensor]]
    config: Config
    scale: float

    @classmethod
    def of(cls, adapter: Adapter, scale: float, model: torch.nn.Module, component: str) -> "_Part":
        weights, config = adapter.weights[component], adapter.configs[component]
        check_adapter(weights, config, model, component)
        return cls(by_module(fit_names(weights, model)), config, scale)


def _idle_error(who: str, component: str, part: _Part, dtype: torch.dtype) -> UserError:
    # Of DoRA's vector nothing is told: it is no factor.
    products = [[t for name, t in parts.items() if "magnitude" not in name] for parts in part.modules.values()]
    if all(any(not tensor.any() for tensor in factors) for factors in products):
        why = "a factor of each of its products is zero, as before training. Give one that was trained."
    else:
        why = (
            f"at scale {part.scale:g} its change is too small for {str(dtype).removeprefix('torch.')}. Give a greater "
            "--lora_scale, or an adapter that was trained for longer."
        )
    return UserError(f"{who} changes nothing in the {component}: {why}")


def _groups(model: torch.nn.Module, names: Iterable[str]) -> Iterator[dict[str, Layer]]:
    """Yield the layers by name, as many together as have GROUP_BYTES in fp32, and one at least."""
    group, room = {}, GROUP_BYTES
    for name in names:
        layer = model.get_submodule(name)
        room -= 4 * layer.weight.numel()
        if room < 0 and group:
            yield group
            group, room = {}, GROUP_BYTES - 4 * layer.weight.numel()
        group[name] = layer
    if group:
        yield group


def _merged_weights(
    layers: dict[str, Layer], weights: dict[str, torch.Tensor], part: _Part
) -> dict[str, torch.Tensor]:
    """Return the weights of the layers that an adapter changes, fp32 like those given, with it merged in by PEFT."""
    alike, merged = {}, {}
    for name in (name for name in layers if name in part.modules):
        alike.setdefault((rank_of(part.config, name), alpha_of(part.config, name)), []).append(name)
    for names in alike.values():
        with torch.device("meta"):
            shells = torch.nn.ModuleDict({str(number): _shell(layers[name]) for number, name in enumerate(names)})
        parameters = {}
        for number, name in enumerate(names):
            shells[str(number)].weight = torch.nn.Parameter(weights[name].clone(), requires_grad=False)
            for key, tensor in part.modules[name].items():
                tensor = tensor.to(weights[name].device, torch.float32).contiguous()
                parameters[f"base_model.model.{number}.{key}"] = tensor
        config = _layer_config(part.config, names[0], part.scale)
        peft_model = get_peft_model(shells, config, low_cpu_mem_usage=True)
        set_peft_model_state_dict(peft_model, parameters, low_cpu_mem_usage=True)
        # Of a weight in fp32 the merge is exact to fp32; safe_merge would only look for what is looked for anyway.
        found = peft_model.merge_and_unload(safe_merge=False)
        merged |= {name: found[str(number)].weight.detach() for number, name in enumerate(names)}
    return merged


def _layer_config(config: Config, module: str, scale: float) -> PeftConfig:
    """Return the settings of layers that have this module's rank and alpha, and numbers for names."""
    kind = kind_of(config)
    options = {name: getattr(config, name) for name in MERGED_BY[kind]}
    options["lora_alpha" if kind == "LORA" else "alpha"] = alpha_of(config, module) * scale
    return KINDS[kind](r=rank_of(config, module), target_modules=r"\d+", inference_mode=True, **options)


def _check_change(part: _Part, module: str, component: str, before: torch.Tensor, after: torch.Tensor) -> None:
    """Compare what PEFT added for a LoRA with the product of its matrices."""
    if kind_of(part.config) != "LORA" or part.config.use_dora:
        return
    a, b = (part.modules[module][f"lora_{name}.weight"].to(before.device).float() for name in "AB")
    strength = part.scale * strength_of(part.config, module)
    change = (b.flatten(1) @ (strength * a).flatten(1)).view_as(before)
    difference = (after - before).sub_(change).norm()
    # Far above what the two roundings of fp32 leave, far below a change that is missing.
    if torch.isfinite(difference) and difference > 1e-3 * change.norm() + 1e-6 * before.norm():
        raise UserError(
            f"The merge left out {component}.{module}, or changed it otherwise than lora_B x lora_A says. Export the "
            "adapter again with no other settings than r, lora_alpha and target_modules."
        )
