import ast
import os
from pathlib import Path

import pytest


SCRIPT = "examples/text_to_image/train_text_to_image_lora_sdxl.py"


@pytest.fixture
def their_flags() -> set[str]:
    checkout = os.environ.get("DIFFUSERS")
    if not checkout:
        pytest.skip("needs a checkout of diffusers: make test_peers DIFFUSERS=path/to/diffusers")
    tree = ast.parse((Path(checkout) / SCRIPT).read_text())
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    added = (call for call in calls if getattr(call.func, "attr", "") == "add_argument")
    return {call.args[0].value for call in added}


def test_every_flag_of_the_example_is_ours_too(their_flags, train_script):
    ours = {option for action in train_script.make_parser()._actions for option in action.option_strings}
    assert len(their_flags) >= 55
    assert their_flags - ours == set()
