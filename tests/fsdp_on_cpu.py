"""The command line, with accelerate told that every process has an accelerator of its own: it lets FSDP shard nothing on a
CPU, though PyTorch's FSDP can."""

import runpy

from accelerate import DistributedType, PartialState

_initialise = PartialState.__init__


def _initialise_as_accelerated(self, *args, **kwargs):
    _initialise(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = _initialise_as_accelerated
runpy.run_module("transformers_prism.cli.main", run_name="__main__")
