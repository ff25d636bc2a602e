"""Distances between the student's and the teacher's distribution over a vocabulary, straight from hidden states.

    z = cap(scale * student[n] . head[v]),  q = softmax(z);   y, p the same of teacher[n mod R], with its own scale and cap
    cross_entropy            -sum p log q                     z's gradient: q - p
    kl                       sum p (log p - log q)                          q - p
    reverse_kl               sum q (log q - log p)                          q (log q - log p - reverse_kl)
    total_variation          1 - sum min(p, q)                              q (B - a),  a = [q < p],  B = sum a q
    negative_log_acceptance  -log sum min(p, q)                             q (B - a) / sum min(p, q)

with cap(x) = softcap * tanh(x / softcap), or x itself; a is 1/2 where q = p. Both share one frozen head of V rows, all of
the target's or those of a draft vocabulary; a head that is being trained is not supported. Gradients reach the student alone.

Layout: student `(N, D)`, teacher `(R, D)`, head `(V, D)`, losses `(K, N)` in float32. Forward computes both products tile by
tile of the vocabulary, with a running softmax, and keeps 8 float32 numbers a row. The sums of min(p, q) take a second pass,
since they need both complete softmaxes. Backward computes the products again, a part of the vocabulary at a time: z's
gradients of that part go through a workspace of at most 64 MB, and a second product adds them up to `(N, D)` in float32.
Backward only reads what forward kept, so that several losses may share it.

Bytes moved: a pass reads the head once for every 128 rows (64 in float32 or unless D is a multiple of 16), 2 * V * D bytes
in 16 bits; everything else is small compared to that. A pass takes 4 * N * V * D operations, backward 6 * N * V * D.
Source: softmax in tiles as in Cut Cross-Entropy (arXiv:2411.09009); acceptance of a drafted token is sum min(p, q) by
Leviathan et al. 2023 (arXiv:2211.17192).
"""

import torch

from .dispatch import (
    ALL_REGISTERS,
    NUM_PROGRAMS,
    expect,
    expect_float,
    expect_tensors,
    operator,
    operator_namespace,
    use_triton,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_NAMESPACE = operator_namespace(__name__, __file__)
LOSSES = ("cross_entropy", "kl", "reverse_kl", "total_variation", "negative_log_acceptance")
# Smaller acceptances are clamped to this, and have no gradient.
_LEAST_ACCEPTANCE = 1e-9
# Of each row: both log-sum-exps, p z, p y, q z, q y, and for the last two losses min(p, q) and a q, summed over tokens.
_NUM_STATISTICS = 8
# Of gradients of logits: 4096 tokens by a few thousand rows in 16 bits stay in an H100's L2 cache.
_WORKSPACE_BYTES = 64 * 1024**2
_MAX_WORKSPACE_TOKENS = 4096


def distillation_losses(
    log_probs: torch.Tensor, target_log_probs: torch.Tensor, target: torch.Tensor, losses: tuple[str, ...],
    token_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The named `losses`, `(K, ...)` in their order, from whole distributions: log q, log p and p, `(..., V)` each. If the
    V tokens are a sample, `token_weights` `(V,)` says how many tokens each stands for."""
    # No `vecdot`, which rounds to 16 bits under autocast.
    def total(terms: torch.Tensor) -> torch.Tensor:
        return (terms if token_weights is None else terms * token_weights).sum(dim=-1)

    def of(name: str) -> torch.Tensor:
        if name == "cross_entropy":
            return -total(target * log_probs)
        if name == "kl":
            return total(target * (target_log_probs - log_probs))
        if name == "reverse_kl":
            return total(log_probs.exp() * (log_probs - target_log_probs))
        accepted = total(torch.minimum(target, log_probs.exp()))
        return 1 - accepted if name == "total_variation" else -accepted.clamp(min=_LEAST_ACCEPTANCE).log()

    return torch.stack([of(name) for name in losses])


def head_logits(states: torch.Tensor, head: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Logits `(..., V)` of a head `(V, D)` at states `(..., D)`, scaled and capped."""
    logits = states @ head.T * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def linear_distillation_loss_reference(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, losses: str, student_scale: float,
    student_softcap: float | None, teacher_scale: float, teacher_softcap: float | None
) -> torch.Tensor:
    """The definition; see [`linear_distillation_loss`]. Computes in float32, or in float64 if the tensors are."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    head = head.detach().to(dtype)

    def log_softmax(states, scale, softcap):
        return torch.log_softmax(head_logits(states.to(dtype), head, scale, softcap), dim=-1)

    target_log_probs = log_softmax(teacher.detach(), teacher_scale, teacher_softcap)  # [R, V]
    log_probs = log_softmax(student.unflatten(0, (-1, len(teacher))), student_scale, student_softcap)  # [N / R, R, V]
    values = distillation_losses(log_probs, target_log_probs, target_log_probs.exp(), tuple(losses.split(",")))
    return values.flatten(1)


if triton is not None:

    @triton.jit
    def _capped(logits, scale, softcap, HAS_SOFTCAP: tl.constexpr):
        logits = logits * scale
        if HAS_SOFTCAP:
            logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.8853900817779268 / softcap)) + 1.0))
        return logits

    @triton.jit
    def _both_logits(
        student, teacher, head, row, is_row, token, is_token,
        num_teacher_rows, student_scale, student_softcap, teacher_scale, teacher_softcap,
        HIDDEN_SIZE: tl.constexpr, HAS_STUDENT_CAP: tl.constexpr, HAS_TEACHER_CAP: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        # A tile [N, V] of the student's logits and of the teacher's, from one load of the head's rows.
        ours = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        theirs = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        student += row[:, None] * HIDDEN_SIZE
        teacher += (row % num_teacher_rows)[:, None] * HIDDEN_SIZE
        head += token[:, None] * HIDDEN_SIZE
        for start in range(0, HIDDEN_SIZE, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            is_column = (column < HIDDEN_SIZE)[None, :]
            weights = tl.trans(tl.load(head + column[None, :], mask=is_token[:, None] & is_column, other=0.0))  # [D, V]
            states = tl.load(student + column[None, :], mask=is_row[:, None] & is_column, other=0.0)  # [N, D]
            ours = tl.dot(states, weights, ours, input_precision=PRECISION)
            states = tl.load(teacher + column[None, :], mask=is_row[:, None] & is_column, other=0.0)
            theirs = tl.dot(states, weights, theirs, input_precision=PRECISION)
        ours = _capped(ours, student_scale, student_softcap, HAS_STUDENT_CAP)
        return ours, _capped(theirs, teacher_scale, teacher_softcap, HAS_TEACHER_CAP)

    @triton.jit
    def _linear_distillation_loss_fwd_kernel(
        student, teacher, head, parts,
        num_rows, num_teacher_rows, num_tokens, split_length, student_scale, student_softcap, teacher_scale,
        teacher_softcap,
        HAS_REVERSE: tl.constexpr, HIDDEN_SIZE: tl.constexpr, HAS_STUDENT_CAP: tl.constexpr,
        HAS_TEACHER_CAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        # One program: a tile of rows over one part of the vocabulary. Sums are relative to the largest logit so far.
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = row < num_rows
        our_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        their_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        our_sum = tl.zeros((BLOCK_N,), tl.float32)
        their_sum = tl.zeros((BLOCK_N,), tl.float32)
        sum_pz = tl.zeros((BLOCK_N,), tl.float32)
        sum_py = tl.zeros((BLOCK_N,), tl.float32)
        sum_qz = tl.zeros((BLOCK_N,), tl.float32)
        sum_qy = tl.zeros((BLOCK_N,), tl.float32)
        begin = tl.program_id(1) * split_length
        for first in range(begin, tl.minimum(begin + split_length, num_tokens), BLOCK_V):
            token = (first + tl.arange(0, BLOCK_V)).to(tl.int64)
            is_token = token < num_tokens
            ours, theirs = _both_logits(
                *(student, teacher, head, row, is_row, token, is_token, num_teacher_rows),
                *(student_scale, student_softcap, teacher_scale, teacher_softcap),
                *(HIDDEN_SIZE, HAS_STUDENT_CAP, HAS_TEACHER_CAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D),
            )
            new_max = tl.maximum(their_max, tl.max(tl.where(is_token[None, :], theirs, float("-inf")), 1))
            decay = tl.exp(their_max - new_max)
            weights = tl.where(is_token[None, :], tl.exp(theirs - new_max[:, None]), 0.0)
            their_sum = their_sum * decay + tl.sum(weights, 1)
            sum_pz = sum_pz * decay + tl.sum(weights * ours, 1)
            sum_py = sum_py * decay + tl.sum(weights * theirs, 1)
            their_max = new_max
            new_max = tl.maximum(our_max, tl.max(tl.where(is_token[None, :], ours, float("-inf")), 1))
            decay = tl.exp(our_max - new_max)
            weights = tl.where(is_token[None, :], tl.exp(ours - new_max[:, None]), 0.0)
            our_sum = our_sum * decay + tl.sum(weights, 1)
            if HAS_REVERSE:
                sum_qz = sum_qz * decay + tl.sum(weights * ours, 1)
                sum_qy = sum_qy * decay + tl.sum(weights * theirs, 1)
            our_max = new_max
        parts += tl.program_id(1).to(tl.int64) * 8 * num_rows + row
        tl.store(parts, our_max, mask=is_row)
        tl.store(parts + num_rows, our_sum, mask=is_row)
        tl.store(parts + 2 * num_rows, their_max, mask=is_row)
        tl.store(parts + 3 * num_rows, their_sum, mask=is_row)
        tl.store(parts + 4 * num_rows, sum_pz, mask=is_row)
        tl.store(parts + 5 * num_rows, sum_py, mask=is_row)
        tl.store(parts + 6 * num_rows, sum_qz, mask=is_row)
        tl.store(parts + 7 * num_rows, sum_qy, mask=is_row)

    @triton.jit(do_not_specialize=["num_splits"])
    def _linear_distillation_loss_reduce_fwd_kernel(parts, statistics, num_rows, num_splits, BLOCK_N: tl.constexpr):
        # One program: all parts of a tile of rows, and their sums as expectations.
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = row < num_rows
        for side in tl.static_range(0, 2):
            # The student's largest logits and sums come first, but the sums that are weighted by them come last.
            at_max = parts + 2 * side * num_rows + row
            at_sums = parts + (6 - 2 * side) * num_rows + row
            largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_N,), tl.float32)
            with_ours = tl.zeros((BLOCK_N,), tl.float32)
            with_theirs = tl.zeros((BLOCK_N,), tl.float32)
            for _ in range(0, num_splits):
                part_max = tl.load(at_max, mask=is_row, other=0.0)
                new_max = tl.maximum(largest, part_max)
                decay = tl.exp(largest - new_max)
                weight = tl.exp(part_max - new_max)
                total = total * decay + weight * tl.load(at_max + num_rows, mask=is_row, other=1.0)
                with_ours = with_ours * decay + weight * tl.load(at_sums, mask=is_row, other=0.0)
                part = tl.load(at_sums + num_rows, mask=is_row, other=0.0)
                with_theirs = with_theirs * decay + weight * part
                largest = new_max
                at_max += 8 * num_rows
                at_sums += 8 * num_rows
            tl.store(statistics + side * num_rows + row, largest + tl.log(total), mask=is_row)
            at_sums = statistics + (4 - 2 * side) * num_rows + row
            tl.store(at_sums, with_ours / total, mask=is_row)
            tl.store(at_sums + num_rows, with_theirs / total, mask=is_row)

    @triton.jit
    def _linear_distillation_loss_acceptance_fwd_kernel(
        student, teacher, head, statistics, parts,
        num_rows, num_teacher_rows, num_tokens, split_length, student_scale, student_softcap, teacher_scale,
        teacher_softcap,
        HIDDEN_SIZE: tl.constexpr, HAS_STUDENT_CAP: tl.constexpr, HAS_TEACHER_CAP: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        # One program: sums of min(p, q) and of a q over one part of the vocabulary.
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = row < num_rows
        our_log_sum = tl.load(statistics + row, mask=is_row, other=0.0)
        their_log_sum = tl.load(statistics + num_rows + row, mask=is_row, other=0.0)
        accepted = tl.zeros((BLOCK_N,), tl.float32)
        smaller = tl.zeros((BLOCK_N,), tl.float32)
        begin = tl.program_id(1) * split_length
        for first in range(begin, tl.minimum(begin + split_length, num_tokens), BLOCK_V):
            token = (first + tl.arange(0, BLOCK_V)).to(tl.int64)
            is_token = token < num_tokens
            ours, theirs = _both_logits(
                *(student, teacher, head, row, is_row, token, is_token, num_teacher_rows),
                *(student_scale, student_softcap, teacher_scale, teacher_softcap),
                *(HIDDEN_SIZE, HAS_STUDENT_CAP, HAS_TEACHER_CAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D),
            )
            ours = tl.where(is_token[None, :], tl.exp(ours - our_log_sum[:, None]), 0.0)
            theirs = tl.exp(theirs - their_log_sum[:, None])
            accepted += tl.sum(tl.minimum(ours, theirs, propagate_nan=tl.PropagateNan.ALL), 1)
            smaller += tl.sum(tl.where(ours < theirs, ours, tl.where(ours == theirs, 0.5 * ours, 0.0)), 1)
        parts += tl.program_id(1).to(tl.int64) * 2 * num_rows + row
        tl.store(parts, accepted, mask=is_row)
        tl.store(parts + num_rows, smaller, mask=is_row)

    @triton.jit(do_not_specialize=["first_token", "num_part_tokens"])
    def _linear_distillation_loss_logits_bwd_kernel(
        student, teacher, head, statistics, coefficients, grad_logits,
        num_rows, num_teacher_rows, first_token, num_part_tokens, stride_grad, student_scale, student_softcap,
        teacher_scale, teacher_softcap,
        HAS_REVERSE: tl.constexpr, HAS_ACCEPTANCE: tl.constexpr, HIDDEN_SIZE: tl.constexpr,
        HAS_STUDENT_CAP: tl.constexpr, HAS_TEACHER_CAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ):
        # One program: gradients of one tile of logits, [N, V], into the workspace.
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = row < num_rows
        column = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        is_token = column < num_part_tokens
        ours, theirs = _both_logits(
            *(student, teacher, head, row, is_row, first_token + column, is_token, num_teacher_rows),
            *(student_scale, student_softcap, teacher_scale, teacher_softcap),
            *(HIDDEN_SIZE, HAS_STUDENT_CAP, HAS_TEACHER_CAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D),
        )
        slope = tl.full((BLOCK_N, BLOCK_V), 1.0, tl.float32)
        if HAS_STUDENT_CAP:
            slope = 1.0 - (ours / student_softcap) * (ours / student_softcap)
        ours -= tl.load(statistics + row, mask=is_row, other=0.0)[:, None]
        theirs -= tl.load(statistics + num_rows + row, mask=is_row, other=0.0)[:, None]
        probs = tl.exp(ours)
        target = tl.exp(theirs)
        result = tl.load(coefficients + row, mask=is_row, other=0.0)[:, None] * (probs - target)
        if HAS_REVERSE:
            coefficient = tl.load(coefficients + num_rows + row, mask=is_row, other=0.0)[:, None]
            reverse_kl = tl.load(coefficients + 2 * num_rows + row, mask=is_row, other=0.0)[:, None]
            result += coefficient * probs * (ours - theirs - reverse_kl)
        if HAS_ACCEPTANCE:
            coefficient = tl.load(coefficients + 3 * num_rows + row, mask=is_row, other=0.0)[:, None]
            smaller = tl.load(statistics + 7 * num_rows + row, mask=is_row, other=0.0)[:, None]
            is_smaller = tl.where(probs < target, 1.0, tl.where(probs == target, 0.5, 0.0))
            result += coefficient * probs * (smaller - is_smaller)
        mask = is_row[:, None] & is_token[None, :]
        address = grad_logits + row[:, None] * stride_grad + column[None, :]
        tl.store(address, (result * slope).to(grad_logits.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["first_token", "num_part_tokens"])
    def _linear_distillation_loss_hidden_bwd_kernel(
        grad_logits, head, grad_student,
        num_rows, first_token, num_part_tokens, stride_grad,
        HIDDEN_SIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        # One program: a tile of the student's gradient [N, D], to which this part of the vocabulary is added.
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = row < num_rows
        feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        is_feature = feature < HIDDEN_SIZE
        mask = is_row[:, None] & is_feature[None, :]
        address = grad_student + row[:, None] * HIDDEN_SIZE + feature[None, :]
        result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if first_token > 0:
            result = tl.load(address, mask=mask, other=0.0)
        for start in range(0, num_part_tokens, BLOCK_V):
            column = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
            is_token = column < num_part_tokens
            place = grad_logits + row[:, None] * stride_grad + column[None, :]
            grads = tl.load(place, mask=is_row[:, None] & is_token[None, :], other=0.0)  # [N, V]
            place = head + (first_token + column)[:, None] * HIDDEN_SIZE + feature[None, :]
            weights = tl.load(place, mask=is_token[:, None] & is_feature[None, :], other=0.0)  # [V, D]
            result = tl.dot(grads, weights, result, input_precision=PRECISION)
        tl.store(address, result, mask=mask)

    def _tiles(hidden_size: int, itemsize: int) -> dict:
        """Tiles for any number of rows: smaller tiles for few rows would not be faster, since the head has to be read in any
        case. float32 products are six products of bfloat16 parts, which is as exact. These take registers, and so do rows
        whose elements each have an address of their own."""
        block_n = 128 if hidden_size % 16 == 0 else 64
        tiles = {"PRECISION": "ieee", "BLOCK_N": block_n, "BLOCK_V": 64, "BLOCK_D": 64}
        if itemsize == 4:
            tiles = {"PRECISION": "bf16x6", "BLOCK_N": 64, "BLOCK_V": 32, "BLOCK_D": 32}
        return {**tiles, "num_warps": 8, "num_stages": 2, **ALL_REGISTERS}

    def _forward_grid(num_rows: int, num_tokens: int, tiles: dict) -> tuple[tuple[int, int], int]:
        """Tiles of rows by parts of the vocabulary, enough to give every multiprocessor a program, and a part's length."""
        num_tiles = triton.cdiv(num_tokens, tiles["BLOCK_V"])
        row_tiles = triton.cdiv(num_rows, tiles["BLOCK_N"])
        num_splits = min(num_tiles, triton.cdiv(NUM_PROGRAMS, row_tiles))
        split_length = triton.cdiv(num_tiles, num_splits) * tiles["BLOCK_V"]
        return (row_tiles, triton.cdiv(num_tokens, split_length)), split_length

    def _numerics(student_scale, student_softcap, teacher_scale, teacher_softcap) -> tuple[tuple, dict]:
        """The scales and soft-caps as kernels take them: numbers, and flags that say which soft-caps there are."""
        numbers = (student_scale, student_softcap or 1.0, teacher_scale, teacher_softcap or 1.0)
        return numbers, {"HAS_STUDENT_CAP": student_softcap is not None, "HAS_TEACHER_CAP": teacher_softcap is not None}

    def _loss_values(statistics: torch.Tensor, losses: str) -> torch.Tensor:
        """Losses `(K, N)` from the statistics of each row."""
        our_log_sum, their_log_sum, pz, py, qz, qy, accepted, _ = statistics
        formulas = {
            "cross_entropy": lambda: our_log_sum - pz,
            "kl": lambda: (py - their_log_sum) - (pz - our_log_sum),
            "reverse_kl": lambda: (qz - our_log_sum) - (qy - their_log_sum),
            "total_variation": lambda: 1 - accepted,
            "negative_log_acceptance": lambda: -accepted.clamp(min=_LEAST_ACCEPTANCE).log(),
        }
        return torch.stack([formulas[name]() for name in losses.split(",")])

    def _needs(losses: str) -> tuple[bool, bool]:
        return "reverse_kl" in losses, "total_variation" in losses or "negative_log_acceptance" in losses

    def _linear_distillation_loss_fwd(
        student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, losses: str, student_scale: float,
        student_softcap: float | None, teacher_scale: float, teacher_softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (num_rows, hidden_size), num_tokens = student.shape, head.shape[0]
        tiles = _tiles(hidden_size, student.element_size())
        grid, split_length = _forward_grid(num_rows, num_tokens, tiles)
        has_reverse, has_acceptance = _needs(losses)
        parts = torch.empty((grid[1], _NUM_STATISTICS, num_rows), dtype=torch.float32, device=student.device)
        statistics = torch.empty((_NUM_STATISTICS, num_rows), dtype=torch.float32, device=student.device)
        sizes = (num_rows, teacher.shape[0], num_tokens, split_length)
        scales, caps = _numerics(student_scale, student_softcap, teacher_scale, teacher_softcap)
        options = {"HIDDEN_SIZE": hidden_size, **caps, **tiles}
        _linear_distillation_loss_fwd_kernel[grid](
            student, teacher, head, parts, *sizes, *scales, HAS_REVERSE=has_reverse, **options
        )
        _linear_distillation_loss_reduce_fwd_kernel[(triton.cdiv(num_rows, 128),)](
            parts, statistics, num_rows, grid[1], BLOCK_N=128
        )
        if has_acceptance:
            sums = torch.empty((grid[1], 2, num_rows), dtype=torch.float32, device=student.device)
            _linear_distillation_loss_acceptance_fwd_kernel[grid](
                student, teacher, head, statistics, sums, *sizes, *scales, **options
            )
            torch.sum(sums, dim=0, out=statistics[6:])
        else:
            statistics[6:] = 0
        return _loss_values(statistics, losses), statistics

    def _coefficients(grad_losses: torch.Tensor, statistics: torch.Tensor, losses: str) -> torch.Tensor:
        """Coefficients of the gradients of a row's logits, `(4, N)`: factors of q - p and of the reverse KL's part, the
        reverse KL itself, and the factor of q (B - a)."""
        gradient = dict(zip(losses.split(","), grad_losses.float(), strict=True))
        zero = torch.zeros_like(statistics[0])
        accepted = statistics[6]
        is_kept = accepted > _LEAST_ACCEPTANCE
        of_log = torch.where(is_kept, 1 / accepted.clamp(min=_LEAST_ACCEPTANCE), zero)
        acceptance = gradient.get("total_variation", zero) + gradient.get("negative_log_acceptance", zero) * of_log
        forward = gradient.get("cross_entropy", zero) + gradient.get("kl", zero)
        reverse_kl = _loss_values(statistics, "reverse_kl")[0]
        return torch.stack((forward, gradient.get("reverse_kl", zero), reverse_kl, acceptance))

    def _linear_distillation_loss_bwd(
        grad_losses: torch.Tensor, statistics: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor,
        head: torch.Tensor, losses: str, student_scale: float, student_softcap: float | None, teacher_scale: float,
        teacher_softcap: float | None
    ) -> torch.Tensor:
        (num_rows, hidden_size), num_tokens = student.shape, head.shape[0]
        coefficients = _coefficients(grad_losses, statistics, losses)
        # Gradients of rows with a small weight must not underflow in 16 bits, so the workspace holds them without the weight.
        size = coefficients[[0, 1, 3]].abs().amax(dim=0).clamp(min=1e-30)
        coefficients[[0, 1, 3]] /= size
        tiles = _tiles(hidden_size, student.element_size())
        width = min(_MAX_WORKSPACE_TOKENS, _WORKSPACE_BYTES // (num_rows * student.element_size()), num_tokens)
        width = triton.cdiv(max(width, 1), tiles["BLOCK_V"]) * tiles["BLOCK_V"]
        grad_logits = torch.empty((num_rows, width), dtype=student.dtype, device=student.device)
        grad_student = torch.empty((num_rows, hidden_size), dtype=torch.float32, device=student.device)
        scales, caps = _numerics(student_scale, student_softcap, teacher_scale, teacher_softcap)
        has_reverse, has_acceptance = _needs(losses)
        options = {"HIDDEN_SIZE": hidden_size, **caps, **tiles}
        row_tiles = triton.cdiv(num_rows, tiles["BLOCK_N"])
        for first in range(0, num_tokens, width):
            count = min(width, num_tokens - first)
            _linear_distillation_loss_logits_bwd_kernel[(row_tiles, triton.cdiv(count, tiles["BLOCK_V"]))](
                *(student, teacher, head, statistics, coefficients, grad_logits),
                *(num_rows, teacher.shape[0], first, count, width), *scales,
                HAS_REVERSE=has_reverse, HAS_ACCEPTANCE=has_acceptance, **options,
            )
            _linear_distillation_loss_hidden_bwd_kernel[(row_tiles, triton.cdiv(hidden_size, tiles["BLOCK_D"]))](
                *(grad_logits, head, grad_student, num_rows, first, count, width),
                HIDDEN_SIZE=hidden_size,
                **tiles,
            )
        return (grad_student * (size * student_scale)[:, None]).to(student.dtype)

    _linear_distillation_loss = operator(_NAMESPACE, _linear_distillation_loss_fwd)
    _linear_distillation_loss_backward = operator(_NAMESPACE, _linear_distillation_loss_bwd)

    @_linear_distillation_loss.register_fake
    def _(student, teacher, head, losses, *scales):
        values = student.new_empty((len(losses.split(",")), student.shape[0]), dtype=torch.float32)
        return values, student.new_empty((_NUM_STATISTICS, student.shape[0]), dtype=torch.float32)

    @_linear_distillation_loss_backward.register_fake
    def _(grad_losses, statistics, student, teacher, head, losses, *scales):
        return student.new_empty(student.shape)

    def _keep_for_backward(ctx, inputs, output):
        student, teacher, head, *ctx.settings = inputs
        ctx.save_for_backward(output[1], student, teacher, head)

    def _backward(ctx, grad_losses, _):
        gradient = _linear_distillation_loss_backward(grad_losses.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return gradient, *[None] * 7

    _linear_distillation_loss.register_autograd(_backward, setup_context=_keep_for_backward)


def linear_distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, losses: tuple[str, ...] = ("cross_entropy",),
    student_scale: float = 1.0, student_softcap: float | None = None, teacher_scale: float = 1.0,
    teacher_softcap: float | None = None, implementation: str = "auto"
) -> torch.Tensor:
    """Distances, in nats, between the distributions that a frozen head gives for two hidden states.

    Args:
        student (`torch.Tensor` of shape `(..., R, D)`): float32, float16 or bfloat16; on PyTorch's path float64 as well.
            Made contiguous where it is not.
        teacher (`torch.Tensor` of shape `(R, D)`): compared with every leading dimension of the student. Made contiguous
            where it is not.
        head (`torch.Tensor` of shape `(V, D)`): contiguous; the rows of a draft vocabulary, or all.
        losses (`tuple` of `str`): one or more, each once, of "cross_entropy", "kl", "reverse_kl", "total_variation" and
            "negative_log_acceptance".
        student_scale, teacher_scale (`float`): of the logits.
        student_softcap, teacher_softcap (`float`, *optional*): bounds of the logits.
        implementation (`str`): "auto", "triton" or "torch".
    Returns:
        `torch.Tensor` of shape `(K, ..., R)`: each loss of each row, in float32 (float64 if the tensors are); gradients
        reach the student alone.
    Raises:
        ValueError: if shapes, strides, dtypes, devices or losses do not fit.
    """
    expect(student.dim() >= 2 and student.numel() > 0, "student", "rows that are not empty", tuple(student.shape))
    expect_float("student", student, has_double=True)
    shape = tuple(student.shape[-2:])
    fits = head.dim() == 2 and head.shape[0] > 0 and head.shape[1] == shape[1]
    expect(fits, "head", f"shape {('V', shape[1])}", tuple(head.shape))
    tensors = {"teacher": (teacher, shape, student.dtype), "head": (head, tuple(head.shape), student.dtype)}
    expect_tensors(student.device, **tensors)
    expect(head.is_contiguous(), "head", "contiguous rows", f"strides {head.stride()}")
    is_known = len(losses) > 0 and set(losses) <= set(LOSSES) and len(set(losses)) == len(losses)
    expect(is_known, "losses", f"different ones of {', '.join(LOSSES)}", losses)
    for name, softcap in (("student_softcap", student_softcap), ("teacher_softcap", teacher_softcap)):
        expect(softcap is None or softcap > 0, name, "more than 0", softcap)
    if student.dtype == torch.float64:
        expect(implementation != "triton", "student", "dtype float32, float16 or bfloat16", student.dtype)
        implementation = "torch"
    rows = student.flatten(0, -2).contiguous()
    settings = (",".join(losses), float(student_scale), student_softcap, float(teacher_scale), teacher_softcap)
    if use_triton(implementation, student.device):
        values, _ = _linear_distillation_loss(rows, teacher.detach().contiguous(), head.detach(), *settings)
    else:
        values = linear_distillation_loss_reference(rows, teacher, head, *settings)
    return values.unflatten(1, student.shape[:-1])
