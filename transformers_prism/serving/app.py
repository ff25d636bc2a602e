"""`transformers serve` with a draft: an OpenAI-compatible server that decodes one target with its draft.

The routes, the chat templates and the reading and writing of requests are those of transformers. What is replaced: how the
target is loaded (`Models`), and the call of `model.generate` (`Generation`), which gets the draft, the request's seed and
a way to stop when the client hangs up.
"""

import json
import logging
import math
import socket
import threading
import time
import warnings
from asyncio import Queue, create_task
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from huggingface_hub import CacheNotFound
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from transformers_prism.decoding.speculation import Speculation
from transformers_prism.decoding.target_side import num_learned_positions
from transformers_prism.serving.request import Request
from transformers_prism.transformers_names import serve_parts

parts = serve_parts()

import uvicorn  # noqa: E402
from fastapi import HTTPException  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402
from fastapi.responses import JSONResponse  # noqa: E402

logger = logging.getLogger(__name__)

NO_CONTINUOUS_BATCHING = (
    "continuous batching of transformers takes no assistant model, so it cannot use a draft; leave it out here, or serve "
    "the target without a draft with `transformers serve --continuous-batching`"
)
# Status of a request whose client hung up; nobody receives it.
CLIENT_CLOSED_REQUEST = 499
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What a request can cause: errors of settings, of chat templates, and of a forward that no check has foreseen.
_REFUSALS = (AttributeError, IndexError, RuntimeError, TemplateError, TypeError, ValueError)


@dataclass(frozen=True)
class ServedTarget:
    """The target that is decoded with a draft.

    Args:
        name, draft_name (`str`): the model's id for clients; the draft's name, shown by `/v1/models`.
        load (`Callable`): returns target, tokenizer and the draft bound to it; called again after they were unloaded.
        model_timeout (`int`): seconds without a request after which target and draft are unloaded; -1 is never.
        allows_other_models (`bool`): whether a request may name another model, which then decodes without a draft.
    """

    name: str
    draft_name: str
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel]]
    model_timeout: int = -1
    allows_other_models: bool = False


_request: ContextVar[Request | None] = ContextVar("request", default=None)


class ClientWatch:
    """ASGI application around another: notices during an answer that its client has hung up."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request()
        messages: Queue = Queue()

        async def listen():
            message = {"type": ""}
            while message["type"] != "http.disconnect":
                message = await receive()
                messages.put_nowait(message)
            request.has_hung_up.set()

        async def next_message():
            message = await messages.get()
            if message["type"] == "http.disconnect":
                messages.put_nowait(message)  # for whoever asks again
            return message

        listener = create_task(listen())
        _request.set(request)  # seen by the tasks that this request starts, and by no other
        try:
            await self.app(scope, next_message, send)
        finally:
            listener.cancel()


class _Pair(parts.TimedModel):  # type: ignore[name-defined]
    """Target and tokenizer, unloaded after some time without a request; the time of a running answer does not count."""

    num_answering = 0
    _timer: threading.Timer

    def __init__(self, *args, forget: Callable[["_Pair"], None]):
        self.forget = forget
        super().__init__(*args)

    def reset_timer(self) -> None:
        """Count from now on, if there is a limit: transformers' timer without one goes off at once."""
        self._timer.cancel()
        if self.timeout_seconds > 0 and self.model is not None:
            self._timer = threading.Timer(self.timeout_seconds, self._timeout_reached)
            self._timer.daemon = True  # it holds up no process that ends
            self._timer.start()

    def _timeout_reached(self) -> None:
        if self.num_answering:
            self.reset_timer()
        else:
            super()._timeout_reached()

    def delete_model(self) -> None:
        """Free target and draft, forgotten first, so that a request that arrives meanwhile loads them again."""
        self.forget(self)
        super().delete_model()


class Models(parts.ModelManager):  # type: ignore[name-defined]
    """Loads models as transformers does, and the served target with its draft; `options` are those of transformers'
    ModelManager, for other models."""

    def __init__(self, served: ServedTarget, **options):
        super().__init__(model_timeout=served.model_timeout, **options)
        self.served = served
        self._lock = threading.Lock()
        self._pair: tuple | None = None

    def draft_of(self, model) -> PreTrainedModel | None:
        """The draft bound to a model; None for any but the served target."""
        target, draft = self._pair or (None, None)
        return draft if target is model else None

    def process_model_name(self, model_id: str) -> str:
        """The name that a model is kept under.

        Raises:
            HTTPException: if only the target is served, and this is another name.
        """
        if model_id == self.served.name:
            return model_id
        if not self.served.allows_other_models:
            raise HTTPException(404, f"model: expected {self.served.name!r}, the one served here, got {model_id!r}")
        return super().process_model_name(model_id)

    def load_model_and_processor(self, model_id_and_revision: str, progress_callback=None, tqdm_class=None, gguf_file=None):
        """The model and its tokenizer, loaded if they are not here."""
        name = self.served.name
        if model_id_and_revision != name:
            return super().load_model_and_processor(model_id_and_revision, progress_callback, tqdm_class, gguf_file)
        with self._lock:
            timed = self.loaded_models.get(name)
            is_cached = timed is not None
            if timed is None:
                logger.info("Loading %s with the draft %s.", name, self.served.draft_name)
                target, tokenizer, draft = self.served.load()
                timed = _Pair(target, self.model_timeout, tokenizer, forget=self._forget)
                self.loaded_models[name], self._pair = timed, (target, draft)
            timed.reset_timer()
            if progress_callback is not None:
                progress_callback({"status": "ready", "model": name, "cached": is_cached})
            return timed.model, timed.processor

    @contextmanager
    def answering(self, model) -> Iterator[None]:
        """Keep a model that is being used; its time without a request begins when the last answer has ended."""
        pair = next((one for one in self.loaded_models.values() if isinstance(one, _Pair) and one.model is model), None)
        if pair is None:  # another model, which transformers manages
            yield
            return
        pair.num_answering += 1
        try:
            yield
        finally:
            pair.num_answering -= 1
            pair.reset_timer()

    def _forget(self, pair: _Pair) -> None:
        """Let go of target and draft, if they are still those of this pair."""
        with self._lock:
            if self.loaded_models.get(self.served.name) is pair:
                del self.loaded_models[self.served.name]
                self._pair = None

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        """Entries of `/v1/models`: the target, with its draft's name; then others, if they may be asked for."""
        name = self.served.name
        status = {"value": "loaded" if name in self.loaded_models else "unloaded"}
        owner = name.split("/")[0] if name.count("/") == 1 else "local"
        own = {"id": name, "object": "model", "created": 0, "owned_by": owner, "draft": self.served.draft_name}
        others = []
        if self.served.allows_other_models:
            listed = getattr(super(), "list_models", None) or super().get_gen_models
            try:
                others = [model for model in listed(cache_dir) if model["id"] != name]
            except CacheNotFound:  # 5.23, before anything was downloaded
                others = []
        return [own | {"status": status}, *others]

    get_gen_models = list_models  # what 5.23 calls it


class _Streamer(BaseStreamer):
    """Counts tokens, and ends generation when the client has hung up; hands tokens on to a streamer, if there is one."""

    def __init__(self, streamer, has_hung_up: threading.Event):
        self.streamer, self.has_hung_up, self.num_tokens = streamer, has_hung_up, -1  # the prompt comes first

    def put(self, value):
        """Take the prompt, then tokens."""
        if self.has_hung_up.is_set():
            logger.info("The client hung up after %d tokens; the rest is not decoded.", max(self.num_tokens, 0))
            raise HTTPException(CLIENT_CLOSED_REQUEST, "the client hung up")
        self.num_tokens += 1
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self):
        """Does nothing: `generate` below ends the other streamer, after it has set the report of this answer."""


class _DraftedCall:
    """Stands in for a model in one request: `generate` adds the draft, everything else is the model's."""

    def __init__(self, model, models: Models, request: Request):
        self._model, self._models, self._request = model, models, request
        self._draft = models.draft_of(model)

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def generate(self, streamer=None, **arguments):
        """As the model's, with the draft. It runs in the one thread that all requests share, so one call at a time."""
        config, request = arguments["generation_config"], self._request
        if request.do_sample is not None:
            config.do_sample = request.do_sample
        samples = config.do_sample
        if samples is None:  # as the model's own settings say
            samples = getattr(self._model.generation_config, "do_sample", False)
        if not samples:
            # Reset, since sampling settings would bring a warning with every greedy request.
            config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
        self._fit_positions(config, arguments["input_ids"].shape[-1])
        if config.get_generation_mode() in ("greedy_search", "sample"):
            if self._draft is not None and config.dola_layers is None:
                arguments["assistant_model"] = self._draft
            arguments["streamer"] = counting = _Streamer(streamer, request.has_hung_up)
        elif streamer is not None:
            raise ValueError("expected greedy decoding or sampling for a streamed answer, got num_beams above 1")
        else:
            arguments["stopping_criteria"] = [lambda ids, _: ids.new_full(ids.shape[:1], request.has_hung_up.is_set(), dtype=torch.bool)]
        if request.seed is not None:
            torch.manual_seed(request.seed)
        start = time.perf_counter()
        try:
            with self._models.answering(self._model), warnings.catch_warnings():
                # Reported with the answer, and it may be the same for every request.
                warnings.filterwarnings("ignore", message="decoding without the draft")
                output = self._model.generate(**arguments)
        except _REFUSALS as error:
            if streamer is None or not request.escapes_errors:
                raise
            raise ValueError(json.dumps(str(error))[1:-1]) from error
        seconds = time.perf_counter() - start
        num_tokens = counting.num_tokens if "streamer" in arguments else output.shape[-1] - arguments["input_ids"].shape[-1]
        speculation = self._draft.last_speculation if "assistant_model" in arguments else None
        request.report = report_of(num_tokens, seconds, speculation)
        logger.info("%s", summary_of(request.report))
        if streamer is not None:
            streamer.end()
        return output

    def _fit_positions(self, config, num_tokens: int) -> None:
        """End an answer where a target with learned positions has no more of them; refuse a longer one that was asked for."""
        num_positions = num_learned_positions(self._model)
        if num_positions is None or config.max_new_tokens is None or num_tokens + config.max_new_tokens <= num_positions:
            return
        if self._request.names_limit or num_tokens >= num_positions:
            raise ValueError(
                f"expected a prompt and an answer of at most {num_positions} tokens (the target's positions), got {num_tokens} and "
                f"{config.max_new_tokens}"
            )
        config.max_new_tokens = num_positions - num_tokens


def report_of(num_tokens: int, seconds: float, speculation: Speculation | None) -> dict:
    """What an answer reports in its usage: tokens per second, the prompt's time included; with a draft rounds and
    acceptance length, or why the draft was not used."""
    report: dict = {"tokens": num_tokens, "seconds": round(seconds, 3)}
    report["tokens_per_second"] = round(num_tokens / seconds, 2) if seconds > 0 else None
    if speculation is None:
        return report | {"draft_not_used": "this model, or this way of decoding, has no draft"}
    if speculation.declined is not None:
        return report | {"draft_not_used": speculation.declined}
    tau, num_rounds = speculation.acceptance_length, sum(speculation.num_rounds)
    return report | {"rounds": num_rounds, "acceptance_length": None if math.isnan(tau) else round(tau, 3)}


def summary_of(report: dict) -> str:
    """A report as one line of the log."""
    rate = report["tokens_per_second"]
    line = f"{report['tokens']} tokens in {report['seconds']:.2f} s" + ("" if rate is None else f", {rate:.1f} tokens/s")
    if "draft_not_used" in report:
        return f"{line}; without the draft: {report['draft_not_used']}"
    tau = report["acceptance_length"]
    return f"{line}, {report['rounds']} rounds" + ("" if tau is None else f", acceptance length {tau:.2f}")


class Generation(parts.GenerateManager):  # type: ignore[name-defined]
    """Generates in one thread for all models and requests, one after the other: they share one random generator, and a
    seed has to hold for a whole answer."""

    def __init__(self, models: Models):
        super().__init__()
        self.models = models

    def generate_streaming(self, model, *args, **kwargs):
        """As transformers', with the draft."""
        return super().generate_streaming(self._call(model), *args, **kwargs)

    async def generate_non_streaming(self, model, *args, **kwargs):
        """As transformers', with the draft."""
        return await super().generate_non_streaming(self._call(model), *args, **kwargs)

    def _call(self, model) -> _DraftedCall:
        return _DraftedCall(model, self.models, _request.get() or Request())


class State(parts.GenerationState):  # type: ignore[name-defined]
    """Hands the same `Generation` to every handler; without continuous batching."""

    def __init__(self, generation: Generation):
        super().__init__()
        self.generation = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generation:
        """What generates for a model."""
        return self.generation


class _Checked:
    """Mixin for request handlers: adds the target's name where none is given, the reason to errors, the report to the usage."""

    async def handle_request(self, body: dict, request_id: str):
        """Answer a request.

        Raises:
            HTTPException: 400 with the reason for a request that cannot be served, 404 for a model that cannot be loaded.
        """
        request, served = _request.get() or Request(), self.model_manager.served  # type: ignore[attr-defined]
        if body.get("model") is None:
            body["model"] = served.name
        body.setdefault("stream", False)  # transformers' own default for responses is True, OpenAI's is False
        try:
            if not isinstance(body["model"], str):
                raise ValueError(f"model: expected a name, got {body['model']!r}")
            # transformers writes a message into the JSON of a stream without escaping it, but for this route.
            request.escapes_errors = not isinstance(self, parts.ResponseHandler)
            request.read(body, takes_text_alone=body["model"] == served.name)
            response = await super().handle_request(body, request_id)  # type: ignore[misc]
        except OSError as error:
            raise HTTPException(404, str(error)) from error
        except KeyError as error:
            raise HTTPException(400, f"expected the field {error} in the request, got none") from error
        except _REFUSALS as error:
            raise HTTPException(400, str(error)) from error
        return _with_report(response, request)


def _with_report(response, request: Request):
    """The response with the report in its usage, or in that of its last event."""
    if not hasattr(response, "body_iterator"):
        return JSONResponse(_with_usage(json.loads(response.body), request), response.status_code)
    events = response.body_iterator

    async def reported():
        try:
            async for event in events:
                yield "".join(_reported_line(line, request) for line in event.splitlines(keepends=True))
        finally:
            await events.aclose()

    response.body_iterator = reported()
    return response


def _reported_line(line: str, request: Request) -> str:
    """A line of an event stream, with the report added if it holds the usage; an error takes the form that clients read."""
    if line.startswith('data: {"error": "'):
        return f"data: {json.dumps(_error(json.loads(line[6:])['error']))}\n"
    if request.report is None or not line.startswith("data: {") or '"usage":' not in line:
        return line
    end = line[len(line.rstrip("\r\n")) :]
    return "data: " + json.dumps(_with_usage(json.loads(line[6:]), request)) + end


def _with_usage(payload: dict, request: Request) -> dict:
    """An answer, with the report in its usage if it has one."""
    holder: dict = payload.get("response") or payload
    if isinstance(holder.get("usage"), dict) and request.report is not None:
        holder["usage"]["speculation"] = request.report
    return payload


def _error(message: str, status: int = 400) -> dict:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": "invalid_request_error", "code": status}}


def build_app(served: ServedTarget, **options):
    """An ASGI application that serves a target with its draft, both loaded already. Its attribute `models` is the [`Models`]
    made with `options` (`device`, `dtype`, ...)."""
    models = Models(served, **options)
    state = State(Generation(models))

    def handler(name: str):
        kind = getattr(parts, name)
        return type(name, (_Checked, kind), {})(model_manager=models, generation_state=state)

    app = parts.build_server(
        models,
        handler("ChatCompletionHandler"),
        completion_handler=handler("CompletionHandler"),
        response_handler=handler("ResponseHandler"),
        transcription_handler=parts.TranscriptionHandler(models, state),
        systemone_handler=parts.SystemOneHandler(model_manager=models, generation_state=state),
        generation_state=state,
    )

    @app.exception_handler(HTTPException)
    async def tell(_, error):
        return JSONResponse(_error(error.detail, error.status_code), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def tell_of_body(_, error):
        reason = "; ".join(one["msg"] for one in error.errors())
        return JSONResponse(_error(f"expected a JSON object as the body, got another: {reason}"), 400)

    models.load_model_and_processor(served.name)
    watched = ClientWatch(app)
    watched.models = models  # type: ignore[attr-defined]
    return watched


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, opened before anything is loaded.

    Args:
        host (`str`): address of this machine; any but loopback is open to others, without a key.
        port (`int`): 0 takes a free one.
    Raises:
        OSError: if the address is not available, saying why and what to do.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family)
    except OSError as error:
        remedy = "stop what listens there, or name another port with --port"
        raise OSError(f"expected to listen on {host} port {port}, got: {error.strerror or error}; {remedy}") from error
    if host not in _LOOPBACK:
        logger.warning("Listening on %s: whoever reaches that address can use this server, which asks for no key.", host)
    return listener


def run_server(app, listener: socket.socket) -> None:
    """Serve until interrupted."""
    # An unfinished answer delays the end of the process by at most this many seconds.
    uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=5)).run(sockets=[listener])
