"""The page's script where there is no Gradio; with it, and in a browser, tests/browser."""

import os
import sys


def test_without_gradio_it_says_what_to_install(run_script, tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('no such thing')")
    finished = run_script("app", "--help", env={"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    assert finished.returncode == 2
    assert finished.stderr == "error: The page needs Gradio: pip install -e '.[app]'. (no such thing)\n"
