"""Cards: filled in from measurements and training records, and refused where a figure has no source."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_published_set import run_without_package
from tiny_models import tiny_draft, write_lines
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from transformers_prism.cli.main import app
from transformers_prism.hub.card import label_of, render_card, step_shares, training_runs, write_card
from transformers_prism.hub.metrics import gather, read_metrics
from transformers_prism.target import load_target

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def measured(tiny_folders, tmp_path_factory):
    """A folder with a tiny draft, and the files of two measurements and a verify report of it."""
    root = tmp_path_factory.mktemp("measured")
    target_folder, draft_folder = tiny_folders
    folder = root / "tiny-PRISM"
    shutil.copytree(draft_folder, folder)
    records = [{"question_id": i, "category": c, "turns": [f"w{i + 5} w9"]} for i, c in enumerate(("qa", "writing"))]
    prompts = write_lines(root / "prompts.jsonl", records)
    models = ("--target", target_folder, "--draft", str(folder))
    bench = ("bench", "generate", *models, "--prompts", str(prompts), "--num-prompts", "2", "--max-new-tokens", "40")
    commands = {
        "greedy": (*bench, "--repeat", "1"),
        "sampled": (*bench, "--repeat", "2", "--temperature", "0.8", "--top-p", "0.9", "--method", "chain"),
        "acceptance": (
            *("bench", "acceptance", *models, "--prompts", str(prompts), "--num-prompts", "2", "--max-new-tokens", "24"),
            *("--tree", "7/3/3", "--tree", "3/3/1", "--temperature", "0"),
        ),
        "verify": ("verify", *models, "--max-new-tokens", "12"),
    }
    files = []
    for name, command in commands.items():
        files.append(root / f"{name}.json")
        result = CliRunner().invoke(app, [*command, "--json", str(files[-1])])
        assert result.exit_code == 0, result.output
    return folder, files


@pytest.fixture
def draft_folder(measured, tmp_path):
    """A copy of the draft's folder that a test may change."""
    return Path(shutil.copytree(measured[0], tmp_path / "tiny-PRISM"))


def stage(name, agreement, **changes):
    """A stage of a training record."""
    settings = {"name": name, "num_modules": 2, "num_steps": 3, "learning_rate": 0.0017, "hidden_weight": 0.25}
    return {
        "stage": {**settings, **changes},
        "num_updates": 4321,
        "tokens_seen": 987654,
        "seconds": 123.4,
        "loss": [1.2345],
        "validation": {f"eval_agreement_{step}": value for step, value in enumerate(agreement)},
    }


def training_record(*stages, init_from=None):
    """What the train command writes."""
    counts = {"num_conversations": 2666, "num_tokens": 772408, "num_answer_tokens": 595670}
    config = {"token_weight": 0.1, "schedule": "cosine", "weight_decay": 0.01, "max_grad_norm": 1.0, "batch_size": 4}
    return {
        "command": "transformers-prism train --seed 5",
        "config": {**config, "compute_dtype": "bfloat16", "use_cpu": True, "seed": 5},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "data": {"training": counts, "validation": {**counts, "num_conversations": 48}},
        "draft_vocab_coverage": 0.98466,
        "stages": list(stages),
        **({"init_from": init_from} if init_from else {}),
    }


def test_a_card_holds_every_figure_with_its_surroundings(measured, draft_folder):
    """Per task and for all, with hardware, dtype, tree, batch, baseline and command; the verify report; a plot."""
    assert write_card(draft_folder, measured[1]) == ["README.md", "conditional_acceptance.png", "metrics.json"]
    text = (draft_folder / "README.md").read_text()
    metrics = json.loads((draft_folder / "metrics.json").read_text())
    assert [len(metrics[kind]) for kind in ("generate", "acceptance", "verify")] == [2, 1, 1]
    for record in metrics["generate"]:
        for task, figures in [*record["tasks"].items(), ("**all**", record["summary"])]:
            digits = 3 if task == "**all**" else 2
            counts = f"| {task} | {figures['num_prompts']} | {figures['num_identical']} |"
            tau = f" {figures['acceptance_length_pooled']:.{digits}f} |"
            ratio = f"| {figures['ratio']:.{digits}f} |"
            rows = [line for line in text.splitlines() if line.startswith(counts + tau) and line.endswith(ratio)]
            assert rows, (task, figures)
        for words in (record["hardware"], record["dtype"], record["settings"]["baseline"], record["command"]):
            assert words in text
    for row in metrics["acceptance"][0]["rows"]:
        assert "answers" not in row
        assert f"| {row['tree']} | 0.0 | 2 | {row['tau']:.2f} |" in text
    assert "batch 1" in text
    assert "`chain` tree of 15 drafted nodes" in text
    assert "`static` tree of 15 drafted nodes" in text
    assert "all of it holds" in text
    assert re.search(r"broken on purpose: caught on \d+ of \d+ paths", text)
    assert re.search(r"\| sampled \| tree, (host|device)'s walk, coupled \| 3 \| \d+ \| 3 \| 0 \|", text)
    assert (draft_folder / "conditional_acceptance.png").read_bytes().startswith(b"\x89PNG")
    assert "](conditional_acceptance.png)" in text


def test_the_same_figures_give_the_same_files(measured, draft_folder):
    """The card again from metrics.json alone, and the plot, byte for byte."""
    written = write_card(draft_folder, measured[1])
    first = {name: (draft_folder / name).read_bytes() for name in written}
    assert write_card(draft_folder) == ["README.md", "conditional_acceptance.png"]
    assert {name: (draft_folder / name).read_bytes() for name in written} == first


def test_the_plotted_shares_are_those_that_were_counted(measured):
    """Steps that too few rounds reached are left out."""
    metrics = gather(*measured)
    metrics["generate"][0]["summary"]["step_counts"] = [[100, 75], [75, 30], [19, 19]]
    (first, *_) = step_shares(metrics)
    assert first["shares"] == [0.75, 0.4]
    assert first["rounds"] == [100, 75]


def test_a_licence_is_a_persons_to_name(draft_folder):
    """A draft of a target under other terms is not said to be under ours."""
    (draft_folder / "about.json").unlink(missing_ok=True)
    write_card(draft_folder)
    card = ModelCard.load(draft_folder / "README.md")
    assert card.data.license is None
    assert "The licence of the weights is not named yet" in card.text
    (draft_folder / "about.json").write_text(json.dumps({"license": "gemma"}))
    write_card(draft_folder)
    assert "Licence of the weights: gemma." in (draft_folder / "README.md").read_text()


def test_the_metadata_is_the_hubs(measured, draft_folder, tmp_path):
    """Parsed by huggingface_hub: library, task, base model and its relation, tags, licence, results."""
    about = {"base_model": "some/target", "language": "en", "license": "apache-2.0"}
    (draft_folder / "about.json").write_text(json.dumps(about))
    write_card(draft_folder, measured[1])
    data = ModelCard.load(draft_folder / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.base_model, data.base_model_relation) == ("some/target", "adapter")
    assert "speculative-decoding" in data.tags
    records = json.loads((draft_folder / "metrics.json").read_text())["generate"]
    # One result for each measurement, although all are of the same prompts.
    results = model_index_to_eval_results(data.to_dict()["model-index"])[1]
    assert len(data.to_dict()["model-index"][0]["results"]) == len(records) == 2
    for index, record in enumerate(records):
        tau, speedup = results[2 * index : 2 * index + 2]
        assert (tau.metric_type, speedup.metric_type) == ("acceptance_length", "speedup")
        assert tau.metric_value == pytest.approx(record["summary"]["acceptance_length_pooled"], abs=1e-3)
        assert speedup.metric_value == pytest.approx(record["summary"]["ratio"], abs=1e-3)
        for words in (label_of(record), "batch 1", record["dtype"], record["hardware"]):
            assert words in tau.dataset_config == speedup.dataset_config


def test_a_new_draft_has_a_card_without_figures(tiny_folders):
    """What save_pretrained writes before anything was measured or trained."""
    text = (Path(tiny_folders[1]) / "README.md").read_text()
    assert "Nothing was measured with these weights yet" in text
    assert "No record of its training" in text
    assert "No verify report" in text
    assert read_metrics(tiny_folders[1])["generate"] == []


def test_a_chain_of_training_runs_is_told_from_its_beginning(draft_folder):
    """Each run with its stages and command; agreement of all."""
    first = training_record(stage("single_step", [0.4397, 0.1061]))
    second = stage("split", [0.5832])
    second["validations"] = [
        {"eval_tokens_seen": 0, "eval_agreement_0": 0.5612, "eval_tau": 2.1},
        {"eval_tokens_seen": 987654, "eval_agreement_0": 0.5832, "eval_tau": 2.3},
    ]
    record = training_record(second, init_from={"name": "the first", "training": first})
    (draft_folder / "training.json").write_text(json.dumps(record))
    write_card(draft_folder, [])
    text = (draft_folder / "README.md").read_text()
    assert text.index("**Run 1**") < text.index("single_step") < text.index("**Run 2**, from the weights of run 1")
    assert "| after run 1, single_step | 0.440 | 0.106 |" in text
    assert "| before run 2, split | 0.561 |  |\n| after run 2, split | 0.583 |  |" in text
    assert "before run 1" not in text
    assert "| split | 2 | 3 | token 0.1, hidden 0.25 | 0.0017 | 4321 | 987654 | 123 |" in text
    assert text.count("transformers-prism train --seed 5") == 2
    assert "98.5 %" in text
    assert [run["init_from"] for run in training_runs(record)] == [None, "the first"]


def test_a_missing_figure_is_refused(measured, draft_folder):
    """A measurement whose summary lost a figure gives no card with a hole in it."""
    metrics = gather(*measured)
    del metrics["generate"][0]["summary"]["ratio"]
    with pytest.raises(ValueError, match="ratio"):
        render_card(draft_folder, metrics)


def test_figures_of_other_weights_are_refused(measured, draft_folder, tiny_folders):
    """Measurements, and a metrics.json that an older draft left."""
    write_card(draft_folder, measured[1])
    draft = tiny_draft(AutoModelForCausalLM.from_pretrained(tiny_folders[0]), seed=7)
    # Without the code that would write new metrics.
    PreTrainedModel.save_pretrained(draft, draft_folder)
    with pytest.raises(ValueError, match="expected figures of the weights in its folder"):
        write_card(draft_folder)
    with pytest.raises(ValueError, match="expected figures of the draft's weights"):
        write_card(draft_folder, measured[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "modules"}, "got kind 'modules'"),
        ({"hardware": None}, "hardware"),
        ({"settings": {"tree": "auto"}}, "settings.baseline"),
    ],
)
def test_files_that_say_too_little_are_refused(measured, tmp_path, change, message):
    """Other measurements, and those without their surroundings."""
    record = {**json.loads(measured[1][0].read_text()), **change}
    path = tmp_path / "record.json"
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    with pytest.raises(ValueError, match=re.escape(message)):
        gather(measured[0], [path])


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"kind": NaN}', None])
def test_files_that_are_no_measurement_are_refused(measured, tmp_path, text):
    """Damaged, of another form, with figures that are none, or absent."""
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="expected a JSON object of a measurement"):
        gather(measured[0], [path])


def test_about_takes_known_keys_only(draft_folder):
    """A misspelt key would silently be left out of the card."""
    (draft_folder / "about.json").write_text(json.dumps({"licence": "mit"}))
    with pytest.raises(ValueError, match="expected only license"):
        write_card(draft_folder)


def test_about_is_of_texts(draft_folder):
    """One limit may stand alone; what is no text is named."""
    (draft_folder / "about.json").write_text(json.dumps({"limits": "Only English."}))
    write_card(draft_folder)
    assert "\n- Only English.\n" in (draft_folder / "README.md").read_text()
    for content, message in (
        ({"base_model": ["a/b"]}, r"expected text in 'base_model', got \['a/b'\]"),
        ({"limits": [1]}, r"expected text or a list of texts in 'limits', got \[1\]"),
        ([], "expected a JSON object, got list"),
    ):
        (draft_folder / "about.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            write_card(draft_folder)


def test_figures_that_are_not_there_are_empty_cells(measured, draft_folder):
    """Of a task whose answers took no round, and of a draft that was declined."""
    metrics = gather(draft_folder, measured[1])
    (record, *_) = metrics["generate"]
    absent = {"acceptance_length_pooled": None, "acceptance_length_per_prompt_mean": None, "round_ms": None, "ceiling": None}
    record["summary"].update(absent)
    next(iter(record["tasks"].values())).update(absent)
    text = render_card(draft_folder, metrics)
    assert "|  |" in text
    assert "None" not in text


def test_the_command_writes_the_card(measured, draft_folder):
    """With measurements; errors are one line and a status."""
    result = CliRunner().invoke(app, ["card", str(draft_folder), *map(str, measured[1])])
    assert result.exit_code == 0, result.output
    assert [Path(line.split()[-1]).name for line in result.output.splitlines()][0] == "README.md"
    result = CliRunner().invoke(app, ["card", str(draft_folder), str(draft_folder / "config.json")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def seeded(code: str) -> str:
    """A pipeline samples unless told otherwise; with the same seed the text is the same."""
    return f"import torch\ntorch.manual_seed(0)\n{code}"


@pytest.fixture
def snippets(tiny_folders):
    """The code of a card, with folders in place of names on the Hub; and the text that the target alone writes."""
    target, tokenizer = load_target(tiny_folders[0])
    inputs = tokenizer("The sky is blue because", return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=32)[0]
    text = (Path(tiny_folders[1]) / "README.md").read_text()
    codes = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    names = {f'"user/{Path(tiny_folders[1]).name}"': repr(tiny_folders[1]), '"name/of-the-target"': repr(tiny_folders[0])}
    for name, folder in names.items():
        assert all(name in code for code in codes)
        codes = [code.replace(name, folder) for code in codes]
    return codes, tokenizer.decode(plain, skip_special_tokens=True)


@pytest.mark.slow
def test_the_snippets_of_a_card_run_without_the_package(snippets, tiny_folders, tmp_path):
    """The third as the sentence above it says: with trust_remote_code in place of the package."""
    (first, second, third), text = snippets
    third = third.replace("import transformers_prism\n", "").replace("target.dtype)", "target.dtype, trust_remote_code=True)")
    code = "\n".join((first, second, seeded(third), seeded(third.replace(", assistant_model=draft", ""))))
    printed = run_without_package(tiny_folders[1], tiny_folders[0], code, HF_MODULES_CACHE=str(tmp_path)).splitlines()
    assert [printed[0], printed[2]] == [text] * 2
    assert printed[3] == printed[4]
    assert float(re.fullmatch(r"tokens per forward of the target: ([\d.]+)", printed[1]).group(1)) >= 1


def test_the_pipeline_of_a_card_runs_with_the_package(snippets, capsys):
    """The third snippet as it stands, with the draft as an object."""
    third = snippets[0][2]
    for code in (third, third.replace(", assistant_model=draft", "")):
        exec(compile(seeded(code), "README.md", "exec"), {})
    with_draft, plain = capsys.readouterr().out.splitlines()
    assert with_draft == plain
