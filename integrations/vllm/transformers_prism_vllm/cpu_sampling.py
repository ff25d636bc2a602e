"""A mistake of vLLM 0.32 on CPUs that would make sampled text with any draft wrong, mended where it is there.

For each draft token the rejection sampler repeats the temperature, top-k and top-p of its request. The function for CPUs writes
the repeated values into a copy as integers, which is thrown away, so that draft tokens are verified under numbers that happen
to be in memory.
"""

import torch
from vllm.v1.sample import rejection_sampler


def mend_cpu_sampling() -> bool:
    """Put a right function in the place of vLLM's if that gives wrong values on this machine; returns whether it did."""
    values = torch.tensor([0.5, 0.25])
    expand = rejection_sampler.expand_batch_to_tokens
    found = expand(values, torch.tensor([2, 3], dtype=torch.int32), 3)
    if torch.equal(found, torch.tensor([0.5, 0.5, 0.25])):
        return False
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    return True


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each request's value once for each of its draft tokens; named as the function of vLLM.

    Args:
        x (`torch.Tensor` of shape `(num_requests,)`): the values.
        cu_num_tokens (`torch.Tensor` of shape `(num_requests,)`): draft tokens of each request and those before it.
        num_tokens (`int`): of all.
        replace_from, replace_to (`int`): a value, and what stands for it in the result.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return expanded.masked_fill(expanded == replace_from, replace_to) if replace_from != replace_to else expanded
