import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest

from rasengan import UserError, components, first_line, hub


class Refusing(BaseHTTPRequestHandler):
    """A hub that knows no token, and notes those that it was sent."""

    def do_POST(self):
        self.server.tokens.append(self.headers["Authorization"])
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def sent_tokens(monkeypatch):
    """What reaches a hub that refuses everything."""
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    server.tokens = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    yield server.tokens
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("token", ["hf_SECRÉT", "hf_ SECRET", "hf_SECRET\x01"])
@pytest.mark.parametrize("of_environment", [False, True])
def test_a_token_that_is_none_is_refused_unseen(sent_tokens, monkeypatch, token, of_environment):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="--push_to_hub: the token .*it is not shown here") as error:
        hub.create_repository("me/lora", None if of_environment else token)
    assert "SECR" not in str(error.value)
    assert sent_tokens == []


def test_a_download_with_a_token_that_is_none_ends_with_an_error(sent_tokens, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_SECRÉT")
    source = components.Source("me/base", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"token of HF_TOKEN .*it is not shown here.*Copy it again\.") as error:
        components.fetch("unet", source)
    assert "SECR" not in str(error.value)


@pytest.mark.parametrize("token", ["hf_SECRET", "hf_SECRET ", "hf_SECRET\r\n"])
def test_a_refused_token_is_not_shown(sent_tokens, token):
    with pytest.raises(UserError, match="the hub refused me/lora") as error:
        hub.create_repository("me/lora", token)
    assert "SECRET" not in str(error.value)
    assert sent_tokens == ["Bearer hf_SECRET"]


@pytest.mark.parametrize(
    "text", ["Illegal header value b'Bearer {token} '", "no user {token}", "https://u:{token}@h/a is not there"]
)
def test_what_others_say_of_an_error_holds_no_token(text):
    for token in ("hf_" + 34 * "a", "hf_oauth_" + 40 * "Z"):
        shown = first_line(RuntimeError(text.format(token=token)))
        assert token[-10:] not in shown
        assert shown.startswith(text[:7])
    for place in ("/data/hf_models/a", "/data/hf_sdxl_lora_training_pictures"):
        assert first_line(RuntimeError(f"{place} is not there")) == f"{place} is not there"
