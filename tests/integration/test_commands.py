"""Every call of a script that README and docs/ show is run, in order, on the tiny SDXL with a hub of its own.

`accelerate launch` is left out here, and runs in test_processes.py; `make demo`, which is demo.sh,
in test_miniature_draws.py; what Colab's cells do besides in tests/notebook.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from rasengan import adapters


ROOT = Path(__file__).parents[2]
DRIVE = "/content/drive/MyDrive"
# Behind the words that are shown, where a later flag wins: what makes a run small, and keeps it here.
SMALL = {
    "train_lora_sdxl": "--resolution 64 --max_train_steps 4 --checkpointing_steps 2 --validation_inference_steps 2 "
    "--validation_split 2",
    "infer": "--height 64 --width 64 --num_inference_steps 2",
    "check_data": "--output_dir report",
    "evaluate": "--validation_split 2 --num_pictures 1 --num_inference_steps 2",
}
CACHED = ("train_lora_sdxl", "infer", "check_data", "evaluate")
# What `...` stands for.
REST = {"infer": "--pretrained_model_name_or_path sdxl"}
# The page has its own tests in a browser, and the miniature's training its own in test_train_miniature.py; the
# command of many GPUs without any flag is a run like the others.
ELSEWHERE = {"app", "train_miniature"}

RUN = """
import importlib.util, json, os, sys, traceback
from pathlib import Path
from accelerate.state import AcceleratorState, GradientState

scripts = {}
for script, words, folder in json.load(open(sys.argv[1])):
    os.chdir(folder)
    if script not in scripts:
        spec = importlib.util.spec_from_file_location(script, Path(sys.argv[2]) / f"{script}.py")
        scripts[script] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(scripts[script])
    try:
        status = scripts[script].main(scripts[script].parse_args(words))
        ending = "well" if status in (None, 0) else f"with {status}"
    except (Exception, SystemExit):
        ending = traceback.format_exc()
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    print(json.dumps(["ended", ending]), flush=True)
"""


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS = [
    (script, words)
    for script, words in load(ROOT / "tests" / "unit" / "test_readme.py").COMMANDS
    if script not in ELSEWHERE and words
]


def fill_hub(root: Path, base: Path, pictures: Path, adapter: Path) -> None:
    """Write the repositories that the commands name: the base in fp16, the data set as parquet, two adapters."""
    sdxl = root / "models" / "stabilityai" / "stable-diffusion-xl-base-1.0"
    shutil.copytree(base, sdxl)
    for file in sdxl.rglob("*.safetensors"):
        weights = {name: weight.half() for name, weight in load_file(file).items()}
        file.unlink()
        save_file(weights, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()[:8]]
    contents = [{"bytes": (pictures / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    images = [{"image": content, "text": row["text"]} for content, row in zip(contents, rows, strict=True)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = root / "datasets" / "lambdalabs" / "naruto-blip-captions" / "data"
    data.mkdir(parents=True)
    datasets.Dataset.from_list(images, features).to_parquet(data / "train-00000-of-00001.parquet")
    for name in ("other-lora", "ink-style"):
        (root / "models" / "someone" / name).mkdir(parents=True)
        shutil.copy(adapter, root / "models" / "someone" / name)


def fill_home(home: Path, base: Path, pictures: Path, trained: Path) -> None:
    """Write what the commands take as given: a base, pictures, a run, prompts, a photo and a tuned model."""
    shutil.copytree(base, home / "sdxl")
    shutil.copytree(pictures, home / "pictures")
    shutil.copytree(trained, home / "naruto-lora")
    shutil.copytree(trained, home / "demo" / "lora")
    (home / "rasengan").symlink_to(ROOT / "rasengan")
    for number, step in ((2, 1000), (4, 2000)):
        shutil.move(home / "naruto-lora" / f"checkpoint-{number}", home / "naruto-lora" / f"checkpoint-{step}")
    (home / "prompts.txt").write_text("a wizard\na red star\n")
    Image.new("RGB", (80, 60), "green").save(home / "photo.jpg")


@pytest.fixture(scope="module")
def endings(tiny_base, picture_set, trained, tmp_path_factory) -> list[str]:
    """How each of COMMANDS ended: "well", or a traceback."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("home", "colab", "drive"):
        (folder / name).mkdir()
    fill_hub(folder / "hub", tiny_base, picture_set, trained / adapters.DIFFUSERS_FILE)
    fill_home(folder / "home", tiny_base, picture_set, trained)
    base = ["--pretrained_model_name_or_path", "sdxl"]
    tasks = [
        ("convert", ["--input", "naruto-lora", "--output", "big.safetensors", "--format", "kohya"], "home"),
        ("infer", [*base, "--lora_weights", "naruto-lora", "--save_merged", "tuned-sdxl"], "home"),
    ]
    for script, shown in COMMANDS:
        words = [word.replace(DRIVE, str(folder / "drive")) for word in shown]
        if script == "infer" and base[0] not in words:
            words += REST["infer"].split()
        if script == "infer" and not any(word.startswith("--lora") for word in words):
            words += ["--lora_weights", "naruto-lora"]
        if "--plan_only" in words:  # which needs a card
            words = [word for word in words if word != "--plan_only"] + ["--output_dir", "planned"]
        words += SMALL.get(script, "").split()
        words += ["--conditioning_cache_dir", str(folder / "cache")] if script in CACHED else []
        tasks.append((script, words, "colab" if any(word.startswith(DRIVE) for word in shown) else "home"))
    (folder / "tasks.json").write_text(json.dumps([(s, w, str(folder / place)) for s, w, place in tasks]))
    hub_server = load(ROOT / "tests" / "hub_server.py")
    with hub_server.serve_hub(folder / "hub") as (address, _):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
        finished = subprocess.run(
            [sys.executable, "-c", RUN, folder / "tasks.json", ROOT / "scripts"],
            env={name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"},
            **{"capture_output": True, "text": True, "timeout": 280},
        )
    assert finished.returncode == 0, finished.stderr
    found = [json.loads(line)[1] for line in finished.stdout.splitlines() if line.startswith('["ended"')]
    assert found[:2] == ["well", "well"], found
    return found[2:]


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[f"{n} {s}" for n, (s, _) in enumerate(COMMANDS)])
def test_the_command_runs_and_ends_well(endings, number):
    assert endings[number] == "well", " ".join(["python", COMMANDS[number][0], *COMMANDS[number][1]])
