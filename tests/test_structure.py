"""Which file may import which, and what files that are published to the Hub must keep to."""

import ast
import re
import sys
from pathlib import Path

import pytest

from transformers_prism.publishing import published_files

PACKAGE = Path(__file__).resolve().parent.parent / "transformers_prism"
FILES = sorted(PACKAGE.rglob("*.py"))

# Files at the root of the package, and the files of ours that each may import. Those not named import nothing of ours.
# A name that ends in a dot stands for a whole folder.
ALLOWED = {
    "__init__": {"configuration_prism", "cpu", "generation", "modeling_prism", "tried_releases"},
    "modeling_prism": {
        *("configuration_prism", "cpu", "generation", "drafting", "speculation", "tree_policy"),
        *("borrowed_layers", "loading", "processing_module", "publishing", "transformers_names", "tried_releases"),
        "kernels.",
    },
    "transformers_names": {"tried_releases"},
    "borrowed_layers": {"cpu"},
    "cpu": {"transformers_names"},
    "configuration_prism": {"transformers_names"},
    "loading": {"publishing", "transformers_names", "tree_policy"},
    "processing_module": {"configuration_prism", "transformers_names"},
    "generation": {
        "attention",
        *("tree", "tree_policy", "auto_trees", "planned_trees", "verification", "target_rounds", "speculation"),
        *("cache", "drafting", "transformers_names", "ngrams", "round_check", "target_support", "borrowed_layers"),
        "kernels.",
    },
    "auto_trees": {"tree", "tree_policy", "ngrams", "round_costs", "speculation", "target_rounds"},
    "planned_trees": {"auto_trees", "speculation", "target_rounds", "tree", "tree_policy"},
    "round_costs": {"cpu", "drafting", "target_rounds", "whole_files"},
    "target_rounds": {"tree", "attention", "cache", "round_check", "target_support", "transformers_names", "kernels."},
    "target_support": {"attention", "cache", "transformers_names"},
    "round_check": {"tree", "tried_targets"},
    "tree": {"kernels."},
    "drafting": {"tree", "attention", "cache", "sampling_noise", "transformers_names", "kernels."},
    "verification": {"tree", "sampling_noise", "transformers_names", "kernels."},
    "publishing": {"transformers_names"},
    "sampling_noise": {"kernels."},
    "attention": {"transformers_names", "kernels."},
    "cache": {"kernels."},
    "demo": {"configuration_prism", "cpu", "modeling_prism", "speculation", "target", "transformers_names"},
    "target": {"transformers_names"},
}
# Folders that may import the root freely, but neither each other nor what only a terminal needs; what is measured, though,
# has to be imported.
FOLDERS = ("training", "hub", "conversion", "benchmark")
MEASURED_FOLDERS = {"benchmark": {"training"}}
TERMINAL = {"cli", "command_options", "demo"}
# Files in folders that hold commands, which `cli` adds to its own.
COMMANDS = {"benchmark.commands"}
# What the loader of remote code may ask a user to install; anything else has to be inside `try`.
PUBLISHED_REQUIREMENTS = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy"}


def name_of(path: Path) -> str:
    """ "training.losses" for transformers_prism/training/losses.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def own_imports(path: Path) -> set[str]:
    """Names, as by `name_of`, of the files of ours that a file imports; "" is the package itself."""
    folder = name_of(path).split(".")[:-1]
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            found.add(".".join([*base, *(node.module or "").split(".")]).rstrip("."))
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE.name:
            found.add(node.module.removeprefix(PACKAGE.name).removeprefix("."))
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)
            found.update(name.removeprefix(PACKAGE.name).removeprefix(".") for name in names)
    return found


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_structure_imports_follow_the_arrows(path):
    """Each import is an arrow that the layout allows."""
    name = name_of(path)
    imports = own_imports(path)
    if name == "cli":
        return
    assert "cli" not in imports, f"{name} imports cli; nobody does"
    folder = name.split(".")[0]
    if folder in FOLDERS and "." in name:
        foreign = {*FOLDERS, *TERMINAL} - {folder} - MEASURED_FOLDERS.get(folder, set())
        if name in COMMANDS:
            foreign -= {*TERMINAL, "hub"}
        others = {one for one in imports if one.split(".")[0] in foreign}
        assert not others, f"{name} imports {sorted(others)}; {folder} may import the root of the package only"
        return
    # Kernels import none of each other, only what chooses between their implementations.
    allowed = {"kernels.dispatch"} if folder == "kernels" else ALLOWED.get(name, set())
    wrong = {one for one in imports if one not in allowed and one.split(".")[0] + "." not in allowed}
    assert not wrong, f"{name} imports {sorted(wrong)}; expected only {sorted(allowed)}"


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_structure_package_does_not_import_benchmarks(path):
    """They are not installed with it."""
    assert not re.search(r"^\s*(from|import) benchmarks\b", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_structure_folders_import_absolutely(path):
    """In a subfolder, files of ours are imported by their whole name (kernels excepted, which are published)."""
    if path.parent in (PACKAGE, PACKAGE / "kernels"):
        return
    relative = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative, f"{name_of(path)}: expected absolute imports, got {ast.unparse(relative[0])}"


@pytest.mark.quick
@pytest.mark.parametrize("path", published_files(), ids=name_of)
def test_structure_published_files_suit_the_loader(path):
    """Only `from .name import x`; no line of a docstring that reads like one; other packages inside `try` only."""
    tree, text = parsed(path), path.read_text(encoding="utf-8")
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    num_relative = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
            assert node.module, ast.unparse(node)
            assert "." not in node.module or node.module.startswith("kernels."), ast.unparse(node)
            num_relative += 1
            continue
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        roots = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
        assert roots <= PUBLISHED_REQUIREMENTS or id(node) in guarded, ast.unparse(node)
    # The loader reads text, not syntax.
    assert len(re.findall(r"^\s*from\s+\.\S*\s+import", text, flags=re.MULTILINE)) == num_relative
    assert not re.findall(r"^\s*import\s+\.", text, flags=re.MULTILINE)


@pytest.mark.quick
@pytest.mark.parametrize("path", published_files(), ids=name_of)
def test_structure_published_files_do_not_ask_for_our_classes(path):
    """The loader may make two copies of a file, so that isinstance() with a class from another file can be wrong."""
    tree = parsed(path)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            assert not set(re.findall(r"\bPrism\w+", ast.unparse(node.args[1]))) - own, ast.unparse(node)


@pytest.mark.quick
def test_structure_file_names_say_what_they_hold():
    """No file is named after nothing in particular."""
    vague = {"utils", "common", "base", "registry", "helpers", "misc"}
    assert not [path for path in FILES if path.stem in vague]


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_structure_public_things_have_docstrings(path):
    """Files, and public functions, classes and methods at their top, say what they are."""
    tree = parsed(path)
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    for holder in [node for node in public if isinstance(node, ast.ClassDef)]:
        public += [node for node in holder.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    missing = [node.name for node in public if not ast.get_docstring(node) and not _overrides(node)]
    assert not missing, f"{path.name}: no docstring in {missing}"


def _overrides(node) -> bool:
    """Whether a method says that it takes the place of one that has its documentation elsewhere."""
    return any(isinstance(one, ast.Name) and one.id == "override" for one in node.decorator_list)
