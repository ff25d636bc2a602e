"""Fixtures for all tests: no network, tiny models in folders, and data from outside the repository where there is some."""

import os
import tempfile
from pathlib import Path

# Before transformers reads them: the suite needs no network, and leaves no costs of tiny models in a user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="prism-tests-")

import pytest
import torch
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from tiny_models import tiny_draft, tiny_target, word_tokenizer

from transformers_prism.decoding.sampler import treating_cpus_as_accelerators
from transformers_prism.policy import automatic
from transformers_prism.policy.costs import RoundCosts

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config, items):
    """Losslessness first, since it is the promise; tests marked gpu or kernel only where they can run."""
    items.sort(key=lambda item: item.path.name != "test_lossless.py")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        # Each file that has some runs them in a process of their own: see kernel_checks.py.
        deselected = [item for item in items if item.get_closest_marker("kernel")]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("kernel")]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def prism_data() -> Path:
    """Folder with benchmark prompts and reference vectors: `$PRISM_DATA`, or `shared` beside the repository."""
    folder = Path(os.environ.get("PRISM_DATA") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip("no data outside the repository: set PRISM_DATA to a folder with data/ and reference/")
    return folder


@pytest.fixture
def one_thread():
    """Tiny products gain nothing from threads, and on busy cores threads wait for each other far longer than they work."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def cheap_rounds(monkeypatch) -> RoundCosts:
    """Costs of rounds that do not depend on the machine: verifying 64 tokens costs twice as much as one."""
    costs = RoundCosts([1, 64], [1.0, 2.0], 0.02)
    monkeypatch.setattr(automatic, "known_costs", lambda target, draft, num_rows: costs)
    # What rounds really take does not count.
    monkeypatch.setattr(RoundCosts, "observe_verify", lambda self, num_tokens, seconds: None)
    monkeypatch.setattr(RoundCosts, "observe_step", lambda self, seconds: None)
    return costs


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny random target with its tokenizer, and of a random draft for it."""
    target = tiny_target("llama", seed=3)
    target_folder, draft_folder = (tmp_path_factory.mktemp(name) for name in ("target", "draft"))
    target.save_pretrained(target_folder)
    word_tokenizer().save_pretrained(target_folder)
    tiny_draft(target).save_pretrained(draft_folder)
    return str(target_folder), str(draft_folder)


@pytest.fixture(scope="module")
def saved_pair(tmp_path_factory):
    """A target and its folder, and a draft for it."""
    target, folder = tiny_target("llama", 3), tmp_path_factory.mktemp("target")
    target.save_pretrained(folder)
    return target, folder, tiny_draft(target)


@pytest.fixture
def device_walk():
    """What accelerators do, which a CPU does not do by itself."""
    with treating_cpus_as_accelerators():
        yield


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to, with a cache of its own and no waiting between attempts."""
    with Hub() as hub:
        settings = {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "DOWNLOAD_CHUNK_SIZE": 1000,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        yield hub
