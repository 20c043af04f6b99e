"""Adapters on the hub, a miniature of which answers on this machine."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from rasengan import UserError, adapter_reader, adapters, downloads
from rasengan.adapter_places import fetch_adapter
from rasengan.adapter_writer import same_adapter, write_diffusers, write_kohya, write_peft_folders


ROOT = Path(__file__).parents[2]
# In another process, since the hub's address is read when huggingface_hub is imported.
ASK = """
import json, sys
from rasengan import UserError
from rasengan.adapter_places import fetch_adapter

def ask(place, cache_dir):
    try:
        return str(fetch_adapter(place, cache_dir))
    except UserError as error:
        return f"error: {error}"

print(json.dumps([ask(*question) for question in json.loads(sys.argv[1])]))
"""
PLACES = {
    "diffusers": "me/diffusers",
    "peft": "me/peft",
    "kohya": "me/kohya",
    "file": "me/many/two.safetensors",
    "brackets": "me/many/[three].safetensors",
    "folder": "me/many/inner",
    "many": "me/many",
    "no file": "me/many/four.safetensors",
    "pickle": "me/pickle",
    "no repository": "me/nothing",
}


@pytest.fixture(scope="module")
def adapter():
    module = "mid_block.attentions.0.proj_in"
    weights = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[module])
    config.target_modules = [module]
    return adapters.Adapter({"unet": weights}, {"unet": config})


@pytest.fixture(scope="module")
def hub(adapter, tmp_path_factory):
    """What each place gives, a path or an error; the folder that caches are in; and the files that were fetched."""
    spec = importlib.util.spec_from_file_location("hub_server", ROOT / "tests" / "hub_server.py")
    hub_server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub_server)
    folder = tmp_path_factory.mktemp("hub")
    root = folder / "root" / "models" / "me"
    for name in ("kohya", "many/inner", "pickle"):
        (root / name).mkdir(parents=True)
    write_diffusers(root / "diffusers", adapter)
    write_peft_folders(root / "diffusers" / "peft", adapter)
    (root / "diffusers" / "unet").mkdir()
    save_file({"base": torch.ones(1)}, root / "diffusers" / "unet" / "model.safetensors")
    write_peft_folders(root / "peft", adapter)
    for file in (
        "kohya/style.safetensors",
        "many/one.safetensors",
        "many/two.safetensors",
        "many/[three].safetensors",
    ):
        write_kohya(root / file, adapter)
    write_diffusers(root / "many" / "inner", adapter)
    for name in ("kohya", "peft", "diffusers", "pickle"):
        (root / name / "run_me.bin").write_bytes(b"a pickle")
        (root / name / "script.py").write_text("print('hello')")
    questions = [(place, str(folder / name)) for name, place in PLACES.items()]
    with hub_server.serve_hub(folder / "root") as (address, requests):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
        finished = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(questions)],
            env={name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"},
            **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120},
        )
    assert finished.returncode == 0, finished.stderr
    # Again, when the server is gone, and by a token that no request can hold.
    again = {}
    for how in ({"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0"}, {"HF_TOKEN": "hf_\u00e4"}):
        finished_again = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(questions)],
            env=environment | how,
            **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120},
        )
        assert finished_again.returncode == 0, finished_again.stderr
        again[str(how)] = dict(zip(PLACES, json.loads(finished_again.stdout), strict=True))
    fetched = {request.rpartition("/")[2] for request in requests if "/resolve/" in request}
    return dict(zip(PLACES, json.loads(finished.stdout), strict=True)), folder, fetched, again


@pytest.mark.parametrize("name", ["diffusers", "peft", "kohya", "file", "brackets", "folder"])
def test_an_adapter_on_the_hub_is_read_like_one_on_the_disk(hub, adapter, name):
    path = Path(hub[0][name])
    assert hub[1] / name in path.parents
    assert same_adapter(adapter_reader.read_adapter(path), adapter)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_what_was_fetched_is_found_again_without_the_hub(hub, offline):
    again = hub[3][str({"HF_HUB_OFFLINE": offline})]
    for name in ("diffusers", "peft", "kohya", "file", "brackets", "folder"):
        assert again[name] == hub[0][name]
    assert again["no repository"].startswith(
        "error: me/nothing is no path here, and the hub did not give its adapter: "
    )


def test_a_token_that_is_none_is_an_error_that_does_not_show_it(hub):
    for answer in hub[3][str({"HF_TOKEN": "hf_\u00e4"})].values():
        assert answer.startswith("error: The token of HF_TOKEN or `hf auth login` holds a letter that no token does")
        assert "\u00e4" not in answer


def test_only_safetensors_and_the_adapters_configuration_are_fetched(hub):
    assert hub[2] == {
        *(adapters.DIFFUSERS_FILE, adapters.PEFT_FILE, adapters.PEFT_CONFIG),
        *("style.safetensors", "two.safetensors", "[three].safetensors"),
    }
    snapshot = Path(hub[0]["diffusers"])
    assert [str(file.relative_to(snapshot)) for file in snapshot.rglob("*.*")] == [adapters.DIFFUSERS_FILE]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        (
            "many",
            "me/many on the hub holds no pytorch_lora_weights.safetensors and no adapter_config.json, and 3 other",
        ),
        ("no file", "me/many on the hub has no four.safetensors. Correct the name"),
        (
            "pickle",
            "me/pickle on the hub holds no pytorch_lora_weights.safetensors and no adapter_config.json, and no",
        ),
        ("no repository", "me/nothing is no path here, and the hub did not give its adapter: "),
    ],
)
def test_what_holds_no_adapter_is_refused(hub, name, start):
    assert hub[0][name].startswith(f"error: {start}")
    assert "Correct the" not in hub[0][name] or re.search(r"[^.]\. Correct the", hub[0][name])
    assert "\n" not in hub[0][name]


@pytest.mark.parametrize("place", ["one-name", "./a/b", "/a/b", "a//b"])
def test_what_can_be_no_repository_stays_a_path(place):
    assert fetch_adapter(place) == Path(place)
    with pytest.raises(UserError, match="There is no adapter at"):
        adapter_reader.read_adapter(fetch_adapter(place))


@pytest.mark.parametrize("error", [json.JSONDecodeError("no JSON", "<html>", 0), KeyError("sha"), TypeError("None")])
def test_a_gateways_page_in_place_of_the_hubs_answer_is_an_error_with_the_remedy(monkeypatch, error):
    def answer(*arguments, **options):
        raise error

    monkeypatch.setattr(downloads, "snapshot_download", answer)
    with pytest.raises(UserError, match="me/style is no path here, and the hub did not give .*: .* Correct the name"):
        fetch_adapter("me/style")


def test_a_path_that_exists_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "me" / "diffusers").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetch_adapter("me/diffusers") == Path("me/diffusers")
