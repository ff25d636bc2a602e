"""How far `tree="auto"` is from the best that could be chosen: recorded rounds, replayed offline at measured costs.

    python -m benchmarks.replay record spec_bench.jsonl rounds.pt --num-prompts 48
    python -m benchmarks.replay costs costs.json                    on an idle machine
    python -m benchmarks.replay compare rounds.pt costs.json --json replay.json

Greedy text is the same whatever is drafted. So `record` commits one token a round, and keeps at every position the largest
tree that the draft would draw there. `compare` then goes through the same texts in several ways, each at the same costs:

    plain           steps without a draft
    auto            the package's own policy, as it learns from call to call
    auto, learned   the same once more, with what it learned the first time
    table           as auto, but acceptance of nodes is estimated from other texts, and draft steps are chosen after drawing all
    network         the same, with estimates of a network that gets more features of a node (`replay_chances.py`)
    best sizes      numbers of draft steps and nodes chosen in hindsight in each round; the policy's estimates rank the nodes
    best nodes      nodes chosen in hindsight: only those that are accepted, and only as many as pay

The last two are found exactly, by dynamic programming over each text. They know what the target will say, which no policy can.
What a policy could gain by better estimates is what the network gains over the table. If a smaller tree than the recorded one
expands a node that the larger one did not, that node has no children here.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks.known_texts import path_of
from benchmarks.replay_chances import compare_chances
from benchmarks.tables import markdown_table
from transformers_prism import generation
from transformers_prism.bench.acceptance import packed_for_cpu
from transformers_prism.bench.prompts import choose_prompts, read_prompts, task_of
from transformers_prism.bench.record import record_head
from transformers_prism.cli.demo import SHIPPED_DRAFT, chat_inputs, load_draft
from transformers_prism.cli.options import DraftOption, TargetOption, report_file, user_errors
from transformers_prism.command_line import this_command
from transformers_prism.decoding.round_values import Limits, Proposal, Verified
from transformers_prism.decoding.tree import CandidatePool
from transformers_prism.hub.files import weights_sha256
from transformers_prism.policy import automatic
from transformers_prism.policy.candidates import Candidates
from transformers_prism.policy.costs import RoundCosts
from transformers_prism.policy.costs import measure as measure_costs
from transformers_prism.policy.experience import MAX_COPIED, Experience, cells_of_drafted
from transformers_prism.policy.fixed import PlainSteps
from transformers_prism.policy.ngrams import NgramIndex
from transformers_prism.policy.planners import WithinRound
from transformers_prism.policy.settings import TreeSettings
from transformers_prism.target import load_target
from transformers_prism.whole_files import write_json

_SETTINGS = ("tree", "top_k", "depth", "num_nodes", "ngrams")


class _Recorder(PlainSteps):
    """In place of the automatic policy: draws the largest tree, and commits one token."""

    pools: list[CandidatePool] = []
    settings: TreeSettings

    def __init__(self, settings, target, draft, sequences, sampler, text=None):
        type(self).settings = settings

    def propose(self, draft_side, sequences, limits: Limits) -> Proposal:
        """A plain step, after a look at what the draft would say."""
        self.pools.append(draft_side.read().draw(self.settings.top_k, self.settings.depth))
        return super().propose(draft_side, sequences, limits)


@torch.no_grad()
def record(target, draft, records: list[dict], inputs: list[dict], max_new_tokens: int) -> dict:
    """Decode prompts, keeping what the draft would draw at each position.

    Returns:
        `dict`: `settings` of the largest tree; `max_new_tokens`; `texts`, of each prompt its `task`, `prompt` and `answer`, lists of tokens,
        and the `steps` of its pools: token ids, parents and log-probabilities, `(positions, n)` each.
    """
    draft.generation_config.update(tree="auto")
    texts = []
    with mock.patch.object(generation, "AutomaticTrees", _Recorder):
        for one, arguments in zip(records, inputs, strict=True):
            _Recorder.pools = []
            output = target.generate(**arguments, max_new_tokens=max_new_tokens, do_sample=False, assistant_model=draft)
            steps = []
            for step in range(_Recorder.settings.depth if _Recorder.pools else 0):
                ids, parents, log_probs = (torch.cat([pool.steps[step][part] for pool in _Recorder.pools]) for part in range(3))
                steps.append((ids.int(), parents.repeat_interleave(ids.shape[1] // parents.shape[1], dim=1), log_probs))
            prompt = arguments["input_ids"][0].tolist()
            texts.append({"task": task_of(one), "prompt": prompt, "answer": output[0, len(prompt) :].tolist(), "steps": steps})
    settings = {name: getattr(_Recorder.settings, name) for name in _SETTINGS}
    return {"settings": settings, "max_new_tokens": max_new_tokens, "texts": texts}


class _FixedCosts(RoundCosts):
    """Costs that rounds do not correct."""

    def observe_verify(self, num_tokens: int, seconds: float) -> None:
        """Nothing."""

    def observe_step(self, seconds: float) -> None:
        """Nothing."""


class _FixedOverhead:
    """The further seconds of a round with a tree; rounds do not correct them."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def observe(self, has_tree: bool, seconds: float) -> None:
        """Nothing."""


@dataclasses.dataclass
class Costs:
    """Seconds of forwards, of a draft step, and of what else a round with a tree takes."""

    forwards: RoundCosts
    overhead: float = 0.0

    def round(self, num_nodes: int, num_steps: int) -> float:
        """Seconds of a round that verifies this many drafted nodes after this many draft steps."""
        drafted = num_steps * self.forwards.step_seconds + (self.overhead if num_nodes else 0.0)
        return self.forwards.verify(1 + num_nodes) + drafted


def read_costs(path: Path) -> Costs:
    """Those that `costs` wrote."""
    content = json.loads(path.read_text())
    overhead = content.pop("overhead_seconds", 0.0)
    return Costs(_FixedCosts(**content), overhead)


class _RecordedDrafter:
    """Draws from the pool that was recorded at a position."""

    is_behind = False

    def __init__(self, text: dict):
        self.text, self.position = text, 0

    def read(self) -> "_RecordedDrafter":
        """It also stands in for the draft side, which returns a drafter here."""
        return self

    def draw(self, top_k: int, depth: int, choose_width=None, coupling=None) -> CandidatePool:
        """Draw as the draft does, from the nodes that were recorded."""
        full = [tuple(part[self.position] for part in step) for step in self.text["steps"][:depth]]
        # A recorded index in the whole pool -> one in the pool that is drawn here.
        index_of, steps, num_before, chosen = {-1: -1}, [], 0, {-1}
        for step, (token_ids, parents, log_probs) in enumerate(full):
            rows = [row for row, parent in enumerate(parents.tolist()) if parent in chosen]
            if not rows:
                break
            start = len(index_of) - 1
            index_of.update({num_before + row: start + place for place, row in enumerate(rows)})
            own = torch.tensor([index_of[int(parents[row])] for row in rows])
            steps.append((token_ids[rows][None].long(), own[None], log_probs[rows][None]))
            if step + 1 == depth or choose_width is None:
                chosen = set(index_of)
            else:
                width = choose_width(steps[-1][2][:, None])
                if width == 0:
                    break
                best = log_probs[rows].topk(min(width, len(rows))).indices.tolist()
                chosen = {num_before + rows[place] for place in best}
            num_before += len(token_ids)
        return CandidatePool(steps)


class _RecordedSequences:
    """One sequence whose text is known, of which a part was emitted."""

    def __init__(self, text: dict):
        self.text, self.active = text, [0]
        self.prompt_length = len(text["prompt"])
        self.ids = torch.tensor([text["prompt"]])
        self.new_tokens: list[list[int]] = [text["answer"][:1]]

    def __len__(self) -> int:
        return 1

    @property
    def lengths(self) -> list[int]:
        """Tokens so far."""
        return [self.prompt_length + len(self.new_tokens[0])]

    def is_done(self, sequence: int) -> bool:
        """Whether the answer has ended."""
        return len(self.new_tokens[0]) == len(self.text["answer"])

    def last_tokens(self) -> list[int]:
        """The root of the next tree."""
        return [self.new_tokens[0][-1]]


def replay_auto(recorded: dict, costs: Costs, draft: object) -> tuple[float, int, int]:
    """Run the package's policy over all texts; its experience is kept with `draft`.

    Returns:
        `tuple`: seconds, rounds, and tokens that they committed.
    """
    settings = TreeSettings(**recorded["settings"])
    sampler: Any = SimpleNamespace(do_sample=False, coupling=lambda sequences, depth: None)
    seconds, num_rounds, num_tokens = 0.0, 0, 0
    for text in recorded["texts"]:
        # The stand-ins for sequences, drafter and sampler have only what the policy uses.
        sequences: Any = _RecordedSequences(text)
        drafter: Any = _RecordedDrafter(text)
        overhead: Any = _FixedOverhead(costs.overhead)
        with mock.patch.object(automatic, "known_costs", return_value=costs.forwards):
            policy = automatic.AutomaticTrees(settings, None, draft, sequences, sampler)
        policy.known = dataclasses.replace(policy.known, overhead=overhead)
        policy.planner = WithinRound(policy.known)
        answer = text["answer"]
        while not sequences.is_done(0):
            emitted = len(sequences.new_tokens[0])
            drafter.position = emitted - 1
            left = len(answer) - emitted
            # As in decoding, where it is not known in advance that the text will end earlier.
            room = recorded["max_new_tokens"] - emitted - 1
            proposal = policy.propose(drafter, sequences, Limits(room, settings.num_nodes))
            tree, tokens = proposal.tree, proposal.tree.token_ids[0].tolist()
            path = path_of(tokens, tree.parents[0].tolist(), answer[emitted:])
            kept = [0, *path][:left]
            took = costs.round(tree.num_nodes - 1, proposal.num_steps)
            policy.learn(proposal, [kept], Verified(torch.empty(0), [], [], costs.forwards.verify(tree.num_nodes)))
            sequences.new_tokens[0] = answer[: emitted + len(kept)]
            seconds, num_rounds, num_tokens = seconds + took, num_rounds + 1, num_tokens + len(kept)
    return seconds, num_rounds, num_tokens


def _choices(text: dict, position: int, settings: TreeSettings, index: NgramIndex, experience: Experience) -> tuple[list, list]:
    """The options of a round at a position, as lists of (tokens committed, nodes, draft steps): with sizes chosen in
    hindsight, and with nodes chosen in hindsight."""
    continuation = text["answer"][position + 1 :][:-1] if settings.depth else []
    # The last token of an answer is the bonus of its last round.
    sizes, nodes = [(1, 0, 0)], [(1, 0, 0)]
    match, copied = index.continuation(MAX_COPIED) if settings.ngrams else (0, [])
    for num_steps in range(len(text["steps"]) + 1):
        candidates = Candidates()
        if num_steps:
            pool = CandidatePool([tuple(part[position : position + 1] for part in step) for step in text["steps"][:num_steps]])
            ((token_ids, parents, depths, log_probs),) = pool.rows()
            cells = cells_of_drafted(depths, log_probs)
            candidates = Candidates.drafted(token_ids, parents, depths, log_probs, cells, experience.drafted.chances)
        candidates.add_copy(match, copied, experience.copied.chances)
        path = path_of(candidates.token_ids, candidates.parents, continuation, root=-1)
        ranked = sorted(range(len(candidates.values)), key=candidates.values.__getitem__, reverse=True)
        rank = {node: place for place, node in enumerate(ranked)}
        needed = 0
        for depth, node in enumerate(path, start=1):
            needed = max(needed, rank[node] + 1)
            if needed <= settings.num_nodes:
                sizes.append((depth + 1, needed, num_steps))
            nodes.append((depth + 1, depth, num_steps))
    return sizes, nodes


def best_seconds(text: dict, settings: TreeSettings, costs: Costs, experience: Experience) -> tuple[float, float]:
    """Least seconds of a text's rounds, with sizes and with nodes chosen in hindsight."""
    answer = text["answer"]
    index = NgramIndex(text["prompt"])
    options = []
    for position in range(len(answer) - 1):
        index.extend([answer[position]])
        options.append(_choices(text, position, settings, index, experience))
    totals = []
    for way in (0, 1):
        least = [0.0] * len(answer)
        for position in reversed(range(len(answer) - 1)):
            least[position] = min(
                costs.round(num_nodes, num_steps) + least[position + num_tokens]
                for num_tokens, num_nodes, num_steps in options[position][way]
            )
        totals.append(least[0])
    return totals[0], totals[1]


def compare(recorded: dict, costs: Costs) -> dict[str, dict]:
    """For each way its seconds, tau if rounds were made, its speed over plain steps, and its speed over auto."""
    draft: Any = torch.nn.Module()
    draft.device = torch.device("cpu")
    settings = TreeSettings(**recorded["settings"])
    num_tokens = sum(len(text["answer"]) - 1 for text in recorded["texts"])
    found: dict[str, dict] = {"plain": {"seconds": num_tokens * costs.round(0, 0)}}
    for name in ("auto", "auto, learned"):
        seconds, num_rounds, num_committed = replay_auto(recorded, costs, draft)
        assert num_committed == num_tokens
        found[name] = {"seconds": seconds, "tau": num_tokens / num_rounds}
    found |= compare_chances(recorded, costs.round)
    experience = automatic.experience_of(draft, False)
    best = [best_seconds(text, settings, costs, experience) for text in recorded["texts"]]
    for way, name in enumerate(("best sizes", "best nodes")):
        found[name] = {"seconds": sum(one[way] for one in best)}
    for one in found.values():
        one["over_plain"] = found["plain"]["seconds"] / one["seconds"]
        one["over_auto"] = found["auto"]["seconds"] / one["seconds"]
    return found


def rows_of(ways: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a table of what [`compare`] found."""
    heading = ["way", "seconds", "tau", "over plain", "over auto"]
    rows = []
    for name, one in ways.items():
        tau = f"{one['tau']:.2f}" if "tau" in one else ""
        rows.append([name, f"{one['seconds']:.1f}", tau, f"{one['over_plain']:.3f}", f"{one['over_auto']:.3f}"])
    return heading, rows


def section_of(record: dict) -> list[str]:
    """What the page says of a record of `compare`."""
    settings, ways = record["settings"], record["ways"]
    won = ways["network"]["over_auto"] / ways["table"]["over_auto"] - 1
    return [
        "## Automatic trees against the best choice",
        f"{settings['num_prompts']} prompts of `{settings['prompts']}`, {settings['max_new_tokens']} new tokens, greedy: at each "
        "position the largest tree that the draft would draw was recorded, and the same texts were then gone through in several "
        "ways at the same costs, measured but for the millisecond that a round with a tree takes besides. **auto** is the package's "
        "policy, as it learns from its first round on, and with what it has learned after them. **table** takes the chances of nodes "
        "from other texts and chooses draft steps after all were seen. **network** does so with chances of a network that knows more of "
        "each node: ranks, entropy, ancestors, what the n-gram copy says, how the draft did lately. **best sizes** and **best nodes** "
        "know what the target will say, which no policy can.",
        markdown_table(*rows_of(ways)),
        f"Better chances of nodes bring {100 * won:.1f} % (network over table), chances and steps known beforehand "
        f"{100 * (ways['table']['over_auto'] - 1):.1f} % (table over auto). What is left to the best nodes is what the draft does not "
        "know.",
    ]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Replay recorded rounds with other choices of trees.")


@app.command("record")
def record_command(
    prompts: Annotated[Path, typer.Argument(help="prompts in any usual shape, as Spec-Bench's")],
    output: Annotated[Path, typer.Argument(help="what was recorded")],
    target: TargetOption = None,
    draft: DraftOption = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="spread over the tasks")] = 48,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="of each answer")] = 128,
) -> None:
    """Decode prompts and record what the draft would draw at each position. Nothing is timed."""
    with user_errors():
        model, tokenizer = load_target(target)
        loaded = load_draft(draft or SHIPPED_DRAFT, model)
        chosen = choose_prompts(read_prompts(prompts), num_prompts)
        inputs = [chat_inputs(tokenizer, one["turns"][0]) for one in chosen]
        with packed_for_cpu(model, loaded, True):
            recorded = record(model, loaded, chosen, inputs, max_new_tokens)
        settings = {"prompts": prompts.name, "num_prompts": num_prompts, "max_new_tokens": max_new_tokens}
        head = record_head("replay", model, settings, weights_sha256(draft or SHIPPED_DRAFT))
        torch.save({**recorded, "head": head}, output)
        report_file(output)


@app.command("costs")
def costs_command(
    output: Annotated[Path, typer.Argument(help="JSON of the costs")],
    target: TargetOption = None,
    draft: DraftOption = None,
    overhead: Annotated[float, typer.Option(min=0, help="seconds that a round with a tree takes besides its forwards")] = 0.001,
) -> None:
    """Measure forwards and a draft step on this machine, which should be idle."""
    with user_errors():
        model, _ = load_target(target)
        loaded = load_draft(draft or SHIPPED_DRAFT, model)
        with packed_for_cpu(model, loaded, True):
            costs = measure_costs(model, loaded, 1)
        names = ("num_tokens", "verify_seconds", "step_seconds", "spread")
        write_json(output, {**{name: getattr(costs, name) for name in names}, "overhead_seconds": overhead})
        report_file(output)


@app.command("compare")
def compare_command(
    rounds: Annotated[Path, typer.Argument(help="of `record`")],
    costs: Annotated[Path, typer.Argument(help="of `costs`")],
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Go through the recorded texts in every way and print the table."""
    with user_errors():
        recorded = torch.load(rounds, weights_only=True)
        found = compare(recorded, read_costs(costs))
        typer.echo(markdown_table(*rows_of(found)))
        if json_file is not None:
            head = recorded["head"]
            commands = (head["command"], f"python -m benchmarks.replay costs {costs.name}", this_command())
            figures = {"command": "\n".join(commands), "costs": json.loads(costs.read_text()), "ways": found}
            write_json(json_file, {**head, **figures})
        report_file(json_file)


if __name__ == "__main__":
    app()
