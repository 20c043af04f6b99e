"""The page's script where there is no Gradio; with it, and in a browser, tests/browser."""

import os
import sys


def test_without_gradio_it_says_what_to_install_and_helps_all_the_same(run_script, tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('no such thing')")
    without = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    finished = run_script("app", "--runs_dir", tmp_path, env=without)
    assert finished.returncode == 2
    assert finished.stderr == "error: The page needs Gradio: pip install -e '.[app]'. (no such thing)\n"
    helped = run_script("app", "--help", env=without)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--runs_dir" in helped.stdout
