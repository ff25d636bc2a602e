"""PRISM drafts for lossless speculative decoding in transformers: `target.generate(**inputs, assistant_model=draft)`."""

from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_prism import PrismConfig
from .cpu import prepare_for_cpu
from .generation import install, uninstall
from .modeling_prism import PrismDraftModel
from .tried_releases import warn_of_untried_release

if TYPE_CHECKING:
    from .conversion.forms import load_draft


def _write_card(folder):
    from .hub.card import write_card  # here, since only saving a draft needs what it imports

    write_card(folder, [], with_plot=False)


PrismDraftModel.write_card = staticmethod(_write_card)

__version__ = "0.2.0"

warn_of_untried_release()

AutoConfig.register("prism", PrismConfig, exist_ok=True)
AutoModel.register(PrismConfig, PrismDraftModel, exist_ok=True)
AutoModelForCausalLM.register(PrismConfig, PrismDraftModel, exist_ok=True)


def __getattr__(name: str):
    if name == "load_draft":  # on first use, since nothing else needs the files that read other formats
        from .conversion.forms import load_draft

        return load_draft
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["PrismConfig", "PrismDraftModel", "install", "load_draft", "prepare_for_cpu", "uninstall"]
