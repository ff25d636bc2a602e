"""Each folder in hub_cards is what `save_pretrained` and `card` write; what is pushed of it is a whole repository."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from test_published_set import run_without_package

from transformers_prism import PrismDraftModel
from transformers_prism.hub.card import write_card
from transformers_prism.hub.files import published_code, published_files, published_name, weights_sha256

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("hub_cards/*/config.json"))
WITHOUT_WEIGHTS = sorted({path.parent for path in ROOT.glob("hub_cards/*/about.json")} - set(FOLDERS))


def contents(folder: Path) -> dict[str, bytes]:
    """Files by their names within a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


_RELEASE = re.compile(rb'"transformers_version": "[^"]*"')


def is_code(name: str) -> bool:
    """Whether a file is of the package's code, which git ignores in hub_cards."""
    return name.startswith("custom_generate/") or ("/" not in name and name.endswith(".py"))


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def shipped_and_saved(request, tmp_path_factory):
    """A folder in hub_cards, and where its draft was saved again."""
    saved = tmp_path_factory.mktemp("saved") / request.param.name
    PrismDraftModel.from_pretrained(request.param).save_pretrained(saved)
    return request.param, saved


def test_a_folder_is_what_save_pretrained_writes(shipped_and_saved):
    """Weights, configurations, card, metrics, records and licence, byte for byte, none missing and none left over; but for
    the release of transformers that wrote configurations."""
    shipped, saved = ({n: c for n, c in contents(folder).items() if not is_code(n)} for folder in shipped_and_saved)
    assert {"README.md", "metrics.json", "training.json", "LICENSE", "model.safetensors"} <= shipped.keys()
    assert shipped.keys() == saved.keys()
    for name, content in shipped.items():
        assert _RELEASE.sub(b"", content) == _RELEASE.sub(b"", saved[name]), name


def test_a_card_is_what_the_command_writes(shipped_and_saved, tmp_path):
    """From metrics.json, training.json, about.json, the configurations and the weights."""
    copy = shutil.copytree(shipped_and_saved[0], tmp_path / shipped_and_saved[0].name)
    (copy / "README.md").unlink()
    write_card(copy, with_plot=False)
    assert (copy / "README.md").read_bytes() == (shipped_and_saved[0] / "README.md").read_bytes()


def test_saving_adds_the_packages_code(shipped_and_saved):
    """Nothing else, and nothing less."""
    added = {name: content for name, content in contents(shipped_and_saved[1]).items() if is_code(name)}
    expected = {published_name(path): published_code(path).encode() for path in published_files()}
    for path in (ROOT / "transformers_prism" / "custom_generate").glob("*.*"):
        expected[f"custom_generate/{path.name}"] = path.read_bytes()
    assert added == expected


@pytest.mark.parametrize("folder", WITHOUT_WEIGHTS, ids=lambda folder: folder.name)
def test_a_card_without_weights_says_so(folder):
    """And has what the figures come from, so that the draft can be made again."""
    about, card = json.loads((folder / "about.json").read_text()), (folder / "README.md").read_text()
    assert {path.name for path in folder.iterdir() if not path.name.endswith(".png")} == {
        *("README.md", "about.json", "metrics.json", "training.json")
    }
    assert "**The weights are not kept in this repository.**" in about["data"]
    assert about["data"] in card
    command = json.loads((folder / "training.json").read_text())["command"]
    assert command
    assert command in card


LOAD = """
draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True)
assert "transformers_modules" in type(draft).__module__
draft.save_pretrained(DRAFT + " again")
print(repr([draft.config.num_processing_modules, draft.generation_config.tree]))
"""


@pytest.mark.slow
def test_what_is_pushed_loads_without_the_package(shipped_and_saved, tiny_folders, tmp_path):
    """And saves the same files again."""
    saved = shipped_and_saved[1]
    printed = run_without_package(saved, tiny_folders[0], LOAD, HF_MODULES_CACHE=str(tmp_path))
    draft = PrismDraftModel.from_pretrained(saved)
    assert ast.literal_eval(printed.splitlines()[-1]) == [
        draft.config.num_processing_modules,
        draft.generation_config.tree,
    ]
    again = saved.with_name(f"{saved.name} again")
    assert weights_sha256(again) == weights_sha256(saved)
    assert contents(again) == contents(saved)
