"""PRISM drafts in vLLM: a plugin that vLLM finds by its entry point and calls in each of its processes."""

import importlib.metadata

from packaging.version import Version

__all__ = ["TRIED_VLLM", "register", "warning_of_release"]

# The first release that it was made for, and the first that it was not; 0.32 was tried.
TRIED_VLLM = ("0.32", "0.34")
# As config.json says, and as vLLM's EAGLEConfig renames it.
_ARCHITECTURES = ("PrismDraftModel", "Eagle3PrismDraftModel")


def register() -> None:
    """Make vLLM know the model type and the model class of a PRISM draft. Calling it again changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry, __version__
    from vllm.logger import init_logger
    from vllm.transformers_utils import config as vllm_config

    from transformers_prism_vllm.configuration import PrismConfig

    if (warning := warning_of_release(__version__)) is not None:
        init_logger("vllm.transformers_prism_vllm").warning_once(warning)
    AutoConfig.register(PrismConfig.model_type, PrismConfig, exist_ok=True)
    # vLLM has no function for this. Without it --trust-remote-code would take the class in the draft's own folder.
    vllm_config._CONFIG_REGISTRY[PrismConfig.model_type] = PrismConfig
    known = ModelRegistry.get_supported_archs()
    for architecture in _ARCHITECTURES:
        if architecture not in known:
            # By name, so that nothing of CUDA is touched before vLLM starts its workers.
            ModelRegistry.register_model(architecture, "transformers_prism_vllm.model:PrismDraftModel")


def warning_of_release(found: str) -> str | None:
    """What to say of a release of vLLM that was not tried, None of one that was.

    Args:
        found (`str`): vLLM's version.
    """
    first, end = map(Version, TRIED_VLLM)
    if first <= Version(Version(found).base_version) < end:
        return None
    return (
        f"transformers-prism-vllm {importlib.metadata.version('transformers-prism-vllm')}: expected vLLM >={first},<{end}, "
        f"which it was made for, got {found}; if drafts fail or few tokens are accepted, install a release of this range"
    )
