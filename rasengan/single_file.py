"""SDXL as one safetensors file in the original checkpoint's layout, which ComfyUI and AUTOMATIC1111 read."""

import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open

from rasengan import UserError, tensor_files
from rasengan.files import sync, sync_folder, writing
from rasengan.naming import original_unet_name
from rasengan.safetensors_header import make_header


COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Rules from diffusers' names to the original's, in order; a rule's number is a regular expression's group.
_VAE_PLACES = (
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}."),
    (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample."),
    (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"group_norm\.", "norm."),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0\.", "proj_out."),
)
_BIGG_PLACES = (
    (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)

Weights = Mapping[str, torch.Tensor]


def original_weights(component: str, weights: Weights) -> dict[str, torch.Tensor]:
    """Return a component's weights by the names, and in the shapes, of the original checkpoint.

    Args:
        component: one of `COMPONENTS`.
        weights: by diffusers' or transformers' names, on any device, meta too.
    """
    if component == "unet":
        return {f"model.diffusion_model.{original_unet_name(name)}": tensor for name, tensor in weights.items()}
    if component == "vae":
        return dict(_vae_tensor(name, tensor) for name, tensor in weights.items())
    bare = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    if component == "text_encoder":
        return {f"conditioner.embedders.0.transformer.text_model.{name}": tensor for name, tensor in bare.items()}
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in _bigg(bare).items()}


def _rename(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _vae_tensor(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    # The original's attention is made of 1x1 convolutions.
    is_projection = ".attentions." in name and tensor.ndim == 2
    return f"first_stage_model.{_rename(name, _VAE_PLACES)}", tensor[:, :, None, None] if is_projection else tensor


def _bigg(weights: Weights) -> dict[str, torch.Tensor]:
    """Return OpenCLIP's layout: q, k and v stacked, the projection transposed."""
    original, stacked = {}, {}
    for name, tensor in weights.items():
        if match := re.match(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            stacked.setdefault((match[1], match[3]), {})[match[2]] = tensor
        elif name == "text_projection.weight":
            original["text_projection"] = tensor.T
        else:
            original[_rename(name, _BIGG_PLACES)] = tensor
    for (layer, kind), parts in stacked.items():
        original[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat([parts[part] for part in "qkv"])
    return original


# Where OpenCLIP stacks what transformers has in three.
_STACKED = re.compile(r"(encoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)")


def read_tensor(file: Path, component: str, name: str, shape: torch.Size) -> torch.Tensor:
    """Return a tensor of a single file by its name in diffusers or transformers.

    Args:
        file: as `write_single_file` writes it, and others in that layout.
        component: one of `COMPONENTS`.
        name: of the tensor, without text_model.
        shape: that the component's configuration gives it.

    Raises:
        UserError: the file does not hold it in this shape.
    """
    stacked = _STACKED.fullmatch(name) if component == "text_encoder_2" else None
    # The names of the other two of three are needed to find that of all.
    names = [f"{stacked[1]}.{part}_proj.{stacked[3]}" for part in "qkv"] if stacked else [name]
    ((original, whole),) = original_weights(component, {n: torch.empty(shape, device="meta") for n in names}).items()
    with tensor_files.opened(file) as content:
        there = original in content.keys()  # noqa: SIM118
        tensor = content.get_tensor(original) if there else None
    if tensor is None or tensor.shape != whole.shape:
        found = "no" if tensor is None else f"a {' x '.join(map(str, tensor.shape))}"
        raise UserError(
            f"{file} holds {found} {original}, where SDXL's {component} has {' x '.join(map(str, whole.shape))}. Give "
            "an SDXL in the original checkpoint's layout."
        )
    if stacked:
        return tensor.chunk(3)["qkv".index(stacked[2])]
    return tensor.T if name == "text_projection.weight" else tensor.reshape(shape)


def write_single_file(
    path: Path,
    skeletons: Mapping[str, torch.nn.Module],
    dtypes: Mapping[str, torch.dtype],
    load_weights: Callable[[str], Weights],
    markers: Iterable[str] = (),
) -> None:
    """Write all components as one file, one of them in memory at a time; it appears under its name whole.

    Each component is read back and compared bit for bit before the next one is loaded.

    Args:
        path: of the file.
        skeletons: the model of each of `COMPONENTS`, on the meta device say: its names and shapes.
        dtypes: of each component in the file.
        load_weights: called once for each component, gives its state dict.
        markers: names of empty tensors, by which programs that read single files know what a scheduler's file says.

    Raises:
        UserError: the file cannot be written.
        RuntimeError: it does not read back as it was written, or the weights are not those of the skeleton.
    """
    shapes = {name: _shapes(original_weights(name, skeletons[name].state_dict())) for name in COMPONENTS}
    planned = {key: (dtypes[name], shape) for name in COMPONENTS for key, shape in shapes[name].items()}
    planned |= dict.fromkeys(markers, (torch.float32, torch.Size([0])))
    header, places, size = make_header(planned)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with writing(path, "Make room, or give another place.", size):
            with open(unfinished, "wb") as file:
                file.write(header)
                file.truncate(size)  # so that safetensors opens it before its end is written
                for name in COMPONENTS:
                    tensors = original_weights(name, load_weights(name))
                    if _shapes(tensors) != shapes[name]:
                        raise RuntimeError(
                            f"the {name}'s weights are not of the names and shapes of its configuration"
                        )
                    _write(file, tensors, dtypes[name], places)
                    _verify(unfinished, tensors, dtypes[name])
            sync(unfinished)
            os.replace(unfinished, path)
            sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _shapes(tensors: Weights) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _write(file: BinaryIO, tensors: Weights, dtype: torch.dtype, places: dict[str, int]) -> None:
    for key, tensor in tensors.items():
        file.seek(places[key])
        file.write(memoryview(as_bytes(tensor, dtype).numpy()))
    file.flush()


def _verify(path: Path, tensors: Weights, dtype: torch.dtype) -> None:
    with safe_open(path, framework="pt") as found:
        for key, tensor in tensors.items():
            if not torch.equal(as_bytes(found.get_tensor(key), dtype), as_bytes(tensor, dtype)):
                raise RuntimeError(
                    f"{path.name}: {key} does not read back as it was written. The disk may be damaged."
                )


def as_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what a tensor is stored as: compared as numbers, NaN would differ from itself; and NumPy has no bf16."""
    return tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8)
