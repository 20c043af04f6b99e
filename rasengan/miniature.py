"""A miniature SDXL that draws the small world: its architecture, and a judge of its pictures.

The classes, conditioning and file layout are SDXL's; only widths and depths are smaller, so that a LoRA is trained and
pictures are drawn within minutes on a CPU. `scripts/train_miniature.py` made the weights, which come with the package.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rasengan import UserError, first_line, world


ASSETS = Path(__file__).parent / "assets"  # what the script wrote, and the demo's recipe
SIDE_PX = 128
WIDTHS = 64, 96  # of the text encoders
START, END = "<|startoftext|>", "<|endoftext|>"


# --- the model ---


def build() -> dict[str, object]:
    """Return the components, fp32, with random weights from PyTorch's global generator."""
    tokenizer, tokenizer_2 = make_tokenizer(pad_token=END), make_tokenizer(pad_token="!")
    return {
        "unet": UNet2DConditionModel(
            sample_size=SIDE_PX // 8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(80, 128, 144),
            norm_num_groups=16,
            layers_per_block=1,
            transformer_layers_per_block=(1, 2, 1),
            attention_head_dim=(5, 8, 9),  # the number of heads, as in SDXL's own configuration
            cross_attention_dim=sum(WIDTHS),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 32,
        ),
        "vae": AutoencoderKL(
            sample_size=SIDE_PX,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(24, 40, 64, 96),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            force_upcast=True,
        ),
        "text_encoder": CLIPTextModel(_text_config(tokenizer, WIDTHS[0], "quick_gelu")),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizer_2, WIDTHS[1], "gelu")),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "scheduler": EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="epsilon",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }


def is_one(unet_config: dict) -> bool:
    """Say whether a UNet's configuration is a miniature's."""
    return (unet_config.get("sample_size"), unet_config.get("cross_attention_dim")) == (SIDE_PX // 8, sum(WIDTHS))


def make_tokenizer(pad_token: str) -> CLIPTokenizer:
    """Return a tokenizer of bytes, which has a token of its own for each word of the world's captions."""
    # Sorted, because the alphabet comes as a set; as in CLIP's own vocabulary, "!" then gets id 0.
    symbols = sorted(ByteLevel.alphabet())
    merges = []
    for word in _words():
        pieces = _pieces(word, merges)
        while len(pieces) > 1:  # a later merge leaves the words before as they are: theirs come first
            merges.append((pieces[0], pieces[1]))
            pieces = _pieces(word, merges)
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *dict.fromkeys(map("".join, merges))]
    # The end of text comes last: CLIP may look for it as the highest id of a caption.
    vocab = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Return the tokens of a word: of the pairs that merges join, the one of the first merge goes first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while pairs := set(zip(pieces, pieces[1:], strict=False)) & set(merges):
        first = min(pairs, key=merges.index)
        place = next(n for n, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair == first)
        pieces[place : place + 2] = ["".join(first)]
    return pieces


def _words() -> list[str]:
    """Return the words of all captions of more than a letter, sorted."""
    names = [*world.THINGS, *world.THINGS.values(), *world.COLORS, *world.PATTERNS, *world.POSITIONS]
    texts = [*names, *world.COUNTS.values(), *world.STYLES.values(), "at in the on background"]
    return sorted({word for text in texts for word in text.split() if len(word) > 1})


def _text_config(tokenizer: CLIPTokenizer, width: int, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        projection_dim=width,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# --- the judge ---

QUESTIONS = {
    "thing": list(world.THINGS),
    "color": list(world.COLORS),
    "position": list(world.POSITIONS),
    "count": list(world.COUNTS),
    "pattern": list(world.PATTERNS),
    "ground": list(world.COLORS),
    "style": [*world.STYLES, "none"],  # none of them: noise, flat colors, what a broken model draws
}
ASKED = ("thing", "color", "position")  # what a picture must show


class Judge(nn.Module):
    """A classifier that says what a picture shows, and in which style; it has seen renderings and noise only."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        side = SIDE_PX // 2 ** (len(widths) - 1)
        self.pool = nn.Sequential(nn.Conv2d(widths[-1], 16, 1), nn.Flatten(), nn.Linear(16 * side**2, 256), nn.ReLU())
        self.answers = nn.ModuleDict({name: nn.Linear(256, len(of)) for name, of in QUESTIONS.items()})

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return scores (B, choices) for each question, of pixels (B, 3, 128, 128) in [-1, 1]."""
        hidden = self.pool(self.features(pixel_values))
        return {name: head(hidden) for name, head in self.answers.items()}


def load_judge(place: str | Path) -> Judge:
    """Return a trained judge, on the CPU.

    Args:
        place: a file of its weights, or a folder with `judge.safetensors`.

    Raises:
        UserError: there is none, or it is no judge's.
    """
    file = Path(place)
    file = file / "judge.safetensors" if file.is_dir() else file
    judge = Judge()
    try:
        judge.load_state_dict({name: weight.float() for name, weight in load_file(file).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{file} holds no weights of a judge: {first_line(error).rstrip(':.')}. Give the folder that "
            "train_miniature.py wrote."
        ) from error
    return judge.eval()


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Return pictures as pixels (B, 3, 128, 128) in [-1, 1], resized where they are not of this size."""
    size = SIDE_PX, SIDE_PX
    images = [image if image.size == size else image.resize(size, Image.Resampling.LANCZOS) for image in images]
    data = b"".join(image.convert("RGB").tobytes() for image in images)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return flat.view(-1, SIDE_PX, SIDE_PX, 3).permute(0, 3, 1, 2) / 127.5 - 1


def judge_pictures(judge: Judge, images: list[Image.Image]) -> list[dict[str, object]]:
    """Return the judge's answers for each picture, as `judge_pixels` does."""
    return judge_pixels(judge, to_pixels(images))


@torch.no_grad()
def judge_pixels(judge: Judge, pixel_values: torch.Tensor) -> list[dict[str, object]]:
    """Return the judge's answers for each picture, by question, beside `style_score`, the probability of the style.

    Args:
        judge: on the pixels' device.
        pixel_values: (B, 3, 128, 128), in [-1, 1].
    """
    answers = judge(pixel_values)
    best = {name: scores.argmax(dim=1).tolist() for name, scores in answers.items()}
    style = answers["style"].softmax(dim=1)[:, QUESTIONS["style"].index(world.STYLE)].tolist()
    return [
        {name: QUESTIONS[name][choices[row]] for name, choices in best.items()} | {"style_score": style[row]}
        for row in range(len(style))
    ]


def shows(answer: dict[str, object], scene: world.Scene) -> bool:
    """Say whether the judge found what was asked."""
    return all(answer[name] == getattr(scene, name) for name in ASKED)
