"""The JSON file of a measurement says what its figures belong to."""

import json
from importlib.machinery import ModuleSpec

import pytest
import torch
from tiny_models import tiny_target

from transformers_prism.bench.generate import count_steps
from transformers_prism.bench.record import hardware, record_head, write_record
from transformers_prism.command_line import command_line, this_command
from transformers_prism.decoding.speculation import RoundTree, Speculation

pytestmark = pytest.mark.quick


def test_a_record_names_machine_weights_and_command(tmp_path, monkeypatch):
    """Without folders of this machine in the command."""
    monkeypatch.setattr("__main__.__spec__", None, raising=False)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/transformers-prism", "bench", "--prompts", "/home/me/p.jsonl"])
    path = tmp_path / "record.json"
    write_record(path, "generate", tiny_target(), {"tree": "auto"}, {"summary": {}}, "00ff")
    record = json.loads(path.read_text())
    assert record["command"] == "transformers-prism bench --prompts p.jsonl"
    assert record["weights_sha256"] == "00ff"
    assert (record["kind"], record["dtype"], record["device"]) == ("generate", "float32", "cpu")
    assert record["hardware"] == hardware(torch.device("cpu"))
    assert record["hardware"].endswith("cores")
    assert set(record["versions"]) == {"transformers_prism", "torch", "transformers"}
    assert record["settings"] == {"tree": "auto"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/home/me/models/target", "target"),
        ("/home/me/target.gguf", "target.gguf"),
        ("./target/", "target"),
        ("C:\\models\\target", "target"),
        ("user/target", "user/target"),
        ("target.gguf", "target.gguf"),
    ],
)
def test_a_target_is_told_without_folders(name, told):
    """A card shows it to everybody."""
    target = tiny_target()
    target.config._name_or_path = name
    assert record_head("generate", target, {})["target"] == told


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    """As the commands are run without --json."""
    monkeypatch.chdir(tmp_path)
    write_record(None, "generate", tiny_target(), {}, {})
    assert not list(tmp_path.iterdir())


def test_steps_are_counted_where_they_were_drafted():
    """A round counts for a step only if its tree was drafted that deep and everything before was accepted."""
    speculation = Speculation.empty(1)
    for num_emitted, num_steps in ((3, 3), (1, 3), (3, 2), (1, 0)):
        speculation.add_round(0, num_emitted)
        speculation.trees.append(RoundTree(num_steps, 5))
    # Accepted 2 of 3, 0 of 3, 2 of 2 steps; the last round drafted nothing.
    assert count_steps(speculation) == [[3, 2], [2, 2], [1, 0]]
    # With trees of one depth, the shares are those of the statistics.
    del speculation.trees[2:], speculation.accepted_per_round[0][2:]
    shares = [accepted / reached for reached, accepted in count_steps(speculation)]
    assert shares == pytest.approx(speculation.conditional_acceptance)


def test_commands_are_told_without_folders():
    """Each of several files keeps its name, and trees are no paths."""
    argv = ["/opt/bin/transformers-prism", "train", "--data", "a/b/old,/data/new.jsonl.gz", "--features=run/features"]
    assert command_line(argv) == "transformers-prism train --data old,new.jsonl.gz --features=features"
    assert command_line(["bench", "--tree", "59/6/10", "--tree=15/4/4", "user/name"]) == "bench --tree 59/6/10 --tree=15/4/4 name"


def test_a_module_is_recorded_as_it_was_started(monkeypatch):
    """Not as the file that Python found for it."""
    monkeypatch.setattr("__main__.__spec__", ModuleSpec("benchmarks.training", None), raising=False)
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/training.py", "--json", "/home/me/training.json"])
    assert this_command() == "python -m benchmarks.training --json training.json"


@pytest.mark.quick
def test_a_recorded_command_can_be_copied_into_a_shell():
    """Words with spaces are quoted, trees stay whole, folders go."""
    words = ["python -m x", "--label", "59/6/10, prepared", "--json", "/tmp/a/result.json"]
    assert command_line(words) == "python -m x --label '59/6/10, prepared' --json result.json"
