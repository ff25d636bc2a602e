"""The page of `demo --web`: an answer with the draft and without, which of its tokens were drafted, and how fast both were."""

import copy
import importlib.util
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from transformers_prism.cli.demo import PROMPTS, SHIPPED_DRAFT, RoundStreamer, answer_once, chat_inputs, load_pair
from transformers_prism.decoding.speculation import acceptance_length
from transformers_prism.policy.settings import TreeSettings
from transformers_prism.transformers_names import name_of

REFRESH_SECONDS = 0.1
CSS = """
.prism {--accepted: #2f9e5b; --bonus: #d98a00; font-size: 15px;}
.prism .columns {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 16px;}
.prism .answer {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 14px 16px; min-height: 150px;}
.prism .head {margin-bottom: 10px;}
.prism .head span, .prism .note {opacity: 0.72; font-variant-numeric: tabular-nums;}
.prism .head span {display: block; min-height: 1.5em;}
.prism .text {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.65;}
.prism .accepted {background: color-mix(in srgb, var(--accepted) 24%, transparent); border-radius: 3px;}
.prism .bonus {background: color-mix(in srgb, var(--bonus) 30%, transparent); border-radius: 3px; box-shadow: inset 0 -2px var(--bonus);}
.prism .round:hover {outline: 2px solid var(--body-text-color-subdued); outline-offset: 1px; border-radius: 3px;}
.prism .legend {display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 2px 0 10px;}
.prism .legend span {padding: 0 5px;}
.prism .verdict {margin: 14px 0 4px; font-size: 16px; font-weight: 600;}
.prism .same {color: var(--accepted);}
.prism .differs {color: #d03b3b;}
.prism .chart {display: grid; grid-template-columns: auto 1fr; gap: 6px 8px; margin-top: 16px;}
.prism .chart .caption {grid-column: 1 / -1;}
.prism .scale {display: flex; flex-direction: column; justify-content: space-between; text-align: right;}
.prism .bars {display: flex; align-items: flex-end; height: 92px; border-bottom: 1px solid var(--body-text-color-subdued);}
.prism .bar {flex: 1 1 0; max-width: 16px; display: flex; flex-direction: column; justify-content: flex-end; height: 100%;}
.prism .bar i {display: block; margin-right: min(2px, 25%);}
.prism .bar .up {background: var(--accepted);}
.prism .bar .end {background: var(--bonus);}
.prism .replay .token {animation: prism-show 0.01s both;}
@keyframes prism-show {from {visibility: hidden;} to {visibility: visible;}}
"""


@dataclass(frozen=True)
class Token:
    """A piece of text, as it appeared.

    Args:
        text (`str`): of one token, or of several if a character needs them.
        kind (`str`): "accepted": drafted, and kept by the target; "bonus": the target's own at the end of a round;
            "plain": the target's own outside of rounds.
        round (`int`): its round, from 0; -1 outside of rounds.
        seconds (`float`): since the call of generate() began.
    """

    text: str
    kind: str
    round: int
    seconds: float


@dataclass
class Answer:
    """One answer, as far as it has been decoded.

    Args:
        tokens (`list[Token]`): the text.
        token_ids (`list[int]`): every token, those without text included.
        accepted (`list[int]`): drafted tokens that each round kept.
        seconds (`float`): of the generate() call so far, or of all of it.
        state (`str`): "waiting", "running", "done" or "stopped".
        error (`Exception`, *optional*): what ended it.
    """

    tokens: list[Token] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    state: str = "waiting"
    error: Exception | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the whole call, the prompt included; 0 before the first token."""
        return len(self.token_ids) / self.seconds if self.seconds > 0 else 0.0

    @property
    def acceptance_length(self) -> float | None:
        """Committed tokens per round, the bonus included; None without a round."""
        return acceptance_length(sum(self.accepted) + len(self.accepted), len(self.accepted))


class _Stopped(Exception):
    """Ends a call of generate() whose answer nobody waits for."""


class _AnswerStreamer(RoundStreamer):
    """Writes tokens into an answer, and ends the call when it is told to stop."""

    def __init__(self, answer: Answer, tokenizer: PreTrainedTokenizerBase, stop: threading.Event):
        super().__init__(Console(quiet=True), tokenizer)
        self.answer, self.stop, self.start = answer, stop, time.perf_counter()
        self.token_ids = answer.token_ids

    def put_round(self, num_accepted: int) -> None:
        """Count a round."""
        super().put_round(num_accepted)
        self.answer.accepted.append(num_accepted)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then tokens."""
        if self.stop.is_set():
            raise _Stopped
        super().put(value)
        self.answer.seconds = time.perf_counter() - self.start

    def end(self) -> None:
        """The call ends after this."""

    def _print(self, text: str, kind: str) -> None:
        seconds = time.perf_counter() - self.start
        self.answer.tokens.append(Token(text, kind, len(self.answer.accepted) - 1, seconds))


class Comparison:
    """Decodes prompts with a draft and without, one call at a time: each has the machine to itself, and the same seed.

    Args:
        target (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`), draft (`PrismDraftModel`): a bound pair.
    """

    def __init__(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draft):
        self.target, self.tokenizer, self.draft = target, tokenizer, draft
        self._lock = threading.Lock()

    def settings(self, temperature: float, tree: str, depth: int, num_nodes: int, max_new_tokens: int) -> GenerationConfig:
        """Settings of one answer, with and without the draft.

        Args:
            temperature (`float`): 0 is greedy.
            tree (`str`): "auto", "static" or "chain".
            depth (`int`): draft steps of a round at most.
            num_nodes (`int`): drafted tokens of a round at most.
            max_new_tokens (`int`): tokens of the answer at most.
        """
        config = copy.deepcopy(self.target.generation_config)
        config.do_sample = temperature > 0
        config.temperature = float(temperature) if temperature > 0 else 1.0
        config.top_p, config.top_k = 1.0, 50
        config.max_new_tokens, config.max_length = int(max_new_tokens), None
        top_k = 10
        if tree == "static":  # a static tree has no more nodes than are drafted
            top_k = min(top_k, self.draft.config.num_draft_tokens)
            num_nodes = min(num_nodes, TreeSettings(tree, top_k, int(depth), 0).pool_size(int(depth)))
        config.tree, config.tree_top_k = tree, top_k
        config.tree_depth, config.tree_num_nodes = int(depth), int(num_nodes)
        return config

    def answers(self, prompt: str, config: GenerationConfig, seed: int) -> Iterator[tuple[Answer, Answer]]:
        """Decode with the draft, then without.

        Args:
            prompt (`str`): the user's turn.
            config (`GenerationConfig`): of [`settings`].
            seed (`int`): set before each call.
        Yields:
            `tuple[Answer, Answer]`: with the draft and without, the same two objects each time, as they grow. Closing the
            generator stops the running call at its next token and does not wait for it, since a server closes it in the thread
            that serves all visitors.
        Raises:
            Exception: what generate() raised.
        """
        drafted, plain, stop = Answer(), Answer(), threading.Event()
        arguments = (((drafted, self.draft), (plain, None)), prompt, config, seed, stop)
        thread = threading.Thread(target=self._decode_in_turn, args=arguments, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                yield drafted, plain
                thread.join(REFRESH_SECONDS)
            yield drafted, plain
        finally:
            stop.set()
        for answer in (drafted, plain):
            if answer.error is not None:
                raise answer.error

    def _decode_in_turn(self, ways, prompt: str, config: GenerationConfig, seed: int, stop: threading.Event):
        """Both calls of generate(), in their own thread, once no other visitor's call runs."""
        while not self._lock.acquire(timeout=REFRESH_SECONDS):
            if stop.is_set():
                return
        try:
            for answer, draft in ways:
                if not stop.is_set():
                    self._decode(answer, draft, prompt, config, seed, stop)
                if answer.state != "done":
                    return
        finally:
            self._lock.release()

    def _decode(self, answer: Answer, draft, prompt: str, config: GenerationConfig, seed: int, stop: threading.Event):
        answer.state = "running"
        try:
            inputs = chat_inputs(self.tokenizer, prompt, self.target.device)
            torch.manual_seed(seed)
            streamer = _AnswerStreamer(answer, self.tokenizer, stop)
            self.target.generate(**inputs, generation_config=config, assistant_model=draft, streamer=streamer)
            answer.seconds = time.perf_counter() - streamer.start
            answer.state = "done"
        except _Stopped:
            answer.state = "stopped"
        except Exception as error:
            answer.state, answer.error = "stopped", error


def render(drafted: Answer, plain: Answer, is_replay: bool = False, is_asked: bool = True) -> str:
    """The page's part that changes, as HTML.

    Args:
        drafted (`Answer`), plain (`Answer`): with the draft and without.
        is_replay (`bool`): whether both answers are replayed at once, each token at the time at which it appeared.
        is_asked (`bool`): whether there was a question.
    """
    kind = "columns replay" if is_replay else "columns"
    waits = "waits for another visitor's answer ..." if is_asked and drafted.state == "waiting" else ""
    columns = _column("With the draft", drafted, waits) + _column("Without", plain, waits)
    return f'<div class="prism">{_LEGEND}<div class="{kind}">{columns}</div>{_verdict(drafted, plain)}{_chart(drafted)}</div>'


_LEGEND = (
    '<div class="legend"><span class="accepted">drafted, and accepted by the target</span>'
    '<span class="bonus">bonus: the target\'s own token</span><i class="note">hover over a word to see its round</i></div>'
)


def _column(title: str, answer: Answer, waits: str) -> str:
    figures = []
    if answer.token_ids:
        figures = [f"{len(answer.token_ids)} tokens", f"{answer.tokens_per_second:.1f} tokens/s"]
    if answer.acceptance_length is not None:
        figures.append(f"acceptance length {answer.acceptance_length:.2f}")
    if answer.state == "stopped":
        figures.append("stopped")
    note = " · ".join(figures) or ("reads the prompt ..." if answer.state == "running" else waits)
    head = f'<div class="head"><b>{title}</b><span>{note}</span></div>'
    return f'<div class="answer">{head}<div class="text">{_text(answer)}</div></div>'


def _text(answer: Answer) -> str:
    """Tokens in their colours, those of a round together."""
    tokens, parts, current = list(answer.tokens), [], -1
    for token in tokens:
        if token.round != current and token.round >= 0:
            parts.append(("</span>" if current >= 0 else "") + f'<span class="round" title="{_round_title(answer, token.round)}">')
            current = token.round
        style = f'class="token {token.kind}" style="animation-delay:{token.seconds:.2f}s"'
        word = token.text.lstrip(" ")  # the space before a word is not coloured, as it may end a line
        parts.append(f"{' ' * (len(token.text) - len(word))}<span {style}>{escape(word)}</span>")
    return "".join(parts) + ("</span>" if current >= 0 else "")


def _round_title(answer: Answer, index: int) -> str:
    count = answer.accepted[index]
    return f"round {index + 1}: {count} drafted token{'' if count == 1 else 's'} accepted, 1 of the target"


def _verdict(drafted: Answer, plain: Answer) -> str:
    """Whether both texts are the same, and the ratio of speeds, once both are done."""
    if drafted.state != "done" or plain.state != "done":
        return ""
    if drafted.token_ids != plain.token_ids:
        return '<div class="verdict differs">Outputs differ. They must not: please report it.</div>'
    ratio = drafted.tokens_per_second / plain.tokens_per_second
    same = f"Same output, token for token ({len(plain.token_ids)} tokens)."
    speed = f"{ratio:.2f} times the speed." if ratio > 0 else ""
    return f'<div class="verdict"><span class="same">✓ {same}</span> {speed}</div>'


def _chart(drafted: Answer) -> str:
    """Tokens of each round as bars, from zero."""
    accepted = list(drafted.accepted)
    if not accepted:
        return ""
    top = max(accepted) + 1
    bars = "".join(
        f'<div class="bar" title="{_round_title(drafted, index)}">'
        f'<i class="end" style="height:{100 / top:.2f}%"></i><i class="up" style="height:{100 * count / top:.2f}%"></i></div>'
        for index, count in enumerate(accepted)
    )
    scale = f'<div class="scale note"><span>{top}</span><span>0</span></div>'
    caption = f'<div class="caption note">Tokens per round, one forward of the target each ({len(accepted)} rounds)</div>'
    return f'<div class="chart">{caption}{scale}<div class="bars">{bars}</div></div>'


def build_page(comparison: Comparison, target_name: str, draft_name: str, max_new_tokens: int = 96):
    """The page, for [`launch`].

    Args:
        comparison (`Comparison`): what answers.
        target_name (`str`), draft_name (`str`): shown below the heading.
    Returns:
        `gradio.Blocks`
    """
    import gradio as gr

    def answer(prompt, temperature, tree, depth, num_nodes, max_new_tokens, seed):
        if not prompt.strip():
            raise gr.Error("Write a question first.")
        config = comparison.settings(temperature, tree, int(depth), int(num_nodes), max_new_tokens)
        try:
            for drafted, plain in comparison.answers(prompt, config, int(seed or 0)):
                yield render(drafted, plain), (drafted, plain)
        except Exception as error:  # any error of decoding is shown on the page
            raise gr.Error(f"{type(error).__name__}: {error}") from error

    def show_stopped(answers):
        if not answers:
            return gr.skip()
        for one in answers:
            one.state = "done" if one.state == "done" else "stopped"
        return render(*answers)

    def replay(answers):
        return render(*answers, is_replay=True) if answers else gr.skip()

    with gr.Blocks(title="PRISM", analytics_enabled=False) as page:
        gr.Markdown(
            f"# PRISM: the same answer, sooner\n`{target_name}` with the draft `{draft_name}`: the draft proposes several "
            "tokens, the target checks them all in one forward and keeps those that it would have written itself."
        )
        answers = gr.State(None)
        prompt = gr.Textbox(label="Question", value=PROMPTS[0], lines=2, elem_id="question")
        with gr.Row():
            start = gr.Button("Answer", variant="primary", min_width=100, elem_id="start")
            stop = gr.Button("Stop", min_width=100, elem_id="stop")
            again = gr.Button("Replay both at once", min_width=180, elem_id="replay")
        gr.Examples([[text] for text in PROMPTS], inputs=[prompt], label="Examples")
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature", info="0 is greedy", elem_id="temperature")
                tokens = gr.Slider(16, max(512, max_new_tokens), max_new_tokens, step=1, label="Tokens at most", elem_id="tokens")
                seed = gr.Number(0, label="Seed", precision=0)
            with gr.Row():
                tree = gr.Radio(["auto", "static", "chain"], value="auto", label="Tree", info="auto: chosen every round")
                depth = gr.Slider(1, 8, 8, step=1, label="Depth", info="draft steps of a round at most")
                nodes = gr.Slider(1, 63, 63, step=1, label="Nodes", info="drafted tokens of a round at most")
        view = gr.HTML(render(Answer(), Answer(), is_asked=False), elem_id="view", padding=False)
        gr.Markdown(
            "Both are decoded in turn, with the draft first, so that each has the machine to itself. Speeds include the "
            "prompt and this page's own work; `transformers-prism bench generate` measures them properly."
        )
        inputs = [prompt, temperature, tree, depth, nodes, tokens, seed]
        # Calls wait for each other in [`Comparison`] instead, so that a waiting visitor is told and can stop.
        run = gr.on([start.click, prompt.submit], answer, inputs, [view, answers], concurrency_limit=None, show_progress="hidden")
        stop.click(show_stopped, answers, view, cancels=[run], show_progress="hidden")
        again.click(replay, answers, view, show_progress="hidden")
    return page


def run_web(
    target: str | None, draft: str | None, packed: bool, device: str, dtype: str, port: int, max_new_tokens: int = 96, host: str = "127.0.0.1"
) -> None:
    """Show the page until interrupted.

    Args:
        target (`str`, *optional*), draft (`str`, *optional*), packed (`bool`), device (`str`), dtype (`str`): as for
            [`load_pair`].
        port (`int`), host (`str`): to listen on.
        max_new_tokens (`int`): of an answer, where the page begins.
    Raises:
        ImportError: if Gradio is missing.
        OSError: if the port is in use.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("expected the package gradio for the page, got none; pip install gradio")
    page = make_page(target, draft, packed, device, dtype, max_new_tokens)
    try:
        launch(page, server_name=host, server_port=port)
    except OSError as error:
        raise OSError(f"expected to listen on {host} port {port}, got: {error}; name another with --port") from error


def make_page(
    target: str | None, draft: str | None, packed: bool = True, device: str = "auto", dtype: str = "float32", max_new_tokens: int = 96
):
    """Load a target and its draft and build their page; arguments as for [`run_web`]. Costs are measured here, not later."""
    models = load_pair(target, draft, packed, device, dtype)
    answer_once(*models)
    return build_page(Comparison(*models), name_of(models[0].config), draft or SHIPPED_DRAFT.name, max_new_tokens)


def launch(page, **options):
    """Launch a page of [`build_page`] with its colours, and without web fonts; options are Gradio's."""
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(css=CSS, theme=theme, footer_links=[], **options)


__all__ = ["Answer", "Comparison", "Token", "build_page", "launch", "make_page", "render", "run_web"]
