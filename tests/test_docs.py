"""The README and CONTRIBUTING against the tree: its code, its commands; figures name the command behind them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from transformers_prism.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


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
def test_docs_python_blocks_run(tiny_folders, capsys):
    """Each Python block of the README runs, with tiny models in place of the real ones."""
    target_folder, draft_folder = tiny_folders
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    for block in blocks:
        block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", target_folder)
        block = block.replace("hub_cards/SmolLM2-135M-Instruct-PRISM", draft_folder)
        exec(compile(block, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) >= 1


@pytest.mark.quick
def test_docs_settings_of_the_tree_are_read(tiny_folders):
    """The line of the README that sets the tree names settings that the loop reads."""
    from transformers_prism import PrismDraftModel
    from transformers_prism.policy.settings import TreeSettings

    draft = PrismDraftModel.from_pretrained(tiny_folders[1])
    line = re.search(r"`(draft\.generation_config\.update\(.*?\))`", README).group(1)
    exec(line, {"draft": draft})
    settings = TreeSettings.resolve(draft.generation_config, num_draft_tokens=97)
    assert (settings.tree, settings.top_k, settings.depth, settings.num_nodes) == ("static", 10, 6, 59)


@pytest.mark.quick
def test_docs_commands_exist():
    """Each command in a block of the README exists: make targets, and commands with their options."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line]
    assert lines
    for line in lines:
        words = line.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
            continue
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), line
            continue
        assert words[0] == "transformers-prism", line
        command = [word for word in words[1:3] if re.fullmatch(r"[a-z]+", word)]
        result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, line
        for option in re.findall(r"--[a-z-]+", line):
            assert option == "--help" or option in result.output, f"{line}: no {option}"


@pytest.mark.quick
def test_docs_figures_name_their_command():
    """A section of the README with a measured figure in it names the command that measured it."""
    figure = re.compile(r"\b\d+(\.\d+)?\s*(tokens/s|tokens per second|ms\b|milliseconds|%|times\b)|tau (of )?\d")
    for section in re.split(r"^## ", README, flags=re.MULTILINE):
        prose = re.sub(r"^```.*?^```", "", section, flags=re.MULTILINE | re.DOTALL)
        if figure.search(prose):
            assert re.search(r"`(make|transformers-prism) [^`]+`", prose), section.splitlines()[0]


@pytest.mark.quick
def test_docs_links_lead_somewhere():
    """Files that the documents name by link or in backticks exist."""
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
        names = re.findall(r"`((?:transformers_prism|tests|examples|docs)/[\w./-]+\.\w+)`", text)
        for name in [*links, *names]:
            assert (ROOT / name).exists(), f"{document}: {name}"


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
