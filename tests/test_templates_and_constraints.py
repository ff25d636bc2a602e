"""Thinking templates, tool calls and output bound to a grammar: with a draft as without one."""

import pytest
import torch
from compatibility_runs import Case
from tiny_models import PAD_ID, VOCAB_SIZE, chat_tokenizer, prompts, scripted_draft, tiny_target
from transformers import LogitsProcessor, LogitsProcessorList

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]

ARGUMENTS = {"max_new_tokens": 32, "pad_token_id": PAD_ID}
TARGETS = ["llama", "qwen3_next"]
# Words of the grammar: an object of keys and numbers, `{ key : number , ... }`.
OPEN, CLOSE, COLON, COMMA = 10, 11, 12, 13
KEYS, NUMBERS = list(range(20, 40)), list(range(40, 80))
FOLLOWING = {
    None: [OPEN],
    OPEN: KEYS,
    COLON: NUMBERS,
    COMMA: KEYS,
    CLOSE: [OPEN],
    **dict.fromkeys(KEYS, [COLON]),
    **dict.fromkeys(NUMBERS, [COMMA, CLOSE]),
}
TEMPLATE = (
    "{% if tools %}<system> {% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}<end> {% endif %}"
    "{% for turn in messages %}<{{ turn['role'] }}> "
    "{% if turn.get('tool_calls') %}{{ turn['tool_calls'][0]['function']['name'] }} "
    "{% for value in turn['tool_calls'][0]['function']['arguments'].values() %}{{ value }} {% endfor %}"
    "{% else %}{{ turn['content'] }} {% endif %}<end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if enable_thinking %}w50 {% else %}w50 w51 {% endif %}{% endif %}"
)


def target_of(name: str):
    """A tiny target with full attention, or with recurrent layers."""
    return tiny_target(name, seed=3) if name == "llama" else Case(name, name).draw(4)


def both(target, input_ids, mask=None, seed: int = 5, wrong_every: int = 5, **arguments):
    """Sequences without and with a draft that is wrong now and then; `arguments` makes new ones for each call."""
    outputs = []
    draft = None
    for _ in range(2):
        torch.manual_seed(seed)
        made = {name: value() if callable(value) and name == "logits_processor" else value for name, value in arguments.items()}
        outputs.append(target.generate(input_ids, attention_mask=mask, assistant_model=draft, **{**ARGUMENTS, **made}))
        if draft is None:
            draft = scripted_draft(target, outputs[0], input_ids.shape[1], is_strict=False)
            for row in draft.script:
                row[::wrong_every] = [VOCAB_SIZE - 1 - token for token in row[::wrong_every]]
    return *outputs, draft.last_speculation


def allowed(batch_id: int, input_ids: torch.Tensor) -> list[int]:
    """What the grammar allows next."""
    return FOLLOWING.get(int(input_ids[-1]), [OPEN])


class Automaton(LogitsProcessor):
    """A constraint as libraries write them: it holds a state for each row and moves it by the last token at each call."""

    def __init__(self, num_prompt_tokens: int):
        self.num_prompt_tokens, self.num_calls = num_prompt_tokens, 0
        self.states: list[int | None] | None = None

    def __call__(self, input_ids, scores):
        assert input_ids.shape[1] == self.num_prompt_tokens + self.num_calls, "called once for each token, in order"
        if self.states is None:
            self.states = [None] * len(input_ids)
        else:
            self.states = input_ids[:, -1].tolist()
        self.num_calls += 1
        for row, state in enumerate(self.states):
            banned = torch.ones_like(scores[row], dtype=torch.bool)
            banned[FOLLOWING[state]] = False
            scores[row] = scores[row].masked_fill(banned, -torch.inf)
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_a_prefix_function_bounds_the_text(name, do_sample):
    """`prefix_allowed_tokens_fn` sees the prefixes that plain decoding shows it."""
    input_ids, _ = prompts(1)
    plain, drafted, speculation = both(
        target_of(name), input_ids, do_sample=do_sample, prefix_allowed_tokens_fn=allowed
    )
    assert torch.equal(plain, drafted)
    assert speculation.acceptance_length > 1.3
    new = drafted[0, input_ids.shape[1] :].tolist()
    assert all(token in FOLLOWING[before] for before, token in zip(new, new[1:], strict=False))


def test_a_prefix_function_bounds_each_row_of_a_batch():
    """Rows of a batch are shown with their own number."""
    input_ids, mask = prompts(3)
    seen = set()

    def by_row(batch_id, ids):
        seen.add(batch_id)
        return allowed(batch_id, ids) if batch_id else NUMBERS

    plain, drafted, speculation = both(target_of("llama"), input_ids, mask, do_sample=False, prefix_allowed_tokens_fn=by_row)
    assert torch.equal(plain, drafted)
    assert seen == {0, 1, 2}
    assert speculation.declined is None


def test_a_prefix_function_is_asked_about_its_own_rows_alone():
    """One with a trie for each row knows no others' texts: transformers refuses an empty list."""
    input_ids, mask = prompts(3)
    beginnings = [row.tolist() for row in input_ids]

    def of_own(batch_id, ids):
        return NUMBERS if ids[: input_ids.shape[1]].tolist() == beginnings[batch_id] else []

    plain, drafted, speculation = both(target_of("llama"), input_ids, mask, do_sample=False, prefix_allowed_tokens_fn=of_own)
    assert torch.equal(plain, drafted)
    assert speculation.declined is None


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_a_processor_with_a_state_is_called_once_a_token(name, do_sample):
    """As constraint libraries have it: rejected tokens never reach it."""
    input_ids, _ = prompts(1)
    make = lambda: LogitsProcessorList([Automaton(input_ids.shape[1])])  # noqa: E731
    plain, drafted, speculation = both(target_of(name), input_ids, do_sample=do_sample, logits_processor=make)
    assert torch.equal(plain, drafted)
    assert speculation.declined is None
    assert speculation.acceptance_length > 1.3


def test_a_processor_with_a_state_declines_a_batch():
    """Rows run ahead of each other, which one state cannot follow; the text is plain decoding's."""
    input_ids, mask = prompts(2)
    make = lambda: LogitsProcessorList([Automaton(input_ids.shape[1])])  # noqa: E731
    with pytest.warns(UserWarning, match="Automaton may keep a state for the whole batch"):
        plain, drafted, _ = both(target_of("llama"), input_ids, mask, do_sample=False, logits_processor=make)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("enable_thinking", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_thinking_templates(name, enable_thinking):
    """With and without thoughts, up to the token that ends them."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "w20 w21 w22"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, enable_thinking=enable_thinking, return_tensors="pt", return_dict=True
    )
    assert (51 in inputs["input_ids"][0].tolist()) != enable_thinking
    target = target_of(name)
    plain = target.generate(**inputs, do_sample=False, **ARGUMENTS)
    end = int(plain[0, inputs["input_ids"].shape[1] + 20])
    arguments = {"do_sample": False, "eos_token_id": [end, 1]}
    plain, drafted, speculation = both(target, inputs["input_ids"], inputs["attention_mask"], **arguments)
    assert torch.equal(plain, drafted)
    assert speculation.declined is None
    assert plain.shape[1] <= inputs["input_ids"].shape[1] + 21


@pytest.mark.parametrize("name", TARGETS)
def test_tool_calls(name):
    """A chat with tools, a call, its result, and the answer to it."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tools = [{"type": "function", "function": {"name": "w30", "description": "", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "w30", "arguments": {"place": "w44"}}}
    chat = [
        {"role": "user", "content": "w20 w21"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": "w60 w61"},
    ]
    inputs = tokenizer.apply_chat_template(
        chat, tools=tools, add_generation_prompt=True, enable_thinking=True, return_tensors="pt", return_dict=True
    )
    assert {30, 44} <= set(inputs["input_ids"][0].tolist())
    for do_sample in (False, True):
        plain, drafted, speculation = both(target_of(name), inputs["input_ids"], inputs["attention_mask"], do_sample=do_sample)
        assert torch.equal(plain, drafted)
        assert speculation.acceptance_length > 1.3
