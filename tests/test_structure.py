"""Which file may import which, and what files that are published to the Hub must keep to."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

from transformers_prism.hub.files import published_files

PACKAGE = Path(__file__).resolve().parent.parent / "transformers_prism"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms from the ground up: a file imports files of lower floors, and of its own folder. A room is a folder or a file.
FLOORS = (
    {"command_line", "tried_releases", "tried_targets", "whole_files"},
    {"kernels", "transformers_names"},
    {"configuration_prism", "packed_layers", "target"},
    {"decoding", "processing_module"},
    {"cpu"},
    {"borrowed_layers", "policy"},
    {"generation", "hub.files", "hub.loading", "hub.pretrained"},
    {"modeling_prism"},
    {"conversion", "hub", "training"},
    {"bench", "serving"},
    {"cli"},
)
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


def room_of(name: str) -> str:
    """The room of `FLOORS` that a file stands in."""
    rooms = {room for floor in FLOORS for room in floor}
    return next(room for room in (name, name.split(".")[0]) if room in rooms)


def floor_of(name: str) -> int:
    """The floor of a file, 0 for the lowest."""
    return next(index for index, floor in enumerate(FLOORS) if room_of(name) in floor)


def imports_by_name(path: Path) -> set[str]:
    """Names of the files of ours that `importlib` is asked for, as far as they are written out."""
    folder = name_of(path).split(".")[:-1]
    texts = re.findall(r"""import_module\(\s*f?["'](\.*)([\w.]+)["']""", path.read_text(encoding="utf-8"))
    return {".".join([*folder[: len(folder) - len(dots) + 1], name]) if dots else name for dots, name in texts}


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_structure_imports_go_down(path):
    """A file imports lower floors and its own room; nobody imports the package as a whole but its commands."""
    name = name_of(path)
    if name == "__init__":
        return
    for other in own_imports(path) | imports_by_name(path):
        if not (PACKAGE / f"{other.replace('.', '/')}.py").is_file():
            continue
        is_below = floor_of(other) < floor_of(name) or room_of(other) == room_of(name)
        is_beside = name.split(".")[0] == other.split(".")[0]
        assert is_below or is_beside, f"{name} imports {other}, of floor {floor_of(other)}; its own is {floor_of(name)}"


@pytest.mark.quick
def test_structure_has_no_circle():
    """No file imports itself by way of others, imports by name included."""
    graph = {name_of(path): own_imports(path) | imports_by_name(path) for path in FILES}
    order = tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert {name_of(path) for path in FILES} <= set(order)
    assert sum(map(len, graph.values())) > len(FILES)


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_structure_package_does_not_import_benchmarks(path):
    """They are not installed with it."""
    assert not re.search(r"^\s*(from|import) benchmarks\b", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_structure_files_that_are_not_published_import_absolutely(path):
    """Files of ours are imported by their whole name, but where a draft carries the code under another name."""
    if path in published_files() or path.parent in (PACKAGE, PACKAGE / "kernels"):
        return
    relative = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative, f"{name_of(path)}: expected absolute imports, got {ast.unparse(relative[0])}"


@pytest.mark.quick
@pytest.mark.parametrize("path", published_files(), ids=name_of)
def test_structure_published_files_suit_the_loader(path):
    """Only `from .name import x` or `from ..name import x`; no line of a docstring that reads like one; other packages inside `try` only."""
    tree, text = parsed(path), path.read_text(encoding="utf-8")
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    num_relative = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= len(path.relative_to(PACKAGE).parts), ast.unparse(node)
            assert node.module, ast.unparse(node)
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


def imported_at_once(name: str) -> set[str]:
    """Files of ours that are imported together with a file: by imports outside of functions and conditions, and theirs."""
    found, waiting = set(), [name]
    while waiting:
        path = PACKAGE / f"{waiting.pop().replace('.', '/')}.py"
        folder = name_of(path).split(".")[:-1]
        for node in parsed(path).body:
            if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == PACKAGE.name):
                base = folder[: len(folder) - node.level + 1] if node.level else []
                module = (node.module or "").removeprefix(PACKAGE.name).removeprefix(".")
                module = ".".join([*base, *module.split(".")]).strip(".")
                names = {module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)}
                names = {one for one in names if (PACKAGE / f"{one.replace('.', '/')}.py").is_file()} - found
                found |= names
                waiting += names
    return found


@pytest.mark.quick
def test_structure_a_start_imports_little():
    """`import transformers_prism` reads no other forms of drafts, and `--help` imports nothing of what commands do."""
    package = imported_at_once("__init__")
    assert "modeling_prism" in package
    assert not {name for name in package if room_of(name) in ("conversion", "training", "bench", "cli")}
    command = imported_at_once("cli.main")
    assert "cli.decode" in command
    assert not command & {"cli.demo", "cli.doctor", "cli.make_draft", "cli.web"}
    assert not {name for name in command if room_of(name) in ("bench", "conversion")}
