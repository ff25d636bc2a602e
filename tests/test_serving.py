"""`transformers-prism serve`: the real client of OpenAI against tiny models, on this release of transformers."""

import gc
import json
import re
import socket
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, tiny_draft, tiny_target, word_tokenizer
from transformers import GenerationConfig
from typer.main import get_command
from typer.testing import CliRunner

from transformers_prism.cli.main import app as command
from transformers_prism.cli.serve import load as load_named

openai = pytest.importorskip("openai", reason="needs the extra 'serve': openai")
pytest.importorskip("fastapi", reason="needs the extra 'serve': fastapi")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve': uvicorn")

from transformers_prism.serving import app as serving  # noqa: E402

MESSAGES = [{"role": "user", "content": "w9 w11 w20 w33"}]
NEVER_ENDS = {"logit_bias": {"1": -100}}


def chat_tokenizer():
    """Words, and a chat template."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Pair:
    """A tiny target and a draft that share nothing with other tests; counts its loads and its target's forwards."""

    def __init__(self, **settings):
        self.settings, self.num_loads, self.num_forwards, self.seconds = settings, 0, 0, 0.0
        self.target = self.draft = None

    def load(self):
        """Target, tokenizer and draft, as [`ServedTarget`] wants it."""
        self.num_loads += 1
        target = tiny_target("llama", seed=3)
        target.register_forward_pre_hook(self._count)
        draft = tiny_draft(target).bind(target)
        self.target, self.draft = weakref.ref(target), weakref.ref(draft)
        return target, chat_tokenizer(), draft

    def _count(self, *_):
        self.num_forwards += 1
        time.sleep(self.seconds)


@contextmanager
def serve(pair: Pair, **settings):
    """A server of this pair in a thread; yields its client and its URL."""
    served = serving.ServedTarget("tiny/llama", "tiny/draft", pair.load, **settings)
    app = serving.build_app(served, device="cpu")
    listener = serving.listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.should_exit = True
        thread.join(90)  # a starved machine takes its time
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def pair():
    """What the module's server serves."""
    return Pair()


@pytest.fixture(scope="module")
def client(pair):
    """A client of one server for tests that leave it as it was."""
    with serve(pair) as client:
        yield client


def plain_text(messages, seed: int | None = None, **settings) -> str:
    """What plain `generate` answers."""
    tokenizer, target = chat_tokenizer(), tiny_target("llama", seed=3)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    if seed is not None:
        torch.manual_seed(seed)
    output = target.generate(**inputs, do_sample=seed is not None, sequence_bias={(1,): -100.0}, **settings)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask(client, content: str = "w9 w11 w20 w33", **settings):
    """One answer."""
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="tiny/llama", messages=messages, **NEVER_ENDS, **settings)


def streamed(client, content: str = "w9 w11 w20 w33", **settings):
    """Text and last event of one streamed answer."""
    events = list(ask(client, content, stream=True, **settings))
    return "".join(event.choices[0].delta.content or "" for event in events), events[-1]


def test_serving_answers_as_plain_decoding_does(client):
    """Greedy text, tokens of the usage and the reason of the end, streamed or not; the report says how it was drafted."""
    plain = plain_text(MESSAGES, max_new_tokens=40)
    answer = ask(client, max_tokens=40, temperature=0)
    text, last = streamed(client, max_tokens=40, temperature=0)
    assert answer.choices[0].message.content == text == plain
    assert answer.choices[0].finish_reason == last.choices[0].finish_reason == "length"
    for usage in (answer.usage, last.usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (10, 40)
        report = usage.speculation
        assert report["tokens"] == 40
        assert report["tokens_per_second"] > 0
        assert 1 <= report["acceptance_length"] == round(39 / report["rounds"], 3)


@pytest.mark.parametrize("settings", [{"temperature": 0.8}, {"temperature": 1.3, "top_p": 0.9}, {"top_p": 0.7}])
def test_serving_samples_as_asked_for(client, settings):
    """The target's own configuration is greedy: a temperature or a nucleus of the request samples, with its seed."""
    plain = plain_text(MESSAGES, seed=11, max_new_tokens=30, **settings)
    assert plain != plain_text(MESSAGES, max_new_tokens=30)
    assert ask(client, max_tokens=30, seed=11, **settings).choices[0].message.content == plain
    assert streamed(client, max_tokens=30, seed=11, **settings)[0] == plain
    assert ask(client, max_tokens=30, seed=12, **settings).choices[0].message.content != plain


def test_serving_takes_stop_strings_and_penalties(client):
    """They reach generate()."""
    words = plain_text(MESSAGES, max_new_tokens=40).split()
    text = ask(client, max_tokens=40, stop=words[5]).choices[0].message.content
    assert text.split() == words[: words.index(words[5]) + 1]
    penalised = ask(client, max_tokens=40, frequency_penalty=0.8).choices[0].message.content
    assert penalised == plain_text(MESSAGES, max_new_tokens=40, repetition_penalty=1.8)


def test_serving_two_clients_at_once(client):
    """Each gets its own answer, with its own seed, whatever arrives during it."""
    contents = [f"w{20 + number} w{40 + number}" for number in range(4)]
    texts: dict = {}

    def one(number: int):
        own = client.with_options(timeout=120)
        method = streamed if number % 2 else ask
        answer = method(own, contents[number], max_tokens=40, temperature=0.9, seed=number)
        texts[number] = answer[0] if number % 2 else answer.choices[0].message.content

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, content in enumerate(contents):
        messages = [{"role": "user", "content": content}]
        assert texts[number] == plain_text(messages, seed=number, max_new_tokens=40, temperature=0.9)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_serving_stops_when_the_client_hangs_up(pair, client, is_streamed):
    """In mid-answer; the next request waits for no more of it and is right."""
    plain = plain_text(MESSAGES, max_new_tokens=20)
    pair.seconds, before = 0.02, pair.num_forwards
    try:
        if is_streamed:
            events = ask(client, max_tokens=1000, stream=True)
            for _, event in zip(range(3), events, strict=False):
                assert event
            events.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(client.with_options(timeout=0.5), max_tokens=1000)
        answer = ask(client, max_tokens=20)
    finally:
        pair.seconds = 0.0
    assert answer.choices[0].message.content == plain
    assert pair.num_forwards - before < 200  # of 1000 tokens, at most 5 a round


def test_serving_a_waiting_request_whose_client_is_gone_is_left_out(pair, client):
    """Its turn comes, and nothing is decoded."""
    pair.seconds = 0.02
    try:
        first = threading.Thread(target=ask, args=(client,), kwargs={"max_tokens": 100})
        first.start()
        time.sleep(0.2)
        before = pair.num_forwards
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.2), "w50", max_tokens=1000)
        first.join()
        ask(client, max_tokens=2)
    finally:
        pair.seconds = 0.0
    assert pair.num_forwards - before < 110


def test_serving_lists_target_and_draft(client):
    """One model, under the id that requests name; the draft is named beside it."""
    (model,) = client.models.list().data
    assert (model.id, model.draft, model.status["value"]) == ("tiny/llama", "tiny/draft", "loaded")
    assert client.get("/../health", cast_to=object) == {"status": "ok"}


def test_serving_needs_no_model_name(client):
    """There is one."""
    body = {"messages": MESSAGES, "max_tokens": 4, **NEVER_ENDS}
    answer = client.post("/chat/completions", body=body, cast_to=object)
    assert answer["model"] == "tiny/llama"


def test_serving_other_ways_to_ask(client):
    """Text completions and responses are drafted, too."""
    completion = client.completions.create(model="tiny/llama", prompt="w9 w11 w20", max_tokens=12)
    assert completion.usage.speculation["rounds"] > 0
    response = client.responses.create(model="tiny/llama", input="w9 w11 w20", max_output_tokens=12)
    assert response.usage.speculation["rounds"] > 0
    *_, last = client.responses.create(model="tiny/llama", input="w9 w11 w20", max_output_tokens=12, stream=True)
    assert last.response.usage.speculation["rounds"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature: expected a number of at least 0, got -1"),
        ({"temperature": "hot"}, "temperature: expected a number of at least 0, got 'hot'"),
        ({"top_p": 0}, "top_p: expected a number above 0 and at most 1, got 0"),
        ({"max_tokens": 0}, "max_tokens: expected an integer of at least 1, got 0"),
        ({"max_tokens": 2.5}, "max_tokens: expected an integer of at least 1, got 2.5"),
        ({"seed": "x"}, "seed: expected an integer of at least 0, got 'x'"),
        ({"extra_body": {"seed": 2**70}}, "seed: expected 0 to"),
        ({"stop": 5}, "stop: expected a text or a list of texts, none of them empty, got 5"),
        ({"stop": [""]}, "stop: expected a text or a list of texts, none of them empty"),
        ({"model": 5}, "model: expected a name, got 5"),
        ({"messages": ["hi"]}, "messages: expected turns with a text or a list of parts as content, got 'hi'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages: expected turns with a text or a list of parts as content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages: expected turns with a text or a list of parts"),
        ({"frequency_penalty": -1.5}, "frequency_penalty: expected more than -1, since 1 is added"),
        ({"logit_bias": {"10": "x"}}, "10: expected a number, got 'x'"),
        ({"logit_bias": {"10": None}}, "logit_bias: expected numbers, got {'10': None}"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected token ids as names, got {'x': 1}"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: expected token ids as names, got {'-1': 1}"),
        ({"temperature": 10**400}, "temperature: expected a number of at least 0"),
        ({"logit_bias": {"10": -(10**400)}}, "10: expected a number, got"),
        ({"extra_body": {"logit_bias": [1]}}, "logit_bias: expected an object of numbers by token id"),
        ({"extra_body": {"generation_config": "[1]"}}, "generation_config: expected a JSON object as a text, got"),
        ({"extra_body": {"generation_config": '{"return_dict_in_generate": true}'}}, "expected return_dict_in_generate to be false"),
        ({"n": 2}, "n: expected 1, got 2"),
        ({"messages": None}, "messages: expected a list of turns, got None"),
        ({"logprobs": True}, "logprobs: expected false or 0, since it is not served, got True"),
        ({"presence_penalty": 0.5}, "presence_penalty: expected 0, since it is not served, got 0.5"),
        ({"response_format": {"type": "json_object"}}, "response_format: expected .* since it is not served"),
        ({"tool_choice": "required", "tools": []}, 'tool_choice: expected "auto" or "none", since'),
        ({"extra_body": {"previous_response_id": "x"}}, "previous_response_id: expected none, since"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages: expected parts of type text, since this server reads nothing else, got 'image_url'",
        ),
        ({"extra_body": {"generation_config": "{"}}, "generation_config: expected a JSON object as a text, got"),
        ({"extra_body": {"generation_config": '{"tree": "oak", "max_new_tokens": 9}'}}, "tree: expected one of auto"),
    ],
)
def test_serving_says_what_is_wrong_with_a_request(client, settings, message):
    """Status 400 and the reason; the server answers the next one."""
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": "tiny/llama", "messages": MESSAGES, "max_tokens": 5, **settings})
    assert ask(client, max_tokens=2).usage.completion_tokens == 2


def test_serving_an_error_in_a_stream_is_readable(client):
    """Quotes and line ends in its message break no JSON."""
    broken = {"generation_config": json.dumps({"tree": 'o"a\nk', "max_new_tokens": 9})}
    with pytest.raises(openai.APIError, match="tree: expected one of auto"):
        streamed(client, extra_body=broken)
    broken = {"generation_config": '{"max_new_tokens": 9, "min_new_tokens": "5"}'}  # a TypeError of transformers
    with pytest.raises(openai.APIError, match="concatenate|supported between"):
        streamed(client, extra_body=broken)


def test_serving_beams_take_no_draft(client):
    """They are decoded as transformers does, and the report says so."""
    answer = ask(client, extra_body={"generation_config": '{"num_beams": 2, "max_new_tokens": 6}'})
    assert "draft_not_used" in answer.usage.speculation


def test_serving_other_models_are_refused_or_plain(tiny_folders, pair, client, tmp_path):
    """One that a request names is loaded without the draft if that was allowed, else refused, whichever way it is asked."""
    target = tiny_target("mistral", seed=4)
    target.save_pretrained(tmp_path / "other")
    chat_tokenizer().save_pretrained(tmp_path / "other")
    name = str(tmp_path / "other")
    with pytest.raises(openai.NotFoundError, match="expected 'tiny/llama', the one served here"):
        client.chat.completions.create(model=name, messages=MESSAGES)
    with pytest.raises(openai.NotFoundError, match="the one served here"):
        client.post("/../load_model", body={"model": name}, cast_to=object)
    inputs = chat_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    torch.manual_seed(5)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=0.9)
    with serve(Pair(), allows_other_models=True) as other:
        answer = other.chat.completions.create(model=name, messages=MESSAGES, max_tokens=12, temperature=0.9, seed=5)
        assert answer.choices[0].message.content == chat_tokenizer().decode(plain[0, 10:], skip_special_tokens=True)
        assert "draft_not_used" in answer.usage.speculation
        assert ask(other, max_tokens=12).usage.speculation["rounds"] > 0
        assert other.models.list().data[0].id == "tiny/llama"
        with pytest.raises(openai.NotFoundError):
            other.chat.completions.create(model="tiny/unknown", messages=MESSAGES)


def test_serving_drafts_again_after_the_models_were_unloaded():
    """Both are let go of when nobody asks, and both come back, bound to each other."""
    pair = Pair()
    with serve(pair, model_timeout=1) as client:
        first = ask(client, max_tokens=20)
        targets = [pair.target, pair.draft]
        deadline = time.monotonic() + 20
        while client.models.list().data[0].status["value"] == "loaded" and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(0.2)
        gc.collect()
        assert [one() for one in targets] == [None, None]
        second = ask(client, max_tokens=20)
    assert pair.num_loads == 2
    assert first.choices[0].message.content == second.choices[0].message.content
    assert second.usage.speculation["rounds"] == first.usage.speculation["rounds"]


@pytest.mark.quick
def test_serving_without_a_limit_no_timer_runs():
    """transformers' own would go off at once, again and again while an answer runs."""
    pair = Pair()
    models = serving.Models(serving.ServedTarget("it", "none", pair.load))
    models.load_model_and_processor("it")
    timed = models.loaded_models["it"]
    timed.num_answering = 1
    timed._timer.join()
    timed.reset_timer()
    timed._timeout_reached()
    assert not timed._timer.is_alive()
    assert models.loaded_models["it"] is timed


@pytest.mark.quick
def test_serving_a_request_while_models_are_freed_loads_them_again(monkeypatch):
    """They are forgotten first; and those that came after them stay."""
    pair, found = Pair(), []
    models = serving.Models(serving.ServedTarget("it", "none", pair.load, model_timeout=300))
    models.load_model_and_processor("it")
    timed = models.loaded_models["it"]
    free = serving.parts.TimedModel.delete_model

    def load_meanwhile(self):
        free(self)
        found.append(models.load_model_and_processor("it")[0])

    with monkeypatch.context() as patches:
        patches.setattr(serving.parts.TimedModel, "delete_model", load_meanwhile)
        timed.delete_model()
    timed.delete_model()
    assert models.loaded_models["it"].model is found[0] is not None
    assert models.draft_of(found[0]) is not None
    assert pair.num_loads == 2
    models.loaded_models["it"].delete_model()


@pytest.mark.quick
def test_serving_settings_without_a_limit_end_as_others_do():
    """generate() alone would stop after 20 tokens."""
    for settings, limit in (({"tree": "chain"}, 1024), ({"max_new_tokens": 7}, 7), ({"max_length": 9}, None)):
        body = {"messages": MESSAGES, "generation_config": json.dumps(settings)}
        serving.Request().read(body)
        assert json.loads(body["generation_config"]).get("max_new_tokens") == limit


@pytest.mark.quick
def test_serving_fields_that_ask_for_nothing_are_taken():
    """As clients send them by default; tools that must not be called are left out."""
    neutral = {"logprobs": False, "presence_penalty": 0.0, "response_format": {"type": "text"}, "best_of": 1, "echo": None}
    body = {"messages": MESSAGES, **neutral, "tools": [{"type": "function"}], "tool_choice": "none"}
    serving.Request().read(body)
    assert "tools" not in body
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    serving.Request().read({"messages": image}, takes_text_alone=False)


def test_serving_beams_end_when_the_client_hangs_up(pair, client):
    """Nobody waits for the rest."""
    pair.seconds, before = 0.02, pair.num_forwards
    try:
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.5), extra_body={"generation_config": '{"num_beams": 2, "max_new_tokens": 900}'})
        ask(client, max_tokens=2)
    finally:
        pair.seconds = 0.0
    assert pair.num_forwards - before < 200


@pytest.mark.quick
def test_serving_a_busy_port_is_told_of_before_anything_is_loaded(tiny_folders):
    """In one line, with the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        result = CliRunner().invoke(command, ["serve", "no/such/target", "--port", str(port)])
    assert result.exit_code == 1
    assert f"port {port}" in result.stderr
    assert "name another port with --port" in result.stderr


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "no/such-draft"], "no/such-draft"),
        (["--continuous-batching"], "takes no assistant model"),
        (["--host", "no.such.host.invalid"], "expected to listen on no.such.host.invalid"),
    ],
)
def test_serving_errors_of_users_are_one_line(tiny_folders, arguments, message):
    """Nothing is served."""
    result = CliRunner().invoke(command, ["serve", tiny_folders[0], "--port", "0", *arguments])
    assert result.exit_code == 1, repr(result.exception)
    assert result.stderr.count("error: ") == 1
    assert message in result.stderr


@pytest.mark.quick
def test_serving_another_targets_draft_is_refused(tiny_folders, tmp_path):
    """At the start, naming both sides."""
    other = tiny_target("llama", hidden_size=64, num_attention_heads=4)
    tiny_draft(other).save_pretrained(tmp_path / "draft")
    result = CliRunner().invoke(command, ["serve", tiny_folders[0], "--port", "0", "--draft", str(tmp_path / "draft")])
    assert result.exit_code == 1
    assert "made for another target" in result.stderr


@pytest.mark.quick
def test_serving_the_command_serves_on_loopback(tiny_folders, monkeypatch):
    """Target and draft by folder; the URL is printed."""
    started = []
    monkeypatch.setattr(serving, "run_server", lambda app, listener: started.append((app, listener)))
    target, draft = tiny_folders
    result = CliRunner().invoke(command, ["serve", target, "--draft", draft, "--port", "0", "--served-model-name", "mine"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    ((app, listener),) = started
    host, port = listener.getsockname()
    listener.close()
    assert host == "127.0.0.1"
    assert f"Serving mine with {draft} at http://127.0.0.1:{port}/v1" in result.output
    assert app.models.list_models()[0]["draft"] == draft


@pytest.mark.quick
def test_serving_loads_by_name(tiny_folders):
    """On the device and in the dtype that were asked for."""
    target, _, draft = load_named(*tiny_folders, "auto", "bfloat16", True)
    assert target.dtype == draft.dtype == torch.bfloat16
    assert draft.last_speculation is not None


def test_serving_the_guide_works(client, capsys):
    """Its Python block runs against a server, and the options that it lists are the command's."""
    guide = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", guide, flags=re.MULTILINE | re.DOTALL)
    exec(block.replace("http://127.0.0.1:8000/v1", str(client.base_url)), {})
    assert "acceptance_length" in capsys.readouterr().out
    # Of transformers' server, of the demo and of vLLM.
    others = {"--continuous-batching", "--web", "--enforce-eager"}
    options = set(re.findall(r"`(--[a-z-]+)`", guide)) - others
    known = {name for param in get_command(command).commands["serve"].params for name in param.opts + param.secondary_opts}
    assert options <= known


@pytest.mark.quick
def test_serving_reports_are_one_line():
    """With and without a draft."""
    report = serving.report_of(10, 2.0, None)
    assert serving.summary_of(report).startswith("10 tokens in 2.00 s, 5.0 tokens/s; without the draft:")


def test_a_report_of_beams_leaves_out_the_prompt():
    """They are decoded without a draft and without a streamer that would count."""
    target, request = tiny_target(), serving.Request()
    config = GenerationConfig(num_beams=2, max_new_tokens=5, pad_token_id=0)
    call = serving._DraftedCall(target, serving.Models(serving.ServedTarget("it", "none", tuple)), request)
    found = call.generate(input_ids=torch.tensor([[5, 6, 7, 8]]), generation_config=config)
    assert (found.shape[1], request.report["tokens"]) == (9, 5)


def test_serving_a_setting_leaves_the_targets_own_sampling(monkeypatch):
    """Llama 3 and Qwen sample by their own configurations: naming a tree does not change with what."""
    target = tiny_target("llama", seed=3)
    target.generation_config.update(do_sample=True, temperature=0.3, top_k=3, top_p=0.5)
    models = serving.Models(serving.ServedTarget("it", "none", tuple))
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    for settings in ({}, {"top_k": 1}, {"temperature": 0.05}):
        texts = []
        for call in (target, serving._DraftedCall(target, models, serving.Request(seed=1))):
            config = GenerationConfig(max_new_tokens=12, pad_token_id=0, **settings)
            torch.manual_seed(1)
            texts.append(call.generate(**inputs, generation_config=config).tolist())
        assert texts[0] == texts[1]


def test_serving_what_a_template_refuses_is_a_bad_request(client):
    """With its words, and so is a prompt that says nothing."""
    template = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' else '' }}" + CHAT_TEMPLATE
    pair = Pair()
    load = pair.load

    def load_with_template():
        target, tokenizer, draft = load()
        tokenizer.chat_template = template
        return target, tokenizer, draft

    pair.load = load_with_template
    with serve(pair) as strict:
        messages = [{"role": "system", "content": "w5"}, *MESSAGES]
        for is_streamed in (False, True):
            with pytest.raises(openai.BadRequestError, match="System role not supported"):
                list(strict.chat.completions.create(model="tiny/llama", messages=messages, stream=is_streamed, max_tokens=4))
    with pytest.raises(openai.BadRequestError, match="logit_bias: expected it in a chat"):
        client.completions.create(model="tiny/llama", prompt="w5", max_tokens=4, logit_bias={"10": 1})
    for prompt in ("", None):
        with pytest.raises(openai.BadRequestError, match="a prompt that is not empty"):
            client.completions.create(model="tiny/llama", prompt=prompt, max_tokens=4)


def test_serving_an_answer_ends_with_the_targets_positions():
    """Of a target with learned ones; a limit that a request names has to fit."""
    target = tiny_target("gpt2", seed=3, n_positions=24)
    models = serving.Models(serving.ServedTarget("it", "none", tuple))
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    for names_limit in (False, True):
        config = GenerationConfig(max_new_tokens=1024, pad_token_id=0, do_sample=False)
        call = serving._DraftedCall(target, models, serving.Request(names_limit=names_limit))
        if names_limit:
            with pytest.raises(ValueError, match="at most 24 tokens"):
                call.generate(**inputs, generation_config=config)
        else:
            assert call.generate(**inputs, generation_config=config).shape[1] == 24


@pytest.mark.slow
def test_serving_an_answer_is_no_time_without_a_request():
    """It takes longer than the models are kept."""
    pair = Pair()
    with serve(pair, model_timeout=1) as client:
        pair.seconds = 0.15
        ask(client, max_tokens=24, extra_body={"generation_config": json.dumps({"tree": "static", "tree_depth": 1, "tree_num_nodes": 1})})
        assert pair.num_loads == 1
        ask(client, max_tokens=2)
        assert pair.num_loads == 1
        time.sleep(2.5)
        assert pair.target() is None
