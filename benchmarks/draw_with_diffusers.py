"""Draw with diffusers' own pipeline as its documentation says: the program that `drawing.py` compares ours with.

python benchmarks/draw_with_diffusers.py BASE FOLDER [--lora FILE] --side_px 1024 --pictures 1 --steps 30
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base", help="a pipeline's folder")
    add("folder", type=Path, help="for the pictures")
    add("--lora", help="an adapter, drawn with unmerged")
    add("--side_px", type=int, default=1024, help="of the square pictures [%(default)s]")
    add("--pictures", type=int, default=1, help="of each prompt [%(default)s]")
    add("--steps", type=int, default=30, help="[%(default)s]")
    add("--prompt", nargs="+", required=True)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    pipeline = StableDiffusionXLPipeline.from_pretrained(args.base, torch_dtype=dtype, add_watermarker=False)
    pipeline.to("cuda" if on_gpu else "cpu")
    if args.lora:
        pipeline.load_lora_weights(args.lora)
    args.folder.mkdir(parents=True, exist_ok=True)
    size = {"height": args.side_px, "width": args.side_px, "num_images_per_prompt": args.pictures}
    for number, prompt in enumerate(args.prompt):
        images = pipeline(prompt, num_inference_steps=args.steps, guidance_scale=7.5, **size).images
        for place, image in enumerate(images):
            image.save(args.folder / f"{number}-{place}.png")


if __name__ == "__main__":
    main()
