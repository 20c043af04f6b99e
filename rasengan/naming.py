"""The names of SDXL's modules: diffusers', the original checkpoint's, and kohya's, joined with underscores.

Source: https://github.com/Stability-AI/generative-models sgm/modules/diffusionmodules/openaimodel.py (the original's),
https://github.com/kohya-ss/sd-scripts/blob/48d368fa/networks/lora.py (kohya's, in create_modules).
"""

import re


# kohya's prefix of each component that can be adapted.
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
# What kohya and LyCORIS call the parts of an adapted module, and what PEFT does; a LoHa's and a
# LoKr's are the same in both.
KOHYA_PARTS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}
# The prefix under which ComfyUI saves the same modules, with the original's names and dots.
COMFY_PREFIXES = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}


def _unet_places() -> dict[str, str]:
    """Return the original's name of each part of the UNet by diffusers'."""
    # SDXL has three levels, of two layers each on the way down and three on the way up.
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for level in range(3):
        for number, kind in enumerate(("resnets", "attentions")):
            for layer in range(2):
                places[f"down_blocks.{level}.{kind}.{layer}"] = f"input_blocks.{3 * level + layer + 1}.{number}"
            for layer in range(3):
                places[f"up_blocks.{level}.{kind}.{layer}"] = f"output_blocks.{3 * level + layer}.{number}"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
        places[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{3 * level + 2}.2"
    return places


_UNET_PLACES = _unet_places()
_UNET_PARTS = {name.partition(".")[0] for names in _UNET_PLACES.items() for name in names}
_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_DIFFUSERS_PLACES = {original: name for name, original in _UNET_PLACES.items()}
_DIFFUSERS_RESNET_PARTS = {original: name for name, original in _RESNET_PARTS.items()}

# What has an underscore within one name, so that kohya's other underscores are dots.
_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in"),
    *("proj_out", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "conv_norm_out", "time_embedding"),
    *("add_embedding", "linear_1", "linear_2", "input_blocks", "middle_block", "output_blocks", "in_layers"),
    *("out_layers", "emb_layers", "skip_connection", "time_embed", "label_emb", "text_model", "self_attn", "q_proj"),
    *("k_proj", "v_proj", "out_proj", "layer_norm1", "layer_norm2", "final_layer_norm", "token_embedding"),
    *("position_embedding", "text_projection"),
)
_WORD_OR_JOIN = re.compile(rf"(?<![^_])({'|'.join(_WORDS)})(?=_|$)|_")


def original_unet_name(name: str) -> str:
    """Return the original checkpoint's name of a UNet's module or tensor; one that has none comes back as it is."""
    return _renamed(name, _UNET_PLACES, _RESNET_PARTS)


def diffusers_unet_name(name: str) -> str:
    """Return diffusers' name of a UNet's module or tensor; one that is not the original's comes back as it is."""
    return _renamed(name, _DIFFUSERS_PLACES, _DIFFUSERS_RESNET_PARTS)


def _renamed(name: str, places: dict[str, str], resnet_parts: dict[str, str]) -> str:
    place, rest = _split_at(name, places)
    if place is None:
        return name
    part, after = _split_at(rest, resnet_parts)
    # An upsampler's conv and a transformer's norm are named alike in both.
    rest = rest if part is None else _joined(resnet_parts[part], after)
    return _joined(places[place], rest)


def _split_at(name: str, heads: dict[str, str]) -> tuple[str | None, str]:
    """Return the longest of some heads that a name begins with, if any, and what follows it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        head = ".".join(parts[:length])
        if head in heads:
            return head, ".".join(parts[length:])
    return None, name


def _joined(head: str, rest: str) -> str:
    return f"{head}.{rest}" if rest else head


def encoder_name(name: str) -> str:
    """Return a text encoder's module or tensor as older transformers named it, and other programs still do.

    All but the projection of the pooled output lies in text_model there.
    """
    bare = name.removeprefix("text_model.")
    return bare if bare.partition(".")[0] == "text_projection" else f"text_model.{bare}"


def kohya_name(component: str, module: str) -> str:
    """Return kohya's name of a module, `lora_unet_input_blocks_4_1_...` say: SDXL's UNet goes by its original names.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        module: its name in diffusers or transformers; text_model. in front of an encoder's may be absent.
    """
    name = original_unet_name(module) if component == "unet" else encoder_name(module)
    return KOHYA_PREFIXES[component] + name.replace(".", "_")


def parse_kohya_name(name: str) -> tuple[str, str] | None:
    """Return the component and the module that a name of kohya's or ComfyUI's stands for; None for any other name.

    The UNet's modules may go by diffusers' names or by the original's, whatever its depth. Other families' networks
    have the UNet's prefixes too, but none of its parts: a name of theirs is any other.
    """
    for prefixes, dotted in ((KOHYA_PREFIXES, _with_dots), (COMFY_PREFIXES, str)):
        for component, prefix in prefixes.items():
            if name.startswith(prefix):
                module = dotted(name.removeprefix(prefix))
                if component != "unet":
                    return component, module
                is_known = module.partition(".")[0] in _UNET_PARTS
                return (component, diffusers_unet_name(module)) if is_known else None
    return None


def _with_dots(name: str) -> str:
    return _WORD_OR_JOIN.sub(lambda match: match[1] or ".", name)
