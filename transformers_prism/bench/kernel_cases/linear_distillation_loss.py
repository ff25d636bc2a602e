"""Calls of `linear_distillation_loss`: rows of a training batch, every dtype and set of losses."""

import torch

from transformers_prism.bench.kernel_cases import Inputs, KernelCase, cases_of
from transformers_prism.kernels.linear_distillation_loss import (
    LOSSES,
    _linear_distillation_loss_bwd,
    _linear_distillation_loss_fwd,
    linear_distillation_loss,
)


def _make(
    inputs: Inputs, num_steps=3, num_rows=1024, hidden_size=4096, num_tokens=32000, losses=("cross_entropy",),
    softcap=None, dtype=torch.bfloat16
):
    student = inputs.normal(num_steps, num_rows, hidden_size, dtype=dtype)
    teacher = inputs.normal(num_rows, hidden_size, dtype=dtype)
    # Logits as large as those of a real model.
    head = inputs.normal(num_tokens, hidden_size, dtype=dtype, scale=2 * hidden_size**-0.5)
    return student, teacher, head, losses, 1.0, softcap, 1.0, softcap


def _call(student, *rest, implementation):
    """Each loss of each row, and the student's gradient of their sum."""
    student = student.detach().requires_grad_()
    losses = linear_distillation_loss(student, *rest, implementation=implementation)
    return losses.detach(), *torch.autograd.grad(losses.sum(), [student])


def _launch(student, teacher, head, losses, *rest):
    arguments = (student.flatten(0, 1), teacher, head, ",".join(losses), *rest)
    values, statistics = _linear_distillation_loss_fwd(*arguments)
    # All parts of the vocabulary have the same launches.
    _linear_distillation_loss_bwd(values, statistics, *arguments)


def cases() -> list[KernelCase]:
    """Each dtype, each part of the losses, and a vocabulary and a width that are multiples of nothing."""
    acceptance = ("cross_entropy", "negative_log_acceptance")
    few = {"hidden_size": 90, "num_tokens": 50257, "num_rows": 5, "num_steps": 1}
    wide = {"hidden_size": 2048, "num_rows": 256, "softcap": 30.0}
    sizes: dict[str, dict] = {
        "bf16 D4096 V32000": {},
        "bf16 D4096 V128256 acceptance": {"num_tokens": 128256, "num_steps": 1, "losses": acceptance},
        "bf16 D2304 V262144 softcap": {"hidden_size": 2304, "num_tokens": 262144, "num_rows": 256, "softcap": 30.0},
        "fp16 D576 V8192 all": {"hidden_size": 576, "num_tokens": 8192, "losses": LOSSES, "dtype": torch.float16},
        "fp16 D90 V50257 R5 all softcap": {**few, "losses": LOSSES, "softcap": 30.0, "dtype": torch.float16},
        "fp32 D90 V50257 R5 all": {**few, "losses": LOSSES, "dtype": torch.float32},
        "fp32 D2048 V32000 all softcap": {**wide, "losses": LOSSES, "dtype": torch.float32},
    }
    # Losses are differences of sums in float32; gradients of logits are rounded to 16 bits before the second product, and
    # the result again.
    tolerance = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
    return cases_of(sizes, _make, _call, _launch, tolerance)
