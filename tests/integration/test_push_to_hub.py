"""--push_to_hub against a hub in miniature, which notes what arrives."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from rasengan.hub import upload


TOKEN = "hf_the_token_of_the_flag"
OTHER_TOKEN = "hf_the_token_of_the_environment"


class Hub(BaseHTTPRequestHandler):
    """The requests of create_repo and upload_folder, answered; text goes inline, all else through LFS."""

    protocol_version = "HTTP/1.1"
    repositories: list
    tokens: list
    objects: dict  # content by SHA-256
    files: dict  # content by path, as committed

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.tokens.append(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/my-lora"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/me/my-lora/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            text = (".md", ".json")
            modes = [{"path": n, "uploadMode": "regular" if n.endswith(text) else "lfs"} for n in names]
            self.answer({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        elif path == "/me/my-lora.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            href = f"http://{self.headers['Host']}/objects/"
            objects = [o | {"actions": {"upload": {"href": href + o["oid"], "header": {}}}} for o in wanted]
            self.answer({"transfer": "basic", "objects": objects})
        elif path == "/api/models/me/my-lora/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            self.answer({"commitUrl": f"http://{self.headers['Host']}/me/my-lora/commit/0", "commitOid": "0" * 40})
        else:
            self.answer({"error": path}, status=404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(content).hexdigest()
        assert self.path == f"/objects/{digest}"
        self.objects[digest] = content
        self.answer({})

    def answer(self, content: dict, status: int = 200) -> None:
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *message) -> None:
        pass


@pytest.fixture
def hub():
    """The class of a running hub's handler, with its address."""
    handler = type("ThisHub", (Hub,), {"repositories": [], "tokens": [], "objects": {}, "files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def test_the_adapter_the_card_and_the_grid_arrive_and_the_token_does_not(hub, run_script, train_arguments, tmp_path):
    output_dir = tmp_path / "my-lora"
    finished = run_script(
        "train_lora_sdxl",
        *(*train_arguments, "--output_dir", output_dir, "--push_to_hub", "--hub_token", TOKEN),
        *("--validation_prompt", "a red star", "--num_validation_images", 1, "--validation_inference_steps", 2),
        *("--max_train_samples", 4),
        env={"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": OTHER_TOKEN, "HF_HUB_OFFLINE": "0"},
    )
    assert finished.returncode == 0, finished.stderr
    assert [repository["name"] for repository in hub.repositories] == ["my-lora"]
    assert set(hub.files) == {
        "pytorch_lora_weights.safetensors",
        "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
        "README.md",
        "validation.png",
    }
    assert {name: (output_dir / name).read_bytes() for name in hub.files} == hub.files
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    everything = b"".join(hub.files.values()) + (finished.stdout + finished.stderr).encode()
    everything += b"".join(path.read_bytes() for path in output_dir.rglob("*") if path.is_file())
    assert TOKEN.encode() not in everything
    assert OTHER_TOKEN.encode() not in everything


def test_an_earlier_runs_grid_does_not_arrive(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.address)
    for name in ("pytorch_lora_weights.safetensors", "README.md", "validation.png"):
        (tmp_path / name).write_text(name)
    upload("me/my-lora", TOKEN, tmp_path, with_grid=False)
    assert set(hub.files) == {"pytorch_lora_weights.safetensors", "README.md"}
    upload("me/my-lora", TOKEN, tmp_path, with_grid=True)
    assert "validation.png" in hub.files
