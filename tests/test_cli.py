"""The commands demo, generate and bench on tiny models; errors of users are one line and a status."""

import json
import re
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
import typer
from pretend_accelerator import DEVICE, PretendedAccelerator, move_model
from tiny_models import chat_tokenizer, scripted_draft, tiny_draft, tiny_target, word_tokenizer, write_lines
from transformers import PreTrainedModel
from typer.testing import CliRunner

from transformers_prism.bench.prompts import choose_prompts, read_prompts
from transformers_prism.cli import demo
from transformers_prism.cli.main import app
from transformers_prism.cli.options import user_errors
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.policy import costs

pytestmark = pytest.mark.quick


def run(*arguments) -> str:
    """Output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output + result.stderr + repr(result.exception)
    return result.output


def fails(*arguments) -> str:
    """What a command that must fail with status 1 says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, repr(result.exception)
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def prompt_file(tmp_path):
    """Records of three tasks, two of them categories of MT-bench."""
    categories = ["writing", "coding", "translation", "translation", "qa", "qa"]
    records = [
        {"question_id": number, "category": category, "turns": [f"w{number + 5} w9 w11", "w4"]}
        for number, category in enumerate(categories)
    ]
    return write_lines(tmp_path / "prompts.jsonl", records)


def test_cli_help_lists_the_commands():
    """--help names each command."""
    output = run("--help")
    for name in ("demo", "generate", "bench", "train", "convert"):
        assert name in output


def test_cli_demo_compares_both_ways(tiny_folders):
    """Three answers and a table, identical throughout."""
    target, draft = tiny_folders
    output = run("demo", "--target", target, "--draft", draft, "--max-new-tokens", 8)
    assert output.count("\n> ") == 3
    assert output.count("yes") == 4
    assert "\u2026 " not in output.split("all (pooled)")[1]
    assert "NO" not in output
    for column in ("output", "accept.", "tok/s", "ratio", "all (pooled)"):
        assert column in output


def test_cli_demo_without_the_shipped_draft_says_so(tiny_folders, monkeypatch, tmp_path):
    """Where the repository's draft is absent, the message says where it was expected and what to do."""
    monkeypatch.setattr(demo, "SHIPPED_DRAFT", tmp_path / "absent")
    message = fails("demo", "--target", tiny_folders[0])
    assert "absent" in message
    assert "--draft" in message


def test_cli_generate_streams_the_text_of_plain_decoding(tiny_folders):
    """The text that streams is the text of plain generate; statistics follow."""
    from transformers_prism.target import load_target

    target_folder, draft_folder = tiny_folders
    target, tokenizer = load_target(target_folder)
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=10, do_sample=False)[0, 3:]
    arguments = ("--target", target_folder, "--draft", draft_folder, "--prompt", "w5 w6 w7", "--max-new-tokens", 10)
    output = run("generate", *arguments)
    assert tokenizer.decode(plain, skip_special_tokens=True) in output
    assert "10 tokens in" in output
    assert run("generate", *arguments, "--temperature", 0.8, "--top-p", 0.9)


def test_cli_targets_that_ask_for_beams_decode_with_one(tiny_folders, prompt_file, tmp_path):
    """A target's own settings may ask for beams, which no draft serves; each command says that it uses one."""
    target, folder = tiny_target("llama", seed=3), tmp_path / "beams"
    shutil.copytree(tiny_folders[0], folder)
    target.generation_config.num_beams = 3
    target.generation_config.save_pretrained(folder)
    pair = ("--target", folder, "--draft", tiny_folders[1])
    assert "10 tokens in" in run("generate", *pair, "--prompt", "w5 w6 w7", "--max-new-tokens", 10)
    words = ("--prompts", prompt_file, *pair, "--num-prompts", 2, "--max-new-tokens", 6)
    result = CliRunner().invoke(app, [str(word) for word in ("bench", "generate", *words, "--repeat", 1)])
    assert result.exit_code == 0
    assert "the target's own settings ask for 3 beams" in result.stderr
    assert "2/2" in result.output
    findings = tmp_path / "findings.json"
    run("doctor", *pair, "--max-new-tokens", 8, "--json", findings)
    (told,) = [one for one in json.loads(findings.read_text())["findings"] if one["name"] == "settings"]
    assert "3 beams" in told["text"]


def test_cli_answers_beyond_learned_positions_are_refused(prompt_file, tmp_path):
    """With the most that the target has positions for, before anything is decoded."""
    target, folder, draft = tiny_target("gpt2"), tmp_path / "target", tmp_path / "draft"
    target.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    tiny_draft(target).save_pretrained(draft)
    pair = ("--target", folder, "--draft", draft, "--max-new-tokens", 126)
    expected = "max_new_tokens: expected at most 123 with a prompt of 5 tokens, since the target has 128 learned positions, got 126"
    assert expected in fails("generate", *pair, "--prompt", "w5 w6 w7 w8 w9")
    for command in (("bench", "generate"), ("bench", "acceptance")):
        assert expected in fails(*command, "--prompts", prompt_file, *pair)
    assert "max_new_tokens: expected at most 124 with a prompt of 4 tokens" in fails("verify", "--prompts", prompt_file, *pair)


def test_cli_greedy_decoding_takes_no_top_p(tiny_folders):
    """It would be ignored."""
    words = ("generate", "--target", tiny_folders[0], "--draft", tiny_folders[1], "--prompt", "w5")
    assert "top_p: expected a temperature above 0 with it, got 0.9" in fails(*words, "--top-p", 0.9)
    assert CliRunner().invoke(app, [*words, "--temperature", "1", "--top-p", "3"]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("synthesize", "--output", "FILE"), "is a file"),
        (("make-draft", "model", "--output", "FILE"), "is a file"),
        (("make-draft", "model", "--output", "new", "--chat-template", "absent"), "does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_cli_paths_of_another_kind_are_refused_at_once(words, message, tmp_path, monkeypatch):
    """A file where a folder is expected, and a file that is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr


def test_cli_streamer_tells_accepted_from_bonus(tiny_folders):
    """Per round as many tokens in the colour of accepted ones as the statistics count, then one bonus token."""
    from rich.console import Console

    from transformers_prism.target import load_target

    tokenizer = load_target(tiny_folders[0])[1]
    target = tiny_target("llama", seed=3)
    input_ids = torch.tensor([[5, 6, 7]])
    plain = target.generate(input_ids, max_new_tokens=24, do_sample=False)
    draft = scripted_draft(target, plain, prompt_length=3)
    printed = []
    streamer = demo.RoundStreamer(Console(), tokenizer)
    streamer._print = lambda text, kind: printed.append((text, kind))
    target.generate(input_ids, max_new_tokens=24, do_sample=False, assistant_model=draft, streamer=streamer)
    accepted = draft.last_speculation.accepted_per_round[0]
    assert sum(accepted) > 0
    expected = ["plain"]
    for count in accepted:
        expected += ["accepted"] * count + ["bonus"]
    assert [kind for _, kind in printed] == expected
    assert "".join(text for text, _ in printed) == tokenizer.decode(plain[0, 3:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (("study", "--data", "x", "--plan"), "python -m benchmarks.study"),
        (("bench", "page", "x.json"), "python -m benchmarks.page"),
        (("bench", "training", "--help"), "python -m benchmarks.training"),
        (("bench", "synthesize"), "python -m benchmarks.synthesize"),
        (("bench", "modules", "--packed"), "python -m benchmarks.scaling --modules 1 --modules 8"),
        (("bench", "scaling", "--modules", "1"), "python -m benchmarks.scaling"),
        (("bench", "rounds", "--plot", "x.png"), "python -m benchmarks.page"),
        (("bench", "kernels", "--compile-only"), "python -m benchmarks.compile_kernels"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_cli_commands_that_moved_say_where(words, place):
    """Commands and options of the last release: status 2, and what took their place."""
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert place in result.stderr


def test_cli_bench_prompts_are_spread_over_tasks(prompt_file):
    """The categories of MT-bench count as one task; further prompts go round the tasks again."""
    records = read_prompts(prompt_file)
    chosen = choose_prompts(records, 4)
    assert [record["question_id"] for record in chosen] == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="expected 1 to 6, got 7"):
        choose_prompts(records, 7)


def test_cli_bench_prompts_of_spec_bench_cover_six_tasks(prism_data):
    """Eight prompts of the real file: two of the first two tasks and one of each other."""
    path = prism_data / "data" / "spec_bench.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} among the data outside the repository")
    records = choose_prompts(read_prompts(path), 8)
    tasks = ["mt_bench" if record["question_id"] <= 160 else record["category"] for record in records]
    assert {task: tasks.count(task) for task in tasks} == {
        **{"mt_bench": 2, "translation": 2},
        **dict.fromkeys(("summarization", "qa", "math_reasoning", "rag"), 1),
    }


def test_cli_bad_prompt_file_is_named(tiny_folders, tmp_path):
    """A line that is no record, and a file that is not there, are named before any model is loaded."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question_id": 1}\n')
    assert "bad.jsonl to be unusable (max_bad_share), got 1 of 1: 1 expected one of" in fails("bench", "generate", "--prompts", path)
    assert "absent.jsonl" in fails("bench", "generate", "--prompts", tmp_path / "absent.jsonl")


def test_cli_draft_for_another_target_is_one_line(tiny_folders, tmp_path):
    """A draft of another vocabulary ends in a message that says expected and got."""
    from tiny_models import tiny_draft

    tiny_draft(tiny_target("llama", vocab_size=96)).save_pretrained(tmp_path)
    message = fails("generate", "--target", tiny_folders[0], "--draft", tmp_path, "--prompt", "w5")
    assert "96" in message
    assert "97" in message


def test_cli_train_has_an_option_for_each_field_in_groups():
    """With hyphens; required ones are marked, and the other half of a flag says what it does."""
    import dataclasses

    from transformers_prism.cli import train
    from transformers_prism.training.recipes import TrainConfig

    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"})
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in names:
        assert f"--{name.replace('_', '-')} " in result.output, name
    assert not re.findall(r"--\w+_", result.output)
    assert set(train._BASIC) | set(train._COST) | set(train._NEGATIVE) <= set(names)
    groups = [result.output.index(name) for name in ("Basic options", "Cost: time and memory", "Advanced options")]
    assert groups == sorted(groups)
    assert len(re.findall(r"\*  --(?:data|output) .*\[required\]", result.output)) == 2
    assert "--no-text-tokens: propose tokens of the draft vocabulary only" in result.output


def test_cli_every_command_has_both_flags_and_hyphens():
    """`--traceback` and `--quiet` everywhere, underscores nowhere."""
    import typer

    def commands(group, words=()):
        for name, command in getattr(group, "commands", {}).items():
            yield from commands(command, (*words, name))
        if not hasattr(group, "commands") and not group.hidden:
            yield words, group

    found = dict(commands(typer.main.get_command(app)))
    assert {("demo",), ("train",), ("bench", "generate"), ("data", "preview")} <= found.keys()
    for words, command in found.items():
        options = {name for param in command.params for name in (*param.opts, *param.secondary_opts) if name.startswith("--")}
        assert {"--traceback", "--quiet"} <= options, words
        assert not [name for name in options if "_" in name], words


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--batch_size", "4"], ["--batch-size", "4"]),
        (["--batch_size=4"], ["--batch-size=4"]),
        (["--text_tokens", "False", "--use_cpu"], ["--no-text-tokens", "--use-cpu"]),
        (["--text-tokens=true", "--use_cpu", "False"], ["--text-tokens"]),
        (["--no_text_tokens", "--init_from", "a_b"], ["--no-text-tokens", "--init-from", "a_b"]),
        (["--unknown_name", "--", "--use_cpu"], ["--unknown_name", "--", "--use_cpu"]),
    ],
)
def test_cli_old_spellings_are_read(old, new):
    """As transformers' parser took them; what is unknown is left for the error message."""
    import typer

    from transformers_prism.cli.options import present_spelling

    params = typer.main.get_command(app).commands["train"].params
    words, notices = present_spelling(params, old)
    assert words == new
    assert bool(notices) == (old != new)
    assert present_spelling(params, new)[1] == []


def test_cli_old_spellings_are_told_of_once(tiny_folders, monkeypatch):
    """One warning for all of them; none with --quiet or the environment variable."""
    words = ["generate", "--target", "absent", "--prompt", "w5", "--max_new_tokens", "4", "--top_p", "0.5"]
    with pytest.warns(UserWarning, match="--max_new_tokens is now --max-new-tokens, --top_p is now --top-p") as warned:
        CliRunner().invoke(app, words)
    assert len([one for one in warned if "old spelling" in str(one.message)]) == 1
    for more, variables in ((["--quiet"], {}), ([], {"TRANSFORMERS_PRISM_QUIET": "1"})):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = CliRunner().invoke(app, [*words, *more], env=variables)
        assert result.stderr.startswith("error: "), result.stderr


def test_cli_numbers_of_prompts_fit_the_batches_and_the_file(tiny_folders, prompt_file, tmp_path):
    """Said before models are loaded; without a number as many are measured as fill batches."""
    one = write_lines(tmp_path / "one.jsonl", [{"question_id": 0, "category": "qa", "turns": ["w5"]}])
    assert "prompts: expected at least 2, some to measure and others to lengthen them with, got 1" in fails(
        "bench", "rounds", "--prompts", one, "--target", "nowhere"
    )
    generate = ["bench", "generate", "--prompts", prompt_file, "--batch-size", 4]
    assert "num_prompts: expected a multiple of the batch size 4, got 6" in fails(*generate, "--num-prompts", 6, "--target", "nowhere")
    assert "prompts: expected at least 4, which fill a batch, got 1" in fails(
        "bench", "generate", "--prompts", one, "--batch-size", 4, "--target", "nowhere"
    )
    target, draft = tiny_folders
    options = ["--target", target, "--draft", draft, "--method", "chain", "--max-new-tokens", 4, "--json", tmp_path / "f.json", "--no-packed"]
    run(*generate, *options)
    assert json.loads((tmp_path / "f.json").read_text())["settings"]["num_prompts"] == 4


@pytest.mark.parametrize("words", [["inspect"], ["push", "--dry-run"], ["train", "--use-cpu", "--data", "{data}", "--output", "{out}", "--init-from"]])
def test_cli_a_draft_that_is_not_there_is_named(tiny_folders, tmp_path, words):
    data = write_lines(tmp_path / "data.jsonl", [{"input_ids": [5, 6, 7, number], "prompt_length": 1} for number in range(9)])
    words = [word.format(data=data, out=tmp_path / "out") for word in words]
    more = ["me/draft"] if words[0] == "push" else ["--target", tiny_folders[0]] if words[0] == "train" else []
    assert "expected a draft at 'no/where', a folder or a name on the Hub, got: " in fails(*words, "no/where", *more)


def test_cli_a_card_is_of_a_draft(tmp_path):
    assert "expected the folder of a draft, with config.json in it, got " in fails("card", tmp_path / "nowhere")


def test_cli_errors_are_one_line_or_a_traceback(monkeypatch):
    """Also those that nobody foresaw."""
    monkeypatch.setattr(demo, "run_demo", lambda *arguments: {}["absent"])
    assert fails("demo") == "error: KeyError: 'absent'\n"
    result = CliRunner().invoke(app, ["demo", "--traceback"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: KeyError: 'absent'\n")


def test_cli_push_lists_files_without_pushing(tiny_folders):
    """With sizes and the repository, offline."""
    output = run("push", tiny_folders[1], "me/tiny-PRISM", "--dry-run", "--private")
    for name in ("README.md", "config.json", "model.safetensors", "modeling_prism.py", "custom_generate/generate.py", "LICENSE"):
        assert re.search(rf"^ *[\d,]+  {re.escape(name)}$", output, flags=re.MULTILINE), name
    sizes = [int(line.split()[0].replace(",", "")) for line in output.strip().splitlines()]
    assert sizes[-1] == sum(sizes[:-1])
    assert "for me/tiny-PRISM, private if it is new, branch main; nothing was pushed" in output


@pytest.mark.parametrize("name", ["a b/c", "../x", "me/x..y"])
def test_cli_push_refuses_what_the_hub_would_not_take(tiny_folders, name):
    """With --dry-run, too."""
    assert name in fails("push", tiny_folders[1], name, "--dry-run")


@pytest.mark.parametrize("words", [(), ("--code-only",)])
def test_cli_push_offline_ends_in_one_line(tiny_folders, words):
    """Whatever the client says about its connection."""
    message = fails("push", *(words or (tiny_folders[1],)), "me/tiny-PRISM")
    assert message.count("\n") == 1
    assert "nothing was pushed, the Hub cannot be reached" in message


def test_cli_push_without_a_connection_ends_in_one_line(tiny_folders, monkeypatch):
    """Errors of the HTTP client, which are none of Python's own for a connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    message = fails("push", tiny_folders[1], "me/tiny-PRISM")
    assert message.count("\n") == 1
    assert "nothing was pushed, the Hub cannot be reached" in message


def test_cli_card_of_a_target_without_a_name_asks_for_it(tiny_folders, tmp_path):
    """In the card, in a warning when it is pushed, and no more once it is named."""
    folder = shutil.copytree(tiny_folders[1], tmp_path / "draft")
    assert "`transformers-prism card FOLDER --base-model user/name` writes it" in (folder / "README.md").read_text()
    with pytest.warns(UserWarning, match="the card does not name the draft's target"):
        run("push", folder, "me/tiny-PRISM", "--dry-run")
    run("card", folder, "--base-model", "some/target")
    text = (folder / "README.md").read_text()
    assert "has no name here" not in text
    assert "base_model: some/target" in text
    assert "A PRISM draft for `some/target`" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("push", folder, "me/tiny-PRISM", "--dry-run", "--base-model", "some/other")
    assert (folder / "README.md").read_text() == text
    assert "expected the target's name on the Hub" in fails("card", folder, "--base-model", "/a/folder")


@pytest.mark.quick
def test_cli_a_missing_package_names_the_extra(capsys):
    """It said "No module named 'accelerate'"."""
    with pytest.raises(typer.Exit), user_errors():
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
    expected = "error: expected the packages of the extra 'train', got no accelerate; pip install accelerate datasets matplotlib pyarrow"
    assert capsys.readouterr().err.strip() == expected


def test_a_draft_in_the_place_of_the_target(tmp_path):
    """As where the two names change places."""
    target = tiny_target("llama", seed=3)
    tiny_draft(target).save_pretrained(tmp_path / "draft")
    chat_tokenizer().save_pretrained(tmp_path / "draft")
    for arguments in (["generate", "--prompt", "w10"], ["doctor"]):
        result = CliRunner().invoke(app, [*arguments, "--target", str(tmp_path / "draft")])
        assert result.exit_code == 1, arguments
        told = " ".join((result.stdout + result.stderr).split())
        assert "expected a language model, got a PRISM draft; name it with --draft" in told, arguments


def test_a_prompt_without_a_token():
    """A tokenizer without a template and a beginning of text."""
    with pytest.raises(ValueError, match="prompt: expected a text of at least one token, got none"):
        demo.chat_inputs(word_tokenizer(), "")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--prompt", "w10 w11", "--max-new-tokens", 8), ("demo", "--max-new-tokens", 4), ("doctor", "--max-new-tokens", 8),
        ("bench", "generate", "--num-prompts", 2, "--repeat", 1, "--max-new-tokens", 4),
        ("bench", "acceptance", "--num-prompts", 2, "--tree", "5/5/1", "--max-new-tokens", 4),
        ("bench", "rounds", "--num-rounds", 2, "--context", 16),
    ],
)
def test_cli_commands_run_on_a_device_and_in_a_dtype(tiny_folders, prompt_file, monkeypatch, words):
    """Models and prompts go to the accelerator that there is; nothing is packed for a CPU."""
    target, draft = tiny_folders
    asked, bind = [], PrismDraftModel.bind

    def bind_first(draft, target, tokenizer=None):
        if draft.device != DEVICE:  # it refuses weights on such a device
            bind(draft, target)
            move_model(target)
            move_model(draft)
        return draft

    monkeypatch.setattr(PrismDraftModel, "bind", bind_first)
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, place, *more: asked.append(place) or model)
    for place in ("cli.demo", "cli.doctor", "target"):
        monkeypatch.setattr(f"transformers_prism.{place}.find_device", lambda name="auto": DEVICE)
    functions = {"synchronize": lambda device: None, "get_rng_state": lambda device=None: torch.get_rng_state()}
    functions["set_rng_state"] = lambda state, device=None: torch.set_rng_state(state)
    monkeypatch.setattr(costs, "MEASURED_TOKENS", (1, 4))
    monkeypatch.setattr(torch, "meta", SimpleNamespace(**functions), raising=False)
    prompts = ("--prompts", prompt_file) if "bench" in words else ()
    with PretendedAccelerator():
        run(*words, *prompts, "--target", target, "--draft", draft)
    assert DEVICE in asked
