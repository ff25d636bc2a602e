"""Faults: exceptions and interrupts at every line of a call, threads, forks, copies, full disks.

python -m tests.faults --json docs/compatibility/faults.json    everything, some tens of minutes
python -m tests.faults --part lines --every 10 --scenario chain
python -m tests.faults --part lines --errors KeyboardInterrupt --scenario static --json FILE    a row of the file anew

After each fault models, caches and settings must be as they were, and the next call must be right (`fault_lines.py`). The
exit status is 1 if anything failed.
"""

import argparse
import contextlib
import copy
import errno
import functools
import json
import os
import pickle
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from fault_lines import EXCEPTIONS, LENGTH, SCENARIOS, Call, changes, check_lines, pairs_for, state_of
from fitted_pairs import text_of
from soak import Pair, fit_pair

from transformers_prism.decoding.memory import take_from
from transformers_prism.policy import costs as round_costs
from transformers_prism.transformers_names import CACHE_KEYWORD

_PROMPT_LENGTH = 9


def _prompts(pair: Pair, seed: int) -> dict:
    text = text_of(pair.chain, 2, _PROMPT_LENGTH, torch.Generator().manual_seed(seed))
    return {"input_ids": text, "attention_mask": torch.ones_like(text), **LENGTH}


@torch.no_grad()
def _can_be_drawn(target, sequences: torch.Tensor) -> bool:
    """Whether each new token is one of the three that the target finds likeliest there, or as likely."""
    start = _PROMPT_LENGTH - 1
    logits = target(sequences).logits[:, start:-1]
    chosen = logits.gather(-1, sequences[:, start + 1 :, None])[..., 0]
    return bool((chosen >= logits.topk(3, dim=-1).values[..., 2] - 1e-3).all())


def check_threads(pair: Pair, num_threads: int = 4, num_calls: int = 6, is_shared: bool = False) -> list[str]:
    """Threads that decode at once, greedily and sampled, each with models of its own, or all with the same.

    Greedy text must be plain decoding's. Threads share the generator, so that sampled text may be any that can be drawn:
    each token one of the likeliest three. An error counts as wrong unless models are shared and it is a ValueError, which
    says why.
    """
    copies = [pair if is_shared else copy.deepcopy(pair) for _ in range(num_threads)]
    expected = [pair.target.generate(**_prompts(pair, seed), do_sample=False) for seed in range(num_calls)]
    problems: list[str] = []

    def work(number: int) -> None:
        own = copies[number]
        for seed in range(num_calls):
            is_sampled = (seed + number) % 2 == 1
            chosen = {"do_sample": True, "top_k": 3} if is_sampled else {"do_sample": False}
            try:
                output = own.target.generate(**_prompts(pair, seed), assistant_model=own.draft, **chosen)
                is_right = _can_be_drawn(own.target, output) if is_sampled else torch.equal(output, expected[seed])
                if not is_right:
                    problems.append(f"thread {number}, call {seed}: wrong output")
            except Exception as error:
                if not (is_shared and type(error) is ValueError):
                    problems.append(f"thread {number}, call {seed}: {error!r}")

    before = state_of(pair, None)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return problems + [f"not as before: {name}" for name in changes(before, state_of(pair, None))]


def check_fork(pair: Pair) -> list[str]:
    """A child process goes on decoding with what its parent has used."""
    expected = pair.target.generate(**_prompts(pair, 0), assistant_model=pair.draft)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # where the process has threads, as under pytest
        child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            output = pair.target.generate(**_prompts(pair, 0), assistant_model=pair.draft)
            os.write(write, json.dumps(output.tolist()).encode())
            status = 0
        os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status != 0:
        return [f"the child ended with status {status}"]
    return [] if json.loads(found) == expected.tolist() else ["the child's output is wrong"]


def _pickled(one):
    return pickle.loads(pickle.dumps(one))


def check_copies(pair: Pair) -> list[str]:
    """Copies and pickles of models, and of a chat's cache, made between calls."""
    problems = []
    target, draft = pair.target, pair.draft
    expected = target.generate(**_prompts(pair, 0), assistant_model=draft)
    chat = Call(next(one for one in SCENARIOS if one.name == "chat"), pair)
    for copied in (copy.deepcopy, _pickled):
        # Once a model has returned hidden states, with a draft or without, hooks of transformers keep it from being pickled.
        for which in ("both", "target", "draft") if copied is copy.deepcopy else ("draft",):
            try:
                models = copied((target, draft)) if which == "both" else (target, draft)
                models = (copied(target), draft) if which == "target" else models
                models = (target, copied(draft)) if which == "draft" else models
                if not torch.equal(models[0].generate(**_prompts(pair, 0), assistant_model=models[1]), expected):
                    problems.append(f"{copied.__name__} of {which}: wrong output")
            except Exception as error:
                problems.append(f"{copied.__name__} of {which}: {error!r}")
        with chat.settings():
            chat.prepare(draft)
            for cache in (copied(chat.cache), chat.cache):
                chat.inputs[CACHE_KEYWORD] = cache
                if not torch.equal(chat.run(draft), chat.expected):
                    problems.append(f"{copied.__name__} of a cache: wrong output")
    num_bytes = sum(one.numel() * one.element_size() for one in (*draft.parameters(), *draft.buffers()))
    if len(pickle.dumps(draft)) > 2 * num_bytes + 200_000:
        problems.append(f"the pickle of a draft of {num_bytes} bytes has {len(pickle.dumps(draft))}")
    return problems


def _full_disk(room: int) -> dict[str, Callable]:
    """Methods of `Path` on a disk where a file takes so many bytes and no more."""

    def write(path, data, *arguments, **keywords):
        data = data.encode() if isinstance(data, str) else data
        with open(path, "wb") as file:
            file.write(data[:room])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return {"write_text": write, "write_bytes": write}


def _refuse(*arguments, **keywords):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def check_disk(pair: Pair) -> list[str]:
    """Costs of rounds on a disk that is full or cannot be written to: the call goes well and leaves no file behind."""
    problems = []
    expected = pair.target.generate(**_prompts(pair, 0), do_sample=False)
    pair.draft.generation_config.update(tree="auto")
    faults = {
        "full, nothing fits": _full_disk(0),
        "full, a part fits": _full_disk(10),
        "not to be renamed on": {"replace": _refuse, "rename": _refuse},
        "read-only": {"mkdir": _refuse, "write_text": _refuse, "write_bytes": _refuse},
        "unreadable": {"read_text": _refuse, "read_bytes": _refuse},
    }
    for name, methods in faults.items():
        take_from(pair.target, "round costs")
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            folder = Path(scratch) / "costs"
            for owner, attribute, value in [
                (round_costs.constants, "HF_HOME", str(folder)),
                *((Path, method, value) for method, value in methods.items()),
            ]:
                stack.callback(setattr, owner, attribute, getattr(owner, attribute))
                setattr(owner, attribute, value)
            try:
                output = pair.target.generate(**_prompts(pair, 0), do_sample=False, assistant_model=pair.draft)
                if not torch.equal(output, expected):
                    problems.append(f"disk {name}: wrong output")
            except Exception as error:
                problems.append(f"disk {name}: {error!r}")
            left = [one.name for one in folder.rglob("*") if one.is_file()]
            if left and name != "unreadable":
                problems.append(f"disk {name}: left {left} behind")
    take_from(pair.target, "round costs")
    return problems


OTHERS: dict[str, Callable[[Pair], list[str]]] = {
    "threads": check_threads,
    "shared": functools.partial(check_threads, num_threads=2, is_shared=True),
    "fork": check_fork,
    "copies": check_copies,
    "disk": check_disk,
}


def main(argv=None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["lines", *OTHERS], help="only this")
    parser.add_argument("--scenario", choices=[one.name for one in SCENARIOS], help="of lines, only this")
    parser.add_argument("--every", type=int, default=1, help="of lines, every N-th, with one error each")
    names = [error.__name__ for error in EXCEPTIONS]
    parser.add_argument("--errors", nargs="+", choices=names, default=names, help="of lines, these; without --every each at each line")
    parser.add_argument("--json", type=Path, help="where the counts are written; what it holds of other calls stays")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}", flush=True)
    record: dict = {"lines": {}, "others": {}}
    if args.json is not None and args.json.is_file():
        record |= json.loads(args.json.read_text(encoding="utf-8"))
    record |= {"transformers": transformers.__version__, "torch": torch.__version__}
    is_bad = False
    if args.part in (None, "lines"):
        scenarios = [one for one in SCENARIOS if args.scenario in (None, one.name)]
        pairs = pairs_for(scenarios)
        errors = [error for error in EXCEPTIONS if error.__name__ in args.errors]
        for scenario in scenarios:
            found = check_lines(scenario, pairs[scenario.architecture], args.every, errors, _Progress())
            print(f"{scenario.name}: {found['places']} places, {found['raised']} faults", flush=True)
            for kind in ("failed", "in cleanup"):
                for text, places in found[kind].items():
                    print(f"  {kind} {len(places)} times: {text}\n    {', '.join(places[:8])}", flush=True)
            counts = {"places": found["places"], "every": args.every, "errors": args.errors, "faults": found["raised"]}
            record["lines"][scenario.name] = counts | {"failed": sum(map(len, found["failed"].values()))}
            is_bad |= bool(found["failed"])
    others = {name: check for name, check in OTHERS.items() if args.part in (None, name)}
    pair = fit_pair("mistral", num_updates=60) if others else None
    for name, check in others.items():
        problems = check(pair)
        print(f"{name}: {len(problems)} failed", *problems, sep="\n  ", flush=True)
        record["others"][name] = len(problems)
        is_bad |= bool(problems)
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(is_bad)


class _Progress:
    """Prints a line now and then."""

    def __init__(self):
        self.told = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self.told > 30:
            self.told = time.monotonic()
            print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
