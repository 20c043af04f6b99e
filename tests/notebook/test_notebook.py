"""The notebook, cell by cell in a kernel of its own, with the miniature SDXL; only its settings are replaced."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from safetensors.torch import load_file

from rasengan import miniature, world


ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "rasengan_colab.ipynb"
STEPS, PICTURES = 40, 40
PROMPTS = ['a wizard\'s "hat" for $5', "two red stars at the left on a white background"]
# What Colab brings: it writes down what it was asked for.
COLAB = """
import sys, types

asked = []
colab = types.ModuleType("google.colab")
colab.drive = types.SimpleNamespace(mount=asked.append)
colab.files = types.SimpleNamespace(download=asked.append)
sys.modules |= {"google.colab": colab, "google": sys.modules.get("google", types.ModuleType("google"))}
on_colab = True
"""


class Session:
    """A kernel, as a Colab session is one, that executes the notebook's cells by their ids."""

    def __init__(self, client: NotebookClient, settings: dict):
        self.client, self.cells = client, {cell["id"]: cell for cell in client.nb.cells}
        self.settings = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in settings.items()))
        # As papermill does: after the cell with the tag.
        place = next(i for i, cell in enumerate(client.nb.cells) if "parameters" in cell["metadata"].get("tags", []))
        client.nb.cells.insert(place + 1, self.settings)

    def run(self, *names: str) -> None:
        """Execute cells in order: all, or those of some ids."""
        for index, cell in enumerate(self.client.nb.cells):
            if not names or cell["id"] in (*names, self.settings["id"]):
                self.client.execute_cell(cell, index)

    def text(self, name: str) -> str:
        """Return what a cell has printed."""
        return "".join(output["text"] for output in self.cells[name]["outputs"] if output["output_type"] == "stream")

    def shown(self, name: str, kind: str) -> list[str]:
        """Return what a cell shows of a MIME type."""
        return [output["data"][kind] for output in self.cells[name]["outputs"] if kind in output.get("data", ())]

    def stop(self) -> None:
        """Press the stop button: Jupyter signals the whole process group of the kernel."""
        os.killpg(self.client.km.provisioner.pgid, signal.SIGINT)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    pictures = tmp_path_factory.mktemp("pictures")
    world.write_style_set(pictures, PICTURES)
    base = str(miniature.ASSETS / "miniature")
    return {
        **{"base": base, "variant": "", "train_data_dir": str(pictures), "prompts": PROMPTS},
        **{"folder": str(tmp_path_factory.mktemp("drive") / "My Drive"), "run_name": "a run"},
        **{"resolution": 128, "steps": STEPS, "checkpointing_steps": 10, "learning_rate": 0.001},
    }


@pytest.fixture(scope="module")
def new_session(settings, tmp_path_factory):
    """Function that opens a session with the settings and further ones, as a context.

    `begin_in` is the working directory; Jupyter begins in the notebook's.
    """
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        **{"XDG_CACHE_HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "TMPDIR": str(home)},
        # pip resolves everything, offline, and installs nothing. The last is inverted where it is a variable.
        **{"PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"},
    }

    @contextlib.contextmanager
    def open_session(begin_in=NOTEBOOK.parent, **further):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        resources = {"metadata": {"path": str(begin_in)}}
        client = NotebookClient(notebook, timeout=600, resources=resources)
        with client.setup_kernel(env=environment):
            yield Session(client, settings | further)

    yield open_session
    for file in (home / ".tensorboard-info").glob("*.info"):  # it outlives the kernel
        os.kill(json.loads(file.read_text())["pid"], signal.SIGTERM)


@pytest.fixture(scope="module")
def place(settings) -> Path:
    """Where the notebook leaves everything."""
    return Path(settings["folder"])


@pytest.fixture(scope="module")
def stopped(new_session, place) -> tuple[Session, str]:
    """A session whose training was stopped behind its first checkpoint, and the checkpoint that it ended with."""

    def stop_after_a_checkpoint():
        while not list(place.glob("a run/checkpoint-*")):
            if training_ended.wait(0.02):
                return
        session.stop()

    training_ended = threading.Event()
    with new_session() as session:
        session.run("settings", "install", "drive", "base", "plan")
        thread = threading.Thread(target=stop_after_a_checkpoint)
        thread.start()
        try:
            with pytest.raises(CellExecutionError) as caught:
                session.run("train")
        finally:
            training_ended.set()
            thread.join()
    assert (caught.value.ename, caught.value.evalue) == ("KeyboardInterrupt", "stopped by you")
    steps = [int(path.name.partition("-")[2]) for path in place.glob("a run/checkpoint-*")]
    return session, f"checkpoint-{max(steps)}"


@pytest.fixture(scope="module")
def whole(new_session, stopped) -> Session:
    """A new session, as after a disconnect, with all cells from the first to the last."""
    with new_session() as session:
        session.run()
    return session


def test_a_stopped_training_ends_with_a_checkpoint(stopped, place):
    session, checkpoint = stopped
    assert "SIGINT: ending soon, with a checkpoint of the steps" in session.text("train")
    assert 10 <= int(checkpoint.partition("-")[2]) < STEPS
    assert not (place / "a run" / "pytorch_lora_weights.safetensors").exists()


def test_run_again_it_resumes_there_and_ends(stopped, whole, place):
    assert f"Resuming from {place / 'a run' / stopped[1]}" in whole.text("train")
    assert (place / "a run" / f"checkpoint-{STEPS}").is_dir()
    assert (place / "a run" / "pytorch_lora_weights.safetensors").is_file()


def test_every_cell_was_executed(whole):
    assert all(cell["execution_count"] for cell in whole.cells.values() if cell["cell_type"] == "code")


def test_the_installation_adds_nothing_but_the_package(whole):
    assert "$ pip install --quiet -e ." in whole.text("install")
    assert "Installed. Training will use accelerate_configs/cpu.yaml" in whole.text("install")


def test_the_base_is_written_once(stopped, whole, place):
    assert {"unet", "vae", "text_encoder", "text_encoder_2"} <= {path.name for path in (place / "sdxl").iterdir()}
    assert "Writing" not in whole.text("base")
    assert "each file verified by its hash" in whole.text("base")


def test_the_report_on_the_pictures_is_shown(whole):
    assert f"{PICTURES}, of which {PICTURES} can be trained on" in whole.text("check")
    (frame,) = whole.shown("check", "text/html")
    assert frame.count("data:image/") >= PICTURES


def test_base_and_tuned_are_compared_on_what_was_held_out(whole):
    assert "Loss of 2 held-out pictures" in whole.text("evaluate")
    (frame,) = whole.shown("evaluate", "text/html")
    assert "held-out" in frame


def test_without_a_gpu_the_plan_says_so(whole):
    assert whole.text("plan") == "There is no GPU whose memory could be planned\n"


def test_tensorboard_is_shown_and_reads_the_log(whole, place):
    assert "tensorboard-frame" in whole.shown("watch", "text/html")[0]
    assert list((place / "a run" / "logs").rglob("events.out.tfevents.*"))


def test_what_is_there_names_the_newest_checkpoint_and_shows_the_validation(whole):
    assert f"The training cell goes on from checkpoint-{STEPS}\n" in whole.text("there")
    assert len(whole.shown("there", "image/png")) == 1


@pytest.mark.parametrize(("cell", "rows", "columns"), [("compare", 4, 2), ("scales", 2, 4)])
def test_the_pictures_are_drawn_and_their_grid_is_shown(cell, rows, columns, whole, place):
    assert re.search(r"Merged \d+ modules of the unet", whole.text(cell))
    folder = place / "a run-pictures" / cell
    assert len(list(folder.glob("0*.png"))) == rows * columns
    assert len(whole.shown(cell, "image/png")) == 1


def test_the_downloads_are_there(whole, place):
    keys = load_file(place / "a run-kohya.safetensors").keys()
    assert all(key.startswith("lora_unet_") for key in keys)
    names = set(zipfile.ZipFile(place / "a run.zip").namelist())
    assert {"a run/pytorch_lora_weights.safetensors", "a run/README.md", "a run-pictures/compare/grid.png"} <= names
    assert not [name for name in names if "checkpoint-" in name or "/logs/" in name]


def test_without_a_checkout_one_is_cloned_and_a_command_that_fails_stops_with_its_own_line(new_session, tmp_path):
    pretend = nbformat.v4.new_code_cell("gpu = True", id="pretend")  # so that the plan is asked for, and refused
    with new_session(tmp_path, repository=str(ROOT), folder=str(tmp_path / "drive")) as session:
        session.client.nb.cells.insert(session.client.nb.cells.index(session.cells["plan"]), pretend)
        with pytest.raises(CellExecutionError) as caught:
            session.run("settings", "install", "drive", "pretend", "plan", "train")
    assert (tmp_path / "rasengan-xl" / "scripts").is_dir()
    assert caught.value.ename == "RuntimeError"
    assert caught.value.evalue.startswith("error: --plan_only needs a CUDA GPU")
    assert "Traceback" in session.text("plan")  # the launcher's own, below that line
    assert session.cells["train"]["execution_count"] is None


def test_on_colab_drive_is_mounted_and_both_files_are_downloaded(new_session, whole, place):
    with new_session() as session:
        cells = session.client.nb.cells
        # After the installation, which would stop without a GPU; a last cell shows what was asked for.
        cells.insert(cells.index(session.cells["drive"]), nbformat.v4.new_code_cell(COLAB, id="colab"))
        cells.append(nbformat.v4.new_code_cell("print(*asked, sep='\\n')", id="asked"))
        session.cells |= {cell["id"]: cell for cell in cells}
        session.run("settings", "install", "colab", "drive", "download", "asked")
    downloads = [place / "a run-kohya.safetensors", place / "a run.zip"]
    assert session.text("asked").splitlines() == ["/content/drive", *map(str, downloads)]
