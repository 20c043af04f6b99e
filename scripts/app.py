r"""Draw base and tuned pictures side by side in a browser, with the adapters of your runs.

    python scripts/app.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 \
        --runs_dir naruto-lora

Both are drawn from one model in memory. --share gives a link for others, as Colab needs.
"""

import argparse
import html
import itertools
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path


# Before PyTorch looks: it then grows its memory in place, and loses less between blocks of different sizes.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from rasengan import (
    UserError,
    component_checks,
    components,
    first_line,
    memory,
    picture_files,
    processes,
    sdxl,
    sheets,
)
from rasengan.adapter_reader import read_adapter
from rasengan.adapters import Adapter
from rasengan.command_line import Parser, number_type, path_type
from rasengan.endings import in_one_line
from rasengan.pairs import MOST_CHARACTERS, MOST_GUIDANCE, MOST_SCALE, MOST_SEED, SIDES, Pair, PairDrawer, Settings
from rasengan.pipeline import Pipeline
from rasengan.run_folders import choose_adapter, find_adapters
from rasengan.sources import COMPONENT_FLAGS, fetch, sources_of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(__doc__)
    add = parser.add_base_flags(COMPONENT_FLAGS)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="[fp16 on a GPU, no on a CPU]")
    add("--vram_budget_gib", type=number_type(0.1, float), help="GPU memory to use [what the card has]")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="as in training [the base's]")
    add = parser.add_argument_group("page").add_argument
    what = "a run's --output_dir, or a folder of several; the page offers the adapters in it, and reads nothing else"
    add("--runs_dir", type=path_type, required=True, help=what)
    add("--port", type=number_type(1, most=65535), default=7860, help="[%(default)s]")
    add("--share", action="store_true", help="make a public link, through Gradio's server, for as long as this runs")
    return parser.parse_args(argv)


def refuse(error: ImportError) -> None:
    """Say that Gradio is missing, once the command line is read: it may ask for help alone."""
    parse_args()
    raise UserError(f"The page needs Gradio: pip install -e '.[app]'. ({error})") from error


try:
    import gradio as gr
except ImportError as error:
    sys.exit(in_one_line(partial(refuse, error), ""))

HISTORY, KEPT = 24, 200  # pairs that a page shows again, and that are kept on disk for all pages
SHOWN_S = 20  # of an error, which lies over the pictures
STYLE = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important }
.gradio-container main { width: 100% }
.beside { align-self: flex-end; height: 42px; font-weight: 500 }
.picture label, #history label { position: static; border: 0; padding: 8px 10px; font-size: .9em }
.picture button:has(img), .picture .image-frame, .picture img { width: 100% !important; height: auto !important }
.picture img { object-fit: contain !important }
.picture .image-container { overflow: visible }
.picture .icon-button-wrapper.top-panel { top: -34px; border: 0 }
.picture .empty { aspect-ratio: 1; min-height: 0; height: auto }
#made-of { min-height: 3.2em; overflow-wrap: anywhere }
#made-of p { margin: 0 0 .2em }
#made-of p + p, #history .caption-label { color: var(--body-text-color-subdued); font-size: .85em }
#history .grid-wrap { height: auto; max-height: none }
#history .grid-container { padding-top: 0 }
#history .thumbnail-item { aspect-ratio: auto; height: auto; overflow: visible; border: 0; box-shadow: none }
#history .thumbnail-item, #history .caption-label { background: none }
#history .thumbnail-item img { height: auto }
#history .caption-label { position: static; max-width: 100%; border: 0; padding: 4px 0; text-align: left;
  white-space: normal; overflow-wrap: anywhere }
@media (max-width: 640px) { #history .grid-container { grid-template-columns: 1fr } }
"""


class Page:
    """What is behind the page: one model for all who have it open."""

    def __init__(self, drawer: PairDrawer, runs_dir: Path, model: str, pictures: Path):
        """Take what draws, where the adapters are, the base's name for the pictures' metadata, and a folder for them.

        Outside of `pictures` nothing is written.
        """
        self.drawer, self.runs_dir, self.model, self.pictures = drawer, runs_dir.resolve(), model, pictures
        self.places = [self.runs_dir, *drawer.pipeline.folders.values()]  # that are nobody else's business
        self.numbers, self.read = itertools.count(), (None, None)

    def list_adapters(self, chosen: str | None):
        """Return the list of adapters as it is now; the choice stays where it can."""
        names = list(find_adapters(self.runs_dir))
        return gr.Dropdown(choices=names, value=chosen if chosen in names else next(iter(names), None))

    def generate(
        self,
        prompt: str,
        negative_prompt: str,
        adapter: str,
        lora_scale: float,
        seed: int,
        steps: int,
        guidance_scale: float,
        scheduler: str,
        width: int,
        height: int,
        lora_alpha: float,
        history: list[tuple[str, str]],
        progress: gr.Progress = gr.Progress(),  # noqa: B008, which is how Gradio knows that it is wanted
    ):
        """Draw a pair; return both pictures, what they were made of, and the pairs of this page twice."""
        seed = random.randint(0, MOST_SEED) if seed == -1 else seed
        size, sampler = (height, width), scheduler or None
        settings = Settings(prompt, negative_prompt or None, seed, steps, guidance_scale, *size, sampler)

        def on_step(picture: str, step: int) -> None:
            what = "Getting ready" if step == 0 else f"Drawing the {picture} picture"
            progress((min(step, steps), steps), desc=what, unit="steps")

        start = time.monotonic()
        try:
            path = choose_adapter(self.runs_dir, adapter)
            pair = self.drawer.draw(settings, self.adapter(path, lora_alpha or None), lora_scale, on_step)
        except UserError as error:
            # The message may have names in it from a stranger's file, and the page takes markup.
            raise gr.Error(self.shown(error), duration=SHOWN_S, print_exception=False) from error
        for sentence in self.drawer.warnings(settings):
            gr.Warning(html.escape(sentence))
        tuned_by = f"{adapter} at scale {lora_scale:g}"
        base, tuned, both = self.save(pair, settings, tuned_by)
        made_of = f"{tuned_by}, seed {seed}, {steps} steps, guidance {guidance_scale:g}, {width} x {height} px"
        change = max((change.relative_change for change in pair.changes.values()), default=0.0)
        details = f"{made_of}; weights changed by {change:.2%}; {time.monotonic() - start:.1f} s"
        caption = f"<p>{html.escape(prompt)}</p><p>{html.escape(details)}</p>"
        history = [(both, f"{textwrap.shorten(prompt, 200)} ({made_of})"), *history][:HISTORY]
        history = [entry for entry in history if Path(entry[0]).exists()]
        return base, tuned, caption, history, history

    def save(self, pair: Pair, settings: Settings, tuned_by: str) -> list[str]:
        """Write both pictures and one of both side by side, each with what it was made from; return their files."""
        grid = sheets.image_grid([[pair.base, pair.tuned]], [f"seed {settings.seed}"], ["base", "tuned"])
        about = {"prompt": settings.prompt, "seed": settings.seed, "model": self.model} | settings._asdict()
        about = {name: value for name, value in about.items() if value is not None}
        number, files = next(self.numbers), []
        shutil.rmtree(self.pictures / str(number - KEPT), ignore_errors=True)
        for kind, image in {"base": pair.base, "tuned": pair.tuned, "both": grid}.items():
            file = self.pictures / str(number) / picture_files.picture_name(settings.prompt, settings.seed, kind)
            picture_files.save_png(file, image, about | {"adapter": "none" if kind == "base" else tuned_by})
            files.append(str(file))
        return files

    def shown(self, error: UserError) -> str:
        """Return an error's message for the page, without the folders that the runs are in."""
        text = str(error).replace(f"{self.runs_dir}/", "")
        for place in self.places:
            text = text.replace(str(place), place.name)
        # What are flags elsewhere are fields here, which cannot be dropped.
        text = text.replace("Drop --lora_alpha", "Set --lora_alpha to 0")
        text = re.sub(r"--(\w+)", lambda match: match[1].replace("_", " ").replace("lora", "LoRA"), text)
        return html.escape(text)

    def adapter(self, path: Path, lora_alpha: float | None) -> Adapter:
        """Return an adapter; the last one is not read, and so not merged, again while its files are the same."""
        if not isinstance(lora_alpha, int | float | None) or (
            lora_alpha is not None and not 0 < lora_alpha < math.inf
        ):
            raise UserError(f"The LoRA alpha is {lora_alpha!r}. Give a positive number, or 0 for the file's own.")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        key = lora_alpha, [(file, file.stat().st_mtime_ns) for file in files]
        if self.read[0] != key:
            self.read = key, read_adapter(path, lora_alpha)
        return self.read[1]


def build(page: Page) -> gr.Blocks:
    """Return the page's layout."""
    side, most_steps = page.drawer.side, page.drawer.most_steps
    # Without bounds, of which Gradio would speak in its own words, and print a traceback.
    sides = {"step": SIDES.step, "precision": 0, "value": side}
    beside = {"scale": 1, "min_width": 80, "size": "sm", "elem_classes": ["beside"]}
    with gr.Blocks(title="Rasengan-XL", analytics_enabled=False) as blocks:
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                limit = {"max_length": MOST_CHARACTERS}
                prompt = gr.Textbox(label="Prompt", placeholder="a wizard in a forest", lines=3, **limit)
                negative = gr.Textbox(label="Negative prompt", placeholder="what to keep away from", **limit)
                with gr.Row():
                    adapter = gr.Dropdown(list(find_adapters(page.runs_dir)), label="Adapter", scale=5, min_width=180)
                    refresh = gr.Button("Refresh", elem_id="refresh", **beside)
                scale = gr.Slider(0, MOST_SCALE, 1.0, step=0.05, label="LoRA scale", info="0 is the base")
                with gr.Row():
                    seed = gr.Number(0, label="Seed (-1: any)", scale=5, min_width=180, precision=0)
                    dice = gr.Button("Random", elem_id="dice", **beside)
                steps = gr.Slider(1, most_steps, min(30, most_steps), step=1, precision=0, label="Steps")
                with gr.Accordion("More", open=False):
                    guidance = gr.Slider(0, MOST_GUIDANCE, 7.5, step=0.5, label="Guidance scale")
                    names = [("the base's own", ""), *((name, name) for name in sorted(sdxl.SAMPLERS))]
                    sampler = gr.Dropdown(names, value="", label="Sampler")
                    with gr.Row():
                        width = gr.Number(label="Width in px", min_width=120, **sides)
                        height = gr.Number(label="Height in px", min_width=120, **sides)
                    what = "of the training, for a file that does not say; else 0"
                    alpha = gr.Number(0, label="LoRA alpha", info=what)
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=5, min_width=300):
                with gr.Row():
                    options = {"format": "png", "interactive": False, "min_width": 120}
                    options |= {"buttons": ["download", "fullscreen"], "elem_classes": ["picture"]}
                    base = gr.Image(label="Base", elem_id="base", **options)
                    tuned = gr.Image(label="Tuned", elem_id="tuned", **options)
                made_of = gr.HTML("", elem_id="made-of")
                options = {"columns": 2, "fit_columns": False, "height": "auto", "object_fit": "contain"}
                options |= {"interactive": False, "buttons": ["download", "fullscreen"], "elem_id": "history"}
                earlier = gr.Gallery(label="Earlier pairs", **options)
        inputs = [prompt, negative, adapter, scale, seed, steps, guidance, sampler, width, height, alpha, history]
        outputs = [base, tuned, made_of, history, earlier]
        options = {"show_progress_on": [tuned], "concurrency_limit": 1, "api_name": "generate"}
        gr.on([button.click, prompt.submit], page.generate, inputs, outputs, **options)
        gr.on([blocks.load, refresh.click], page.list_adapters, adapter, adapter, queue=False, api_name="adapters")
        dice.click(lambda: random.randint(0, MOST_SEED), None, seed, queue=False, api_visibility="private")
    return blocks


def main(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    runs_dir = Path(args.runs_dir)
    if not runs_dir.is_dir():
        raise UserError(f"--runs_dir {runs_dir} is no folder. Give the --output_dir of a run, or a folder of several.")
    components.disable_progress_bars()
    precision = args.mixed_precision or processes.default_precision(os.environ)
    accelerator = processes.make_accelerator(os.environ, precision)
    if accelerator.num_processes > 1:
        raise UserError("The page is one process: start it with python, not with accelerate launch.")
    device = processes.device_of(accelerator)
    dtype = components.weight_dtype(precision, device)
    sources = sources_of(vars(args))
    component_checks.fetch_checked(sources)
    folders = {name: fetch(name, source) for name, source in sources.items()}
    if device.type == "cuda":
        memory.limit(args.vram_budget_gib, device)
    elif args.vram_budget_gib:
        raise UserError("--vram_budget_gib is of a GPU's memory, and this draws on the CPU. Drop the flag.")
    base = args.pretrained_model_name_or_path or args.pretrained_unet_name_or_path
    model = Path(base).resolve().name if Path(base).is_dir() else base  # where it is here is nobody else's business
    with tempfile.TemporaryDirectory(prefix="rasengan-") as pictures:
        # What Gradio serves is what lies in this folder: one of its own, and not that of all of Gradio's pages.
        os.environ["GRADIO_TEMP_DIR"] = pictures
        page = Page(
            PairDrawer(Pipeline(folders, args.variant, device, dtype), args.prediction_type),
            runs_dir,
            model,
            Path(pictures),
        )
        blocks = build(page).queue(api_open=False, max_size=16)
        hues = {"primary_hue": "indigo", "secondary_hue": "indigo", "neutral_hue": "slate"}
        theme = gr.themes.Default(**hues, font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        # Of Gradio's own, only the page is wanted.
        off = {"footer_links": [], "run_history": False, "enable_monitoring": False, "mcp_server": False}
        off |= {"ssr_mode": False, "max_file_size": 1, "allowed_paths": []}
        try:
            blocks.launch(share=args.share, server_port=args.port, theme=theme, css=STYLE, **off)
        except OSError as error:
            is_taken = "empty port" in str(error)  # as Gradio says it
            reason = "is taken" if is_taken else f"cannot be served: {first_line(error).rstrip('.')}"
            raise UserError(f"--port {args.port} {reason}. Give another.") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder of pictures is removed
    sys.exit(in_one_line(lambda: main(parse_args()), "the page's temporary folder"))
