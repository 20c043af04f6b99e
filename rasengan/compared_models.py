"""The models whose pictures are compared: the base, and the base with adapters merged into it at each scale."""

from pathlib import Path
from typing import NamedTuple

from rasengan import UserError
from rasengan.adapter_places import fetch_adapter
from rasengan.adapter_reader import read_adapters
from rasengan.adapters import Adapter, default_alpha
from rasengan.merging import MergeReport


class Model(NamedTuple):
    """A model to draw with: the base, or the base with adapters, each with its scale."""

    label: str  # in grids
    kind: str  # in file names
    adapters: list[tuple[Adapter, float]]
    places: str


def read_models(
    compared: list[str],
    summed: list[tuple[str, float]],
    scales: list[float],
    with_base: bool,
    lora_alpha: float | None,
    allow_pickle: bool,
    cache_dir: str | None,
) -> list[Model]:
    """Return the models to draw with, the base first where it is compared; reads each adapter once.

    Args:
        compared: places of adapters, each of which makes a model; none where there are some in `summed`.
        summed: places of adapters that make one model together, with their weights; one of weight 0 is no part of it.
        scales: on the changes, each of which makes a model of its own; 0 is the base.
        with_base: also where no scale is 0; the base is there too if there is no adapter.
        lora_alpha: of the training, where a file does not say it.
        allow_pickle: read pickled tensors.
        cache_dir: where downloads go.

    Raises:
        UserError: a place is named twice, or holds no adapter that can be read.
    """
    weighted = [(place, weight) for place, weight in summed if weight]
    sets = [weighted] if weighted else [[(place, 1.0)] for place in compared]
    files = [fetch_adapter(place, cache_dir=cache_dir) for places in sets for place, _ in places]
    read = iter(read_adapters(files, lora_alpha, allow_pickle))
    names = iter(short_names(compared))
    models = [Model("base", "base", [], "none")] if with_base or not sets or 0.0 in scales else []
    for places in sets:
        adapters = [(next(read), weight) for _, weight in places]
        name = next(names) if len(sets) > 1 else "LoRA"
        for scale in filter(None, scales):  # 0 is the base
            label = f"{name} x {scale:g}"
            kind = "tuned" if len(sets) == len(scales) == 1 else label
            described = " + ".join(f"{place} at scale {weight * scale:g}" for place, weight in places)
            models.append(Model(label, kind, [(adapter, weight * scale) for adapter, weight in adapters], described))
    return models


def short_names(places: list[str]) -> list[str]:
    """Return the ends of paths by which they differ.

    Raises:
        UserError: one is there twice.
    """
    if len(set(map(Path, places))) < len(places):
        raise UserError("--lora_weights names a place twice. Give each once.")
    parts = [Path(place).parts for place in places]
    depths = range(1, max(map(len, parts), default=0) + 1)
    candidates = (["/".join(path[-depth:]) for path in parts] for depth in depths)
    return next((names for names in candidates if len(set(names)) == len(names)), places)


def describe_merge(model: Model, component: str, change: MergeReport) -> list[str]:
    """Return what a merge into a component changed, and a warning where that is odd, each a line."""
    configs = [
        (adapter.configs[component], scale) for adapter, scale in model.adapters if component in adapter.configs
    ]
    root = {True: "root of rank", False: "rank"}  # what rsLoRA divides by
    how = " + ".join(
        f"alpha {default_alpha(config):g} / {root[getattr(config, 'use_rslora', False)]} {config.r} x {scale:g}"
        for config, scale in configs
    )
    relative = f"relative weight change {change.relative_change:.3e}"
    said = [f"Merged {change.modules} modules of the {component} at {how}: {relative}"]
    if change.relative_change < 1e-6:
        said.append("warning: this is too small a change to be seen. Was the adapter trained, and is its alpha right?")
    elif change.relative_change > 10:
        said.append("warning: it drowns what the model had. Are the adapter's numbers and its alpha right?")
    return said
