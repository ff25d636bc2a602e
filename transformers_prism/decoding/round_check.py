"""Check rounds of untried targets against single steps from the same state.

The package was tried on the types of `tried_targets.py`. Any other model (an architecture that is newer than this package,
code from a repository, a model whose modules have hooks or a forward from elsewhere) may mask, count positions or keep states
in a way that is wrong for several tokens at once.
So its first tree is compared with plain steps over the same tokens. This is repeated each time the length has doubled, and
after each length that its configuration names. Results hold for all models of the same code and configuration on this machine:
checked lengths are kept in Hugging Face's cache folder (`prism/checked_rounds`), so that only the first calls pay for this.
Shape letters: B rows that still decode, N tree nodes, V vocabulary.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants

from ..transformers_names import attention_name
from ..tried_targets import TRIED_TYPES
from ..whole_files import name_of_parts, write_json_if_possible
from .memory import kept_with, warn_once
from .target_support import added_code, foreign_forwards, is_changed, is_foreign
from .tree import Tree

# Parts of names of configuration fields that hold lengths at which attention or positions may change.
_LENGTH_WORDS = ("window", "topk", "top_k", "chunk", "original_max", "max_position", "block_size", "max_seq")
# Differences of logits that rounding can explain: units in the last place of the largest, and the most as a share of it.
_ROUNDING, _MOST_ROUNDING = 4096, 0.25


class _CheckedLengths:
    """Lengths in tokens, rising, at which models of one code and configuration were checked, by kind of call.

    Args:
        path (`Path`, *optional*): a file that they are kept in.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.by_kind: dict[str, list[int]] = {}
        if path is None:
            return
        with contextlib.suppress(OSError, ValueError):  # none yet, or not one of ours
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                self.by_kind = {kind: lengths for kind, lengths in found.items() if _are_lengths(lengths)}

    def of(self, kind: str) -> list[int]:
        """Lengths at which this kind of call was checked."""
        return self.by_kind.setdefault(kind, [])

    def add(self, kind: str, length: int) -> None:
        """Add a length; if the file cannot be written, for this process only."""
        self.of(kind).append(length)
        if self.path is not None:
            write_json_if_possible(self.path, self.by_kind)


def _are_lengths(values) -> bool:
    return isinstance(values, list) and all(type(value) is int and value > 0 for value in values)


def _folder() -> Path:
    return Path(constants.HF_HOME) / "prism" / "checked_rounds"


@functools.cache
def _digest(path: str) -> str:
    """sha256 of a source file; empty if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def _source_of(kind) -> str:
    """Source file of a class or function; empty if there is none, as in an interactive session."""
    try:
        return inspect.getsourcefile(kind) or ""
    except (OSError, TypeError):
        return ""


def _sources(target) -> list[str]:
    """Source files of a model's class and of the forwards of its modules' classes that are not from tried packages."""
    return [_source_of(type(target)), *sorted(map(_source_of, foreign_forwards(target)))]


def _key(target) -> str:
    """A file name derived from what a check's outcome depends on: the model's code and ours, configuration, layers, device."""
    own_code = [_digest(str(path)) for path in sorted(Path(__file__).parent.glob("*.py"))]
    parts = [
        f"{type(target).__module__}.{type(target).__qualname__}",
        [_digest(path) for path in _sources(target)],
        sorted({f"{type(module).__module__}.{type(module).__qualname__}" for module in target.modules()}),
        json.dumps(target.config.to_dict(), default=repr),
        [str(target.dtype), target.device.type, attention_name(target.config)],
        [transformers.__version__, torch.__version__, *own_code],
    ]
    return name_of_parts(parts)


def is_tried(target) -> bool:
    """Whether the package was tried on this model's type, and on that of its text part, in transformers' own code alone."""
    is_stock = type(target).__module__.startswith("transformers.models.")
    types = {target.config.model_type, target.config.get_text_config().model_type}
    return is_stock and types <= TRIED_TYPES and not foreign_code(target)


def foreign_code(target) -> list:
    """What a model's forwards run of packages that were not tried, as for steering activations or compressing caches: hooks,
    attention functions, forwards that replace a class's own, and modules of other classes."""
    return [*(function for function in added_code(target) if is_foreign(function)), *foreign_forwards(target)]


def _checked_lengths(target) -> "_CheckedLengths":
    """The lengths of models of this code and configuration. None are known of code that was added to a model: what it computes
    may depend on values that change from call to call."""
    if is_changed(target):
        return _CheckedLengths()
    return kept_with(target, "checked lengths", lambda: _CheckedLengths(_path(target)))


def _path(target) -> Path | None:
    """The file of the checks of a model's code and configuration; None if some of the code is in no file."""
    return _folder() / f"{_key(target)}.json" if all(map(_digest, _sources(target))) else None


def lengths_named(text_config) -> list[int]:
    """Lengths in tokens that a configuration names, rising: windows, numbers of keys, original lengths."""
    found: set[int] = set()

    def collect(values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(value)
            elif any(word in str(name) for word in _LENGTH_WORDS) and type(value) is int and value > 1:
                found.add(value)

    collect(text_config.to_dict())
    return sorted(found)


class RoundCheck:
    """Compares trees with plain steps where a target was not tried, or not in every way that this call needs.

    Args:
        target_side (`TreeTarget` or `ChainTarget`): after the prefill.
    """

    def __init__(self, target_side):
        self.side, target = target_side, target_side.target
        self.finding: str | None = None  # what differed
        self.is_needed = target_side.is_checked or not is_tried(target)
        if self.is_needed:
            # Forwards get different inputs in these kinds of calls.
            is_batch, is_padded = len(target_side.next_position) > 1, target_side.is_padded
            self.kind = f"{type(target_side).__name__}, {'batch' if is_batch else 'one'}, {'padded' if is_padded else 'whole'}"
            self.checked = _checked_lengths(target)
            self.seen = self.checked.of(self.kind)
            self.lengths = lengths_named(target.config.get_text_config())

    def _is_due(self, length: int) -> bool:
        """Whether the next tree is the first beyond twice the checked length or a length that the configuration names."""
        if not self.seen or length >= 2 * self.seen[-1]:
            return True
        return any(self.seen[-1] < named <= length for named in self.lengths)

    def max_depth(self) -> float:
        """Most draft steps of the next tree, so that it spans no length that the configuration names: no check covers that."""
        if not self.is_needed:
            return math.inf
        length, longest = min(self.side.next_position), max(self.side.next_position)
        # Nodes beyond a row's last position get that position, so a check of such a tree would not cover others.
        ends = zip(self.side.next_position, self.side.position_limit, strict=True)
        if self._is_due(length) and any(position >= limit for position, limit in ends):
            return 0
        # In every row, the text up to the deepest node is at most as long as the next such length.
        return min((named - 1 - longest for named in self.lengths if named > length), default=math.inf)

    def plain_steps(self, tree: Tree) -> torch.Tensor | None:
        """The target's logits `(B, 2, V)` at each root and its likeliest child by single steps; None if no check is due."""
        if not self.is_needed or self.finding or tree.num_nodes == 1 or not self._is_due(min(self.side.next_position)):
            return None
        children = _likeliest_children(tree)
        return self.side.plain_steps(torch.stack((tree.token_ids[:, 0], tree.token_ids.gather(1, children)[:, 0]), dim=1))

    @contextmanager
    def failing_forwards(self, tree: Tree) -> Iterator[None]:
        """Turn an error of a forward over several tokens into a finding and a warning: single steps may still work."""
        try:
            yield
        except Exception as error:
            if not self.is_needed or self.finding or tree.num_nodes == 1:
                raise
            name = type(self.side.target).__name__
            self.finding = f"{name} refuses several tokens behind its cache ({type(error).__name__}: {error})"
            warn_once(self.side.target, f"decoding goes on without the draft: {self.finding}", stacklevel=8)

    def differs(self, tree: Tree, logits: torch.Tensor, steps: torch.Tensor | None) -> bool:
        """Whether a tree's logits `(B, N, V)` differ from those of the single steps; warns if so."""
        if steps is None or logits.shape[1] == 1:  # of a chain that the target verified no further than its root
            return False
        index = torch.cat((torch.zeros_like(tree.token_ids[:, :1]), _likeliest_children(tree)), dim=1)  # [B, 2]
        of_tree = logits.gather(1, index[..., None].to(logits.device).expand(-1, -1, logits.shape[-1])).float()
        steps = steps.to(of_tree)
        difference, scale = float((of_tree - steps).abs().max()), float(steps.abs().max())
        # Some models return logits in float32 whatever they compute in, and compute parts in it even in float64.
        eps = max(torch.finfo(kind).eps for kind in (logits.dtype, self.side.target.dtype, torch.float32))
        allowed = scale * min(_ROUNDING * eps, _MOST_ROUNDING)
        length = min(self.side.next_position)
        if difference <= allowed:
            self.checked.add(self.kind, length)
            return False
        target = self.side.target
        self.finding = (
            f"logits of {type(target).__name__} over several tokens differ from single steps by {difference:.3g} at "
            f"{length} tokens (rounding explains {allowed:.1g})"
        )
        what = "its attention, or some of its modules, run code of another package" if is_changed(target) else "please report this model"
        warn_once(target, f"decoding goes on without the draft: {self.finding}; {what}", stacklevel=8)
        return True


def _likeliest_children(tree: Tree) -> torch.Tensor:
    """The node of each row, `(B, 1)`, that the draft thinks likeliest after the root."""
    is_child = tree.parents == 0
    is_child[:, 0] = False
    return tree.log_probs.masked_fill(~is_child, -torch.inf).argmax(dim=1, keepdim=True)
