"""The page, served as a user serves it, in a headless Chromium."""

import hashlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file


gradio_client = pytest.importorskip("gradio_client", reason="needs Gradio: pip install -e '.[app]'")
pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs a Chromium on the PATH", allow_module_level=True)

APP = Path(__file__).parents[2] / "scripts" / "app.py"
PROMPT = "<b>bold</b> star"


class Server(NamedTuple):
    """A page that is served, the folder of its runs, and what it prints."""

    url: str
    runs: Path
    log: Path


@pytest.fixture(scope="module")
def server(tiny_base, trained, tmp_path_factory) -> Iterator[Server]:
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(trained, runs / "stars")
    (runs / "link").symlink_to(trained)
    strange = runs / "markup.safetensors"
    save_file({"<img src=x onerror=document.title='bad'>.lora_A": torch.zeros(2, 2)}, strange)
    os.utime(strange, (0, 0))  # the newest is what a page begins with
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--pretrained_model_name_or_path", tiny_base, "--runs_dir", runs, "--port", port]
    log = runs.parent / "log"
    with open(log, "w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, str(APP), *map(str, words)], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            time.sleep(0.5)
            if process.poll() is None and get(f"{url}/") == 200:
                break
        else:
            pytest.fail(log.read_text())
        yield Server(url, runs, log)
        assert process.poll() is None, log.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def get(url: str) -> int:
    """Return the status that an address answers with, 0 for none."""
    try:
        with urllib.request.urlopen(url) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, server):
    """The page, loaded; it may ask no other server for anything."""
    page = chromium.new_page(viewport={"width": 1280, "height": 1000})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#generate")
    page.get_by_label("Number input for Steps").or_(page.get_by_label("number input for Steps")).fill("3")
    yield page
    # The pictures, to be looked at: outside of the repository.
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/desktop.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(500)
        page.screenshot(path=f"{folder}/phone.png", full_page=True)
    page.close()
    assert not [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]


def generate(page, scale: float | None = None) -> dict[str, Image.Image]:
    """Press the button; return the base and the tuned picture, when they are there."""
    if scale is not None:
        page.get_by_label("number input for LoRA scale").fill(str(scale))
    before = page.inner_text("#made-of")
    page.click("#generate")
    page.wait_for_function("text => document.querySelector('#made-of').innerText.trim() != text.trim()", arg=before)
    pictures = {}
    for kind in ("base", "tuned"):
        picture = page.wait_for_selector(f"#{kind} img")
        page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture)
        with urllib.request.urlopen(picture.get_attribute("src")) as response:
            pictures[kind] = Image.open(io.BytesIO(response.read()))
    return pictures


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def test_both_pictures_are_drawn_and_the_scale_changes_only_the_tuned_one(page, server):
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    first = generate(page)
    assert digest(first["base"]) != digest(first["tuned"])
    boxes = [page.locator(f"#{kind} img").bounding_box() for kind in ("base", "tuned")]
    for side in ("y", "width", "height"):
        assert abs(boxes[0][side] - boxes[1][side]) < 1, side
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]

    second = generate(page, scale=0.5)
    assert digest(second["base"]) == digest(first["base"])
    assert digest(second["tuned"]) != digest(first["tuned"])
    off = generate(page, scale=0)
    assert digest(off["base"]) == digest(off["tuned"]) == digest(first["base"])

    assert page.locator("#history .thumbnail-item").count() == 3
    captions = page.locator("#history .caption-label").all_inner_texts()
    assert all(caption.startswith(f"{PROMPT} (stars at scale") for caption in captions)
    assert page.locator("#made-of p").first.inner_text() == PROMPT
    assert page.locator("#made-of b, #history b").count() == 0
    said = second["tuned"].text
    assert said["prompt"] == PROMPT
    assert said["adapter"] == "stars at scale 0.5"
    assert said["seed"] == "0"
    assert said["num_inference_steps"] == "3"
    assert str(server.runs) not in str(said)


def test_a_random_seed_is_shown(page):
    page.get_by_label("Prompt", exact=True).fill("a star")
    page.click("#dice")
    page.wait_for_function("document.querySelector('[aria-label=\"Seed (-1: any)\"]').value != '0'")
    seed = page.get_by_label("Seed (-1: any)").input_value()
    generate(page)
    assert f"seed {seed}," in page.inner_text("#made-of")
    page.get_by_label("Seed (-1: any)").fill("-1")
    assert generate(page)["base"].text["seed"] == re.search(r"seed (\d+),", page.inner_text("#made-of"))[1]


def test_what_is_wrong_is_told_in_the_page_and_the_next_pair_is_drawn(page, server):
    page.get_by_label("Prompt", exact=True).fill("a star")
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name="markup.safetensors").click()
    page.click("#generate")
    toast = page.wait_for_selector("[data-testid='toast-body'], .toast-body")
    text = toast.inner_text()
    assert "<img src=x onerror=document.title='bad'>" in text
    assert str(server.runs) not in text
    assert page.title() == "Rasengan-XL"
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name="stars", exact=True).click()
    assert len(generate(page)) == 2
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("Width in px", "16", "The width is 16. Give a whole number from 64 to 2048."),
        ("Height in px", "100000", "The height is 100000. Give a whole number from 64 to 2048."),
        ("Width in px", "100", "The width is 100 px. Give a multiple of 8."),
        ("Seed (-1: any)", "-5", "The seed is -5. Give a whole number from 0 to 4294967295."),
        ("LoRA alpha", "-1", "The LoRA alpha is -1. Give a positive number, or 0 for the file's own."),
        ("LoRA alpha", "8", "says 32 for the unet. Set LoRA alpha to 0: LoRA scale is what changes the strength."),
    ],
)
def test_a_number_out_of_bounds_is_told_by_its_field_in_the_page_alone(page, server, field, value, message):
    before = server.log.read_text()
    page.get_by_label("Prompt", exact=True).fill("a star")
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name="stars", exact=True).click()
    page.get_by_role("button", name="More").click()
    page.wait_for_timeout(500)  # it has its fields a moment after it opens
    page.get_by_label(field).fill(value)
    page.click("#generate")
    toast = page.wait_for_selector("[data-testid='toast-body'], .toast-body")
    assert message in toast.inner_text()
    assert server.log.read_text() == before


def test_a_new_adapter_is_offered_after_a_refresh(page, server):
    shutil.copy(server.runs / "stars" / "pytorch_lora_weights.safetensors", server.runs / "later.safetensors")
    page.click("#refresh")
    page.wait_for_timeout(500)
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name="later.safetensors").click()
    page.get_by_label("Prompt", exact=True).fill("a star")
    assert generate(page)["tuned"].text["adapter"] == "later.safetensors at scale 1"


def test_wrong_arguments_are_one_line(run_script, tiny_base, server):
    base = ["--pretrained_model_name_or_path", tiny_base]
    port = server.url.rpartition(":")[2]
    for words, error in (
        ([*base, "--runs_dir", tiny_base / "absent"], f"--runs_dir {tiny_base / 'absent'} is no folder. Give"),
        ([*base, "--runs_dir", server.runs, "--port", port], f"--port {port} is taken. Give another."),
        (["--runs_dir", server.runs], "There is no source for the tokenizer."),
        (base, "the following arguments are required: --runs_dir"),
    ):
        finished = run_script("app", *words)
        assert finished.returncode == 2
        assert finished.stderr.startswith(f"error: {error}")
        assert finished.stderr.count("\n") == 1


# --- what a stranger may send ---


@pytest.mark.parametrize("name", ["../trained0", "/etc/passwd", "link", "stars/../stars", "stars/optimizer.bin"])
def test_a_forged_choice_is_refused(name, server):
    client = gradio_client.Client(server.url, verbose=False)
    values = {"prompt": "a star", "negative_prompt": "", "adapter": name, "lora_scale": 1, "seed": 0, "steps": 1}
    values |= {"guidance_scale": 7.5, "scheduler": "", "width": 64, "height": 64, "lora_alpha": 0}
    with pytest.raises(Exception, match=r"not in the list of choices|none of the \d+ adapters"):
        client.predict(**values, api_name="/generate")
    drawn = client.predict(**values | {"adapter": "stars"}, api_name="/generate")
    assert Image.open(drawn[1] if isinstance(drawn[1], str) else drawn[1]["path"]).size == (64, 64)
    with pytest.raises(Exception, match="(?i)height"):
        client.predict(**values | {"adapter": "stars", "height": 65}, api_name="/generate")


def test_no_file_is_served_but_pictures(server):
    files = [server.runs / "stars" / "args.json", server.runs / "markup.safetensors", APP, "/etc/passwd"]
    for file in files:
        for route in ("gradio_api/file=", "gradio_api/file/", "file="):
            assert get(f"{server.url}/{route}{file}") in {403, 404, 405}, (route, file)
    assert get(f"{server.url}/gradio_api/file={Path(os.path.relpath(APP))}") in {403, 404}


def test_nothing_can_be_uploaded(server):
    boundary = "limit"
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n{"a" * 99}\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{server.url}/gradio_api/upload", f"{body}--{boundary}--\r\n".encode(), headers)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code in {413, 400}
