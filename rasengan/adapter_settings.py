"""The settings of an adapter as a stranger's file has them: checked, and with names where it has patterns.

PEFT matches some of them as regular expressions, of which a few letters can take hours. What was adapted is told by
the weights' names.
"""

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from rasengan import UserError
from rasengan.adapters import KINDS, Config, endings, named


# Of PEFT's variants of LoRA those that a merge of lora_B x lora_A would be wrong for, or that need more weights.
OTHER_VARIANTS = (
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    *("layer_replication", "target_parameters", "trainable_token_indices"),
)
ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # what the settings of each kind call it
# What a merge reads of an adapter's settings, beside rank, alpha and names.
SWITCHES = dict.fromkeys(("use_rslora", "use_dora", "use_effective_conv2d", "decompose_both"), bool)
SWITCHES |= {"decompose_factor": int}
# What a training was told to leave out: it has no weights. PEFT matches them as regular expressions.
LEFT_OUT = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
# How a LoRA can begin on the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take their first product off it, or
# quantise it, when they begin, and again or not at all when PEFT loads them: lora_B x lora_A is no change of the base.
INITS = ("gaussian", "eva", "orthogonal", "mica")
BEYOND = 2**63  # no tensor holds a whole number from there on

# Of a pattern's key: an end of a name, or the whole name behind ^, where .* stands for anything.
_NAME = re.compile(r"\^?((?:[\w/-]|\\\W|\.\*?)*)\$?")
MOST_STARRED = 1000  # keys with .* in a file: each is compared with each module


def parse(text: str) -> object:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is no JSON, or deeper or with longer numbers than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def config_of(file: Path, kind: str, options: dict, modules: Iterable[str]) -> Config:
    """Return the settings of one component, in which every name is one of a module.

    Targets that are a list of names stay: `fitting.check_adapter` misses the weights of those that have none.

    Args:
        file: which has the settings, for messages.
        kind: of `adapters.KINDS`.
        options: by PEFT's names; they are not changed.
        modules: which the component has weights for.

    Raises:
        UserError: the adapter is not to be merged as it is, or a pattern is not one of names.
        TypeError: a value is of another kind than PEFT's.
        ValueError: PEFT refuses it.
    """
    _check_values(file, options, kind)
    modules, targets = sorted(modules), options.get("target_modules")
    if not targets or isinstance(targets, str) or any(options.get(name) is not None for name in LEFT_OUT):
        targets = {module.removeprefix("text_model.") for module in modules}
    options = {name: value for name, value in options.items() if name not in {*LEFT_OUT, "runtime_config"}}
    for name, default in (("rank_pattern", "r"), ("alpha_pattern", ALPHAS[kind])):
        options[name] = named(_of_modules(file, name, options.get(name) or {}, modules), options[default])
    config = KINDS[kind].from_peft_type(**options | {"target_modules": None, "peft_type": kind})
    config.target_modules = sorted(targets)  # of which PEFT would make a set, in an order of the hash seed
    return config


def _check_values(file: Path, options: dict, kind: str) -> None:
    init = options.get("init_lora_weights")
    if not isinstance(init, bool | None) and init not in INITS:
        raise UserError(
            f"{file} says init_lora_weights {reprlib.repr(init)}, which is not known to leave the base as it is: the "
            "adapter may be the change of another. Convert it where it was trained, by PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or train it with another init."
        )
    if variant := next((name for name in OTHER_VARIANTS if options.get(name)), None):
        raise UserError(
            f"{file} says {variant}: the change of this variant is not the plain product of its matrices. Give a "
            "LoRA, DoRA, LoHa or LoKr."
        )
    for name, kinds in SWITCHES.items():
        if name in options and not isinstance(options[name], kinds):
            expected = "a number" if kinds is int else "true or false"
            raise TypeError(f"{name} is {reprlib.repr(options[name])}, not {expected}")
    for name, numbers in {"r": int, ALPHAS[kind]: int | float}.items():
        if not _is_positive(options.get(name), numbers):
            raise TypeError(f"{name} is {reprlib.repr(options.get(name))}, not a positive number below 2**63")
    targets = options.get("target_modules")
    names = targets if isinstance(targets, list) else []
    if not isinstance(targets, str | list | None) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"target_modules is {reprlib.repr(targets)}, not names")
    for name, numbers in {"rank_pattern": int, "alpha_pattern": int | float}.items():
        value = options.get(name)
        if not isinstance(value, dict | None):
            raise TypeError(f"{name} is {reprlib.repr(value)}, not names")
        if not all(_is_positive(number, numbers) for number in (value or {}).values()):
            whole = "whole " if numbers is int else ""
            raise TypeError(f"{name} is {reprlib.repr(value)}, not names with positive {whole}numbers below 2**63")


def _is_positive(value: object, kind: type) -> bool:
    return isinstance(value, kind) and value is not True and 0 < value < BEYOND


def _of_modules(file: Path, name: str, pattern: Mapping[str, float], modules: list[str]) -> dict[str, float]:
    """Return the value of each module that a pattern has one for: that of its first key that fits, as in PEFT."""
    plain, starred = {}, []
    for position, key in enumerate(pattern):
        found = _NAME.fullmatch(key)
        if not found:
            raise UserError(
                f"{file}: {name} has {reprlib.repr(key)}, a regular expression, which may take forever to match. "
                "Write the modules' names, or their ends, in which .* may stand for anything."
            )
        first, *parts = (re.sub(r"\\(.)", r"\1", part) for part in re.split(r"(?<!\\)\.\*", found[1]))
        if parts:
            starred.append((position, key.startswith("^"), first, [part for part in parts[:-1] if part], parts[-1]))
        else:
            plain.setdefault("^" * key.startswith("^") + first, position)
    if len(starred) > MOST_STARRED:
        raise UserError(
            f"{file}: {name} has {len(starred):,} names with .* in them, of which {MOST_STARRED:,} are read at most. "
            "Write the modules' names."
        )
    values, found = list(pattern.values()), {}
    for module in modules:
        fits = [plain[end] for end in (f"^{module}", *endings(module)) if end in plain]
        fits += [position for position, *key in starred if _fits(module, *key)]
        if fits:
            found[module] = values[min(fits)]
    return found


def _fits(module: str, is_whole: bool, first: str, between: list[str], last: str) -> bool:
    """Say whether a name, or an end of it where that is enough, is these parts with anything between them."""
    name = f".{module}"
    end = 0
    for number, part in enumerate([f".{first}", *between]):
        start = name.find(part, end)
        if start < 0 or (is_whole and number == 0 and start > 0):
            return False
        end = start + len(part)
    return name.endswith(last, end)
