"""Every private or version-dependent name of transformers that this package uses, for the releases that it was tried with.

If a new release of transformers breaks something, this is the file to fix. Where two releases differ, the code looks at what
exists (a signature, a field), never at a version number: 5.23 calls the key and value cache `past_key_values`, 5.24 `cache`.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from .tried_releases import errors_tell_of_untried_release

# A newer release may lack one of these names.
with errors_tell_of_untried_release():
    from transformers import AttentionInterface, GenerationMixin
    from transformers.generation import GenerateDecoderOnlyOutput
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.utils.hub import extract_commit_hash

# What modules, outputs and generate() have called the cache, the newest name first.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# The method of generate() that assisted decoding reaches, which the hook replaces.
ASSISTED_DECODING = "_assisted_decoding"
# The method that refuses targets with recurrent states together with an assistant.
GENERATION_MODE_CHECK = "_validate_generation_mode"
# Keywords that let `cached_file` return None where a file cannot be found.
NO_ERROR_IF_ABSENT = {"_raise_exceptions_for_missing_entries": False}
NO_ERROR_AT_ALL = NO_ERROR_IF_ABSENT | {
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}


def registered_attention(name: str) -> Callable:
    """The attention function that is registered under a name, whatever stands in its place for a while
    (`ALL_ATTENTION_FUNCTIONS[name] = function`)."""
    return AttentionInterface._global_mapping[name]


@functools.lru_cache(maxsize=256)
def cache_keyword(function) -> str:
    """The keyword by which a function or method takes a cache; this release's usual one if its signature names none.

    Args:
        function (`Callable`): a forward; for a model pass `type(model).forward`, so that the result can be cached.
    """
    # A wrapper that still takes an old name has the signature of the function that it wraps.
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_KEYWORD)


CACHE_KEYWORD = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaAttention.forward).parameters)


def cache_argument(model, cache) -> dict:
    """A cache as the keyword argument that a model's forward takes."""
    return {cache_keyword(type(model).forward): cache}


def cache_of(arguments) -> Any:
    """The cache among keyword arguments of generate() or in an output of a model; None without one."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def decoder_only_output(cache, **fields) -> GenerateDecoderOnlyOutput:
    """What generate() returns with `return_dict_in_generate`."""
    names = GenerateDecoderOnlyOutput.__dataclass_fields__
    return GenerateDecoderOnlyOutput(**fields, **{next(name for name in CACHE_NAMES if name in names): cache})


def replace_method(name: str, make: Callable[[Callable], Callable]) -> None:
    """Let generate() call another function in place of a method; doing it twice changes nothing.

    Args:
        name (`str`): `ASSISTED_DECODING` or `GENERATION_MODE_CHECK`.
        make (`Callable`): gets the method and returns the function. generate() passes some arguments only to methods whose
            signature names them, so the function keeps the method's signature.
    """
    original = getattr(GenerationMixin, name)
    if getattr(original, "_prism_original", None) is None:
        replacement = functools.wraps(original)(make(original))
        replacement._prism_original = original  # type: ignore[attr-defined]
        setattr(GenerationMixin, name, replacement)


def restore_method(name: str) -> None:
    """Undo [`replace_method`], whichever copy of this code has called it."""
    original = getattr(getattr(GenerationMixin, name), "_prism_original", None)
    if original is not None:
        setattr(GenerationMixin, name, original)


def is_stateful(target) -> bool:
    """Whether transformers says that a model's state cannot be rolled back."""
    return bool(getattr(target, "_is_stateful", False))


def prefill(target, input_ids, generation_config, model_kwargs: dict):
    """The target's output over the prompt, as plain decoding computes it."""
    return target._prefill(input_ids, generation_config, model_kwargs)


def next_kwargs(target, outputs, model_kwargs: dict) -> dict:
    """The arguments from which generate() prepares the step after these outputs; `model_kwargs` is not changed."""
    return target._update_model_kwargs_for_generation(outputs, dict(model_kwargs), is_encoder_decoder=False)


def input_methods(target) -> tuple:
    """The methods by which generate() makes the inputs of a step."""
    return target.prepare_inputs_for_generation, target._update_model_kwargs_for_generation


def decode_plainly(target, input_ids, **arguments):
    """What generate() returns without an assistant; arguments as it prepares them for its decoding methods."""
    return type(target)._sample(target, input_ids, **arguments)


def experts_of_step(target, num_tokens: int) -> AbstractContextManager:
    """A context with the implementation of experts for a forward over `num_tokens` tokens per sequence after the prompt.

    For single tokens plain decoding uses another one than for the prompt. It copies the weights of each token's experts, which
    may not fit in memory for a whole tree.
    """
    return target._optimize_model_for_decode() if num_tokens == 1 else nullcontext()


def compiled_forward(target, model_kwargs: dict, generation_config):
    """The forward that generate() compiles by itself for this cache and device; None where it does not."""
    if target._valid_auto_compile_criteria(model_kwargs, generation_config):
        return target.get_compiled_call(generation_config.compile_config)
    return None


def allowed_tokens_of(processor):
    """The caller's function behind a `PrefixConstrainedLogitsProcessor`."""
    return processor._prefix_allowed_tokens_fn


def takes_logits_to_keep(target) -> bool:
    """Whether the forward can be told for how many positions to compute logits."""
    return target._supports_logits_to_keep()


def has_class_for(auto_class: type, config) -> bool:
    """Whether an auto class knows a class for models of this configuration."""
    return type(config) in auto_class._model_mapping  # type: ignore[attr-defined]


def attention_name(config) -> str:
    """The attention implementation of a model's text part, from its configuration."""
    return config.get_text_config()._attn_implementation


def output_embeddings(model):
    """A model's vocabulary head, or its text part's if a composite model does not return one; None without any."""
    parts = [part for part in (model, *model.children()) if hasattr(part, "get_output_embeddings")]
    heads = (part.get_output_embeddings() for part in parts)
    return next((head for head in heads if head is not None), None)


def keeps_no_activations(model) -> bool:
    """Whether gradient checkpointing is on for a model, which then keeps no cache in train mode."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return getattr(model, next(name for name in names if hasattr(type(model), name)))


def decodes_in_its_own_way(model) -> bool:
    """Whether a model has a decoding loop of its own behind generate()."""
    return "_sample" in vars(model) or getattr(type(model), "_sample", None) is not GenerationMixin._sample


def pad_token(generation_config):
    """The padding token of a prepared generation configuration, a tensor, or None."""
    return generation_config._pad_token_tensor


def is_callers_cache(cache) -> bool:
    """Whether the caller of generate() passed this cache and may continue with it."""
    return getattr(cache, "_is_user_defined", False)


def name_of(config) -> str:
    """The repository or folder that a configuration was loaded from; may be empty."""
    return getattr(config, "_name_or_path", None) or ""


def revision_of(config) -> str | None:
    """The revision that a configuration was loaded from on the Hub."""
    return getattr(config, "_commit_hash", None)


def commit_of(file: str) -> str | None:
    """The commit that a file in the Hub's cache belongs to."""
    return extract_commit_hash(file, None)


def call(config, name: str, revision: str | None = None) -> None:
    """Set the repository or folder that a configuration says it is from, and its revision."""
    config._name_or_path = name
    if revision is not None:
        config._commit_hash = revision


def is_made_up(generation_config) -> bool:
    """Whether transformers derived a generation configuration from the model's configuration, since there was no file."""
    return generation_config._from_model_config


def mark_as_own(generation_config) -> None:
    """Have a generation configuration saved with all its settings; a derived one loses those that are not transformers' own."""
    generation_config._from_model_config = False


def serve_parts() -> SimpleNamespace:
    """The classes that `transformers serve` is made of.

    Raises:
        ImportError: if a package of the extra `serve` is missing.
    """
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"expected the packages of the extra 'serve', got none named {', '.join(missing)}; "
            "pip install 'transformers[serving]'"
        )
    with errors_tell_of_untried_release():
        from transformers.cli.serving import (
            chat_completion,
            completion,
            model_manager,
            response,
            server,
            systemone,
            transcription,
            utils,
        )
    handlers = ("ChatCompletion", "Completion", "Response", "SystemOne", "Transcription")
    names = [f"{name}Handler" for name in handlers]
    names += ["GenerateManager", "GenerationState", "ModelManager", "TimedModel", "build_server"]
    files = (utils, chat_completion, completion, model_manager, response, server, systemone, transcription)
    return SimpleNamespace(**{name: next(getattr(file, name) for file in files if hasattr(file, name)) for name in names})
