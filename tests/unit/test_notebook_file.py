"""The notebook as a file; tests/notebook executes it."""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = (ROOT / "notebooks" / "rasengan_colab.ipynb").read_text(encoding="utf-8")


def test_the_notebook_is_committed_without_outputs():
    code = [cell for cell in json.loads(NOTEBOOK)["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_notebook_has_no_place_of_anybodys_machine():
    places = re.findall(r"(?<![\w.:/{}])/(?!/)[A-Za-z][\w.-]*/[\w./-]*", NOTEBOOK)
    assert {place.removesuffix("/MyDrive") for place in places} == {"/content/drive"}


def test_the_notebook_and_readme_give_the_repository_one_address():
    (address,) = re.findall(r"git clone (\S+) rasengan-xl", README)
    assert f'repository = \\"{address}\\"' in NOTEBOOK
    badges = re.findall(r"https://colab\.research\.google\.com/github/(\S+?)/blob/", README + NOTEBOOK)
    assert len(badges) == 2
    assert all(address == badge or address.removesuffix(".git").endswith(f"github.com/{badge}") for badge in badges)
