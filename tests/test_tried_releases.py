"""On a release of transformers that the code was not tried with, it says so once, where that may be the reason of trouble."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import transformers
from test_published_set import LENGTH, run_without_package
from tiny_models import prompts, tiny_draft, tiny_target

from transformers_prism import modeling_prism, tried_releases
from transformers_prism.tried_releases import TRIED_TRANSFORMERS, untried_release

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = TRIED_TRANSFORMERS
# Plain decoding has to serve such a call, on any release.
DECLINED = {"return_dict_in_generate": True, "output_attentions": True}


@pytest.fixture
def newer(monkeypatch):
    """A release that nobody has seen."""
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    monkeypatch.setattr(tried_releases, "_told", set())
    return monkeypatch


@pytest.fixture(scope="module")
def pair():
    """A target and a draft for it."""
    target = tiny_target("llama", 3)
    return target, tiny_draft(target)


def told_in(call) -> list[str]:
    """What a call says of releases."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "was tried with transformers" in str(one.message)]


def generate(target, draft, **arguments):
    """A call of generate() with a draft."""
    input_ids, mask = prompts(2)
    return target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH, **arguments)


@pytest.mark.parametrize("version", [OLDEST, NEWEST, "5.23.7", f"{NEWEST}.dev0", f"{NEWEST}+local"])
def test_releases_between_the_tried_ones_are_tried(monkeypatch, version):
    """Patches of the oldest one included, and what led to the newest."""
    monkeypatch.setattr(transformers, "__version__", version)
    assert untried_release() is None


@pytest.mark.parametrize("version", ["5.22.9", "5.24.1", "5.25.0.dev0", "5.100", "6.0.0rc1"])
def test_other_releases_are_named(monkeypatch, version):
    """As numbers: 5.100 is newer than 5.24."""
    monkeypatch.setattr(transformers, "__version__", version)
    expected = f"transformers_prism was tried with transformers {OLDEST} to {NEWEST}, this is {version}; "
    assert untried_release().startswith(expected)


def test_this_release_is_a_tried_one():
    """Whichever environment runs the tests."""
    assert untried_release() is None


def test_the_pins_are_the_tried_releases():
    """Newest in constraints.txt, oldest in the Makefile, and where pyproject.toml's range begins."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "Makefile", "pyproject.toml")}
    assert re.findall(r"^transformers==(.*)$", texts["constraints.txt"], flags=re.MULTILINE) == [NEWEST]
    assert re.findall(r"^OLDEST_TRANSFORMERS := (.*)$", texts["Makefile"], flags=re.MULTILINE) == [OLDEST]
    (lower,) = re.findall(r'^    "transformers>=([\d.]+),<6",$', texts["pyproject.toml"], flags=re.MULTILINE)
    assert OLDEST in (lower, f"{lower}.0")


IMPORT = """
import warnings
# It puts another object of that name in the place of the first.
import transformers.processing_utils
import transformers
transformers.__version__ = VERSION
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers_prism, transformers_prism.cli.main
print([str(one.message) for one in caught if "tried" in str(one.message)])
"""


@pytest.mark.parametrize(("version", "count"), [(NEWEST, 0), ("5.99.0", 1)])
def test_importing_the_package_warns_once_on_another_release(version, count):
    """And not on a tried one."""
    command = [sys.executable, "-c", f"VERSION = {version!r}\n{IMPORT}"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    messages = ast.literal_eval(result.stdout)
    assert len(messages) == count
    assert all("this is 5.99.0; update it, or try its tests on this release" in one for one in messages)


def test_a_call_that_is_served_says_nothing(pair, newer):
    """A newer release that works is nobody's trouble."""
    assert told_in(lambda: generate(*pair)) == []
    assert pair[1].last_speculation.declined is None


def test_a_declined_call_tells_once(pair, newer):
    """For each release that a process meets; on a tried one nothing."""
    assert len(told_in(lambda: generate(*pair, **DECLINED))) == 1
    assert told_in(lambda: generate(*pair, **DECLINED)) == []
    newer.setattr(transformers, "__version__", NEWEST)
    assert told_in(lambda: generate(*pair, **DECLINED)) == []


def test_a_call_that_fails_tells_once_and_raises_as_before(pair, newer, monkeypatch):
    """The error is the same, and so is a second one."""

    def fail(*args, **kwargs):
        raise AttributeError("a name that is gone")

    monkeypatch.setattr(modeling_prism, "speculative_generate", fail)

    def call():
        with pytest.raises(AttributeError, match="a name that is gone"):
            generate(*pair)

    assert len(told_in(call)) == 1
    assert told_in(call) == []


def test_a_draft_that_does_not_load_tells(pair, newer, monkeypatch, tmp_path):
    """But a file that is not there is not the release's fault."""
    with pytest.raises(OSError, match="absent"):
        assert told_in(lambda: modeling_prism.PrismDraftModel.from_pretrained(str(tmp_path / "absent"))) == []
    pair[1].save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_prism, "PrismProcessingModule", None)

    def call():
        with pytest.raises(TypeError):
            modeling_prism.PrismDraftModel.from_pretrained(tmp_path)

    assert len(told_in(call)) == 1


GONE = """
import warnings
import transformers.processing_utils
import transformers, transformers.generation
transformers.__version__ = "5.99.0"
transformers.generation._class_to_module.pop("GenerateDecoderOnlyOutput")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        import transformers_prism
    except ImportError as error:
        print([str(error), [str(one.message) for one in caught if "tried" in str(one.message)]])
"""


def test_a_name_that_is_gone_tells():
    """When the code is imported, before anything was drafted."""
    command = [sys.executable, "-c", GONE]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    error, messages = ast.literal_eval(result.stdout)
    assert "GenerateDecoderOnlyOutput" in error
    assert len(messages) == 1


PUBLISHED = """
import transformers, warnings
transformers.__version__ = "5.99.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True)
    target.generate(**inputs, assistant_model=draft, **LENGTH)
    counts = [len([one for one in caught if "tried" in str(one.message)])]
    for _ in range(2):
        target.generate(**inputs, assistant_model=draft, **LENGTH, **DECLINED)
print([counts, [str(one.message) for one in caught if "tried" in str(one.message)]])
"""


def test_published_code_says_how_it_is_renewed(pair, tmp_path):
    """Once, and only when a call was declined: by whoever published it, or by a newer package in its place."""
    target, draft = pair
    target.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    code = f"DECLINED = {DECLINED}\n{PUBLISHED}"
    printed = run_without_package(tmp_path / "draft", tmp_path / "target", code, HF_MODULES_CACHE=str(tmp_path / "modules"))
    counts, messages = ast.literal_eval(printed.splitlines()[-1])
    assert counts == [0]
    assert messages == [
        f"this draft's code was tried with transformers {OLDEST} to {NEWEST}, this is 5.99.0; whoever published the draft "
        "can renew its code with `transformers-prism push --code-only USER/DRAFT`, or install and import the newest "
        "transformers_prism, whose own code then runs"
    ]
