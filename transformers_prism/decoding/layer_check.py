"""Find, by trying, layers whose output for a token depends on the other tokens in the same forward.

Quantised layers may scale their inputs by the largest value of a whole forward (torch's dynamic quantization, torchao with
one scale per tensor), or treat columns in which any token has an outlier separately (bitsandbytes in 8 bits). A tree's logits
then differ from those of plain decoding. With one scale per token, or scales for the weights only, they differ by rounding
only. A whole model's logits cannot tell the two apart: rounding moves values across quantisation steps, layer after layer. So
each layer that is not a plain `nn.Linear` gets one token alone, and then together with seven that are 100 times as large.
"""

import contextlib
import warnings
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from ..packed_layers import PACKED_KINDS
from .memory import kept_with

# By name: a model may have been prepared by another copy of this code.
_OWN_LAYERS = tuple(kind.__name__ for kind in PACKED_KINDS)
_NUM_OTHERS, _FACTOR = 7, 100.0
# Differences by rounding, as a share of the largest output, in float32 and in the shorter types.
_ROUNDING, _SHORT_ROUNDING = 1e-4, 4e-3


def has_plain_weight(layer: nn.Module) -> bool:
    """Whether a layer's weight is a plain matrix: not quantised, and not returned by a method.

    Args:
        layer (`nn.Module`): an embedding, a head, or any linear layer.
    """
    weight = getattr(layer, "weight", None)
    # Quantised weights may say that they are float32, but their class is their library's. torch's own classes, such as sharded
    # tensors, hold plain numbers.
    if not isinstance(weight, torch.Tensor) or type(weight).__module__.split(".")[0] != "torch":
        return False
    return weight.dim() == 2 and weight.is_floating_point() and weight.dtype.itemsize > 1


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer computes `input @ weight.T + bias` with a plain weight."""
    # compressed-tensors gives a layer a forward of its own; so do accelerate's hooks, which keep the original.
    own = vars(layer).get("_old_forward", vars(layer).get("forward"))
    forward = type(layer).forward if own is None else getattr(own, "__func__", own)
    computes_product = forward is nn.Linear.forward or type(layer).__name__ in _OWN_LAYERS
    return computes_product and has_plain_weight(layer)


def input_device(target: PreTrainedModel) -> torch.device:
    """The device for a target's inputs; the CPU if it is offloaded, since its hooks then move them to where a layer runs."""
    return torch.device("cpu") if is_offloaded(target, target.device) else target.device


def is_offloaded(module: nn.Module, device: torch.device) -> bool:
    """Whether accelerate keeps a module's weights elsewhere while it does not run, so that they seem to be on `device`."""
    return device.type == "meta" and hasattr(module, "_hf_hook")


def reason_against_target(target: PreTrainedModel) -> str | None:
    """Why a token's logits depend on the other tokens of a forward, so that no tree can be verified; None if they do not.

    Args:
        target (`PreTrainedModel`): any; not checked in train mode, where layers may draw random numbers.
    """
    if target.training:
        return None
    passed, rounding = kept_with(target, "layers that passed", WeakSet), set[str]()
    for module in target.modules():
        width = getattr(module, "in_features", None)
        width = getattr(module, "infeatures", None) if width is None else width
        if not isinstance(width, int) or module in passed or is_plain_linear(module):
            continue
        kind = f"{type(module).__module__}.{type(module).__name__}"
        of_others, of_midpoint = _differences(module, width, target)
        if of_others > (_ROUNDING if target.dtype == torch.float32 else _SHORT_ROUNDING):
            advice = "quantize the weights alone, or scale each token's inputs by themselves"
            if kind.startswith("bitsandbytes"):
                advice = "load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
            return (
                f"a layer of the class {kind} gives a token another output when other tokens are in the same forward (by "
                f"{of_others:.2g} of the largest value), so that a tree's logits are not those of plain decoding; {advice}"
            )
        passed.add(module)
        # In 16 bits everything rounds that much.
        rounding |= {kind} if target.dtype == torch.float32 and of_midpoint > _ROUNDING else set()
    if rounding:
        warnings.warn(
            f"layers of the class {', '.join(sorted(rounding))} round their inputs or products: where two tokens are nearly "
            "as likely, the text may be another than plain decoding's, as it may be with another batch size; quantize the "
            "weights alone, computed in float32, for the same text",
            stacklevel=7,
        )
    return None


@torch.no_grad()
def _differences(layer: nn.Module, width: int, target: PreTrainedModel) -> tuple[float, float]:
    """How far a layer is from computing `input @ weight.T + bias`, as two shares of its largest output: the difference of a
    token's output alone and together with large tokens, and that of the output for the midpoint of two tokens and the midpoint
    of their outputs; both 0 if the layer fails."""
    generator = torch.Generator().manual_seed(0)
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), input_device(target))
    tokens = torch.randn(1, 2, width, generator=generator)
    others = _FACTOR * torch.randn(1, _NUM_OTHERS, width, generator=generator)
    inputs = [tokens[:, :1], tokens[:, 1:], tokens.mean(dim=1, keepdim=True), torch.cat((tokens[:, :1], others), dim=1)]
    outputs: list[torch.Tensor] = []
    # Layers that take other inputs, or run as parts of something larger, raise all sorts of errors.
    with contextlib.suppress(Exception):
        outputs = [layer(part.to(device, target.dtype))[:, :1].float() for part in inputs]
    if len(outputs) < len(inputs):
        return 0.0, 0.0
    first, second, midpoint, together = outputs
    largest = first.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    of_midpoint = (midpoint - (first + second) / 2).abs().max() / largest
    return float((first - together).abs().max() / largest), float(of_midpoint)
