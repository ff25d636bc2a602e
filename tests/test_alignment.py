"""Training computes what decoding computes: aligned forwards against the decode path, and the authors' vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from unmasked_softmax import unmasked_softmax

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.kernels.context_alignment_attention import context_alignment_attention_reference
from transformers_prism.training.alignment import aligned_forward, history_mask
from transformers_prism.training.flash_alignment import flash_alignment_attention
from transformers_prism.training.losses import LossWeights, aligned_loss

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]

DATA = Path(__file__).parent / "data" / "reference"
NUM_TOKENS, WIDTH, VOCABULARY = 9, 32, 97
# An EAGLE-3 draft with every norm that one may have.
NORMS = {
    "module_form": "eagle3",
    "norm_before_residual": True,
    "norm_output": True,
    "query_key_norm": True,
    "target_norm": "each",
    "share_target_head": False,
}


def make_pair(dtype=torch.float32, **overrides):
    """A tiny random target and a draft bound to it; its weights let attention matter and keep outputs near 1."""
    torch.manual_seed(1)
    target = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).to(dtype)
    draft = PrismDraftModel(PrismConfig.from_target(target, **overrides)).to(dtype)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return target.eval(), draft.eval().bind(target)


def decode_step(draft, module_step, token_ids, hidden, cache, num_before, is_path):
    """`draft.forward` over rows that follow `num_before` cached ones, with an explicit causal mask."""
    num_new, window = token_ids.shape[1], draft.config.sliding_window
    mask = torch.full((num_new, num_before + num_new), -torch.inf, dtype=hidden.dtype).triu(num_before + 1)
    if window is not None:
        mask += torch.full(mask.shape, -torch.inf, dtype=hidden.dtype).tril(num_before - window)
    position_ids = torch.arange(num_before, num_before + num_new)[None]
    return draft(token_ids, hidden, module_step, mask[None, None], position_ids, cache).last_hidden_state


def decode_chain(draft, input_ids, target_hidden, num_committed, num_steps):
    """Predictions of a chain below the last of `num_committed` rows, the way decoding makes them, one by one."""
    config = draft.config
    first_steps = [0]
    if config.context_kv == "own_module":
        first_steps = [config.draft_step_to_module.index(m) for m in range(config.num_processing_modules)]
    cache = DynamicCache()
    committed = input_ids[:, :num_committed]
    fused = draft.fuse(target_hidden[:, :num_committed])
    for step in reversed(first_steps):
        output = decode_step(draft, step, committed, fused, cache, 0, False)
    outputs = [output[:, -1:]]
    inputs = []
    num_written = dict.fromkeys(first_steps, num_committed)
    for step in range(1, num_steps):
        inputs.append(outputs[-1])
        view = 0
        if config.context_kv == "own_module":
            view = config.draft_step_to_module.index(config.module_of_step(step))
        start = num_written[view]
        rows = slice(start, num_committed + step)
        hidden = torch.cat(inputs, dim=1)[:, start - num_committed :]
        output = decode_step(draft, step, input_ids[:, rows], hidden, cache, start, True)
        num_written[view] = num_committed + step
        outputs.append(output[:, -1:])
    return outputs


@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(
    "form", [{}, {"module_form": "eagle3"}, NORMS, {"sliding_window": 4}, {"sliding_window": 2}, {"sliding_window": 1}]
)
@pytest.mark.parametrize(
    ("num_modules", "step_to_module"), [(1, [0]), (2, [0, 1]), (2, [0, 1, 0, 1]), (3, [0, 1, 2]), (3, [0, 2, 1])]
)
def test_aligned_forwards_equal_decoding(context_kv, num_layers, form, num_modules, step_to_module):
    """Every step k from every committed length: 1e-5 in float32, 1e-11 in float64."""
    num_steps = 5
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        _, draft = make_pair(
            dtype,
            context_kv=context_kv,
            num_layers_per_module=num_layers,
            num_processing_modules=num_modules,
            draft_step_to_module=step_to_module,
            **form,
        )
        input_ids = torch.randint(0, VOCABULARY, (2, NUM_TOKENS))
        target_hidden = torch.randn(2, NUM_TOKENS, draft.config.fused_hidden_size, dtype=dtype)
        with torch.no_grad():
            trained = aligned_forward(draft, input_ids, target_hidden, num_steps)
            for num_committed in range(1, NUM_TOKENS - num_steps + 2):
                decoded = decode_chain(draft, input_ids, target_hidden, num_committed, num_steps)
                for step, output in enumerate(decoded):
                    difference = trained[step][:, num_committed - 1 + step] - output[:, 0]
                    assert float(difference.abs().max()) <= tolerance


def test_padding_on_the_right_changes_nothing():
    _, draft = make_pair(torch.float64)
    input_ids = torch.randint(0, VOCABULARY, (1, NUM_TOKENS))
    target_hidden = torch.randn(1, NUM_TOKENS, draft.config.fused_hidden_size, dtype=torch.float64)
    with torch.no_grad():
        whole = aligned_forward(draft, input_ids, target_hidden, 3)
        cut = aligned_forward(draft, input_ids[:, :6], target_hidden[:, :6], 3)
    for long, short in zip(whole, cut, strict=True):
        torch.testing.assert_close(long[:, :6], short, rtol=0, atol=1e-11)


def test_rows_without_history_are_masked():
    assert history_mask(4, 3).tolist() == [[True] * 4, [False, True, True, True], [False, False, True, True]]


def test_is_detached_cuts_gradients_between_steps():
    _, draft = make_pair(num_processing_modules=2, normalize_target_hidden=False)
    input_ids = torch.randint(0, VOCABULARY, (1, NUM_TOKENS))
    target_hidden = torch.randn(1, NUM_TOKENS, draft.config.fused_hidden_size)
    for is_detached in (True, False):
        draft.zero_grad(set_to_none=True)
        aligned_forward(draft, input_ids, target_hidden, 2, is_detached)[1].sum().backward()
        # Module 0's MLP reaches step 1 through its prediction alone; its keys and values do in either case.
        assert (draft.processing_modules[0].layers[0].mlp.up_proj.weight.grad is None) is is_detached


@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@pytest.mark.parametrize(
    "form", [{}, {"num_layers_per_module": 2}, {"module_form": "eagle3", "share_target_head": False}, NORMS]
)
def test_every_weight_of_every_form_is_trained(context_kv, form):
    """Through the token loss alone, norm and head of the draft's own included."""
    _, draft = make_pair(num_processing_modules=2, context_kv=context_kv, draft_vocab_size=20, **form)
    input_ids = torch.randint(0, VOCABULARY, (1, NUM_TOKENS))
    predictions = aligned_forward(draft, input_ids, torch.randn(1, NUM_TOKENS, draft.config.fused_hidden_size), 3)
    mask = torch.ones(3, 1, NUM_TOKENS, dtype=torch.bool)
    aligned_loss(draft, predictions, torch.randn(1, NUM_TOKENS, WIDTH), mask, LossWeights(1.0, hidden=0.0)).total.backward()
    without = [name for name, weight in draft.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not without


def test_forwards_say_what_they_expect():
    _, draft = make_pair()
    input_ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"num_steps: expected at least 1, got 0"):
        aligned_forward(draft, input_ids, torch.zeros(1, 4, draft.config.fused_hidden_size), 0)
    with pytest.raises(ValueError, match=r"target_hidden: expected shape \(1, 4, 96\), got \(1, 4, 32\)"):
        aligned_forward(draft, input_ids, torch.zeros(1, 4, WIDTH), 1)


def test_loss_in_chunks_equals_the_plain_loss(monkeypatch):
    """Chunks, a draft vocabulary, a head and norm of the draft's own, weights of steps: value and every gradient.

    The target's distribution is that of its own head, whatever the draft's is.
    """
    monkeypatch.setattr("transformers_prism.training.losses.ROWS_PER_CHUNK", 3)
    eagle3 = {"module_form": "eagle3", "share_target_head": False, "draft_vocab_size": 20}
    for overrides in ({"draft_vocab_size": 20}, {"share_target_head": False}, {"logit_softcap": 5.0}, eagle3):
        the_target, draft = make_pair(torch.float64, **overrides)
        predictions = [torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        label = torch.randn(2, 5, WIDTH, dtype=torch.float64)
        mask = torch.rand(2, 2, 5) < 0.7
        parameters = [*predictions, *draft.head_parameters()]
        weights = LossWeights(0.5, acceptance=0.7, hidden=2.0, steps=(1.0, 0.3))
        loss = aligned_loss(draft, predictions, label, mask, weights)
        found = loss.total
        found_gradients = torch.autograd.grad(found, parameters)
        expected = 0.0
        logits = the_target.get_output_embeddings()(label)
        if draft.draft_to_target is not None:
            logits = logits[..., draft.draft_to_target]
        target = torch.softmax(logits, dim=-1).detach()
        for step, (prediction, rows) in enumerate(zip(predictions, mask, strict=True)):
            log_probs = torch.log_softmax(draft.compute_logits(prediction), dim=-1)
            token = -(target * log_probs).sum(-1)
            # The total variation between two distributions is half the distance of their probabilities.
            acceptance = -torch.log(1 - 0.5 * (target - log_probs.exp()).abs().sum(-1))
            hidden = torch.nn.functional.smooth_l1_loss(prediction, label, reduction="none").mean(-1)
            count = rows.sum() + 1e-5
            whole = ((0.5 * token + 0.7 * acceptance + 2.0 * hidden) * rows).sum() / count
            expected = expected + (1.0, 0.3)[step] * whole
            for part, value in ((loss.token, token), (loss.acceptance, acceptance), (loss.hidden, hidden)):
                torch.testing.assert_close(part[step], ((value * rows).sum() / count).float(), rtol=1e-4, atol=1e-4, check_dtype=False)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
        for left, right in zip(found_gradients, torch.autograd.grad(expected, parameters), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_step_weights_reach_later_steps():
    assert LossWeights(steps=(1.0, 0.5)).of_steps(4).tolist() == [1.0, 0.5, 0.5, 0.5]
    assert LossWeights().of_steps(2).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
def test_activations_computed_again_change_nothing(context_kv):
    """Predictions and gradients with and without checkpointing are the same numbers."""
    _, draft = make_pair(num_processing_modules=2, context_kv=context_kv)
    input_ids = torch.randint(0, VOCABULARY, (2, NUM_TOKENS))
    target_hidden = torch.randn(2, NUM_TOKENS, draft.config.fused_hidden_size)
    gradients = []
    for checkpoint_activations in (False, True):
        draft.zero_grad()
        predictions = aligned_forward(draft, input_ids, target_hidden, 3, False, checkpoint_activations)
        sum(prediction.square().sum() for prediction in predictions).backward()
        gradients.append([parameter.grad.clone() for parameter in draft.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


REFERENCES = ["c1_v2_prism2", "c2_v2_prism3", "c3_legacy_001", "c4_legacy_hass1"]
GRADIENT_STRIDE = 11  # every 11th value of each gradient is kept


def reference_draft(name: str):
    """A draft with the recorded weights that sees each step through that step's module, bound to a stand-in."""
    arrays = np.load(DATA / f"{name}.npz")
    recorded = json.loads((DATA / "configs.json").read_text())[name]["drafter_config"]
    layer = recorded["eagle_config"]
    vocab_size, width = layer["vocab_size"], layer["hidden_size"]
    num_fused = arrays["w.fusion_layer.weight"].shape[1] // width if "w.fusion_layer.weight" in arrays else 1
    target = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=4,
            num_attention_heads=1,
            tie_word_embeddings=False,
        )
    )
    config = PrismConfig.from_target(
        target,
        target_layer_ids=[1, 2, 3][:num_fused] if num_fused > 1 else [4],
        normalize_target_hidden=False,
        context_kv="own_module",
        num_processing_modules=recorded["num_step_models"],
        draft_step_to_module=list(recorded["step_mapping"].values()),
        rope_parameters={"rope_type": "default", "rope_theta": layer["rope_theta"] if "rope_theta" in layer else 1e4},
        intermediate_size=layer["intermediate_size"],
        num_attention_heads=layer["num_attention_heads"],
        num_key_value_heads=layer["num_key_value_heads"],
        head_dim=width // layer["num_attention_heads"],
        rms_norm_eps=layer["rms_norm_eps"],
    )
    weights = {key.removeprefix("w."): torch.tensor(arrays[key]) for key in arrays.files if key.startswith("w.")}
    with torch.no_grad():
        target.get_input_embeddings().weight.copy_(weights.pop("embed_tokens.weight"))
        target.get_output_embeddings().weight.copy_(weights.pop("lm_head.weight"))
    draft = PrismDraftModel(config)
    draft.load_state_dict({our_name(key): value for key, value in weights.items()})
    return draft.bind(target)


def our_name(name: str) -> str:
    """The name here of one of the authors' weights."""
    if name.startswith("stepFCs."):
        _, module, rest = name.split(".", 2)
        return f"processing_modules.{module}.input_projection.{rest}"
    if name.startswith("stepModels."):
        _, module, layer, rest = name.split(".", 3)
        return f"processing_modules.{module}.layers.{layer}.{rest}"
    return name


@pytest.mark.parametrize("name", REFERENCES)
def test_own_module_training_equals_the_authors_with_their_mask_applied(name):
    """Predictions, losses and gradients of both their phases, 1e-4.

    They count every row with a loss mask, the first ones of later forwards included, so the mask here does too.
    """
    recorded = {key: torch.tensor(value) for key, value in np.load(DATA / f"train_{name}.npz").items()}
    batch = {key.removeprefix("train.batch."): value for key, value in recorded.items() if ".batch." in key}
    draft = reference_draft(name)
    mask = batch["loss_mask"].bool().expand(3, -1, -1)
    for phase, is_detached, token_weight, hidden_weight in (("hass", True, 0.1, 1.0), ("prism", False, 0.1, 0.0)):
        draft.zero_grad()
        predictions = aligned_forward(draft, batch["input_ids"], batch["hidden_states"], 3, is_detached)
        loss = aligned_loss(draft, predictions, batch["target"], mask, LossWeights(token_weight, hidden=hidden_weight))
        for step, prediction in enumerate(predictions):
            rows = batch["attention_mask"].bool()
            close(prediction[rows], recorded[f"train.predict_f{step}"][rows])
            close(loss.token[step], recorded[f"train.ploss_f{step}"])
            if hidden_weight:
                close(loss.hidden[step], recorded[f"train.vloss_f{step}"])
        close(loss.total, recorded[f"train.{phase}.loss_sum"])
        loss.total.backward()
        prefix = f"train.{phase}.grad."
        gradients = {our_name(key.removeprefix(prefix)): value for key, value in recorded.items() if prefix in key}
        assert set(gradients) == {key for key, _ in draft.named_parameters()}
        for key, parameter in draft.named_parameters():
            close(parameter.grad.flatten()[::GRADIENT_STRIDE], gradients[key])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_unmasked_softmax_repeats_the_authors_training(name, prism_data):
    """As shipped, their mask is computed and never added: later rows and padding dilute every softmax."""
    arrays = np.load(prism_data / "reference" / f"{name}.npz")
    recorded = {key: torch.tensor(arrays[key]) for key in arrays.files if key.startswith("train.")}
    batch = {key.removeprefix("train.batch."): value for key, value in recorded.items() if ".batch." in key}
    draft = reference_draft(name)
    with unmasked_softmax():
        predictions = aligned_forward(draft, batch["input_ids"], batch["hidden_states"], 3, True)
    rows = batch["attention_mask"].bool()
    for step, prediction in enumerate(predictions):
        close(prediction[rows], recorded[f"train.predict_f{step}"][rows])
    masked = aligned_forward(draft, batch["input_ids"], batch["hidden_states"], 3, True)
    assert (masked[-1] - predictions[-1])[rows].abs().max() > 0.1


@pytest.mark.parametrize(
    ("heads", "groups", "num_rows", "step"),
    [(4, 4, 9, 3), (9, 3, 70, 2), (2, 1, 2, 3), (3, 1, 33, 1), (4, 2, 1, 2)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("window", [None, 1, 2, 4, 20])
def test_flash_attention_is_the_definition(heads, groups, num_rows, step, window):
    """Values and all gradients in float64; also where no row sees a committed one."""
    generator = torch.Generator().manual_seed(num_rows)

    def states(count):
        shape = (2, count, num_rows, 8)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query = states(heads)
    keys, values = ([states(groups) for _ in range(step + 1)] for _ in range(2))
    found = flash_alignment_attention(query, keys, values, 0.3, window)
    starts = None
    if window is not None:
        starts = (torch.arange(num_rows) - window + 1).clamp(min=0).expand(2, -1)
    expected = context_alignment_attention_reference(query, keys, values, starts, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    inputs = [query, *keys, *values]
    pairs = zip(
        torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_a_cpu_makes_no_score_matrix(window, monkeypatch):
    """Whatever draft step it is, neither the definition nor its scores are asked for."""

    def refuse(*args):
        raise AssertionError("expected no scores")

    monkeypatch.setattr("transformers_prism.training.alignment.context_alignment_attention_reference", refuse)
    monkeypatch.setattr("transformers_prism.kernels.context_alignment_attention.context_alignment_scores", refuse)
    _, draft = make_pair(sliding_window=window)
    input_ids = torch.arange(NUM_TOKENS)[None]
    states = torch.randn(1, NUM_TOKENS, draft.config.fused_hidden_size)
    sum(one.sum() for one in aligned_forward(draft, input_ids, states, 3)).backward()
    assert all(parameter.grad is not None for parameter in draft.processing_modules[0].parameters())
