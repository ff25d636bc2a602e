"""`bench generate`: every way of decoding gives plain decoding's tokens, figures follow from the timings, runs go on."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_draft, tiny_target, word_tokenizer, write_lines
from typer.testing import CliRunner

from transformers_prism.bench import measurement, methods
from transformers_prism.bench.figures import as_json, main_method, result_tables, summarize, table_of
from transformers_prism.bench.generate import ItemResult, Outcome, _note_speculation, bench_generate, make_items
from transformers_prism.bench.methods import Contest, Method, load_assistant, parse_methods
from transformers_prism.bench.prompts import ContextFiller, batch_rows
from transformers_prism.bench.rounds import PARTS, profile_rows
from transformers_prism.cli.demo import chat_inputs
from transformers_prism.cli.main import app
from transformers_prism.decoding.speculation import Speculation
from transformers_prism.hub.files import weights_sha256
from transformers_prism.hub.metrics import read_metrics
from transformers_prism.packed_layers import PackedLinear

pytestmark = pytest.mark.quick

CATEGORIES = ["writing", "coding", "translation", "translation", "qa", "qa"]
RECORDS = [
    {"question_id": number, "category": category, "turns": [f"w{number + 50} w9 w41 " + "w42 " * number]}
    for number, category in enumerate(CATEGORIES)
]
ALL_METHODS = "lookup:3 assisted draft auto auto-no-ngrams chain:3 static:2,2,5".split()


@pytest.fixture
def prompt_file(tmp_path):
    """Records of three tasks, two of them categories of MT-bench."""
    return write_lines(tmp_path / "prompts.jsonl", RECORDS)


@pytest.fixture
def command(tiny_folders, prompt_file, tmp_path):
    """Runs `bench generate` on tiny models; returns its result and the file's content."""
    target, draft = tiny_folders
    path = tmp_path / "result.json"

    def run(*arguments, status: int = 0):
        words = ("--target", target, "--draft", draft, "--prompts", prompt_file, "--max-new-tokens", 8, "--json", path)
        words = [str(word) for word in ("bench", "generate", *words, *arguments)]
        result = CliRunner().invoke(app, words, env={"COLUMNS": "100"})
        assert result.exit_code == status, result.output + repr(result.exception)
        return result, json.loads(path.read_text()) if path.is_file() else None

    return run


def items_of(tokenizer, records=RECORDS, batch_size=1):
    """Prompts without a chat template."""
    rows = [chat_inputs(tokenizer, record["turns"][0]) for record in records]
    return make_items(records, rows, batch_size, pad_token_id=0)


def contest_of(names, target=None, is_packed=True, max_length=64):
    """Tiny models for these methods."""
    target = target or tiny_target("llama", seed=3)
    parsed = parse_methods(names, is_packed)
    assistant = load_assistant("random", target) if "assisted" in names else None
    return Contest(target, tiny_draft(target), assistant, parsed, max_length)


def result_of(task, **outcomes):
    """Outcomes of one prompt with one row."""
    filled = {
        name: Outcome(**{"is_identical": [True], "first_difference": [None], "logit_gap": [None], **outcome})
        for name, outcome in outcomes.items()
    }
    return ItemResult([1], task, [10], filled)


PLAIN = {"num_new_tokens": [11], "num_rounds": [11], "num_committed": [11], "num_forwards": 10}
WITH_DRAFT = {"num_new_tokens": [11], "num_rounds": [5], "num_committed": [10], "num_forwards": 5}


def timed(base, seconds, prefill, round_seconds=()):
    """An outcome with timings."""
    return {**base, "seconds": seconds, "prefill_seconds": prefill, "round_seconds": list(round_seconds)}


def test_bench_generate_decodes_alike_in_every_way(cheap_rounds):
    """Greedy, all methods, tokens of plain decoding; the target is left unprepared; each draft was really used."""
    contest = contest_of(ALL_METHODS)
    items = items_of(word_tokenizer(), RECORDS[:2])
    results = list(bench_generate(contest, items, {"max_new_tokens": 8, "do_sample": False}, repeat=2))
    contest.close()
    assert not any(isinstance(module, PackedLinear) for module in contest.target.modules())
    assert set(results[0].outcomes) == {"plain", "prepared", *ALL_METHODS}
    for result in results:
        for name, outcome in result.outcomes.items():
            assert outcome.is_identical == [True], name
            assert len(outcome.seconds) == len(outcome.prefill_seconds) == 2, name
            assert all(
                0 < first < whole for first, whole in zip(outcome.prefill_seconds, outcome.seconds, strict=True)
            )
    assert all(drafted.last_speculation.declined is None for drafted in contest.drafts.values())
    trees = contest.drafts["static:2,2,5"].last_speculation.trees
    assert max(tree.num_nodes for tree in trees) == 5
    assert max(tree.num_steps for tree in contest.drafts["chain:3"].last_speculation.trees) == 3


def test_bench_generate_counts_the_rounds_of_all_repeats():
    """Automatic trees learn, so that repeats differ: the time of all rounds belongs to all of them."""
    outcome, per_round = Outcome(), {"draft": 0.01, "verify": 0.1, "commit": 0.0, "other": 0.0}
    for num_rounds, tau in ((90, 1), (50, 2), (30, 3)):
        speculation = Speculation.empty(1)
        for _ in range(num_rounds):
            speculation.add_round(0, num_emitted=tau)
        speculation.seconds = {name: seconds * num_rounds for name, seconds in per_round.items()}
        _note_speculation(speculation, outcome)
    outcome.num_new_tokens, outcome.is_identical = [100], [True]
    outcome.seconds, outcome.prefill_seconds = [9.9, 5.5, 3.3], [0.0] * 3
    result = ItemResult([1], "qa", [5], {"plain": Outcome(**timed(PLAIN, [10.0] * 3, [0.0] * 3)), "auto": outcome})
    found = summarize([result], Method("auto", "auto", False), ["plain"])
    assert found["round_ms"] == pytest.approx({"draft": 10.0, "verify": 100.0, "rest": 0.0})
    assert found["acceptance_length_pooled"] == pytest.approx((90 + 100 + 90) / 170)


def test_bench_generate_packs_the_target_for_the_methods_that_want_it():
    """While a method decodes, the target's layers are what its name says."""
    contest = contest_of(["draft"])
    seen = {}
    original = contest.target.generate
    names = {id(contest.drafts["draft"]): "draft", id(None): "plain or prepared"}

    def noting(*args, **kwargs):
        is_packed = any(isinstance(module, PackedLinear) for module in contest.target.modules())
        if kwargs["max_new_tokens"] == 8:
            seen.setdefault(names[id(kwargs.get("assistant_model"))], []).append(is_packed)
        return original(*args, **kwargs)

    contest.target.generate = noting
    settings = {"max_new_tokens": 8, "do_sample": False}
    list(bench_generate(contest, items_of(word_tokenizer(), RECORDS[:1]), settings, repeat=2, warm_up=0))
    assert seen["draft"] == [True, True]
    assert seen["plain or prepared"] == [False, True, True, False]


def test_bench_generate_drafts_do_not_share_what_they_learn():
    """Each method has a draft of its own, bound to the one target."""
    contest = contest_of(["auto", "auto-no-ngrams"])
    first, second = contest.drafts.values()
    assert first is not second
    assert (first.generation_config.tree_ngrams, second.generation_config.tree_ngrams) == (True, False)


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}])
def test_bench_generate_batches_give_each_row_what_it_gets(sampling):
    """Prompts of different lengths in one batch: rows are compared one by one, and shorter ones are padded."""
    contest = contest_of(["static:3,3,7"], is_packed=False)
    (item,) = items_of(word_tokenizer(), RECORDS[2:6], batch_size=4)
    assert item.task == "mixed"
    (result,) = bench_generate(contest, [item], {"max_new_tokens": 8, **sampling}, repeat=1)
    assert result.num_prompt_tokens == [5, 6, 7, 8]
    assert result.outcomes["static:3,3,7"].is_identical == [True] * 4
    assert result.outcomes["static:3,3,7"].num_new_tokens == [8] * 4


def test_bench_generate_reports_a_difference():
    """Only the row that differs is counted, with the first differing token and the logit gap there."""
    contest = contest_of(["draft"], is_packed=False)
    original = contest.target.generate

    def generate_wrongly(*args, **kwargs):
        output = original(*args, **kwargs)
        if "assistant_model" in kwargs:
            output[1, -2] += 1
        return output

    contest.target.generate = generate_wrongly
    items = items_of(word_tokenizer(), RECORDS[2:4], batch_size=2)
    results = list(bench_generate(contest, items, {"max_new_tokens": 8, "do_sample": False}, repeat=1))
    outcome = results[0].outcomes["draft"]
    assert outcome.is_identical == [True, False]
    assert outcome.first_difference == [None, 6]
    assert outcome.logit_gap[1] > 0
    assert as_json(results, contest.methods)["summary"]["num_identical"] == 1


def test_bench_generate_counts_tokens_up_to_the_end_of_each_row():
    """What stands behind a row's end is not counted, its end is."""
    target = tiny_target("llama", seed=3)
    inputs = items_of(word_tokenizer(), RECORDS[:1])[0].inputs
    plain = target.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    end = plain[3]
    target.generation_config.eos_token_id = end
    contest = contest_of(["draft"], target, is_packed=False)
    items = items_of(word_tokenizer(), RECORDS[:1])
    (result,) = bench_generate(contest, items, {"max_new_tokens": 8, "do_sample": False}, repeat=1)
    assert result.outcomes["draft"].num_new_tokens == [plain.index(end) + 1]


def test_figures_pool_tokens_over_seconds_and_state_the_ceiling():
    """Ratios from medians; with the prefill and without; ceiling and share by the formula."""
    phases = {"draft": 0.5, "verify": 1.0, "commit": 0.05, "other": 0.2}
    results = [
        result_of(
            "qa",
            plain=timed(PLAIN, [4.0, 3.0, 8.0], [1.0, 1.0, 1.0]),
            draft=timed({**WITH_DRAFT, "num_forwards": 15}, [2.0, 3.0, 2.5], [0.5, 0.5, 0.5], [phases] * 3),
        ),
        result_of(
            "rag", plain=timed(PLAIN, [6.0], [1.0]), draft=timed({**WITH_DRAFT, "num_rounds": [10]}, [5.5], [0.5])
        ),
    ]
    (method,) = (one for one in parse_methods(["draft"], is_packed=False) if one.name == "draft")
    figures = summarize(results, method, ["plain"])
    assert figures["ratio"] == pytest.approx((22 / 8.0) / (22 / 10.0))
    assert figures["median_ratio"] == pytest.approx((4.0 / 2.5 + 6.0 / 5.5) / 2)
    assert (figures["lowest_ratio"], figures["highest_ratio"]) == (pytest.approx(6.0 / 5.5), pytest.approx(1.6))
    assert figures["over"]["plain"]["decoding"] == pytest.approx((20 / 7.0) / (20 / 8.0))
    assert figures["acceptance_length_pooled"] == pytest.approx(20 / 15)
    assert figures["acceptance_length_per_prompt_mean"] == pytest.approx(1.5)
    assert figures["step_ms"] == pytest.approx(1000 * 8.0 / 20)
    assert figures["round_ms"] == {
        key: pytest.approx(value) for key, value in (("draft", 100), ("verify", 200), ("rest", 50))
    }
    assert figures["ceiling"] == pytest.approx(20 / 15 * 400 / 300)
    assert figures["ceiling_share"] == pytest.approx(figures["ratio"] / figures["ceiling"])
    assert figures["spread"] == pytest.approx((3.0 - 2.0) / 2.5)


def test_figures_are_of_the_method_that_a_card_tells_of():
    """Automatic trees before static ones before baselines."""
    assert main_method(parse_methods(["static", "auto", "lookup"], is_packed=True)).name == "auto"
    assert main_method(parse_methods(["lookup"], is_packed=True)).name == "lookup"


def test_methods_bring_the_plain_ones_that_they_are_compared_with():
    """Both plain methods with a prepared target, one without; the target's state changes once."""
    assert [method.name for method in parse_methods(["auto", "compiled"], is_packed=True)] == [
        *("plain", "compiled", "prepared", "auto")
    ]
    assert [method.name for method in parse_methods(["auto"], is_packed=False)] == ["plain", "auto"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fast"], "got 'fast'"),
        (["static:1,2"], "got 'static:1,2'"),
        (["chain:0"], "got 'chain:0'"),
        (["auto:3"], "got 'auto:3'"),
        (["auto", "auto"], "expected each name once, got auto"),
    ],
)
def test_methods_that_make_no_sense_are_refused(names, message):
    """The message says what was found."""
    with pytest.raises(ValueError, match=message):
        parse_methods(names, is_packed=True)


def test_methods_that_cannot_be_served_are_refused():
    """Transformers assists single rows only; an assistant has to be named, and to have the vocabulary."""
    with pytest.raises(ValueError, match="expected 1 for lookup.* got 4"):
        parse_methods(["lookup"], is_packed=True, batch_size=4)
    target, parsed = tiny_target("llama", seed=3), parse_methods(["assisted"], is_packed=True)
    with pytest.raises(ValueError, match="expected --assistant with 'assisted'"):
        Contest(target, tiny_draft(target), None, parsed, 64)
    with pytest.raises(ValueError, match="num_prompts: expected a multiple of the batch size 4, got 6"):
        items_of(word_tokenizer(), RECORDS, batch_size=4)


def test_assistant_of_another_vocabulary_is_refused(tmp_path):
    """Before anything is decoded."""
    tiny_target("llama", vocab_size=96).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the target's vocabulary of 97 tokens, got 96"):
        load_assistant(str(tmp_path), tiny_target("llama"))


def test_prompts_are_brought_to_one_length():
    """By text of other records before them, from another place for each; longer ones lose their middle."""
    tokenizer = word_tokenizer()
    others = [{"turns": [" ".join(f"w{index % 60 + 30}" for index in range(100))]}]
    filler = ContextFiller(tokenizer, others, num_tokens=20)
    first, second = (filler.fit("w5 w6 w7", index, lambda text: chat_inputs(tokenizer, text)) for index in (0, 1))
    assert first["input_ids"].shape == second["input_ids"].shape == (1, 20)
    assert first["input_ids"][0, -3:].tolist() == [5, 6, 7]
    assert not torch.equal(first["input_ids"], second["input_ids"])
    long = " ".join(f"w{index}" for index in range(40, 80))
    cut = filler.fit(long, 0, lambda text: chat_inputs(tokenizer, text))["input_ids"][0]
    assert cut.tolist() == [*range(40, 50), *range(70, 80)]


def test_prompts_are_not_lengthened_by_text_that_is_not_there():
    """Too little text is named, with how much there is."""
    with pytest.raises(ValueError, match="context: expected 50 tokens .* got 3"):
        ContextFiller(word_tokenizer(), [{"turns": ["w5 w6 w7"]}], num_tokens=50)


def test_prompts_in_a_batch_are_padded_on_the_left():
    """Ids and mask."""
    rows = [chat_inputs(word_tokenizer(), text) for text in ("w5", "w6 w7 w8")]
    batch = batch_rows(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[0, 0, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_command_writes_what_cards_and_pages_read(command, tiny_folders):
    """Settings, figures of the method in front, of every method, per task, per prompt; tables of at most 100 columns."""
    names = ("--method", "static:2,2,5", "--method", "lookup")
    result, record = command("--num-prompts", 3, "--repeat", 2, *names)
    assert [prompt["task"] for prompt in record["prompts"]] == ["mt_bench", "translation", "qa"]
    assert (record["kind"], record["settings"]["batch_size"]) == ("generate", 1)
    assert record["settings"]["main_method"] == "static:2,2,5"
    assert record["settings"]["tree_num_nodes"] == 5
    assert record["weights_sha256"] == weights_sha256(tiny_folders[1])
    assert "without a draft" in record["settings"]["baseline"]
    assert set(record["methods"]) == {"plain", "prepared", "static:2,2,5", "lookup"}
    assert record["summary"] == record["methods"]["static:2,2,5"]["summary"]
    assert set(record["tasks"]) == {"mt_bench", "translation", "qa"}
    assert set(record["summary"]["round_ms"]) == {"draft", "verify", "rest"}
    reached, accepted = record["summary"]["step_counts"][0]
    assert 0 <= accepted <= reached
    assert record["summary"]["num_identical"] == 3
    assert max(map(len, result.output.splitlines())) <= 100
    assert "\u2026" not in result.output
    for table in result_tables(record["methods"], "caption"):
        assert table.row_count == 4


def test_command_measures_an_untrained_draft(command):
    """--draft random: the same text, hardly a token accepted, and no draft's weights are named."""
    _, record = command("--num-prompts", 1, "--repeat", 1, "--method", "chain", "--no-packed", "--draft", "random")
    assert record["summary"]["num_identical"] == 1
    assert record["summary"]["acceptance_length_pooled"] < 1.5
    assert record["weights_sha256"] == "random"


def test_command_goes_on_where_it_was_interrupted(command, monkeypatch):
    """Ctrl-C after a prompt leaves it in the file; --resume decodes only the others and keeps its figures."""
    original = measurement.bench_generate

    def interrupted(*args):
        for result in original(*args):
            yield result
            raise KeyboardInterrupt

    sizes = ("--num-prompts", 3, "--repeat", 1, "--method", "chain", "--no-packed")
    monkeypatch.setattr(measurement, "bench_generate", interrupted)
    result, record = command(*sizes, status=130)
    assert "--resume" in result.output + result.stderr
    (kept,) = record["prompts"]
    monkeypatch.setattr(measurement, "bench_generate", original)
    _, record = command(*sizes, "--resume")
    assert record["prompts"][0] == kept
    assert [prompt["task"] for prompt in record["prompts"]] == ["mt_bench", "translation", "qa"]
    assert record["summary"]["num_prompts"] == 3


def test_command_does_not_mix_settings(command):
    """--resume with another repeat is refused, and the file stays as it is."""
    sizes = ("--num-prompts", 1, "--method", "chain", "--no-packed")
    _, before = command(*sizes, "--repeat", 1)
    result, after = command(*sizes, "--repeat", 2, "--resume", status=1)
    assert "settings: expected repeat 2 to resume, got 1" in result.stderr
    assert before == after


def test_command_does_not_mix_prompts_or_targets(command, prompt_file, tiny_folders, tmp_path):
    """A file of the same name with other prompts, and a folder of the same name with other weights."""
    sizes = ("--num-prompts", 1, "--repeat", 1, "--method", "chain", "--no-packed")
    _, before = command(*sizes)
    other = tmp_path / "other"
    other.mkdir()
    write_lines(other / prompt_file.name, [{**record, "turns": ["w30 w31"]} for record in RECORDS])
    result, after = command(*sizes, "--resume", "--prompts", other / prompt_file.name, status=1)
    assert "expected prompts_sha256" in result.stderr
    folder = shutil.copytree(tiny_folders[0], other / Path(tiny_folders[0]).name)
    tiny_target("llama", seed=5).save_pretrained(folder)
    result, after = command(*sizes, "--resume", "--target", folder, status=1)
    assert "expected target_sha256" in result.stderr
    assert before == after


def test_command_adds_to_a_card(command, tiny_folders, tmp_path):
    """--update-card: metrics and card of the draft's folder take the figures; measured again alike, they are replaced."""
    folder = shutil.copytree(tiny_folders[1], tmp_path / "draft")
    sizes = ("--num-prompts", 1, "--repeat", 1, "--no-packed", "--update-card", folder)
    command(*sizes, "--method", "chain")
    command(*sizes, "--method", "static")
    _, record = command(*sizes, "--method", "chain")
    trees = [one["settings"]["tree"] for one in read_metrics(folder)["generate"]]
    assert trees == ["static", "chain"]
    assert read_metrics(folder)["generate"][1]["summary"] == record["summary"]


def test_command_refuses_what_cannot_be_before_any_model_is_loaded(command, tmp_path):
    """Options that need a file, a folder without a draft, and unknown methods."""
    result, _ = command("--update-card", tmp_path / "nowhere", status=1)
    assert "update_card: expected the folder of a draft, got" in result.stderr
    result, _ = command("--method", "fast", status=1)
    assert "got 'fast'" in result.stderr


def test_tables_keep_every_figure_in_a_narrow_terminal():
    parts = dict.fromkeys(PARTS, 123.456)
    profile = {"context": 4096, "num_rounds": 40, "acceptance_length": 2.5, "round_ms": 1234.5, "parts_ms": parts, "rest_share": 0.0425}
    heading, rows = profile_rows([profile])
    console = Console(file=io.StringIO(), width=40)
    console.print(table_of(heading, rows, "milliseconds"), crop=False)
    text = console.file.getvalue()
    assert "…" not in text
    assert all(cell in text for cell in rows[0])


@pytest.mark.parametrize("is_packed", [True, False])
def test_generate_in_another_dtype(is_packed, command, monkeypatch):
    """Weights are packed if there is a product for it; the file says which dtype it was."""
    monkeypatch.setattr(methods, "can_pack", lambda dtype: is_packed)
    _, content = command("--dtype", "bfloat16", "--num-prompts", 2, "--repeat", 1)
    assert content["dtype"] == "bfloat16"
    assert set(content["methods"]) == {"plain", "draft", *(["prepared"] if is_packed else [])}
    if not is_packed:
        result, _ = command("--dtype", "bfloat16", "--method", "prepared", status=1)
        assert "expected --packed, a CPU, and a dtype that prepare_for_cpu can pack for 'prepared'" in result.stderr
    result, _ = command("--device", "cuda:99", status=1)
    assert "device: expected one that torch has here, got 'cuda:99'" in result.stderr
