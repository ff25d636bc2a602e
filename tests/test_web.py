"""The page of `demo --web`: what it decodes and shows; in a real browser where there is one."""

import itertools
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import chat_tokenizer, scripted_draft, tiny_target
from typer.testing import CliRunner

from transformers_prism.cli import web
from transformers_prism.cli.main import app as command
from transformers_prism.cli.web import Answer, Comparison, Token, build_page, launch, render

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUESTION = "w9 w11 w20 w33"
SPACE = Path(__file__).resolve().parent.parent / "hub_cards" / "space"


class SlowTarget:
    """Sleeps before every forward of a target, as a large one would take its time."""

    def __init__(self, target):
        self.seconds = self.num_forwards = 0
        target.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.num_forwards += 1
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def comparison():
    """A tiny target that never ends, and a draft that foresees much of its answer to `QUESTION`."""
    target, tokenizer = tiny_target("llama", seed=3), chat_tokenizer()
    target.generation_config.eos_token_id = None
    slow = SlowTarget(target)
    inputs = web.chat_inputs(tokenizer, QUESTION)
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=96)
    draft = scripted_draft(target, plain, inputs["input_ids"].shape[1], is_strict=False)
    made = Comparison(target, tokenizer, draft.bind(target))
    made.slow = slow
    return made


def settings(comparison, temperature=0.0, tree="static", depth=4, num_nodes=12, max_new_tokens=40):
    """Settings of one answer."""
    return comparison.settings(temperature, tree, depth, num_nodes, max_new_tokens)


def finished(answers) -> tuple[Answer, Answer]:
    """Both answers, once they are done."""
    *_, last = answers
    return last


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_web_both_answers_are_the_same(comparison, temperature):
    """Token for token, greedy or sampled with the seed; tokens are told apart and counted by rounds."""
    drafted, plain = finished(comparison.answers(QUESTION, settings(comparison, temperature), seed=3))
    assert drafted.state == plain.state == "done"
    assert drafted.token_ids == plain.token_ids
    assert len(plain.token_ids) == 40
    assert sum(drafted.accepted) + len(drafted.accepted) == 39
    for index, count in enumerate(drafted.accepted):
        kinds = [token.kind for token in drafted.tokens if token.round == index and token.text]
        assert kinds.count("bonus") <= 1
        assert kinds.count("accepted") <= count
    assert plain.accepted == []
    assert "Same output, token for token (40 tokens)" in render(drafted, plain)


@pytest.mark.quick
def test_web_streams(comparison):
    """Both grow while they are decoded, with the draft first; nothing is said of the two before both are done."""
    comparison.slow.seconds = 0.03
    lengths = []
    try:
        for drafted, plain in comparison.answers(QUESTION, settings(comparison), seed=0):
            lengths.append((len(drafted.token_ids), len(plain.token_ids)))
            assert ("verdict" in render(drafted, plain)) == (plain.state == "done")
    finally:
        comparison.slow.seconds = 0
    assert len(set(lengths)) > 4
    assert all(num_drafted == 40 for num_drafted, num_plain in lengths if num_plain)
    assert lengths[-1] == (40, 40)


def wait_until(condition, seconds: float = 30.0) -> None:
    """Until something holds; fails if it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.quick
def test_web_closing_waits_for_nothing(comparison):
    """A server closes an answer in the thread that serves everybody: a forward that takes long must not hold it up.

    It joined the thread of generate() there, so that one visitor who left during a slow forward stopped the page for all.
    """
    comparison.slow.seconds, before = 1.5, comparison.slow.num_forwards
    try:
        answers = comparison.answers(QUESTION, settings(comparison), seed=0)
        drafted, _ = next(answers)
        wait_until(lambda: comparison.slow.num_forwards > before)
        start = time.monotonic()
        answers.close()
        assert time.monotonic() - start < 0.5
        # The next visitor sees that another answer is still being ended, and may leave, too.
        waiting = comparison.answers(QUESTION, settings(comparison), seed=0)
        both = next(waiting)
        assert render(*both).count("waits for another visitor") == 2
        waiting.close()
    finally:
        comparison.slow.seconds = 0
    wait_until(lambda: drafted.state == "stopped")
    assert finished(comparison.answers(QUESTION, settings(comparison), seed=0))[1].state == "done"
    assert both[0].state == "waiting"


@pytest.mark.quick
def test_web_closing_stops_decoding(comparison):
    """In the middle of an answer; the next one is whole."""
    comparison.slow.seconds = 0.03
    try:
        answers = comparison.answers(QUESTION, settings(comparison, max_new_tokens=500), seed=0)
        drafted = next(both[0] for both in answers if len(both[0].token_ids) > 3)
        answers.close()
        wait_until(lambda: drafted.state == "stopped")
        before = comparison.slow.num_forwards
        time.sleep(0.2)
        assert comparison.slow.num_forwards == before
    finally:
        comparison.slow.seconds = 0
    assert drafted.state == "stopped"
    assert "stopped" in render(drafted, Answer())
    assert finished(comparison.answers(QUESTION, settings(comparison), seed=0))[1].state == "done"


@pytest.mark.quick
def test_web_errors_of_decoding_reach_the_page(comparison, monkeypatch):
    """They are raised, not swallowed by the thread."""
    monkeypatch.setattr(comparison, "target", None)
    config = web.copy.deepcopy(torch.nn.Identity())  # never used
    with pytest.raises(AttributeError):
        finished(comparison.answers(QUESTION, config, seed=0))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("tree", "depth", "num_nodes"), list(itertools.product(["auto", "static", "chain"], [1, 8], [1, 63]))
)
def test_web_every_setting_of_the_sliders_decodes(comparison, tree, depth, num_nodes):
    """The ends of their ranges, for every kind of tree."""
    config = settings(comparison, 0.5, tree, depth, num_nodes, max_new_tokens=16)
    drafted, plain = finished(comparison.answers(QUESTION, config, seed=0))
    assert drafted.token_ids == plain.token_ids
    assert max(drafted.accepted) <= depth


@pytest.mark.quick
def test_web_text_is_escaped_and_rounds_are_told():
    """Text of a model is no HTML; every word of a round has its round's title; bars begin at zero."""
    tokens = [Token("<b>", "plain", -1, 0.1), Token(" a", "accepted", 0, 0.2), Token(" &", "bonus", 0, 0.2)]
    tokens.append(Token(" c", "bonus", 1, 0.3))
    drafted = Answer(tokens, [1, 2, 3, 4], [1, 0], 2.0, "done")
    html = render(drafted, Answer([], [1, 2, 3, 5], [], 4.0, "done"))
    assert "<b>" not in html.split('class="text"')[1].split("</div>")[0]
    assert "&lt;b&gt;" in html
    assert html.count("round 1: 1 drafted token accepted, 1 of the target") == 2
    assert html.count("round 2: 0 drafted tokens accepted") == 2
    assert re.findall(r"height:([\d.]+)%", html) == ["50.00", "50.00", "50.00", "0.00"]
    assert "2.0 tokens/s · acceptance length 1.50" in html
    assert "Outputs differ" in html
    assert "replay" not in html
    assert "animation-delay:0.30s" in render(drafted, Answer(), is_replay=True)
    assert html.count("<span") == html.count("</span>")
    assert html.count("<div") == html.count("</div>")


@pytest.mark.quick
def test_web_without_gradio_says_what_to_install(monkeypatch):
    """Before anything is loaded."""
    monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(command, ["demo", "--web", "--target", "no/such/target"])
    assert result.exit_code == 1
    assert "got none; pip install gradio" in result.stderr


def test_web_the_command_shows_the_page_on_this_machine(tiny_folders, monkeypatch):
    """On loopback, with both models' names."""
    pytest.importorskip("gradio", reason="needs the extra 'web': gradio")
    launched = {}
    monkeypatch.setattr(web, "launch", lambda page, **options: launched.update(options, page=page))
    arguments = ["demo", "--web", "--target", tiny_folders[0], "--draft", tiny_folders[1], "--port", "7999"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert (launched["server_name"], launched["server_port"]) == ("127.0.0.1", 7999)
    assert tiny_folders[1] in str(launched["page"].config)


def test_web_the_space_builds_its_page(tiny_folders, tmp_path, monkeypatch):
    """Its folder holds what the Hub asks for, and its program builds the page for the models that it is told of."""
    gradio = pytest.importorskip("gradio", reason="needs the extra 'web': gradio")
    header = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "sdk: gradio" in header
    assert "app_file: app.py" in header
    monkeypatch.setenv("TARGET", tiny_folders[0])
    monkeypatch.setenv("DRAFT", tiny_folders[1])
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {"__name__": "space", "__file__": str(SPACE / "app.py")}
    exec(compile((SPACE / "app.py").read_text(encoding="utf-8"), "app.py", "exec"), namespace)
    assert isinstance(namespace["page"], gradio.Blocks)


@pytest.fixture(scope="module")
def url(comparison):
    """Where the page is served, with a target slow enough to be watched."""
    pytest.importorskip("gradio", reason="needs the extra 'web': gradio")
    page = build_page(comparison, "tiny/target", "tiny/draft")
    _, local_url, _ = launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    comparison.slow.seconds = 0.03
    yield local_url
    comparison.slow.seconds = 0
    page.close()


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to look at the page")
    if BROWSER is None:
        pytest.skip("needs Chromium: install it, or name it in $CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def visit(browser, url: str, width: int = 1200):
    """A visitor of their own, with the question typed."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(url)
    page.locator("#question textarea").fill(QUESTION)
    return page


def text_of(page, column: int) -> str:
    """The text of one column."""
    return page.locator("#view .text").nth(column).inner_text()


@pytest.mark.slow
def test_web_in_a_browser_streams_and_compares(url, browser):
    """Text comes in parts; at the end both are the same, with colours, titles, bars and both speeds."""
    page = visit(browser, url)
    page.locator("#start").click()
    page.wait_for_selector("#view .round")
    early = text_of(page, 0)
    page.wait_for_selector("#view .verdict", timeout=60_000)
    assert text_of(page, 0).startswith(early)
    assert len(early) < len(text_of(page, 0))
    assert text_of(page, 0) == text_of(page, 1)
    assert "Same output" in page.locator("#view .verdict").inner_text()
    assert page.locator("#view .head", has_text="tokens/s").count() == 2
    assert page.locator("#view .round").first.get_attribute("title").startswith("round 1: ")
    assert page.locator("#view .bar").count() == page.locator("#view .round").count()
    page.locator("#replay").click()
    page.wait_for_selector("#view .replay .token")
    page.close()


@pytest.mark.slow
def test_web_in_a_browser_stops_in_the_middle(url, browser, comparison):
    """The answer stays as it is, nothing more is decoded, and the next question is answered."""
    page = visit(browser, url)
    page.locator("#start").click()
    page.wait_for_selector("#view .round")
    page.locator("#stop").click()
    page.wait_for_timeout(1000)
    text, before = text_of(page, 0), comparison.slow.num_forwards
    page.wait_for_timeout(500)
    assert (text_of(page, 0), comparison.slow.num_forwards) == (text, before)
    assert page.locator("#view .verdict").count() == 0
    assert "stopped" in page.locator("#view .head").first.inner_text()
    page.locator("#start").click()
    page.wait_for_selector("#view .verdict", timeout=60_000)
    page.close()


@pytest.mark.slow
def test_web_in_a_browser_fits_a_narrow_screen(url, browser):
    """One column above the other, nothing beyond the edge."""
    page = visit(browser, url, width=360)
    page.locator("#start").click()
    page.wait_for_selector("#view .verdict", timeout=60_000)
    first, second = (page.locator("#view .answer").nth(column).bounding_box() for column in (0, 1))
    assert second["y"] >= first["y"] + first["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()


@pytest.mark.slow
def test_web_in_a_browser_two_visitors_at_once(url, browser):
    """One waits for the other; each sees the answer to their own question. Who leaves holds up nobody."""
    first, second, leaving = (visit(browser, url) for _ in range(3))
    second.locator("#question textarea").fill("w50 w51")
    leaving.locator("#start").click()
    leaving.wait_for_selector("#view .round")
    first.locator("#start").click()
    second.locator("#start").click()
    leaving.close()
    for page in (first, second):
        page.wait_for_selector("#view .verdict", timeout=90_000)
        assert text_of(page, 0) == text_of(page, 1)
    assert text_of(first, 0) != text_of(second, 0)
    first.close()
    second.close()
