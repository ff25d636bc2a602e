"""Ways of decoding that `bench generate` compares, by name.

    plain             generate() of the target as it was loaded
    prepared          the same, with weights packed for the CPU (`prepare_for_cpu`)
    compiled          the same as plain, compiled by transformers, with a static cache
    lookup[:N]        transformers' prompt lookup of N tokens, 10 if no number is given
    assisted          transformers' assisted decoding with another model
    draft             the draft, with the trees that its generation_config asks for
    auto              the draft with automatic trees
    auto-no-ngrams    the same, without continuations copied from the text
    chain[:DEPTH]     the draft with chains
    static[:K,D,N]    the draft with trees of N nodes from D draft steps with top-k K

All but plain and compiled decode with the prepared target, or with the target as loaded if packing is not wanted.
"""

import copy
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, StaticCache

from transformers_prism.configuration_prism import PrismConfig
from transformers_prism.cpu import PreparedModels, prepare_for_cpu
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.packed_layers import can_pack
from transformers_prism.transformers_names import CACHE_KEYWORD

# A random model that is as cheap as an assistant can be; what it proposes is almost never right.
_RANDOM_ASSISTANT = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}
_STATIC_NAMES = ("tree_top_k", "tree_depth", "tree_num_nodes")
DRAFT_KINDS = ("draft", "auto", "auto-no-ngrams", "chain", "static")
_KINDS = ("plain", "prepared", "compiled", "lookup", "assisted", *DRAFT_KINDS)
# transformers supports these for batches of one only.
_SINGLE_ROW_KINDS = ("lookup", "assisted")


@dataclass(frozen=True)
class Method:
    """A way of decoding: its name as given, such as "static:10,6,59", its kind and numbers, and whether the target's
    weights are packed."""

    name: str
    kind: str
    is_prepared: bool
    numbers: tuple[int, ...] = field(default=())

    @property
    def uses_draft(self) -> bool:
        """Whether a PRISM draft takes part."""
        return self.kind in DRAFT_KINDS

    @property
    def baseline(self) -> str:
        """The plain method on the same target, whose output this one has to give."""
        return "prepared" if self.is_prepared else "plain"

    @property
    def tree(self) -> dict:
        """What the draft's `generation_config` is updated with."""
        if self.kind in ("auto", "auto-no-ngrams"):
            return {"tree": "auto", "tree_ngrams": self.kind == "auto"}
        if self.kind == "chain":
            # A chain is as long as both of its bounds allow.
            return {"tree": "chain", **{name: self.numbers[0] for name in _STATIC_NAMES[1:] if self.numbers}}
        if self.kind == "static":
            return {"tree": "static", **dict(zip(_STATIC_NAMES, self.numbers, strict=False))}
        return {}


def can_be_packed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether [`prepare_for_cpu`] is for models like this."""
    return device.type == "cpu" and can_pack(dtype)


def parse_methods(names: list[str], is_packed: bool, batch_size: int = 1) -> list[Method]:
    """Methods by name, as at the head of this file, with the plain methods that they are compared with; those with the
    same target are neighbours. `is_packed` says whether methods decode with the prepared target.

    Raises:
        ValueError: if a name is unknown, comes twice, or cannot be served.
    """
    methods = [_parse(name, is_packed) for name in names]
    for method in methods:
        if batch_size > 1 and method.kind in _SINGLE_ROW_KINDS:
            raise ValueError(
                f"batch_size: expected 1 for {method.name}, which transformers serves so, got {batch_size}"
            )
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"method: expected each name once, got {', '.join(sorted(repeated))} more often")
    known = {method.name for method in methods}
    for baseline in ["prepared", "plain"] if any(method.is_prepared for method in methods) else ["plain"]:
        if baseline not in known:
            methods.insert(0, Method(baseline, baseline, baseline == "prepared"))
    # Packing takes time, so methods are sorted to pack the target as rarely as possible.
    return sorted(methods, key=lambda method: (method.is_prepared, method.name != method.baseline))


def _parse(name: str, is_packed: bool) -> Method:
    kind, _, rest = name.partition(":")
    numbers = rest.split(",") if rest else []
    most = {"lookup": 1, "chain": 1, "static": 3}.get(kind, 0)
    is_right = kind in _KINDS and all(number.isdecimal() and int(number) > 0 for number in numbers)
    if not is_right or len(numbers) not in (0, most):
        forms = {"lookup": "lookup[:N]", "chain": "chain[:DEPTH]", "static": "static[:TOP_K,DEPTH,NODES]"}
        raise ValueError(f"method: expected one of {', '.join(forms.get(one, one) for one in _KINDS)}, got {name!r}")
    if kind == "prepared" and not is_packed:
        raise ValueError("method: expected --packed, a CPU, and a dtype that prepare_for_cpu can pack for 'prepared', got something else")
    is_prepared = is_packed and kind not in ("plain", "compiled")
    return Method(name, kind, is_prepared, tuple(int(number) for number in numbers))


class Contest:
    """The models of all methods in one process; the target is packed and unpacked as they need it.

    Each method that uses the draft gets its own copy, so that none learns from the rounds of another.

    Args:
        max_length (`int`): tokens of the longest prompt with its answer.
    Raises:
        ValueError: if assisted decoding is asked for without an assistant.
    """

    def __init__(self, target, draft, assistant, methods: list[Method], max_length: int):
        self.target, self.assistant, self.methods = target, assistant, methods
        self.drafts = {method.name: copy.deepcopy(draft) for method in methods if method.uses_draft}
        for method in methods:
            if method.uses_draft:
                self.drafts[method.name].generation_config.update(**method.tree)
            if method.kind == "assisted" and assistant is None:
                raise ValueError("method: expected --assistant with 'assisted', got none")
        self.static_cache = StaticCache(config=target.config, max_cache_len=max_length)
        self.prepared: PreparedModels | None = None
        if any(method.is_prepared for method in methods):
            prepare_for_cpu(*(model for model in (*self.drafts.values(), assistant) if model is not None))

    def enter(self, method: Method) -> bool:
        """Bring the target into the state that a method wants; returns whether it had to change."""
        if method.is_prepared == (self.prepared is not None):
            return False
        if method.is_prepared:
            self.prepared = prepare_for_cpu(self.target)
        else:
            self.close()
        return True

    def close(self) -> None:
        """Leave the target as it was."""
        if self.prepared is not None:
            self.prepared.undo()
            self.prepared = None

    def arguments(self, method: Method) -> dict:
        """Arguments of generate() in addition to the prompt and its settings."""
        if method.uses_draft:
            return {"assistant_model": self.drafts[method.name]}
        if method.kind == "lookup":
            return {"prompt_lookup_num_tokens": method.numbers[0] if method.numbers else 10}
        if method.kind == "assisted":
            return {"assistant_model": self.assistant}
        if method.kind == "compiled":
            self.static_cache.reset()
            compiling = CompileConfig(mode="default")
            compiling._compile_all_devices = True  # generate() leaves a CPU's forwards alone otherwise
            return {CACHE_KEYWORD: self.static_cache, "compile_config": compiling}
        return {}


def load_assistant(name: str | None, target):
    """A model for assisted decoding: by name, or with "random" a tiny untrained one of the target's vocabulary.

    Raises:
        ValueError: if its vocabulary differs from the target's.
    """
    if name is None:
        return None
    vocab_size = target.config.get_text_config().vocab_size
    if name == "random":
        tokens = {
            key: getattr(target.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=vocab_size, **_RANDOM_ASSISTANT))
        model.generation_config.update(**tokens)
    else:
        model = AutoModelForCausalLM.from_pretrained(name)
    found = model.config.get_text_config().vocab_size
    if found != vocab_size:
        raise ValueError(f"assistant: expected the target's vocabulary of {vocab_size} tokens, got {found}")
    return model.to(device=target.device, dtype=target.dtype).eval()


def random_draft(target, num_modules: int, tree_settings: dict, seed: int = 0) -> PrismDraftModel:
    """An untrained draft of the target's width whose step k is served by module k; what it proposes does not matter."""
    config = PrismConfig.from_target(
        target,
        num_processing_modules=num_modules,
        draft_step_to_module=list(range(num_modules)),
        context_kv="prefill_module",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = PrismDraftModel(config).to(device=target.device, dtype=target.dtype).eval()
    draft.generation_config.update(**{"tree": "static", **tree_settings})
    return draft
