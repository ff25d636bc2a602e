"""What a draft's safetensors files say of its weights, read from their headers alone."""

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from transformers_prism.hub.files import DRAFT_VOCABULARY, shard_names


@dataclass(frozen=True)
class WeightHeaders:
    """Shapes of weights by name, and bytes of their files by name."""

    shapes: dict[str, tuple[int, ...]]
    file_bytes: dict[str, int]

    def num_parameters(self, *prefixes: str) -> int:
        """Numbers in all weights whose names begin with one of these, or in all; the draft vocabulary is none."""
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

    Args:
        folder (`str` or `Path`): the draft's folder.
    Returns:
        `WeightHeaders`: of all of its weights.
    Raises:
        ValueError: if there is no such file, one is damaged, or an index names files elsewhere.
    """
    folder = Path(folder)
    index, names = folder / SAFE_WEIGHTS_INDEX_NAME, [SAFE_WEIGHTS_NAME]
    if index.is_file():
        names = shard_names(index)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                shapes.update({weight: tuple(file.get_slice(weight).get_shape()) for weight in file.keys()})
        except FileNotFoundError:
            raise ValueError(f"expected weights in {name}, got no such file in {folder}") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name}: expected a whole safetensors file, got {error}") from error
    return WeightHeaders(shapes, {name: (folder / name).stat().st_size for name in names})


__all__ = ["WeightHeaders", "read_weight_headers"]
