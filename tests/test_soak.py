"""A short soak, and that a soak sees what is broken."""

import json

import pytest
import soak
import torch

from transformers_prism.decoding import walk as walk_module
from transformers_prism.decoding.sampler import Sampler
from transformers_prism.decoding.sampling_noise import StepNoise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs():
    """One target with windows, served by trees, and one with convolutions, served by chains."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = {name: soak.fit_pair(name, num_updates=100) for name in ("gemma3_text", "lfm2")}
    torch.set_num_threads(num_threads)
    return pairs


@pytest.mark.slow
def test_a_short_soak_equals_plain_decoding(pairs):
    """60 generations, with two tokens a round and more, as in a long soak."""
    tally = soak.soak(pairs, 60, 0, soak.Tally())
    assert not tally.differences
    assert tally.num_generations >= 60
    assert tally.counts["drafted"] >= 25
    assert tally.tokens_per_round >= 2
    assert tally.counts["near ties, not compared"] + tally.counts["both raised"] <= 10


def any_child(tree, row):
    """A table of children in which every token is that of a node's first child."""

    class Table(dict):
        def get(self, pair, default=None):
            return next((node for (parent, _), node in self.items() if parent == pair[0]), default)

    return Table(right_children(tree, row))


right_children = walk_module._children
right_noise = StepNoise.of_step


def shifted_noise(self, row, step, shape):
    """The draw of the step after."""
    return right_noise(self, row, step + 1, shape)


right_finish = Sampler.finish


def finish_with_a_draw(self, num_steps):
    """One number more is drawn from the generator."""
    torch.rand(1)
    return right_finish(self, num_steps)


BROKEN = {
    "a wrong token is accepted": (walk_module, "_children", any_child),
    "draws are those of the next step": (StepNoise, "of_step", shifted_noise),
    "the generator is left ahead": (Sampler, "finish", finish_with_a_draw),
}


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_loop_is_seen(broken, pairs, monkeypatch):
    monkeypatch.setattr(*BROKEN[broken])
    tally = soak.Tally()
    while not tally.differences and tally.num_generations < 60:
        soak.soak(pairs, tally.num_generations + 1, 0, tally)
    assert tally.differences
    assert soak.report(tally) == 1


def test_a_soak_goes_on_where_it_stopped(pairs, tmp_path, capsys):
    """The tally of a run that was cut off, read again, gives what one run gives."""
    path = tmp_path / "soak.json"
    whole = soak.soak(pairs, 12, 0, soak.Tally())
    first = soak.Tally()
    soak.soak(pairs, 6, 0, first, soak.Progress(6, path, first))
    assert "generations" in capsys.readouterr().out
    second = soak.soak(pairs, 12, 0, soak.Tally(json.loads(path.read_text())))
    assert second.counts == whole.counts
    assert second.next_seed == whole.next_seed
    assert [len(one) for one in second.resident] != [len(one) for one in whole.resident]


def test_memory_that_grows_is_seen():
    """By medians of the process that lived longest; too few generations say nothing."""
    steady = [100, *[200] * 2999]
    assert soak.Tally({"resident": [steady]}).growth() == 1
    growing = [1000 + generation for generation in range(3000)]
    tally = soak.Tally({"resident": [growing]})
    assert tally.growth() > 1.01
    assert soak.report(tally) == 1
    assert soak.Tally({"resident": [growing[:1000]]}).growth() is None
