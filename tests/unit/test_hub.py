import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pytest

from rasengan import UserError, first_line, hub
from rasengan.sources import Source, fetch


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
    source = Source("me/base", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"token of HF_TOKEN .*it is not shown here.*Copy it again\.") as error:
        fetch("unet", source)
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


# --- the model card ---

SETTINGS = dict.fromkeys(hub.RECIPE, 7) | {"dataset_name": None, "train_data_dir": ".", "validation_prompt": None}
SETTINGS |= {"pretrained_model_name_or_path": "me/base", "optimizer_steps": 123}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder of an adapter; the working directory is another, of pictures."""
    (tmp_path / "naruto").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "naruto")
    return tmp_path / "run"


def card_of(folder, **settings):
    hub.write_model_card(folder, SETTINGS | settings)
    return (folder / "README.md").read_text()


def test_the_card_names_the_base_and_the_data_and_what_was_trained(folder):
    card = card_of(folder)
    assert "base_model: me/base\n" in card
    assert "# A LoRA for me/base, trained on naruto\n" in card  # the folder that was given as a dot
    assert "| `optimizer_steps` | 123 |" in card
    assert "trained on you/pictures\n" in card_of(folder, dataset_name="you/pictures", train_data_dir=None)


def test_a_base_in_a_folder_is_not_named(folder):
    card = card_of(folder, pretrained_model_name_or_path=str(folder))
    assert "base_model" not in card
    assert str(folder) not in card
    assert "# A LoRA for Stable Diffusion XL 1.0, trained on" in card_of(folder, pretrained_model_name_or_path=None)


def test_the_grid_is_shown_where_this_run_has_drawn_it(folder):
    assert "validation.png" not in card_of(folder, validation_prompt=["a star"])  # it ended before
    (folder / "validation.png").write_bytes(b"")
    assert "(validation.png)\n\n- a star\n- a heart\n" in card_of(folder, validation_prompt=["a star", "a heart"])
    assert "validation.png" not in card_of(folder)  # of an earlier run


def test_a_readme_of_the_users_own_stays(folder, caplog):
    (folder / "README.md").write_text("mine")
    assert card_of(folder) == "mine"
    assert "README.md is no model card of this program: it stays" in caplog.text
