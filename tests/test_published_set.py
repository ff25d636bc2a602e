"""A saved draft loads where this package is not installed, and decodes as it does with the package."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import PAD_ID, VOCAB_SIZE, prompts, tiny_draft, tiny_target
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.import_utils import split_package_version

import transformers_prism
from transformers_prism.hub.files import published_code, published_files, published_name, weights_sha256

pytestmark = pytest.mark.quick
PACKAGE = Path(transformers_prism.__file__).parent
LENGTH = {"max_new_tokens": 20, "pad_token_id": PAD_ID, "do_sample": False}

# Runs without the package and, as users may be, without triton.
PREAMBLE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers_prism", "triton"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import warnings
import torch
from transformers import AutoModel, AutoModelForCausalLM
warnings.simplefilter("error", FutureWarning)
warnings.simplefilter("error", DeprecationWarning)
target = AutoModelForCausalLM.from_pretrained(TARGET)
inputs = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
"""


def run_without_package(folder: Path, target_folder: Path, code: str, **environment) -> str:
    """Run code in a fresh process; returns what it printed."""
    input_ids, mask = prompts(2)
    values = {"DRAFT": str(folder), "TARGET": str(target_folder), "IDS": input_ids.tolist(), "MASK": mask.tolist()}
    assignments = "\n".join(f"{name} = {value!r}" for name, value in {**values, "LENGTH": LENGTH}.items())
    script = f"{assignments}\n{PREAMBLE}\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A target and a draft on disk, and the tokens that the package gives."""
    root = tmp_path_factory.mktemp("saved")
    target = tiny_target("llama", 3)
    draft = tiny_draft(target, draft_vocab_size=40)
    draft.draft_to_target.copy_(torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))[:40])
    target.save_pretrained(root / "target")
    draft.save_pretrained(root / "draft", max_shard_size="30KB")
    input_ids, mask = prompts(2)
    tokens = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH)
    return root / "draft", root / "target", tokens.tolist(), draft.last_speculation.accepted_per_round


def test_published_code_is_the_packages_code(saved):
    """Line for line but for imports of files that lie in a folder here, and nothing is missing or left over."""
    folder = saved[0]
    names = {path: "_".join(path.relative_to(PACKAGE).parts) for path in published_files()}
    assert {path.name for path in folder.glob("*.py")} == set(names.values())
    num_rewritten = 0
    for path, name in names.items():
        lines = zip(path.read_bytes().splitlines(True), (folder / name).read_bytes().splitlines(True), strict=True)
        for ours, published in lines:
            if ours == published:
                continue
            num_rewritten += 1
            indent, dots, module, rest = re.fullmatch(rb"( *from )(\.+)([\w.]+)( import .*\n)", ours).groups()
            folders = path.relative_to(PACKAGE).parts[: -len(dots)]
            flat = "_".join([*folders, *module.decode().split(".")])
            assert published == indent + b"." + flat.encode() + rest
    assert num_rewritten > 0
    name = "custom_generate/generate.py"
    assert (folder / name).read_bytes() == (PACKAGE / name).read_bytes()


def test_published_imports_of_a_folder_are_flattened():
    """In a file beside the folder, in one inside it, and nowhere but in import lines."""
    walk, kernel = PACKAGE / "decoding" / "walk.py", PACKAGE / "kernels" / "verify_tree.py"
    loop = PACKAGE / "generation.py"
    assert "\nfrom .kernels_verify_tree import " in published_code(walk)
    assert "\nfrom .decoding_tree import " in published_code(walk)
    assert "\nfrom .decoding_sampler import " in published_code(walk)
    assert "\nfrom .transformers_names import " in published_code(PACKAGE / "decoding" / "sequences.py")
    assert "\nfrom .kernels_dispatch import " in published_code(kernel)
    assert "\nfrom .decoding_walk import " in published_code(loop)
    assert published_name(kernel) == "kernels_verify_tree.py"
    assert published_name(loop) == "generation.py"


def test_published_code_imports_only_torch_and_transformers():
    """By the forms that the loader follows, and numpy, which transformers needs; from the standard library whatever it likes."""
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", *sys.stdlib_module_names}
    files = published_files()
    names = {published_name(path).removesuffix(".py") for path in files}
    codes = [*map(published_code, files), (PACKAGE / "custom_generate" / "generate.py").read_text()]
    for tree in map(ast.parse, codes):
        # Kernels do without triton where it is absent.
        guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
                assert roots <= allowed or (roots == {"triton"} and id(node) in guarded)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1
                assert node.module in names


def test_config_points_at_the_code(saved):
    """Without a repository's name in it, wherever the draft came from."""
    auto_map = json.loads((saved[0] / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_prism.PrismConfig"
    assert auto_map["AutoModel"] == auto_map["AutoModelForCausalLM"] == "modeling_prism.PrismDraftModel"


LOAD_AND_DECODE = """
draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True)
assert "transformers_modules" in type(draft).__module__
assert type(AutoModelForCausalLM.from_pretrained(DRAFT, trust_remote_code=True)).__name__ == "PrismDraftModel"
tokens = target.generate(**inputs, assistant_model=draft, **LENGTH)
print([tokens.tolist(), draft.last_speculation.accepted_per_round])
"""


def test_a_folder_loads_without_the_package(saved, tmp_path):
    """In a fresh process, from shards, with package and triton blocked: the same tokens, round for round."""
    folder, target, *expected = saved
    printed = run_without_package(folder, target, LOAD_AND_DECODE, HF_MODULES_CACHE=str(tmp_path))
    assert ast.literal_eval(printed.splitlines()[-1]) == expected


def offline_hub(folder: Path, home: Path, commit: str = "a" * 40) -> None:
    """Lay a draft's folder out as the Hub's cache keeps `someone/draft`."""
    repository = home / "models--someone--draft"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_an_offline_hub_cache_loads_without_the_package(saved, tmp_path):
    """By repository id."""
    folder, target, *expected = saved
    offline_hub(folder, tmp_path / "hub")
    printed = run_without_package(
        "someone/draft",
        target,
        LOAD_AND_DECODE,
        HF_HUB_CACHE=str(tmp_path / "hub"),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert ast.literal_eval(printed.splitlines()[-1]) == expected


CUSTOM_GENERATE = """
import transformers
loads = []
original = AutoModel.from_pretrained.__func__
AutoModel.from_pretrained = classmethod(lambda cls, *a, **k: loads.append(a) or original(cls, *a, **k))
for _ in range(2):
    tokens = target.generate(**inputs, custom_generate=DRAFT, trust_remote_code=True, **LENGTH)
assert len(loads) == 1, loads
import gc, weakref
plain, reference = target.generate(**inputs, **LENGTH), weakref.ref(target)
assert torch.equal(tokens, plain)
del target
gc.collect()
assert reference() is None
print(tokens.tolist())
"""


@pytest.mark.parametrize("from_hub", [False, True])
def test_custom_generate_needs_no_draft_object(saved, tmp_path, from_hub):
    """The repository's name is enough; the draft is loaded once, and neither it nor the target is kept for ever."""
    folder, target, tokens, _ = saved
    offline_hub(folder, tmp_path / "hub")
    printed = run_without_package(
        "someone/draft" if from_hub else folder,
        target,
        CUSTOM_GENERATE,
        HF_HUB_CACHE=str(tmp_path / "hub"),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert ast.literal_eval(printed.splitlines()[-1]) == tokens


def test_a_draft_loaded_as_remote_code_saves_the_same_bytes(saved, tmp_path):
    """Weights, configurations and code, `custom_generate` included."""
    folder, target, *_ = saved
    code = f"""
draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True)
draft.save_pretrained({str(tmp_path / "again")!r}, max_shard_size="30KB")
"""
    run_without_package(folder, target, code, HF_MODULES_CACHE=str(tmp_path / "modules"))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {str(p.relative_to(tmp_path / "again")) for p in (tmp_path / "again").rglob("*") if p.is_file()}
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


SAVE_CHANGED = """
import warnings
draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True)
with torch.no_grad():
    draft.fusion_layer.bias.add_(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    draft.save_pretrained(CHANGED)
print([str(one.message) for one in caught if "saved draft" in str(one.message)])
"""


def test_a_changed_draft_does_not_take_the_card_of_the_old_weights(saved, tmp_path):
    """Without the package no new card can be made, so that a warning names what lacks; code and licence are there."""
    folder, target, *_ = saved
    code = f"CHANGED = {str(tmp_path / 'changed')!r}\n{SAVE_CHANGED}"
    printed = run_without_package(folder, target, code, HF_MODULES_CACHE=str(tmp_path / "modules"))
    (message,) = ast.literal_eval(printed.splitlines()[-1])
    assert message.startswith("the saved draft lacks README.md, metrics.json: ")
    names = {path.name for path in (tmp_path / "changed").rglob("*")}
    assert {"LICENSE", "modeling_prism.py", "generate.py"} <= names
    assert not {"README.md", "metrics.json"} & names


@pytest.fixture
def published_generate():
    """The file of `custom_generate` as a module of its own, as transformers loads it."""
    spec = importlib.util.spec_from_file_location("published_generate", PACKAGE / "custom_generate" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_custom_generate_takes_a_given_draft_and_asks_for_one_otherwise(saved, published_generate):
    """Called by hand it cannot tell its repository."""
    target, draft = AutoModelForCausalLM.from_pretrained(saved[1]), AutoModel.from_pretrained(saved[0])
    input_ids, mask = prompts(2)
    arguments = {"input_ids": input_ids, "attention_mask": mask, **LENGTH}
    assert published_generate.generate(target, assistant_model=draft, **arguments).tolist() == saved[2]
    assert draft.last_speculation.accepted_per_round == saved[3]
    with pytest.raises(ValueError, match="assistant_model: expected a PRISM draft, got LlamaForCausalLM"):
        published_generate.generate(target, assistant_model=target, **arguments)
    with pytest.raises(ValueError, match="got another caller; pass the draft as assistant_model"):
        published_generate.generate(target, **arguments)


def test_custom_generate_loads_a_draft_for_an_offloaded_target(saved, published_generate, monkeypatch):
    """Whose weights seem to be on "meta"."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    target, (input_ids, mask) = AutoModelForCausalLM.from_pretrained(saved[1]), prompts(2)
    accelerate.cpu_offload(target)
    monkeypatch.setattr(published_generate, "_calling_repository", lambda: str(saved[0]))
    found = published_generate.generate(target, input_ids=input_ids, attention_mask=mask, **LENGTH)
    assert found.tolist() == saved[2]


def test_custom_generate_hands_on_settings_that_are_none(saved, published_generate):
    """`eos_token_id=None` is not the same as no such argument; generate()'s own absent arguments are."""
    target, draft = AutoModelForCausalLM.from_pretrained(saved[1]), AutoModel.from_pretrained(saved[0])
    input_ids, mask = prompts(1)
    arguments = {"input_ids": input_ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    plain = target.generate(**arguments)
    target.generation_config.eos_token_id = int(plain[0, input_ids.shape[1] + 2])
    ended = published_generate.generate(target, assistant_model=draft, streamer=None, token=None, **arguments)
    assert ended.shape[1] < plain.shape[1]
    assert torch.equal(published_generate.generate(target, assistant_model=draft, eos_token_id=None, **arguments), plain)


def test_the_weights_hash_knows_bits_and_not_files(saved, tmp_path):
    """The same in one file or in shards; another for another bit or another dtype."""
    draft = AutoModel.from_pretrained(saved[0])
    draft.save_pretrained(tmp_path / "one")
    assert not list((tmp_path / "one").glob("*.index.json"))
    assert weights_sha256(tmp_path / "one") == weights_sha256(saved[0])
    draft.bfloat16().save_pretrained(tmp_path / "narrow")
    draft.float()
    draft.fusion_layer.bias.data[0] += 1e-3
    draft.save_pretrained(tmp_path / "other")
    hashes = {weights_sha256(folder) for folder in (saved[0], tmp_path / "narrow", tmp_path / "other")}
    assert len(hashes) == 3


def test_with_the_package_its_own_classes_win(saved, tmp_path):
    """Whatever trust_remote_code says, and though the folder's code be of a release that no longer runs."""
    folder = shutil.copytree(saved[0], tmp_path / "draft")
    (folder / "modeling_prism.py").write_text("raise ImportError('of a release that is gone')")
    for trust in (None, False, True):
        draft = AutoModel.from_pretrained(folder, trust_remote_code=trust)
        assert type(draft) is transformers_prism.PrismDraftModel


def test_requirements_of_custom_generate_are_the_packages():
    """One comparison a line: transformers reads no more of a line, and would take what was never tried."""
    project = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    lines = (PACKAGE / "custom_generate" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for name in ("torch", "transformers"):
        (bounds,) = re.findall(rf'^    "{name}([^"]+)",$', project, flags=re.MULTILINE)
        assert [line for line in lines if split_package_version(line)[0] == name] == [name + one for one in bounds.split(",")]
