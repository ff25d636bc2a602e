"""Tensors that live on a pretended accelerator: real values, and a record of whatever makes the host wait for them.

Wrapped tensors say that they are on `DEVICE` and compute on the CPU. As on a real accelerator, an operation may not
mix them with tensors of the host; reading a value, a size that depends on values, or a copy to the host that the host
waits for is noted.
"""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# The one device type besides the CPU that every build of torch lets tensors claim to be on.
DEVICE = torch.device("meta")
_READS = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
)


class OnDevice(torch.Tensor):
    """A tensor of the pretended accelerator, with its values in `host`."""

    # As a device's tensors are of torch; those of other libraries are taken for quantised.
    __module__ = "torch"
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        """Wrap a tensor of the CPU."""
        options = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, host.shape, **options, device=DEVICE)
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Operations outside of a [`PretendedAccelerator`] are computed, but nothing is noted."""
        return _compute(function, args, kwargs or {}, lambda name: None)


def _is_on_device(value) -> bool:
    return isinstance(value, OnDevice)


def _compute(function, args, kwargs, note, note_upload=lambda name: None):
    """Run an operation on the host's values; `note` is told the name of an operation that waits for them, `note_upload`
    of one that brings values of the host over."""
    flat = tree_flatten((args, kwargs))[0]
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    is_any_on_device = any(map(_is_on_device, tensors))
    asked = next((value for value in flat if isinstance(value, torch.device)), None)
    name = function._schema.name.removeprefix("aten::")
    stays = is_any_on_device if asked is None else asked.type == DEVICE.type
    # The host goes on beside a copy that it asked not to wait for.
    waits = not (name == "_to_copy" and kwargs.get("non_blocking"))
    if is_any_on_device and (name in _READS or not stays) and waits:
        note(name)
    if name == "copy_" and not _is_on_device(args[0]) and _is_on_device(args[1]):
        note(name)
        stays = False
    to_device = name == "copy_" and _is_on_device(args[0]) and not _is_on_device(args[1])
    if name == "_to_copy" and not is_any_on_device and asked is not None and asked.type == DEVICE.type:
        to_device = waits
    # Indices of the host are brought over as well.
    if name in ("index", "index_put", "index_put_") and _is_on_device(args[0]):
        to_device = any(index is not None and not _is_on_device(index) for index in args[1])
    if to_device and any(tensor.numel() for tensor in tensors if not _is_on_device(tensor)):
        note_upload(name)
    if name in ("index", "index_put", "index_put_") and any(
        _is_on_device(index) and index.dtype == torch.bool for index in args[1] if index is not None
    ):
        note("nonzero")
    # Copies go between devices, and indices may come from the host.
    if is_any_on_device and name not in ("copy_", "_to_copy", "index", "index_put", "index_put_"):
        strangers = [value for value in tensors if not _is_on_device(value) and value.dim() > 0]
        assert not strangers, f"{name}: tensors of the host and of the device"

    def on_host(value):
        if _is_on_device(value):
            return value.host
        return torch.device("cpu") if isinstance(value, torch.device) else value

    result = function(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    if function._schema.is_mutable and name.endswith("_"):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda value: OnDevice(value) if stays and isinstance(value, torch.Tensor) else value, result)


class _BesidesDispatch(TorchFunctionMode):
    """What torch does behind the back of dispatch modes: `torch.tensor` copies to a device, `tolist` to the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if function is torch.Tensor.tolist:
            return function(args[0].to("cpu"))
        return function(*args, **kwargs)


class PretendedAccelerator(TorchDispatchMode):
    """While it is on, tensors can be made on `DEVICE`; `reads` notes what the host waited for, and where, and `uploads`
    what it brought over, waiting for everything that was queued before."""

    def __init__(self):
        super().__init__()
        self.reads: list[str] = []
        self.uploads: list[str] = []
        self.besides_dispatch = _BesidesDispatch()

    def __enter__(self):
        """Switch it on."""
        self.besides_dispatch.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        """Switch it off."""
        super().__exit__(*exception)
        self.besides_dispatch.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Compute and note."""
        return _compute(
            function,
            args,
            kwargs or {},
            lambda name: self.reads.append(_with_place(name)),
            lambda name: self.uploads.append(_with_place(name)),
        )


def _with_place(name: str) -> str:
    """The name of an operation, and the line of ours that asked for it."""
    ours = [frame for frame in traceback.extract_stack() if "transformers" in frame.filename]
    return f"{name} at {ours[-1].filename}:{ours[-1].lineno}" if ours else name


def move_model(model: torch.nn.Module) -> None:
    """Put a model's parameters and buffers on the pretended accelerator; tied ones stay tied."""
    moved: dict = {}
    for module in model.modules():
        for values, wrap in (
            (module._parameters, lambda one: torch.nn.Parameter(OnDevice(one.data), requires_grad=False)),
            (module._buffers, OnDevice),
        ):
            for name, value in values.items():
                if value is not None and not _is_on_device(value.data):
                    values[name] = moved.setdefault(id(value), wrap(value))
