"""What an adapter is: its weights by PEFT's names, and the settings that say how strongly they act.

Weights are named without the adapter's name: of a LoRA `MODULE.lora_A.weight` (rank, in) and `MODULE.lora_B.weight`
(out, rank), of a convolution's (rank, in, height, width) and (out, rank, 1, 1); of a DoRA
`MODULE.lora_magnitude_vector` beside them; of a LoHa `MODULE.hada_w1_a` and so on, of a LoKr `MODULE.lokr_w1`.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.lokr.layer import factorization

from rasengan.naming import encoder_name


DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
ADAPTABLE = ("unet", "text_encoder", "text_encoder_2")
KINDS = {"LORA": LoraConfig, "LOHA": LoHaConfig, "LOKR": LoKrConfig}

Config = LoraConfig | LoHaConfig | LoKrConfig

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2)"
)
WHOLE_LOKR = {"lokr_w1", "lokr_w2"}
# The tensors that show a module's rank, and on which of their sides.
_RANK_SIDES = {"lora_A.weight": 0, "hada_w1_b": 0, "lokr_w1_b": 0, "lokr_w2_b": 0}


class Adapter(NamedTuple):
    """What an adapter file holds, for each component that it adapts."""

    weights: dict[str, dict[str, torch.Tensor]]
    configs: dict[str, Config]


class WithoutAlphaError(ValueError):
    """The weights do not say their alpha; `rank` is the commonest of their ranks."""

    def __init__(self, rank: int):
        super().__init__(rank)
        self.rank = rank


def split_key(key: str) -> tuple[str, str] | None:
    """Return the module and the part of it that a weight's name stands for; None for a name that is none."""
    match = _KEY.fullmatch(key)
    return (match["module"], match["part"]) if match else None


def endings(module: str) -> Iterator[str]:
    """Yield a module's name and each end of it that begins behind a dot, by which PEFT's settings may name it."""
    while module:
        yield module
        module = module.partition(".")[2]


def by_module(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights of each module by their part; what has no weight's name is left out."""
    modules = {}
    for key, tensor in weights.items():
        if found := split_key(key):
            modules.setdefault(found[0], {})[found[1]] = tensor
    return modules


def fit_names(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights under the model's names: only some versions of transformers begin them with text_model."""
    bare = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    return {encoder_name(key): tensor for key, tensor in bare.items()} if hasattr(model, "text_model") else bare


# --- strength ---


def kind_of(config: Config) -> str:
    """Return "LORA", "LOHA" or "LOKR"."""
    return config.peft_type.value


def default_alpha(config: Config) -> float:
    """Return the alpha of the modules that have none of their own."""
    return config.lora_alpha if kind_of(config) == "LORA" else config.alpha


def rank_of(config: Config, module: str) -> int:
    """Return a module's rank: its own, where a pattern gives one."""
    return _of_module(config.rank_pattern, module, config.r)


def alpha_of(config: Config, module: str) -> float:
    """Return a module's alpha: its own, where a pattern gives one."""
    return _of_module(config.alpha_pattern, module, default_alpha(config))


def strength_of(config: Config, module: str) -> float:
    """Return what a module's product is multiplied by: alpha / rank, or alpha / sqrt(rank) of an rsLoRA."""
    rank = rank_of(config, module)
    return alpha_of(config, module) / (rank**0.5 if getattr(config, "use_rslora", False) else rank)


def _of_module(pattern: Mapping[str, float], module: str, default: float) -> float:
    # A whole name, as `infer_config` writes it, is found at once; a file with a rank for each module has 700 of them.
    escaped = re.escape(module.removeprefix("text_model."))
    if escaped in pattern:
        return pattern[escaped]
    return next((value for key, value in pattern.items() if _ending(key).match(module)), default)


@functools.lru_cache(4096)
def _ending(key: str) -> re.Pattern:
    """Return what PEFT makes of a pattern's key: an end of a name, or a regular expression for one.

    Source: get_pattern_key in https://github.com/huggingface/peft/blob/v0.21.0/src/peft/utils/other.py; re itself
    keeps too few for a file with a rank for each module.
    """
    return re.compile(rf"(.*\.)?({key})$")


# --- whole modules ---


def what_is_malformed(config: Config, module: str, parts: Mapping[str, torch.Tensor]) -> str | None:
    """Return what is missing of a module's parts, or does not fit the others or its rank; None where all fits.

    Whether they fit a layer is not known here.
    """
    expected = _expected_parts(config, parts)
    if wrong := sorted(expected - parts.keys()) or sorted(parts.keys() - expected):
        return f"{module} has {'no' if wrong[0] in expected else 'a stray'} {wrong[0].removesuffix('.weight')}"
    rank = rank_of(config, module)
    for part, tensor in parts.items():
        name, shape = part.removesuffix(".weight"), tuple(tensor.shape)
        # A core, of the rank on its first two sides, has the matrices beside it turned.
        is_turned = "hada_t1" in parts or ("lokr_t2" in parts and part.startswith("lokr_w2"))
        sides = {"A": (0,), "a": (0,) if is_turned else (1,), "B": (1,), "b": (0,), "t": (0, 1)}
        for side in sides.get("t" if "_t" in part else name[-1], ()):
            if len(shape) < 2 or shape[side] != rank:
                found = f"rank {shape[side]}" if len(shape) > 1 else f"the shape {shape}"
                return f"{module}'s {name} has {found}, but the adapter's settings or other parts say {rank}"
    for one, other in (("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b"), ("hada_t1", "hada_t2")):
        if one in parts and parts[one].shape != parts[other].shape:
            return f"{module}'s {one} is {shown(parts[one].shape)}, but its {other} {shown(parts[other].shape)}"
    if "lora_B.weight" in parts:
        a, b, magnitude = parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_magnitude_vector")
        if a.ndim not in {2, 4} or b.shape[2:] != (1,) * (a.ndim - 2):
            return f"{module}'s lora_A is {shown(a.shape)} and its lora_B is {shown(b.shape)}"
        if magnitude is not None and magnitude.shape != ((len(b),) if a.ndim == 2 else (1, len(b), 1, 1)):
            return f"{module} has {len(b)} outputs, but its magnitude vector is {shown(magnitude.shape)}"
    return None


def _expected_parts(config: Config, parts: Iterable[str]) -> set[str]:
    """Return the parts that a module has, where some ways to have it are told by one of them."""
    if kind_of(config) == "LORA":
        return {"lora_A.weight", "lora_B.weight"} | ({"lora_magnitude_vector"} if config.use_dora else set())
    if kind_of(config) == "LOHA":
        cores = {"hada_t1", "hada_t2"}
        return {f"hada_w{number}_{side}" for number in "12" for side in "ab"} | (
            cores if cores & set(parts) else set()
        )
    names = {f"lokr_w{number}{end}" for number in "12" for end in ("", "_a", "_b")}
    for number in "12":
        name = f"lokr_w{number}"
        names -= {f"{name}_a", f"{name}_b"} if name in parts else {name}
    return names | ({"lokr_t2"} if "lokr_t2" in parts and "lokr_w2" not in parts else set())


def shown(shape: Sequence[int]) -> str:
    """Return a shape as messages have it."""
    return " x ".join(map(str, shape))


# --- settings that the weights themselves show ---


def modules_without_alpha(weights: dict[str, torch.Tensor], alphas: Mapping[str, float]) -> set[str]:
    """Return the modules that need an alpha, and have none.

    A LoKr of whole matrices has no rank, and so no alpha that could weaken it.
    """
    modules = by_module(weights)
    return {
        module
        for module, parts in modules.items()
        if module not in alphas and parts.keys() != WHOLE_LOKR and _rank_shown(parts)
    }


def infer_config(
    weights: dict[str, torch.Tensor], alphas: dict[str, float], lora_alpha: float | None = None
) -> Config | None:
    """Return the settings of a component's weights, or None where there is no rank to be seen.

    The commonest rank and alpha become the component's; the others stand in its patterns, each by a module's whole
    name.

    Args:
        weights: of one component, by name.
        alphas: of the modules whose alpha is known.
        lora_alpha: of the others.

    Raises:
        WithoutAlphaError: a module's alpha is not known.
        ValueError: the weights are of several kinds, or no LoKr of PEFT has their shapes.
    """
    modules = by_module(weights)
    ranks = {module: rank for module, parts in modules.items() if (rank := _rank_shown(parts))}
    if not ranks:
        return None
    kinds = {part.partition("_")[0] for parts in modules.values() for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"it holds weights of several kinds ({', '.join(sorted(kinds))})")
    rank = _commonest(ranks)
    is_open = modules_without_alpha(weights, alphas)
    if is_open and lora_alpha is None:
        raise WithoutAlphaError(rank)
    whole = {module for module, parts in modules.items() if parts.keys() == WHOLE_LOKR}
    known = {module: alpha for module, alpha in alphas.items() if module in ranks} | {m: ranks[m] for m in whole}
    known |= dict.fromkeys(is_open, lora_alpha)
    alpha = _commonest(known)
    options = {
        "r": rank,
        "target_modules": sorted(module.removeprefix("text_model.") for module in modules),
        "rank_pattern": named(ranks, rank),
        "alpha_pattern": named(known, alpha),
        "inference_mode": True,
    }
    (kind,) = kinds
    if kind == "lora":
        use_dora = any("lora_magnitude_vector" in parts for parts in modules.values())
        config = LoraConfig(lora_alpha=alpha, use_dora=use_dora, **options)
    elif kind == "hada":
        effective = any("hada_t1" in parts for parts in modules.values())
        config = LoHaConfig(alpha=alpha, use_effective_conv2d=effective, **options)
    else:
        config = LoKrConfig(
            alpha=alpha,
            use_effective_conv2d=any("lokr_t2" in parts for parts in modules.values()),
            decompose_both=any("lokr_w1_b" in parts for parts in modules.values()),
            decompose_factor=_decompose_factor(modules),
            **options,
        )
    config.target_modules = options["target_modules"]  # which it made a set of, in an order of the hash seed
    return config


def named(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return the pattern that gives each module, by its whole name, its value where that is not the default."""
    return {re.escape(m.removeprefix("text_model.")): value for m, value in values.items() if value != default}


def _commonest(values: dict[str, float]) -> float:
    found = list(values.values())
    return max(found, key=found.count)


def _rank_shown(parts: dict[str, torch.Tensor]) -> int:
    for part, side in _RANK_SIDES.items():
        if part in parts and parts[part].ndim > 1:
            return parts[part].shape[side]
    if parts.keys() == WHOLE_LOKR:  # at this rank PEFT makes whole matrices
        return max(*parts["lokr_w1"].shape, *parts["lokr_w2"].shape[:2])
    return 0


def _decompose_factor(modules: dict[str, dict[str, torch.Tensor]]) -> int:
    """Return the factor by which PEFT splits each of these modules into matrices of these very shapes."""
    splits = set()  # each of one or several pairs, of which one is how a side was split
    for parts in modules.values():
        # (out, in) of the left matrix, and of the right one
        (left_out, left_in), (right_out, right_in) = (_lokr_shape(parts, number) for number in (1, 2))
        # A convolution without a core has its kernel, of 3 x 3 in SDXL, in the same side as its inputs.
        is_flat = "lokr_w2_b" in parts and "lokr_t2" not in parts and right_in % 9 == 0
        flat = {(left_in, right_in // 9)} if is_flat else set()
        splits |= {frozenset({(left_out, right_out)}), frozenset({(left_in, right_in)} | flat)}
    for factor in (-1, *sorted({left for pairs in splits for left, _ in pairs})):
        if all(any(factorization(left * right, factor) == (left, right) for left, right in pairs) for pairs in splits):
            return factor
    raise ValueError("no single factor of a LoKr gives its shapes")


def _lokr_shape(parts: dict[str, torch.Tensor], number: int) -> tuple[int, int]:
    name = f"lokr_w{number}"
    if flat := next((part for part in parts if part.startswith(name) and parts[part].ndim < 2), None):
        raise ValueError(f"a {flat} has the shape ({shown(parts[flat].shape)}), and is no matrix")
    if name in parts:
        return tuple(parts[name].shape[:2])
    a, b = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    if a is None or b is None:
        raise ValueError(f"half of its {name} is missing")
    return a.shape[1 if number == 2 and "lokr_t2" in parts else 0], b.shape[1]
