"""Tiny random targets of many architectures, and a draft that is scripted to be right and wrong at random places."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.decoding.tree import CandidatePool, Tree

VOCAB_SIZE = 97
PAD_ID = 0
EOS_ID = 1

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD_ID,
    "bos_token_id": 2,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # tied, a random model mostly repeats its input
    "initializer_range": 0.3,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED_LAYERS = ["sliding_attention", "full_attention"] * 2

ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_mixed_windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": _MIXED_LAYERS},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),  # which its static caches go by
    "mixtral": ("MixtralConfig", _EXPERTS),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 16}),
}
# Whose states roll back along a chain, not across a tree.
CHAIN_ARCHITECTURES = {"lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2})}


def tiny_target(architecture: str = "llama", seed: int = 0, attn_implementation: str | None = None, **overrides):
    """A random target in float32; `seed` draws its weights without touching the global generator."""
    name, settings = {**ARCHITECTURES, **CHAIN_ARCHITECTURES}[architecture]
    arguments = {**_SMALL, **settings, **overrides}
    if architecture == "gpt2":
        shared = (
            "vocab_size",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "initializer_range",
            "tie_word_embeddings",
        )
        arguments = {**{key: _SMALL[key] for key in shared}, **settings, **overrides}
    config = getattr(transformers, name)(**arguments)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    return model.float().eval()


def varied_target(
    architecture: str, input_ids, attention_mask=None, num_distinct: int = 12, least_gap: float = 0.0, **generate_kwargs
):
    """A tiny target whose plain output on these prompts has many distinct tokens in every row, each of them chosen by at least
    `least_gap` of a logit over the next best."""
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    for seed in range(200):
        target = tiny_target(architecture, seed)
        plain = target.generate(input_ids, attention_mask=attention_mask, do_sample=False, **outputs, **generate_kwargs)
        best = torch.stack(plain.logits).topk(2, dim=-1).values
        new = plain.sequences[:, input_ids.shape[1] :]
        is_varied = min(len(set(row.tolist())) for row in new) >= num_distinct
        if is_varied and float((best[..., 0] - best[..., 1]).min()) >= least_gap:
            return target
    raise AssertionError(f"no {architecture} with {num_distinct} distinct tokens in 200 draws")


def prompts(num_rows: int, length: int = 9, seed: int = 0):
    """Random prompts, `(input_ids, attention_mask)`; later rows have more left padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (num_rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(num_rows):
        attention_mask[row, : 2 * row] = 0
        input_ids[row, : 2 * row] = PAD_ID
    return input_ids, attention_mask


def tiny_draft(target, seed: int = 0, **overrides) -> PrismDraftModel:
    """A random draft for a target."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = PrismDraftModel(PrismConfig.from_target(target, **{"initializer_range": 0.3, **overrides}))
    draft.generation_config.update(tree="static", tree_top_k=3, tree_depth=4, tree_num_nodes=15)
    return draft.float().eval()


class ScriptedDraft(PrismDraftModel):
    """A draft that knows what the target will say and proposes it with errors at random places.

    `script` holds, per row, the tokens that plain decoding emits. In each round the tree holds a random number of
    true tokens, 0 to its depth, in a row, between random other nodes.
    """

    script: list[list[int]]
    seed: int = 0
    is_strict: bool = True  # whether the committed tokens must be the script's

    def make_drafter(self):
        """A drafter that reads the script."""
        return ScriptedDrafter(self)


class ScriptedDrafter:
    """Stands in for `Drafter`: counts what was committed, and builds trees around the script."""

    def __init__(self, draft: ScriptedDraft):
        self.scripts = list(draft.script)
        self.num_emitted = [0] * len(self.scripts)
        self.root_ids = None
        self.random = random.Random(draft.seed)
        self.is_strict = draft.is_strict

    def prefill(self, token_ids, target_hidden, position_ids, num_new, padding_mask=None):
        """Check what the loop hands over, and count it; the prompt brings one emitted token."""
        assert token_ids.shape == target_hidden.shape[:2] == position_ids.shape
        is_prompt = self.root_ids is None
        for row, count in enumerate(num_new):
            assert (position_ids[row, :count].diff() >= 0).all()
            emitted = 1 if is_prompt else count
            told = token_ids[row, count - emitted : count].tolist()
            start = self.num_emitted[row]
            assert not self.is_strict or told == self.scripts[row][start : start + emitted]
            self.num_emitted[row] += emitted
        self.root_ids = token_ids[torch.arange(len(num_new)), torch.tensor(num_new) - 1]

    def use_text_tokens(self, is_wanted):
        """The script knows no vocabulary."""

    def use_shapes(self, shapes):
        """Nothing is compiled."""

    def keep_sequences(self, rows):
        """Go on with these rows."""
        self.scripts = [self.scripts[row] for row in rows]
        self.num_emitted = [self.num_emitted[row] for row in rows]
        if self.root_ids is not None:
            self.root_ids = self.root_ids[rows]

    def grow(self, settings, coupling=None) -> Tree:
        """A tree of exactly `settings.num_nodes` nodes, at most `settings.depth` deep."""
        rows = [self._grow_row(row, settings) for row in range(len(self.scripts))]
        token_ids, parents, depths = (torch.tensor(part) for part in zip(*rows, strict=True))
        return Tree(token_ids, parents, depths, -depths.float())

    def draw(self, top_k: int, depth: int, choose_width=None, coupling=None) -> CandidatePool:
        """A chain that is true for a random number of tokens, with a random twin at every node if `top_k` is above 1."""
        width = min(top_k, 2)
        token_ids = [self._draw_row(row, depth, width) for row in range(len(self.scripts))]
        steps = []
        for step, tokens in enumerate(torch.tensor(token_ids).split(width, dim=1)):
            log_probs = torch.tensor([-0.1, -2.0])[:width].expand_as(tokens) - 0.1 * step
            steps.append((tokens, torch.full_like(tokens, width * (step - 1) if step else -1), log_probs))
        return CandidatePool(steps)

    def _draw_row(self, row: int, depth: int, width: int) -> list[int]:
        following = self.scripts[row][self.num_emitted[row] :]
        num_true = self.random.randint(0, min(depth, len(following)))
        random_tokens = [[self.random.randrange(VOCAB_SIZE) for _ in range(width)] for _ in range(depth)]
        for step in range(num_true):
            random_tokens[step][0] = following[step]
        return [token for tokens in random_tokens for token in tokens]

    def _grow_row(self, row: int, settings):
        following = self.scripts[row][self.num_emitted[row] :]
        num_true = self.random.randint(0, min(settings.depth, settings.num_nodes, len(following)))
        is_true = [True] * num_true + [False] * (settings.num_nodes - num_true)
        if settings.tree != "chain":
            self.random.shuffle(is_true)
        token_ids, parents, depths = [int(self.root_ids[row])], [0], [0]
        end_of_true = 0
        for true in is_true:
            if true:
                parent, token = end_of_true, following[depths[end_of_true]]
                end_of_true = len(token_ids)
            elif settings.tree == "chain":
                parent, token = len(token_ids) - 1, self.random.randrange(VOCAB_SIZE)
            else:
                shallow = [node for node, depth in enumerate(depths) if depth < settings.depth]
                parent, token = self.random.choice(shallow), self.random.randrange(VOCAB_SIZE)
            token_ids.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        return token_ids, parents, depths


def scripted_draft(target, plain_sequences, prompt_length: int, seed=0, is_strict=True, **settings) -> ScriptedDraft:
    """A scripted draft for the output of plain decoding, `(B, T)` with the prompts; not strict where the settings of
    the call change the text."""
    with torch.random.fork_rng():
        draft = ScriptedDraft(PrismConfig.from_target(target)).eval()
    draft.script = [row[prompt_length:].tolist() for row in plain_sequences]
    draft.seed, draft.is_strict = seed, is_strict
    draft.generation_config.update(
        **{"tree": "static", "tree_top_k": 4, "tree_depth": 4, "tree_num_nodes": 12, **settings}
    )
    return draft


def scripted_pair(num_rows: int, decoding: dict, architecture: str = "llama", **settings):
    """Target, prompts with their mask, and a draft that is right and wrong about what plain decoding emits with seed 5."""
    input_ids, mask = prompts(num_rows)
    length = {name: decoding[name] for name in ("max_new_tokens", "pad_token_id")}
    target = varied_target(architecture, input_ids, mask, **length)
    torch.manual_seed(5)
    plain = target.generate(input_ids, attention_mask=mask, **decoding)
    return target, scripted_draft(target, plain, input_ids.shape[1], **settings), input_ids, mask


def observer(function):
    """A hook that changes nothing: it passes for one of the package's own, whose forwards need no check."""

    def hook(*args, **kwargs):
        return function(*args, **kwargs)

    hook.__module__ = "transformers_prism"
    return hook


def generate_twice(target, draft, input_ids, attention_mask=None, seed: int = 5, **kwargs):
    """Plain output, output with the draft, and whether both left the global generator in the same state."""
    states = []
    outputs = []
    for assistant in ({}, {"assistant_model": draft}):
        torch.manual_seed(seed)
        outputs.append(target.generate(input_ids, attention_mask=attention_mask, **assistant, **kwargs))
        states.append(torch.get_rng_state())
    return outputs[0], outputs[1], torch.equal(*states)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word "w{i}", split at spaces; unknown words are "w3"."""
    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE - 1)}
    vocabulary["abcdef"] = VOCAB_SIZE - 1  # transformers' stop strings tokenize this word to learn about prefixes
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w3", pad_token="w0", eos_token="w1", bos_token="w2"
    )


CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ '<' + turn['role'] + '> ' + turn['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Like `word_tokenizer`, with a chat template: tokens 1, 4, 5 and 6 end a turn and begin one of user, assistant and
    system."""
    special = ("<pad>", "<end>", "<begin>", "<unknown>", "<user>", "<assistant>", "<system>")
    vocabulary = {word: index for index, word in enumerate(special)}
    vocabulary.update({f"w{index}": index for index in range(len(special), VOCAB_SIZE)})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unknown>",
        pad_token="<pad>",
        eos_token="<end>",
        bos_token="<begin>",
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=list(special[4:]),
    )


def save_chat_target(folder: Path, target=None) -> Path:
    """Save a target, or the usual tiny one, with a tokenizer that has a chat template; returns the folder."""
    (tiny_target("llama", seed=3) if target is None else target).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, rows) -> Path:
    """Write JSON lines; returns the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
