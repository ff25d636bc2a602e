"""Types of models that drafts were tried on, with trees or chains, in transformers' own code: see `docs/compatibility.md`.

Written by `python -m tests.compatibility --update`; rounds of other models are checked (`round_check.py`).
"""

TRIED_TYPES = frozenset(
    """
    llama qwen2 qwen3 mistral gemma2 gemma3_text phi3 olmo2 granite cohere gpt2 gpt_neox mixtral qwen3_moe
    """.split()
)
