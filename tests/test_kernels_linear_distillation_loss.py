"""linear_distillation_loss: five losses from hidden states, in tiles of the vocabulary, and the student's gradient."""

import pytest
import torch
from kernel_checks import DEVICE, Guards, check_operator, guarded_allocations, run_interpreted
from tiny_models import tiny_draft, tiny_target

from transformers_prism.kernels import dispatch
from transformers_prism.kernels import linear_distillation_loss as kernel
from transformers_prism.kernels.linear_distillation_loss import LOSSES, distillation_losses, linear_distillation_loss
from transformers_prism.training.losses import LossWeights, aligned_loss

pytestmark = pytest.mark.quick


def make(num_steps=2, num_rows=5, hidden_size=24, num_tokens=97, dtype=torch.float32):
    """Random arguments with logits of a standard deviation of 2, and students that are near their teachers."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn((num_rows, hidden_size), generator=generator)
    student = teacher + 0.5 * torch.randn((num_steps, num_rows, hidden_size), generator=generator)
    head = torch.randn((num_tokens, hidden_size), generator=generator) * 2 * hidden_size**-0.5
    return student.to(dtype), teacher.to(dtype), head.to(dtype)


def with_gradient(student, teacher, head, losses=LOSSES, dtype=None, **settings):
    """Losses, and the student's gradient of their random sum."""
    student = student.detach().to(dtype or student.dtype).requires_grad_()
    values = linear_distillation_loss(student, teacher.to(student.dtype), head.to(student.dtype), losses, **settings)
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    return values.detach(), torch.autograd.grad(values, student, weight)[0]


def by_hand(student, teacher, head, scales=(1.0, 1.0), caps=(None, None)):
    """The five losses from their formulas, in float64, as `LOSSES` names them."""

    def distribution(states, scale, cap):
        logits = states.double() @ head.double().T * scale
        return torch.softmax(logits if cap is None else cap * torch.tanh(logits / cap), dim=-1)

    q, p = distribution(student, scales[0], caps[0]), distribution(teacher, scales[1], caps[1])
    total_variation = 0.5 * (p - q).abs().sum(-1)
    return torch.stack(
        (
            -(p * q.log()).sum(-1),
            (p * (p / q).log()).sum(-1),
            (q * (q / p).log()).sum(-1),
            total_variation,
            -(1 - total_variation).log(),
        )
    )


SETTINGS = {"student_scale": 0.5, "student_softcap": 3.0, "teacher_scale": 0.7, "teacher_softcap": 5.0}


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["plain", "scaled and capped"])
def test_reference_equals_the_formulas(settings):
    """Each loss and its gradient, in float64."""
    student, teacher, head = make(dtype=torch.float64)
    given = [(settings.get(f"{side}_scale", 1.0), settings.get(f"{side}_softcap")) for side in ("student", "teacher")]
    for index, name in enumerate(LOSSES):
        found, gradient = with_gradient(student, teacher, head, (name,), **settings)
        leaf = student.clone().requires_grad_()
        expected = by_hand(leaf, teacher, head, *zip(*given, strict=True))[index : index + 1]
        torch.testing.assert_close(found, expected.detach(), atol=1e-12, rtol=0)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf, weight)[0], atol=1e-12, rtol=0)


def test_teacher_and_head_are_frozen():
    """No gradient reaches either, though they ask for it."""
    student, teacher, head = (one.requires_grad_() for one in make())
    linear_distillation_loss(student, teacher, head, LOSSES).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert head.grad is None


def test_loss_compiles_without_a_break():
    """The PyTorch path, in one graph."""
    compiled = torch.compile(linear_distillation_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*make(), LOSSES), linear_distillation_loss(*make(), LOSSES))


def test_loss_says_what_is_wrong():
    """Before anything is computed."""
    student, teacher, head = make()
    for arguments, message in (
        ((student[0, 0], teacher, head), r"student: expected rows that are not empty, got \(24,\)"),
        ((student[:, :0], teacher[:0], head), r"student: expected rows that are not empty, got \(2, 0, 24\)"),
        ((student.int(), teacher, head), r"student: expected dtype float32, float16 or bfloat16, got torch.int32"),
        ((student, teacher[:4], head), r"teacher: expected shape \(5, 24\), got \(4, 24\)"),
        ((student, teacher, head[:, :9]), r"head: expected shape \('V', 24\), got \(97, 9\)"),
        ((student, teacher, head[:0]), r"head: expected shape \('V', 24\), got \(0, 24\)"),
        ((student, teacher.half(), head), r"teacher: expected dtype torch.float32, got torch.float16"),
        ((student, teacher, head.to("meta")), r"head: expected device cpu, got meta"),
        ((student, teacher, head.T.contiguous().T), r"head: expected contiguous rows, got strides \(1, 97\)"),
        ((student, teacher, head, ()), r"losses: expected different ones of cross_entropy, kl, .* got \(\)"),
        ((student, teacher, head, ("kl", "kl")), r"losses: expected different ones of .* got \('kl', 'kl'\)"),
        ((student, teacher, head, ("mse",)), r"losses: expected different ones of .* got \('mse',\)"),
        ((student, teacher, head, ("kl",), 1.0, 0.0), r"student_softcap: expected more than 0, got 0.0"),
        ((student, teacher, head, ("kl",), 1.0, None, 1.0, -1.0), r"teacher_softcap: expected more than 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_distillation_loss(*arguments)
    with pytest.raises(ValueError, match=r"student: expected dtype float32, float16 or bfloat16, got torch.float64"):
        linear_distillation_loss(*make(dtype=torch.float64), implementation="triton")


# Losses are differences of sums in float32, whatever the dtype, of exact products. Gradients, relative to their largest
# value: float32 adds in another order; those of the logits are rounded to 11 (float16) or 8 (bfloat16) bits before the
# second product, and the result is again. Triton's interpreter cuts bfloat16 off instead of rounding.
LOSS_TOLERANCE = 2e-5
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
SIZES = [
    {"num_steps": 1, "num_rows": 1, "num_tokens": 97},
    {"num_steps": 3, "num_rows": 21, "hidden_size": 80},
    {"num_steps": 1, "num_rows": 111, "hidden_size": 1},
    {"num_steps": 1, "num_rows": 257, "hidden_size": 63, "num_tokens": 111},
    {"num_steps": 2, "num_rows": 2, "hidden_size": 257, "num_tokens": 700},
]


def check_kernel(student, teacher, head, losses, **settings):
    """The Triton path between guard regions, its outputs poisoned, against autograd of the float64 reference."""
    guards = Guards()
    arguments = [guards.around(one.to(DEVICE)) for one in (student, teacher, head)]
    with guarded_allocations():
        found, gradient = with_gradient(*arguments, losses, implementation="triton", **settings)
        found, gradient = found.clone(), gradient.clone()
    guards.check()
    assert found.dtype == torch.float32
    assert gradient.dtype == student.dtype
    expected, expected_gradient = with_gradient(student, teacher, head, losses, dtype=torch.float64, **settings)
    torch.testing.assert_close(found.cpu().double(), expected, atol=LOSS_TOLERANCE, rtol=0)
    limit = TOLERANCES[student.dtype] * float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient.cpu().double(), expected_gradient, atol=limit, rtol=0)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel_equals_the_reference(sizes, dtype):
    """All losses at once, on the values that the dtype holds."""
    check_kernel(*make(**sizes, dtype=dtype), LOSSES)


@pytest.mark.kernel
@pytest.mark.parametrize("loss", LOSSES)
def test_kernel_computes_each_loss_alone(loss):
    """With scales and soft-caps of both sides."""
    check_kernel(*make(), (loss,), **SETTINGS)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("num_tokens", "dtype"), [(50257, torch.float16), (151936, torch.bfloat16), (262144, torch.float32)]
)
def test_kernel_takes_large_vocabularies(num_tokens, dtype, monkeypatch):
    """In several parts of the workspace and many splits, the last of them short; wider tiles take the interpreter less
    time."""
    tiles = kernel._tiles
    monkeypatch.setattr(kernel, "_tiles", lambda *sizes: {**tiles(*sizes), "BLOCK_N": 16, "BLOCK_V": 2048, "BLOCK_D": 16})
    check_kernel(*make(1, 3, 16, num_tokens, dtype), ("kl", "total_variation"))


@pytest.mark.kernel
def test_equal_distributions_are_where_all_distances_end():
    """The student is the teacher: no divergence, and no gradient, since a tie of p and q counts half."""
    _, teacher, head = (one.to(DEVICE) for one in make())
    values, gradient = with_gradient(teacher[None], teacher, head, LOSSES[1:], implementation="triton")
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter computes with
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_no_number_spoils_its_row_alone(side):
    """A NaN shows in every loss of its row and in its gradient: training that has diverged must not look perfect."""
    student, teacher, head = (one.to(DEVICE) for one in make(num_steps=1))
    (student[0] if side == "student" else teacher)[2, 7] = torch.nan
    values, gradient = with_gradient(student, teacher, head, LOSSES, implementation="triton")
    is_spoilt = torch.arange(5, device=DEVICE) == 2
    assert torch.equal(values.isnan(), is_spoilt.expand_as(values))
    assert torch.equal(gradient.isnan().all(-1), is_spoilt[None])
    assert torch.equal(gradient.isnan().any(-1), is_spoilt[None])


@pytest.mark.kernel
def test_workspace_of_any_width_gives_the_same(monkeypatch):
    """A part of the vocabulary at a time, the last one narrower, and splits of forward with a short last tile."""
    monkeypatch.setattr(kernel, "_MAX_WORKSPACE_TOKENS", 128)
    monkeypatch.setattr(kernel, "NUM_PROGRAMS", 3)
    check_kernel(*make(num_tokens=700), LOSSES)


@pytest.mark.kernel
def test_rows_of_little_weight_keep_their_gradient():
    """In float16 too, where a gradient of a logit of 1e-9 would be 0."""
    student, teacher, head = (one.to(DEVICE) for one in make(dtype=torch.float16))
    gradients = []
    for implementation in ("torch", "triton"):
        leaf = student.clone().requires_grad_()
        values = linear_distillation_loss(leaf, teacher, head, ("cross_entropy",), implementation=implementation)
        # As large as loss scaling makes them in the end, but for the logits' own share.
        gradients.append(torch.autograd.grad(values, leaf, torch.full_like(values, 1e-3))[0].float())
    largest = float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-2 * largest, rtol=0)


@pytest.mark.kernel
def test_backward_leaves_what_others_share():
    """Two losses of one forward pass: backward of one, then of both, and once more, give the same numbers."""
    student, teacher, head = (one.to(DEVICE) for one in make())
    student.requires_grad_()
    values = linear_distillation_loss(student, teacher, head, ("kl", "total_variation"), implementation="triton")
    before = [one.clone() for one in (student.detach(), teacher, head)]
    weight = torch.ones_like(values[0])

    def gradient(index):
        return torch.autograd.grad(values[index], student, weight, retain_graph=True)[0]

    first, second = gradient(0), gradient(1)
    assert torch.equal(gradient(0), first)
    both = torch.autograd.grad(values.sum(), student, retain_graph=True)[0]
    torch.testing.assert_close(both, first + second, atol=1e-6, rtol=0)
    assert torch.equal(weight, torch.ones_like(weight))
    for one, other in zip(before, (student.detach(), teacher, head), strict=True):
        assert torch.equal(one, other)


@pytest.mark.kernel
def test_no_tensor_of_rows_by_tokens_is_made(monkeypatch):
    """Neither pass allocates more than the workspace."""
    monkeypatch.setattr(kernel, "_MAX_WORKSPACE_TOKENS", 128)
    monkeypatch.setattr(kernel, "NUM_PROGRAMS", 4)
    student, teacher, head = (one.to(DEVICE) for one in make(num_tokens=1000))
    sizes = []
    original = torch.empty

    def empty(shape, **kwargs):
        sizes.append(torch.Size(shape).numel())
        return original(shape, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    with_gradient(student, teacher, head, LOSSES, implementation="triton")
    assert max(sizes) == 10 * 128


@pytest.mark.kernel
def test_operator_is_registered_properly():
    """opcheck of both operators, and one graph with forward and backward in it."""
    student, teacher, head = (one.to(DEVICE) for one in make())
    rows = student.flatten(0, 1).requires_grad_()
    settings = (",".join(LOSSES), 0.5, 3.0, 0.7, None)
    check_operator(kernel._linear_distillation_loss, (rows, teacher, head, *settings))
    with torch.no_grad():
        values, statistics = kernel._linear_distillation_loss(rows, teacher, head, *settings)
    plain = (values, statistics, rows.detach(), teacher, head, *settings)
    check_operator(kernel._linear_distillation_loss_backward, plain)

    def run(student):
        return linear_distillation_loss(student, teacher, head, LOSSES, implementation="triton")

    leaf = student.clone().requires_grad_()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(leaf)
    expected = run(leaf)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(values.sum(), leaf)[0] for values in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.kernel
@pytest.mark.parametrize("overrides", [{}, {"draft_vocab_size": 20, "logit_softcap": 5.0}], ids=str)
def test_training_uses_the_kernel_by_itself(overrides, monkeypatch):
    """Where Triton runs on the tensors' device: the same losses and gradients; a head of one's own stays with PyTorch."""
    target = tiny_target().to(DEVICE)
    weights = LossWeights(0.5, acceptance=0.7, hidden=2.0, steps=(1.0, 0.3))
    calls = []
    launch = kernel._linear_distillation_loss
    monkeypatch.setattr(
        kernel, "_linear_distillation_loss", lambda *inputs: calls.append(inputs[2].shape) or launch(*inputs)
    )
    for form, has_kernel in (({}, True), ({"module_form": "eagle3", "share_target_head": False}, False)):
        draft = tiny_draft(target, **overrides, **form).to(DEVICE).bind(target)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn((3, 2, 6, 32), generator=generator).to(DEVICE)
        mask = (torch.rand((2, 2, 6), generator=generator) < 0.7).to(DEVICE)
        found = []
        for devices in ((), (DEVICE.type,)):
            monkeypatch.setattr(dispatch, "TRITON_DEVICES", devices)
            calls.clear()
            predictions = [one.clone().requires_grad_() for one in states[:2]]
            text = draft.text_rows(torch.tensor([3, 25, 30, 90], device=DEVICE))
            loss = aligned_loss(draft, predictions, states[2], mask, weights, text=text)
            leaves = [*predictions, *draft.head_parameters()]
            found.append([loss.total.detach(), loss.token, loss.acceptance, *torch.autograd.grad(loss.total, leaves)])
            assert bool(calls) is (has_kernel and devices != ())
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_kernel_takes_heads_that_are_a_plain_matrix():
    """With the scales and soft-caps of both sides; any other head is left to PyTorch."""
    target = tiny_target()
    draft = tiny_draft(target, logit_scale=0.5, logit_softcap=7.0).bind(target)
    weight, numerics = draft.shared_head()
    states = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    log_probs, target_log_probs = (
        torch.log_softmax(logits, dim=-1) for logits in (draft.compute_logits(states), draft.compute_target_logits(states))
    )
    expected = distillation_losses(log_probs, target_log_probs, target_log_probs.exp(), LOSSES)
    found = linear_distillation_loss(states, states, weight, LOSSES, **numerics)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not weight.requires_grad

    class Adapted(torch.nn.Linear):
        """Computes something else, for all that is known."""

    for head in (torch.nn.Linear(32, 97), Adapted(32, 97, bias=False)):
        target.set_output_embeddings(head)
        assert tiny_draft(target).bind(target).shared_head() is None
    own = tiny_draft(target := tiny_target(), share_target_head=False).bind(target)
    assert own.shared_head() is None


def test_losses_without_a_weight_cost_nothing():
    """Neither part of the vocabulary: zeros, and the distance of hidden states is what is left."""
    target = tiny_target()
    draft = tiny_draft(target).bind(target)
    prediction = torch.randn(1, 4, 32, requires_grad=True)
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    loss = aligned_loss(draft, [prediction], torch.zeros(1, 4, 32), mask, LossWeights(0.0, hidden=1.0))
    torch.testing.assert_close(loss.total, loss.hidden[0])
    loss.total.backward()
    assert prediction.grad.any()


@pytest.mark.kernel
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_autocast_leaves_losses_in_float32(implementation):
    """The head's product may be made of 16 bits; what is summed and weighed afterwards is not rounded to them."""
    target = tiny_target().to(DEVICE)
    draft = tiny_draft(target).to(DEVICE).bind(target)
    label, prediction = torch.randn((2, 1, 9, 32), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones((1, 1, 9), dtype=torch.bool, device=DEVICE)
    weights = LossWeights(0.3, acceptance=0.7, hidden=0.0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = aligned_loss(draft, [prediction], label, mask, weights, implementation)
        log_probs, target_log_probs = torch.log_softmax(torch.stack((prediction, label)), dim=-1)
        found = distillation_losses(log_probs, target_log_probs, target_log_probs.exp(), LOSSES)
    expected = distillation_losses(log_probs, target_log_probs, target_log_probs.exp(), LOSSES)
    assert torch.equal(found, expected)
    torch.testing.assert_close(loss.total, 0.3 * loss.token[0] + 0.7 * loss.acceptance[0], atol=1e-6, rtol=0)


def test_a_draft_with_its_own_head_cannot_ask_for_the_kernel(monkeypatch):
    """Its head is trained, which the kernel does not do."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    target = tiny_target()
    draft = tiny_draft(target, share_target_head=False).bind(target)
    arguments = ([torch.randn(1, 4, 32)], torch.randn(1, 4, 32), torch.ones(1, 1, 4, dtype=torch.bool), LossWeights())
    with pytest.raises(ValueError, match="implementation: expected auto or torch for this head, got triton"):
        aligned_loss(draft, *arguments, implementation="triton")


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
