"""Shapes and sizes of a draft's weights, from the headers of its safetensors files."""

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from transformers_prism.hub.files import DRAFT_VOCABULARY, shard_names
from transformers_prism.hub.loading import header_shapes


@dataclass(frozen=True)
class WeightHeaders:
    """Shapes of weights by name, and bytes of their files by name."""

    shapes: dict[str, tuple[int, ...]]
    file_bytes: dict[str, int]

    def num_parameters(self, *prefixes: str) -> int:
        """Parameters in weights whose names begin with one of these, or in all; the draft vocabulary is not counted."""
        return sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if name != DRAFT_VOCABULARY and (not prefixes or name.startswith(prefixes))
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.file_bytes.values())


def read_weight_headers(folder: str | Path) -> WeightHeaders:
    """Read the headers of a draft's safetensors files, one or those of an index.

    Raises:
        ValueError: if there is no such file, one is damaged, or an index names files elsewhere.
    """
    folder = Path(folder)
    index, names = folder / SAFE_WEIGHTS_INDEX_NAME, [SAFE_WEIGHTS_NAME]
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():  # as transformers looks for them
        names = shard_names(index)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        try:
            shapes.update(header_shapes(folder / name))
        except FileNotFoundError:
            raise ValueError(f"expected weights in {name}, got no such file in {folder}") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name}: expected a whole safetensors file, got {error}") from error
    return WeightHeaders(shapes, {name: (folder / name).stat().st_size for name in names})
