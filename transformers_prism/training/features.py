"""The target's hidden states over conversations, cached on disk or computed whenever they are asked for.

A folder of features holds `features.json` and one file per shard. A shard has one bfloat16 row per token, in the order of
the conversations: the target's states at `layer_ids`, concatenated. A shard is renamed into place when it is complete, so an
interrupted run resumes where it stopped, and several processes may share one folder. A folder grows with its data: if
conversations are appended, only their features are computed.
"""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from transformers_prism.borrowed_layers import place_of, target_logits
from transformers_prism.configuration_prism import target_fingerprint, target_numerics
from transformers_prism.decoding.eval_mode import in_eval_mode
from transformers_prism.decoding.target_support import hidden_state, states_to_ask_for
from transformers_prism.target import weights_digest
from transformers_prism.training.data.conversations import Conversation, sha256_of
from transformers_prism.training.progress_bar import ProgressBar
from transformers_prism.transformers_names import output_embeddings
from transformers_prism.whole_files import read_json, whole_file, write_json

logger = logging.getLogger(__name__)

CONVERSATIONS_PER_SHARD = 64
BYTES_PER_VALUE = 2  # bfloat16
# Lowest rank correlation between the target's own logits and those that its head computes from the last state in bfloat16.
_LEAST_CORRELATION = 0.8
# Largest median difference between these logits, in units of their standard deviation.
_MOST_DIFFERENCE = 0.1
# Largest relative difference of kept states from those of today's target, which may compute in bfloat16.
_MOST_CHANGE = 0.1


class FeatureStore:
    """The target's hidden states over a list of conversations, memory-mapped from a folder of shards; a token's C
    states at `layer_ids` have `width` values in total."""

    def __init__(self, folder, conversations: list[Conversation], layer_ids: list[int], width: int):
        self.folder = Path(folder)
        self.layer_ids = list(layer_ids)
        self.width = width
        self.lengths = [len(conversation.input_ids) for conversation in conversations]
        self._mapped: dict[int, torch.Tensor] = {}

    @property
    def num_shards(self) -> int:
        """Files that the conversations are spread over."""
        return -(-len(self.lengths) // CONVERSATIONS_PER_SHARD)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards together."""
        return sum(self.lengths) * self.width * BYTES_PER_VALUE

    def shard_path(self, shard: int) -> Path:
        """File of a shard, there once the shard is whole."""
        return self.folder / f"shard-{shard:05d}.bf16"

    def members(self, shard: int) -> range:
        """Indices of the conversations in a shard."""
        first = shard * CONVERSATIONS_PER_SHARD
        return range(first, min(first + CONVERSATIONS_PER_SHARD, len(self.lengths)))

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a whole shard."""
        return sum(self.lengths[index] for index in self.members(shard)) * self.width * BYTES_PER_VALUE

    def missing_shards(self) -> list[int]:
        """Shards that are missing or incomplete, such as the last one after data was added."""
        return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

    def _is_whole(self, shard: int) -> bool:
        path = self.shard_path(shard)
        return path.is_file() and path.stat().st_size == self.shard_bytes(shard)

    def states(self, index: int) -> torch.Tensor:
        """States over conversation `index`: bfloat16 of shape `(T, width)`, a view of the mapped file."""
        shard = index // CONVERSATIONS_PER_SHARD
        if shard not in self._mapped:
            self._mapped[shard] = self._map(shard)
        start = sum(self.lengths[self.members(shard)[0] : index])
        return self._mapped[shard][start : start + self.lengths[index]]

    def _map(self, shard: int) -> torch.Tensor:
        path = self.shard_path(shard)
        expected, found = self.shard_bytes(shard), path.stat().st_size
        if found != expected:
            raise ValueError(f"{path.name}: expected {expected} bytes, got {found}")
        values = torch.from_file(str(path), shared=False, size=expected // BYTES_PER_VALUE, dtype=torch.bfloat16)
        return values.view(-1, self.width)  # [tokens of the shard, width]


class OnlineFeatures:
    """The target's hidden states over a list of conversations, computed anew each time, with nothing on disk.

    Each conversation runs through the target by itself, here as in [`compute_features`], so that both give the same
    numbers.
    """

    def __init__(self, target, conversations: list[Conversation], layer_ids: list[int]):
        self.target, self.conversations, self.layer_ids = target, conversations, list(layer_ids)
        self.lengths = [len(conversation.input_ids) for conversation in conversations]

    def states(self, index: int) -> torch.Tensor:
        """States over conversation `index`: bfloat16 of shape `(T, width)`, on the target's device.

        Raises:
            ValueError: if they are not finite.
        """
        states = target_states(self.target, self.conversations[index].input_ids, self.layer_ids)
        if not bool(torch.isfinite(states).all()):
            raise ValueError(f"features: expected finite hidden states, got NaN or infinity in conversation {index}")
        return states


def compute_features(
    target, conversations: list[Conversation], layer_ids: list[int], folder, needed: list[int] | None = None,
    part: tuple[int, int] = (0, 1)
) -> FeatureStore:
    """Run the target over conversations once and keep its hidden states; existing shards are not computed again.

    Args:
        target (`PreTrainedModel`): in the dtype to compute in; states are kept in bfloat16 in any case.
        folder: made if it is missing. An existing one must belong to the same target and layers, and to the same data or
            its first conversations. Features computed in float32 also serve other dtypes, if no needed shard is missing.
        needed (`list[int]`, *optional*): indices of the needed conversations, by default all; their shards are computed.
        part (`tuple[int, int]`): `(index, count)`: compute only the shards whose number is `index` modulo `count`.
    Raises:
        ValueError: if the folder holds features of another target, other layers or other data, or a damaged file.
        OSError: if the disk has no room for them, with both sizes in bytes.
    """
    store = FeatureStore(folder, conversations, layer_ids, sum(state_widths(target, layer_ids)))
    store.folder.mkdir(parents=True, exist_ok=True)
    wanted = _shards_of(range(len(conversations)) if needed is None else needed)
    _claim_folder(store, target, conversations, may_be_float32=wanted.isdisjoint(store.missing_shards()))
    missing = [shard for shard in store.missing_shards() if shard in wanted]
    for shard in sorted(wanted.difference(missing)):
        if shard % part[1] == part[0]:
            _check_shard(target, store, shard, conversations)
    _check_disk(store, missing)
    shards = [shard for shard in missing if shard % part[1] == part[0]]
    total = sum(store.lengths[index] for shard in shards for index in store.members(shard))
    with ProgressBar("features", total, "tokens", is_shown=part[0] == 0) as bar:
        for shard in shards:
            _write_shard(target, store, shard, conversations, bar)
    return store


def computed_with(needed: list[int], num_conversations: int) -> list[int]:
    """The conversations whose features are computed along with those of `needed`, since shards are computed whole."""
    shards = _shards_of(needed)
    return [index for index in range(num_conversations) if index // CONVERSATIONS_PER_SHARD in shards]


def _shards_of(indices: Iterable[int]) -> set[int]:
    return {index // CONVERSATIONS_PER_SHARD for index in indices}


def state_widths(target, layer_ids: list[int]) -> list[int]:
    """Width of each of a target's hidden states at `layer_ids`; in a few targets the widths differ."""
    return [state.shape[-1] for state in _states_of(target, (0, 0), layer_ids)]


def check_states(target, layer_ids: list[int], label_width: int) -> None:
    """Check the target's states at `layer_ids`, which a draft is trained on: their widths, and that the last one is what
    the target's vocabulary head reads.

    Raises:
        ValueError: if the states have other widths, or if the target transforms its last state before the head
            (electra, rembert, bert).
    """
    text_config = target.config.get_text_config()
    widths, expected = state_widths(target, layer_ids), [text_config.hidden_size] * (len(layer_ids) - 1) + [label_width]
    message = "target: expected hidden states that its vocabulary head reads as they are"
    if widths != expected:
        raise ValueError(f"{message}, of widths {expected}, got {widths} from {type(target).__name__}")
    tokens = torch.linspace(0, text_config.vocab_size - 1, 8).long().tolist()
    head = output_embeddings(target)
    with torch.no_grad(), in_eval_mode(target):
        state = target_states(target, tuple(tokens), layer_ids[-1:])
        found = head(state.to(*place_of(head, target, target.dtype)))
        logits = target(torch.tensor([tokens], device=target.device), use_cache=False).logits[0]
    expected_logits = target_logits(target, found.float().to(logits.device))
    difference = float((expected_logits - logits.float()).abs().median() / logits.float().std())
    if difference > _MOST_DIFFERENCE:
        numerics = target_numerics(target.config)
        logger.warning(
            "target: expected logits as its configuration tells (scale %g, soft-cap %s), got others from %s, by %.2f of their "
            "standard deviation: the draft learns a sharper or a flatter distribution",
            numerics["logit_scale"],
            numerics["logit_softcap"],
            type(target).__name__,
            difference,
        )
    # Scales and soft-caps keep the order of logits; logits of a transformed state have an unrelated order.
    ranks = [one.float().argsort(dim=-1).argsort(dim=-1).float().flatten() for one in (found, logits.to(found.device))]
    correlation = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    if correlation < _LEAST_CORRELATION:
        raise ValueError(
            f"{message}, got {type(target).__name__}, which transforms them first: ranks of logits correlate by {correlation:.2f}"
        )


def _description(target, digest: str, conversations: list[Conversation], layer_ids: list[int]) -> dict:
    return {
        "target": target_fingerprint(target.config),
        "weights_sha256": digest,
        "compute_dtype": str(target.dtype).removeprefix("torch."),
        "layer_ids": list(layer_ids),
        "num_conversations": len(conversations),
        "num_tokens": sum(len(conversation.input_ids) for conversation in conversations),
        "conversations_sha256": sha256_of(conversation.input_ids for conversation in conversations),
        "conversations_per_shard": CONVERSATIONS_PER_SHARD,
    }


def _claim_folder(store: FeatureStore, target, conversations: list[Conversation], may_be_float32: bool):
    """Write the description of a new folder, or compare with an existing one; appended data is accepted."""
    digest = weights_digest(target)
    description = _description(target, digest, conversations, store.layer_ids)
    path = store.folder / "features.json"
    if not path.is_file():
        write_json(path, description)
        return
    found = {"weights_sha256": digest, **read_json(path)}  # a folder of an earlier version has no digest
    if may_be_float32 and found.get("compute_dtype") == "float32":
        description["compute_dtype"] = "float32"
    known = found.get("num_conversations", 0)
    before = {**_description(target, digest, conversations[:known], store.layer_ids), "compute_dtype": description["compute_dtype"]}
    if known < len(conversations) and found == before:
        write_json(path, description)
        return
    for name, expected in description.items():
        if found.get(name) != expected:
            raise ValueError(
                f"{store.folder.name}: expected features with {name}={expected!r}, got {found.get(name)!r}; "
                "use another folder or remove this one"
            )


def _check_shard(target, store: FeatureStore, shard: int, conversations: list[Conversation]):
    """Compare a shard's shortest conversation with the states that the target has over it now."""
    index = min(store.members(shard), key=store.lengths.__getitem__)
    states = target_states(target, conversations[index].input_ids, store.layer_ids).cpu().float()
    differences = (states - store.states(index).float()).norm(dim=-1) / states.norm(dim=-1)  # [T]
    difference = float(differences.median())
    if not difference < _MOST_CHANGE:
        raise ValueError(
            f"{store.shard_path(shard)}: expected hidden states of this target, got others or a damaged file: in the median of "
            f"{len(states)} tokens they differ by {100 * difference:.0f} %; remove it, or use another folder"
        )


def _check_disk(store: FeatureStore, missing: list[int]):
    needed = sum(store.shard_bytes(shard) for shard in missing)
    free = shutil.disk_usage(store.folder).free
    logger.info(
        "Features: %d bytes in all, %d still to write, %d bytes free on the disk.", store.num_bytes, needed, free
    )
    if needed > free:
        raise OSError(f"features: expected {needed} bytes of free disk, got {free}")


def _write_shard(target, store: FeatureStore, shard: int, conversations: list[Conversation], bar: ProgressBar):
    online = OnlineFeatures(target, conversations, store.layer_ids)
    with whole_file(store.shard_path(shard)) as unfinished, open(unfinished, "wb") as file:
        for index in store.members(shard):
            states = online.states(index).cpu()  # [T, width]
            states.view(torch.int16).numpy().tofile(file)
            bar.advance(len(states))


def target_states(target, input_ids: tuple[int, ...], layer_ids: list[int]) -> torch.Tensor:
    """Hidden states of one conversation at `layer_ids` side by side: bfloat16 of shape `(T, width)`."""
    return torch.cat(_states_of(target, input_ids, layer_ids), dim=-1).to(torch.bfloat16)


@torch.no_grad()
def _states_of(target, input_ids: tuple[int, ...], layer_ids: list[int]) -> list[torch.Tensor]:
    """Hidden states of one conversation at each of `layer_ids`, `(T, D)`."""
    with in_eval_mode(target):
        output = target.base_model(
            input_ids=torch.tensor([input_ids], device=target.device),
            output_hidden_states=states_to_ask_for(layer_ids, target.config),
            use_cache=False,
        )
    return [hidden_state(output, layer, target.config)[0] for layer in layer_ids]
