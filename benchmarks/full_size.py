"""The full-size SDXL architecture with random weights, and JPEG pictures, for measurements without a download."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rasengan import demo
from rasengan.imaging import decode


UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
# width, layers, heads, activation
TEXT_ENCODERS = {
    "text_encoder": (CLIPTextModel, 768, 12, 12, "quick_gelu"),
    "text_encoder_2": (CLIPTextModelWithProjection, 1280, 32, 20, "gelu"),
}


def build(directory: Path, device: str = "cuda") -> None:
    """Write all seven components: fp16 UNet and text encoders, fp32 VAE, the demo's tokenizers and scheduler."""
    demo.build_tiny_sdxl(directory)
    torch.manual_seed(0)
    special = json.loads((directory / "text_encoder" / "config.json").read_text())
    torch.set_default_dtype(torch.float16)
    with torch.device(device):
        UNet2DConditionModel(**UNET).save_pretrained(directory / "unet")
        for name, (kind, width, layers, heads, activation) in TEXT_ENCODERS.items():
            config = CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                projection_dim=width,
                hidden_act=activation,
                eos_token_id=special["eos_token_id"],
            )
            kind(config).save_pretrained(directory / name)
    torch.set_default_dtype(torch.float32)
    with torch.device(device):
        AutoencoderKL(**VAE).save_pretrained(directory / "vae")
    torch.cuda.empty_cache()


def draw_jpegs(directory: Path, count: int = 96, size_px: int = 640) -> None:
    """Write captioned JPEG files with a metadata.jsonl."""
    demo.draw_picture_set(directory, count=count, size_px=size_px)
    lines = [json.loads(line) for line in (directory / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        file = directory / line["file_name"]
        image: Image.Image = decode(file.read_bytes())
        file.unlink()
        line["file_name"] = f"{file.stem}.jpg"
        image.save(directory / line["file_name"], quality=92)
    (directory / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
