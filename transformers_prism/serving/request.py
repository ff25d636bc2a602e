"""What a request's body asks for, checked before transformers reads it, so that errors say what was expected."""

import json
import math
import sys
import threading
from dataclasses import dataclass, field
from types import NoneType

# What transformers lets an answer have where neither request nor settings name a limit.
_MAX_NEW_TOKENS = 1024
# Fields of OpenAI's API that transformers leaves out, with the values that ask for nothing.
_UNSERVED: dict[str, tuple] = {
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
}
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


@dataclass
class Request:
    """What generation needs to know about the HTTP request that it answers, and the report on the answer."""

    has_hung_up: threading.Event = field(default_factory=threading.Event)
    seed: int | None = None
    do_sample: bool | None = None
    names_limit: bool = False
    escapes_errors: bool = True
    report: dict | None = None

    def read(self, body: dict, takes_text_alone: bool = True) -> None:
        """Take the seed out of a request's body, see whether it samples, and check its fields.

        transformers would set the seed when the request arrives, in the middle of another request's answer. And if the
        target's own configuration is greedy, it would stay greedy whatever temperature was asked for.

        Raises:
            ValueError: for a field that cannot be served.
        """
        for name in ("messages", "input"):
            _check_turns(body, name, takes_text_alone)
        _refuse_unserved(body)
        if not any(body.get(name) for name in ("messages", "input", "prompt")):
            raise ValueError("expected messages, input or a prompt that is not empty, got none")
        temperature = _number(body, "temperature", float, at_least=0)
        top_p = _number(body, "top_p", float, at_least=0)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p:g}")
        penalty = _number(body, "frequency_penalty", float)
        if penalty is not None and penalty <= -1:
            raise ValueError(f"frequency_penalty: expected more than -1, since 1 is added for transformers' repetition penalty, got {penalty:g}")
        limits = [_number(body, name, int, at_least=1) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
        self.names_limit = any(limit is not None for limit in limits)
        if (_number(body, "n", int, at_least=1) or 1) > 1:
            raise ValueError(f"n: expected 1, got {body['n']}; send one request for each answer")
        _read_stop(body)
        _read_settings(body)
        if body.get("logit_bias") is not None:
            biases = body["logit_bias"]
            if not isinstance(biases, dict):
                raise ValueError(f"logit_bias: expected an object of numbers by token id, got {biases!r}")
            if None in biases.values():
                raise ValueError(f"logit_bias: expected numbers, got {biases!r}")
            if not all(name.isdecimal() for name in biases):
                raise ValueError(f"logit_bias: expected token ids as names, got {biases!r}")
            # Clients send integers here, which transformers refuses, as it does an empty object.
            body["logit_bias"] = {name: _number(biases, name, float) for name in biases}
            if not biases:
                del body["logit_bias"]
        self.seed = _number(body, "seed", int, at_least=0)
        if self.seed is not None and self.seed >= 2**63:
            raise ValueError(f"seed: expected 0 to {2**63 - 1}, got {self.seed}")
        body.pop("seed", None)
        if temperature is not None or top_p is not None:
            self.do_sample = temperature != 0


def _number(body: dict, name: str, kind: type, at_least: float = -math.inf):
    """A number of a request's body, None if it names none."""
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not max(at_least, -sys.float_info.max) <= value <= sys.float_info.max or kind(value) != value:
        bound = "" if at_least == -math.inf else f" of at least {at_least}"
        raise ValueError(f"{name}: expected {'an integer' if kind is int else 'a number'}{bound}, got {value!r}")
    return kind(value)


def _refuse_unserved(body: dict) -> None:
    """Refuse fields that would change the answer, and which transformers leaves out; values that ask for nothing may stay."""
    for name, neutral in _UNSERVED.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise ValueError(f"{name}: expected {' or '.join(map(json.dumps, neutral)) or 'none'}, since it is not served, got {value!r}")
    if body.pop("tool_choice", None) == "none":
        body.pop("tools", None)
    if body.get("logit_bias") and "prompt" in body:
        raise ValueError("logit_bias: expected it in a chat, since completions do not serve it, got it beside a prompt")


def _check_turns(body: dict, name: str, takes_text_alone: bool) -> None:
    """Check that a field holds turns, each with a text or a list of parts, where it holds a list; only `input` may be a text."""
    turns = body.get(name, [])
    if name == "input" and isinstance(turns, str | NoneType):
        return
    if not isinstance(turns, list):
        raise ValueError(f"{name}: expected a list of turns, got {turns!r}")
    for turn in turns:
        content = turn.get("content", "") if isinstance(turn, dict) else turn
        has_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not isinstance(turn, dict) or not has_parts and not isinstance(content, str | NoneType):
            raise ValueError(f"{name}: expected turns with a text or a list of parts as content, got {turn!r}")
        kinds = [part.get("type", "text") for part in content] if has_parts else []
        if takes_text_alone and (others := [kind for kind in kinds if kind not in _TEXT_PARTS]):
            raise ValueError(f"{name}: expected parts of type text, since this server reads nothing else, got {others[0]!r}")


def _read_stop(body: dict) -> None:
    """Check the texts that end an answer; an empty list, which clients send for none, is taken out."""
    stop = body.pop("stop", None)
    texts = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop: expected a text or a list of texts, none of them empty, got {stop!r}")
    if texts:
        body["stop"] = stop


def _read_settings(body: dict) -> None:
    """Check transformers' own field, a generation configuration as JSON text."""
    text = body.get("generation_config")
    if text is None:
        return
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"generation_config: expected a JSON object as a text, got {text!r}")
    if settings.get("return_dict_in_generate"):
        raise ValueError("generation_config: expected return_dict_in_generate to be false, since answers are texts, got true")
    if settings.get("max_new_tokens") is None and settings.get("max_length") is None:
        # As without the field. generate() alone would stop after 20 tokens, and the answer would be said to be whole.
        body["generation_config"] = json.dumps({**settings, "max_new_tokens": _MAX_NEW_TOKENS})
