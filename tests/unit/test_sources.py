import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rasengan import UserError, components, downloads
from rasengan.components import load
from rasengan.sources import COMPONENT_FLAGS, COMPONENTS, Source, component_files, component_sources, fetch


ROOT = Path(__file__).parents[2]
MODELS = list(components.MODELS)


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def weights_of(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def refuse(words, function, *arguments, **options):
    with pytest.raises(UserError, match=words) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)


# --- where components are ---


def test_each_component_comes_from_its_own_place_or_from_the_base():
    sources = component_sources("base", {"vae": "other", "unet": None}, "rev", "fp16", "cache")
    assert set(sources) == {*MODELS, "tokenizer", "tokenizer_2", "scheduler"}
    assert sources["vae"] == Source("other", None, "rev", "fp16", "cache")
    assert sources["unet"] == Source("base", "unet", "rev", "fp16", "cache")
    alone = dict.fromkeys(sources, "alone")
    assert component_sources(None, alone)["scheduler"] == Source("alone")
    words = "scheduler.*--pretrained_model_name_or_path.*--pretrained_scheduler_name_or_path"
    refuse(words, component_sources, None, alone | {"scheduler": None})
    assert COMPONENT_FLAGS["vae"] == "--pretrained_vae_model_name_or_path"  # diffusers' name


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_is_found_in_a_pipeline_or_by_itself(base, monkeypatch, component):
    folder = base / component
    assert fetch(component, Source(str(base), component)) == folder
    assert fetch(component, Source(str(folder))) == folder
    assert fetch(component, Source(str(base))) == folder  # its own flag may name a whole pipeline
    monkeypatch.setenv("HOME", str(base.parent))
    assert fetch(component, Source("~/base", component)) == folder
    (base / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert fetch(component, Source(str(base), component)) == folder
    refuse("neither a folder nor a hub id", fetch, component, Source(str(base / "none" / "none"), component))
    shutil.move(folder, base / "elsewhere")
    refuse(f"holds no {component}.*{COMPONENT_FLAGS[component]}", fetch, component, Source(str(base)))


@pytest.mark.parametrize("component", MODELS)
def test_weights_that_are_not_safetensors_or_not_there_are_refused(base, component):
    file = weights_of(base / component)
    file.rename(file.with_suffix(".bin"))
    refuse(rf"{file.stem}\.bin.*Save it as safetensors", fetch, component, Source(str(base), component))
    file.with_suffix(".bin").unlink()
    refuse("its weight files are: none", fetch, component, Source(str(base), component))
    assert fetch(component, Source(str(base), component), weights=False) == base / component


@pytest.mark.parametrize("component", MODELS)
@pytest.mark.parametrize("kept", [0, 4, 1000, -1])  # bytes; a copy or a download that was cut off
def test_cut_off_weights_are_refused_before_anything_is_loaded(base, component, kept):
    file, source = weights_of(base / component), Source(str(base), component)
    file.write_bytes(file.read_bytes()[:kept])
    refuse(f"{file} is damaged: .*Fetch it again.*{COMPONENT_FLAGS[component]}", fetch, component, source)
    assert fetch(component, source, weights=False) == base / component


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_shard_that_is_not_there_or_cut_off_is_named(base, variant):
    folder, source = base / "unet", Source(str(base), "unet", variant=variant)
    load("unet", folder).save_pretrained(folder, variant=variant, max_shard_size="50KB")
    for file in folder.glob("diffusion_pytorch_model.safetensors"):
        file.unlink()
    assert fetch("unet", source) == folder
    shard = next(file for file in folder.iterdir() if "-00002-of-" in file.name)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    refuse(f"{shard} is damaged", fetch, "unet", source)
    shard.unlink()
    refuse(f"{shard} is not there.*Fetch it again", fetch, "unet", source)
    shard.write_bytes(whole)
    assert fetch("unet", source) == folder


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_variant_is_found_and_loaded_and_kept_apart(base, component, max_shard_size):
    folder, source = base / component, Source(str(base), component)
    model, stem = load(component, folder).half(), weights_of(folder).stem
    refuse("Drop --variant", fetch, component, source._replace(variant="fp16"))
    model.save_pretrained(folder, variant="fp16", max_shard_size=max_shard_size)
    assert fetch(component, source._replace(variant="fp16")) == fetch(component, source) == folder
    plain = [file.name for file in component_files(component, folder)]
    variant = [file.name for file in component_files(component, folder, "fp16")]
    assert plain == ["config.json", f"{stem}.safetensors"]
    assert all(name == "config.json" or (name.startswith(stem) and "fp16" in name) for name in variant)
    assert len(variant) == 2 if max_shard_size == "5GB" else len(variant) > 2
    (folder / f"{stem}.safetensors").unlink()
    loaded = load(component, folder, torch.float16, variant="fp16").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    (folder / variant[1]).unlink()
    refuse(f"{component} .*cannot be loaded", load, component, folder, variant="fp16")


# --- the hub ---

ASK = """
import json, sys
from rasengan import UserError
from rasengan.sources import Source, fetch
answers = []
for component, source, weights in json.loads(sys.argv[1]):
    try:
        answers.append(str(fetch(component, Source(**source), weights)))
    except UserError as error:
        answers.append(f"error: {error}")
print(json.dumps(answers))
"""
TINY, ALONE = "org/tiny", "org/vae-alone"
QUESTIONS = {
    "configuration": ("unet", {"name_or_path": TINY, "subfolder": "unet"}, False),
    "unet": ("unet", {"name_or_path": TINY, "subfolder": "unet"}, True),
    "tokenizer_2": ("tokenizer_2", {"name_or_path": TINY, "subfolder": "tokenizer_2"}, True),
    "scheduler": ("scheduler", {"name_or_path": TINY, "subfolder": "scheduler"}, True),
    "alone": ("vae", {"name_or_path": ALONE}, True),
    "of a pipeline": ("vae", {"name_or_path": TINY}, True),
    "no variant": ("unet", {"name_or_path": TINY, "subfolder": "unet", "variant": "fp16"}, True),
    "no component": ("unet", {"name_or_path": ALONE, "subfolder": "unet"}, True),
    "no repository": ("unet", {"name_or_path": "org/none", "subfolder": "unet"}, True),
    "no revision": ("unet", {"name_or_path": TINY, "subfolder": "unet", "revision": "v9"}, True),
}


@pytest.fixture(scope="module")
def hub(tiny_base, tmp_path_factory):
    """The answers to QUESTIONS of a process that has a hub, and the folder with a cache for each."""
    spec = importlib.util.spec_from_file_location("hub_server", ROOT / "tests" / "hub_server.py")
    hub_server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub_server)
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_base, folder / "root" / "models" / TINY)
    shutil.copytree(tiny_base / "vae", folder / "root" / "models" / ALONE)
    questions = [(c, source | {"cache_dir": str(folder / name)}, w) for name, (c, source, w) in QUESTIONS.items()]
    with hub_server.serve_hub(folder / "root") as (address, _):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
        finished = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(questions)],
            env={name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"},
            **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120},
        )
    assert finished.returncode == 0, finished.stderr
    return dict(zip(QUESTIONS, json.loads(finished.stdout), strict=True)), folder


@pytest.mark.parametrize("name", ["configuration", "unet", "tokenizer_2", "scheduler", "alone"])
def test_only_the_component_asked_for_is_downloaded(hub, tiny_base, name):
    answers, caches = hub
    component, source, weights = QUESTIONS[name]
    folder = Path(answers[name])
    expected = {file.name for file in (tiny_base / component).iterdir() if weights or file.suffix == ".json"}
    assert {file.name for file in folder.iterdir()} == expected
    assert all((folder / file).read_bytes() == (tiny_base / component / file).read_bytes() for file in expected)
    snapshot = folder if name == "alone" else folder.parent
    assert {file for file in snapshot.rglob("*") if file.is_file()} == {folder / file for file in expected}
    assert caches / name in folder.parents


def test_of_a_pipeline_for_one_component_only_its_weights_are_downloaded(hub):
    folder = Path(hub[0]["of a pipeline"])
    assert [file.parent.name for file in folder.parent.rglob("*.safetensors")] == ["vae"]
    load("vae", folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no variant", ["holds no diffusion_pytorch_model.fp16.safetensors", "Drop --variant"]),
        ("no component", ["holds no unet", "--pretrained_unet_name_or_path"]),
        ("no repository", ["org/none", "the hub did not give its unet", "hf auth login"]),
        ("no revision", ["org/tiny", "v9", "--revision"]),
    ],
)
def test_what_the_hub_does_not_have_is_refused_in_one_line(hub, name, words):
    answer = hub[0][name]
    assert answer.startswith("error: ")
    assert "\n" not in answer
    assert [word for word in words if word not in answer] == []


def test_a_full_disk_while_downloading_is_an_error_with_the_remedy(monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "snapshot_download", fail)
    refuse("unet of org/name cannot be downloaded: No space left.*--cache_dir", fetch, "unet", Source("org/name"))
