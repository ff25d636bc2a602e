"""Conversations that a target writes itself: its own answers exactly, the same after a stop, shared out, filtered."""

import json
import os
import subprocess
import sys

import pytest
import torch
from compatibility_runs import Case
from pretend_accelerator import PretendedAccelerator, move_model
from tiny_models import EOS_ID, VOCAB_SIZE, chat_tokenizer, save_chat_target, tiny_target, write_lines
from tokenizers import normalizers
from typer.testing import CliRunner

from transformers_prism.cli.main import app
from transformers_prism.training.data.conversations import Contamination, read_conversations
from transformers_prism.training.data.synthesis import SynthesisConfig, Synthesizer, synthesize
from transformers_prism.training.slots import Slots

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]

USER, ASSISTANT, SYSTEM = 4, 5, 6
# A random target says anything at any time; it ends a turn once in a dozen tokens.
SETTINGS = {
    "batch_size": 4,
    "temperatures": (0.0, 1.0),
    "top_k": VOCAB_SIZE,
    "user_temperature": 2.0,
    "user_top_k": VOCAB_SIZE,
    "max_user_tokens": 60,
    "max_answer_tokens": 24,
    "max_length": 250,
}


@pytest.fixture(scope="module")
def target():
    target = tiny_target("llama", seed=1, max_position_embeddings=512, eos_token_id=EOS_ID)
    with torch.no_grad():
        target.lm_head.weight[EOS_ID] = target.lm_head.weight.norm(dim=1).max() * torch.nn.functional.normalize(
            target.lm_head.weight[EOS_ID], dim=0
        )
    return target


@pytest.fixture
def brief_target():
    """Any of a dozen tokens ends its turn, so that greedy answers end early, too."""
    target = tiny_target("llama", seed=1, max_position_embeddings=512)
    target.generation_config.eos_token_id = [EOS_ID, *range(60, 72)]
    return target


def chats(num_chats: int, num_turns: int = 1):
    return [
        [{"role": "user", "content": f"w{10 + chat} w{11 + chat} w{40 + turn}"} for turn in range(num_turns)]
        for chat in range(num_chats)
    ]


def run(target, folder, given=None, **overrides):
    arguments = {name: overrides.pop(name) for name in ("contamination", "part", "report", "is_over") if name in overrides}
    config = SynthesisConfig(**{"num_tokens": 1500, **SETTINGS, **overrides})
    return synthesize(target, chat_tokenizer(), config, folder, given, **arguments)


def written(folder):
    return read_conversations(folder, VOCAB_SIZE)


def indices(folder):
    import pyarrow.parquet

    return [index for path in sorted(folder.glob("*.parquet")) for index in pyarrow.parquet.read_table(path)["index"].to_pylist()]


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "qwen2_vl"])
def test_greedy_answers_are_generates(tmp_path, brief_target, name):
    """Every row gets the answer that generate() gives to its prompt alone, though rows end and begin beside it."""
    given, target = chats(11), brief_target
    if name != "llama":
        target = Case(name, name).draw(4)
        target.generation_config.eos_token_id = brief_target.generation_config.eos_token_id
    run(target, tmp_path, given, num_tokens=10**6, temperatures=(0.0,), max_answer_tokens=20)
    found = {tuple(one.input_ids[: one.prompt_length]): one for one in written(tmp_path)}
    assert len({len(one.input_ids) for one in found.values()}) > 2  # they end at different times
    assert len(found) > 6
    for chat in given:
        ids = chat_tokenizer().apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        plain = target.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0].tolist()
        if len(plain) == len(ids) + 1:
            assert tuple(ids) not in found  # an answer without words is left out
            continue
        assert list(found[tuple(ids)].input_ids) == plain
        assert found[tuple(ids)].assistant_spans == ((len(ids), len(plain)),)


@pytest.mark.parametrize("temperatures", [(0.0,), (0.7, 1.2)])
def test_an_accelerator_writes_the_same(brief_target, temperatures):
    """Tensors of host and device are kept apart, and a step reads back what it chooses from, however many rows there are."""
    settings = {**SETTINGS, "num_tokens": 10**6, "temperatures": temperatures, "max_answer_tokens": 12}
    config = SynthesisConfig(**settings)

    def write():
        return [row.tokens for row in Synthesizer(brief_target, chat_tokenizer(), config, chats(9)).run(range(9))]

    expected, num_steps = write(), 0
    move_model(brief_target)
    step = Slots.step

    def count(slots, token_ids):
        nonlocal num_steps
        num_steps += 1
        return step(slots, token_ids)

    with pytest.MonkeyPatch.context() as patch, PretendedAccelerator() as accelerator:
        patch.setattr(Slots, "step", count)
        assert write() == expected
    assert len(accelerator.reads) <= 3 * (num_steps + 1)
    assert len(expected) == 9


def test_own_user_turns_follow_the_template(tmp_path, target):
    """User turns and answers stand where the template puts them, and only answers are marked."""
    summary = run(target, tmp_path, max_turns=3, system_prompts=("w30 w31",), seed=3)
    found = written(tmp_path)
    assert summary["num_tokens"] == sum(len(one.input_ids) for one in found) >= 1500
    assert max(len(one.assistant_spans) for one in found) > 1
    for one in found:
        ids = one.input_ids
        assert ids[:5] == (SYSTEM, 30, 31, EOS_ID, USER)
        position = 5
        for start, end in one.assistant_spans:
            assert ids[start - 2 : start] == (EOS_ID, ASSISTANT)
            assert start - 2 - position >= 3  # a user turn of some words
            assert EOS_ID not in ids[position : start - 2]
            assert EOS_ID not in ids[start : end - 1]
            if end < len(ids):
                assert ids[end - 1 : end + 1] == (EOS_ID, USER)
            position = end + 1
        assert one.assistant_spans[-1][1] == len(ids)
        assert ids[-1] == EOS_ID or len(ids) - one.assistant_spans[-1][0] == 24


def test_topics_begin_user_turns(tmp_path, target, monkeypatch):
    from transformers_prism.training.data import synthesis

    monkeypatch.setitem(synthesis.TOPICS, "code", ("w50 w51",))
    run(target, tmp_path, topics=("code",), topic_share=0.5)
    begins = [one.input_ids[1:3] == (50, 51) for one in written(tmp_path)]
    assert 0.2 < sum(begins) / len(begins) < 0.8


def test_later_user_turns_are_taken_as_given(tmp_path, brief_target):
    run(brief_target, tmp_path, chats(4, num_turns=3), num_tokens=10**6, max_turns=3, temperatures=(1.0,))
    assert sum(len(one.assistant_spans) for one in written(tmp_path)) > 4
    for one in written(tmp_path):
        for turn, (start, _) in enumerate(one.assistant_spans):
            assert one.input_ids[start - 3] == 40 + turn
            assert one.input_ids[start - 6] == USER


def test_temperatures_are_the_targets_distribution(tmp_path, target):
    """The first answer tokens of many conversations with one prompt are drawn as softmax says."""
    ids = chat_tokenizer().apply_chat_template(chats(1)[0], add_generation_prompt=True)["input_ids"]
    config = SynthesisConfig(num_tokens=1, **{**SETTINGS, "temperatures": (1.5,), "top_k": 4, "max_answer_tokens": 1})
    synthesizer = Synthesizer(target, chat_tokenizer(), config, chats(1) * 600)
    counts = torch.zeros(VOCAB_SIZE)
    for row in synthesizer.run(iter(range(600))):
        counts[row.tokens[-1]] += 1
    with torch.no_grad():
        values, tokens = target(torch.tensor([ids])).logits[0, -1].topk(4)
    expected = 600 * (values / 1.5).softmax(dim=-1)
    assert counts.sum() == counts[tokens].sum() == 600
    chi_square = ((counts[tokens] - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # the 99.9th percentile with three degrees of freedom


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, target):
    """Stopped at several places, the shards of the end hold the same tokens as those of one run."""
    whole = run(target, tmp_path / "whole", num_tokens=6000)
    expected = written(tmp_path / "whole")
    assert whole["num_shards"] > 2

    def stop_after(num_reports):
        def report(progress):
            nonlocal num_reports
            num_reports -= 1
            if num_reports == 0:
                raise KeyboardInterrupt

        return report

    for num_reports in (3, 40, 70):
        with pytest.raises(KeyboardInterrupt):
            run(target, tmp_path / "cut", num_tokens=6000, report=stop_after(num_reports))
        if num_reports == 40:  # of a shard of 64, what was decided is kept
            assert len(indices(tmp_path / "cut")) > 5
    # What was being written when the process died does not count.
    (tmp_path / "cut" / "part-000-00001.1234").write_bytes(b"half a shard")
    cut = run(target, tmp_path / "cut", num_tokens=6000)
    assert {**cut, "num_shards": whole["num_shards"]} == whole
    assert written(tmp_path / "cut") == expected
    # A run that has ended writes nothing more.
    assert run(target, tmp_path / "cut", num_tokens=6000) == cut


def test_progress_counts_what_has_ended(tmp_path, brief_target):
    """A conversation that takes long holds back no figure of later ones, which end before it."""
    told = []
    given = [[{"role": "user", "content": "w1 w2"}] for _ in range(1)] + chats(12)
    summary = run(brief_target, tmp_path, given, temperatures=(0.0,), report=lambda counts: told.append(dict(counts)))
    lengths = {len(row.input_ids) for row in written(tmp_path)}
    assert len(lengths) > 1
    # Every report is of one more conversation, whatever its number.
    steps = [told[0]["written"], *(after["written"] - before["written"] for before, after in zip(told, told[1:], strict=False))]
    assert set(steps) <= lengths | {0}
    assert told[-1] == {"written": summary["num_tokens"], "goal": 1500, "before": 0}


def test_a_run_ends_when_its_time_is_over(tmp_path, target):
    """Answers end where they are and are kept; what had no answer is left out; nothing more is written later."""
    num_asked = 0

    def is_over():
        nonlocal num_asked
        num_asked += 1
        return num_asked > 60

    summary = run(target, tmp_path / "timed", num_tokens=10**9, is_over=is_over)
    found = written(tmp_path / "timed")
    assert summary["num_conversations"] == len(found) > 0
    whole = run(target, tmp_path / "whole", num_tokens=6000)
    assert whole["num_tokens"] > summary["num_tokens"]
    # Each is the beginning of what a run with more time writes, and ends with an answer.
    longer = {index: one.input_ids for index, one in zip(indices(tmp_path / "whole"), written(tmp_path / "whole"), strict=True)}
    for index, one in zip(indices(tmp_path / "timed"), found, strict=True):
        assert one.input_ids == longer[index][: len(one.input_ids)]
        assert one.assistant_spans[-1][1] == len(one.input_ids)
    assert run(target, tmp_path / "timed", num_tokens=10**9) == summary


@pytest.mark.parametrize("top_ks", [{}, {"top_k": 12, "user_top_k": 30}])
def test_conversations_do_not_depend_on_the_batch(tmp_path, target, top_ks):
    """Nor on whether a user turn, which may choose from more tokens, is drawn beside an answer."""
    for batch_size in (2, 7):
        run(target, tmp_path / str(batch_size), batch_size=batch_size, **top_ks)
    assert written(tmp_path / "2") == written(tmp_path / "7")


def test_processes_share_the_work(tmp_path, target):
    """Two parts write disjoint numbers into one folder; each number holds what one process would have written."""
    summaries = [run(target, tmp_path / "two", part=(index, 2)) for index in range(2)]
    assert min(summary["num_tokens"] for summary in summaries) >= 750
    shared = dict(zip(indices(tmp_path / "two"), written(tmp_path / "two"), strict=True))
    assert {index % 2 for index in shared} == {0, 1}
    run(target, tmp_path / "one", num_tokens=3000)
    alone = dict(zip(indices(tmp_path / "one"), written(tmp_path / "one"), strict=True))
    common = shared.keys() & alone.keys()
    assert len(common) > 10
    assert all(shared[index] == alone[index] for index in common)


def test_the_command_shares_the_work(tmp_path, target):
    """Started twice on a machine without an accelerator: the processes know of each other."""
    save_chat_target(tmp_path / "target", target)
    prompts = write_lines(tmp_path / "prompts.jsonl", ({"messages": chat} for chat in chats(40)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "transformers_prism.cli.main", "synthesize", "--output", str(tmp_path / "data")]
    command += ["--target", str(tmp_path / "target"), "--prompts", str(prompts), "--num-tokens", "400"]
    command += ["--batch-size", "4", "--max-user-tokens", "20", "--max-answer-tokens", "12", "--no-packed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    summaries = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [summary["num_tokens"] < 400 for summary in summaries] == [True, True]
    assert sum(summary["num_tokens"] for summary in summaries) >= 400
    assert {index % 2 for index in indices(tmp_path / "data")} == {0, 1}
    assert len(set(indices(tmp_path / "data"))) == len(indices(tmp_path / "data"))


def test_another_run_is_not_resumed(tmp_path, target):
    run(target, tmp_path)
    with pytest.raises(ValueError, match="expected a run with config=.* use another folder"):
        run(target, tmp_path, seed=1)
    with pytest.raises(ValueError, match="expected a run with source=\"the target's own user turns\" as it began, got '2 given"):
        run(target, tmp_path, chats(2))
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["target"]["vocab_size"] == VOCAB_SIZE
    assert provenance["config"]["seed"] == 0
    assert len(provenance["chat_template_sha256"]) == 16


def test_duplicates_and_benchmark_prompts_are_left_out(tmp_path, target):
    given = [*chats(4), *chats(2)]
    contamination = Contamination(chat_tokenizer(), ["w13 w14 w40"])
    summary = run(target, tmp_path, given, num_tokens=10**6, contamination=contamination)
    assert summary["left_out"] == {"duplicate": 2, "holds a benchmark's prompt": 1}
    assert indices(tmp_path) == [0, 1, 2]


def test_loops_are_left_out(tmp_path):
    """A target that says one word for ever teaches a draft nothing."""
    target = tiny_target("llama", seed=1, eos_token_id=EOS_ID)
    with torch.no_grad():
        target.lm_head.weight.zero_()  # the first of equal logits is w0
    summary = run(target, tmp_path, chats(3), num_tokens=10**6, temperatures=(0.0,))
    assert summary == {"num_conversations": 0, "num_tokens": 0, "left_out": {"answer is a loop": 3}, "num_shards": 1}


@pytest.mark.parametrize("max_answer_tokens", [60, 200])
def test_answers_end_before_a_loop(tmp_path, max_answer_tokens):
    """A target that counts to w49 and then says w45 to w49 for ever: it is cut after w49, whatever the room; no turn follows."""
    target = tiny_target("llama", seed=1, eos_token_id=EOS_ID, max_position_embeddings=512)
    asked = chat_tokenizer().apply_chat_template(chats(1)[0], add_generation_prompt=True)["input_ids"]
    follows = {asked[-1]: 20, **{token: token + 1 for token in range(20, 49)}, 49: 45}
    with torch.no_grad():
        for layer in target.model.layers:  # the last token decides
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        known = torch.nn.functional.normalize(target.model.embed_tokens.weight, dim=1)
        target.lm_head.weight.zero_()
        for token, after in follows.items():
            target.lm_head.weight[after] += known[token]
    settings = {"temperatures": (0.0,), "max_answer_tokens": max_answer_tokens, "max_turns": 2, "max_length": 512}
    summary = run(target, tmp_path, chats(3, num_turns=2), num_tokens=10**6, **settings)
    assert summary["num_conversations"] == 3
    for row in written(tmp_path):
        ((start, end),) = row.assistant_spans
        assert end == len(row.input_ids)
        assert list(row.input_ids[start:]) == list(range(20, 50))


def test_what_does_not_fit_is_left_out(tmp_path, target):
    given = [[{"role": "user", "content": "w10 " * 300}], [{"role": "assistant", "content": "w9"}], *chats(1)]
    summary = run(target, tmp_path, given, num_tokens=10**6)
    assert summary["left_out"] == {"prompt too long": 1, "no user turn": 1}
    assert summary["num_conversations"] == 1


def test_system_turns_that_the_template_refuses_are_left_out(tmp_path, target):
    """They ended the run in a traceback of the template's."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + tokenizer.chat_template
    )
    given = [[{"role": "system", "content": "w9"}, *chats(1)[0]], *chats(2)]
    config = SynthesisConfig(num_tokens=10**6, **SETTINGS)
    summary = synthesize(target, tokenizer, config, tmp_path, given)
    assert summary["left_out"] == {"expected a chat that the target's template takes, got its error: no system role": 1}
    assert summary["num_conversations"] == 2
    config = SynthesisConfig(num_tokens=10, system_prompts=("w9",), **SETTINGS)
    with pytest.raises(ValueError, match="got its error: no system role"):
        Synthesizer(target, tokenizer, config)


def test_what_the_template_writes_takes_room_too(target):
    """It ended the whole run when the first row was full."""
    config = SynthesisConfig(num_tokens=10, **{**SETTINGS, "max_length": 84})
    with pytest.raises(ValueError, match=r"max_length: expected at least (8[5-9]|9\d), room for a user turn, an answer and what .*, got 84"):
        Synthesizer(target, chat_tokenizer(), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"topics": ("cooking",)}, "topics: expected some of code, math, writing, translation, reading, got 'cooking'"),
        ({"temperatures": (-1.0,)}, "temperatures: expected numbers of at least 0"),
        ({"temperatures": ()}, "temperatures: expected numbers of at least 0"),
        ({"temperatures": (float("nan"),)}, "temperatures: expected numbers of at least 0"),
        ({"temperatures": (0.5, float("inf"))}, "temperatures: expected numbers of at least 0, none infinite"),
        ({"max_length": 80}, "max_length: expected at least 84, room for a user turn and an answer, got 80"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SynthesisConfig(num_tokens=10, **{**SETTINGS, **settings})


def test_prompts_that_are_used_up_are_told_of(tmp_path, brief_target, caplog):
    summary = run(brief_target, tmp_path / "data", chats(5), num_tokens=10**6)
    assert f"The prompts are used up: {summary['num_tokens']} of 1000000 tokens were written." in caplog.text


def test_commands(tmp_path, target, monkeypatch):
    """synthesize, data preview and train, one after the other."""
    loaded = lambda *_, **__: (target, chat_tokenizer())  # noqa: E731
    monkeypatch.setattr("transformers_prism.target.load_target", loaded)
    monkeypatch.setattr("transformers_prism.training.train.load_target", loaded)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats(40)))
    data = str(tmp_path / "data")
    options = ["--num-tokens", "400", "--batch-size", "4", "--max-answer-tokens", "12", "--prompts", str(prompts)]
    options += ["--max-user-tokens", "20", "--topic", "reading", "--topic-share", "0.5"]
    result = CliRunner().invoke(app, ["synthesize", "--output", data, *options, "--no-packed"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output.splitlines()[-1])
    assert summary["num_tokens"] >= 400
    config = json.loads((tmp_path / "data" / "provenance.json").read_text())["config"]
    assert (config["max_user_tokens"], config["topics"], config["topic_share"]) == (20, ["reading"], 0.5)
    result = CliRunner().invoke(app, ["data", "preview", "--data", data, "--count", "2"])
    assert result.exit_code == 0, result.output
    assert "w10 w11 w40" in result.output
    assert json.loads(result.output.splitlines()[-1])["num_conversations"] == summary["num_conversations"]
    result = CliRunner().invoke(app, ["synthesize", "--output", data, *options, "--seed", "2"])
    assert result.exit_code == 1
    assert "error: data: expected a run with config=" in result.output


def test_bench_compares_equal_answers(tmp_path, target, monkeypatch):
    from benchmarks.synthesize import bench_synthesize

    figures = bench_synthesize(target, chat_tokenizer(), chats(6), batch_size=3, max_new_tokens=8, repeat=1)
    assert figures["num_identical"] == figures["num_prompts"] == 6
    assert figures["num_tokens"]["generate"] == figures["num_tokens"]["synthesize"] > 6
    assert figures["ratio"] > 0


@pytest.mark.parametrize("change", ["prompts", "exclude", "dtype", "weights"])
def test_a_folder_is_of_one_source(tmp_path, brief_target, change):
    """As many other prompts, other benchmarks to leave out, another dtype or other weights make another run."""
    settings = {"num_tokens": 10**6, "temperatures": (0.0,), "contamination": Contamination(chat_tokenizer(), ["w70 w71"])}
    run(brief_target, tmp_path, chats(4), **settings)
    given = chats(5)[1:] if change == "prompts" else chats(4)
    if change == "exclude":
        settings["contamination"] = None
    if change == "dtype":
        brief_target.to(torch.bfloat16)
    if change == "weights":
        brief_target.get_output_embeddings().weight.data *= 2.0
    with pytest.raises(ValueError, match=r"expected a run with (chats_sha256|exclude_sha256|compute_dtype|weights_sha256)="):
        run(brief_target, tmp_path, given, **settings)


def test_an_interruption_loses_no_conversation(tmp_path, brief_target, monkeypatch):
    """Wherever it comes; also an error."""
    settings = {"num_tokens": 10**6, "temperatures": (0.0,)}
    whole = run(brief_target, tmp_path / "whole", chats(4), contamination=Contamination(chat_tokenizer(), []), **settings)
    for number, error in enumerate((KeyboardInterrupt, RuntimeError)):
        calls = []

        def holds(self, *args, calls=calls, error=error):
            calls.append(args)
            if len(calls) == 3:
                raise error
            return False

        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(Contamination, "holds", holds)
            with pytest.raises(error):
                run(brief_target, folder, chats(4), contamination=Contamination(chat_tokenizer(), []), **settings)
        assert indices(folder)
        again = run(brief_target, folder, chats(4), contamination=Contamination(chat_tokenizer(), []), **settings)
        assert again["num_conversations"] == whole["num_conversations"]
        assert sorted(indices(folder)) == sorted(indices(tmp_path / "whole"))


def test_a_run_of_which_nothing_is_kept_says_why(tmp_path, target):
    """It would go on without end."""
    with pytest.raises(ValueError, match=r"got none among the first 256 \(user turn too long: \d+"):
        run(target, tmp_path, max_user_tokens=1, max_length=60)


def test_more_tokens_than_positions_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="max_length: expected at most 24, the target's positions, got 250"):
        run(tiny_target("gpt2", n_positions=24), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_templates_end_of_a_turn_ends_one(tmp_path, target):
    """Also of a target whose settings name another token, as base models do."""
    target.generation_config.eos_token_id = 60
    try:
        synthesizer = Synthesizer(target, chat_tokenizer(), SynthesisConfig(num_tokens=100, **SETTINGS))
    finally:
        target.generation_config.eos_token_id = EOS_ID
    assert synthesizer.eos_ids == {60, EOS_ID}


@pytest.mark.parametrize("num_turns", [1, 2])
def test_prompts_are_tokenized_as_a_whole(brief_target, num_turns):
    """Tokenizers of Llama 2 and Mistral put the mark of a space before every text that begins."""
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("w50 ")
    (chat,) = chats(1, num_turns)
    config = SynthesisConfig(num_tokens=100, **{**SETTINGS, "max_turns": 2})
    row = Synthesizer(brief_target, tokenizer, config, [chat])._next_row(iter([0]))
    assert row.tokens == list(tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"])
    answer = {"role": "assistant", "content": "w80"}
    whole = list(tokenizer.apply_chat_template([chat[0], answer, *chat[1:]], add_generation_prompt=True)["input_ids"])
    assert num_turns == 1 or whole[len(row.tokens) + 1 :] == row.given_turns[0]


def test_benchmarks_are_what_users_ask(tmp_path):
    """Not the system prompt that comes with every question."""
    save_chat_target(tmp_path / "target", tiny_target("llama", seed=1, max_position_embeddings=512, eos_token_id=EOS_ID))
    system = {"role": "system", "content": " ".join(f"w{60 + number}" for number in range(16))}
    for name, first in (("train", 10), ("bench", 40)):
        rows = [{"messages": [system, {"role": "user", "content": f"w{first + number} w8 w9"}]} for number in range(4)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    options = ["--prompts", "train.jsonl", "--exclude", "bench.jsonl", "--target", "target", "--output", "data"]
    options = [str(tmp_path / one) if "--" not in one else one for one in options]
    result = CliRunner().invoke(app, ["synthesize", *options, "--num-tokens", "100000", "--max-answer-tokens", "8", "--batch-size", "4"])
    assert result.exit_code == 0, result.output
    assert "holds a benchmark" not in result.output
