"""The four losses of the paper (Eq. 6-9), as means over tokens in nats.

A mean is over the tokens that count, never over padding or the batch. A step may be split over micro-batches or
processes. The caller then passes how many tokens the whole step has, and the parts add up to one mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from linmu_models.chat import IGNORE

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kept:
    """The positions whose next token is supervised, row by row."""

    rows: Tensor
    """(n,) int64, batch row."""
    positions: Tensor
    """(n,) int64: the position that predicts; the predicted token is one further on."""
    targets: Tensor
    """(n,) int64: the token to predict."""
    samples: Tensor
    """(n,) int64: the sample; its row, unless rows hold several."""

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, states: Tensor) -> Tensor:
        """The kept rows of `(B, L, D)` hidden states, `(n, D)`."""
        return states[self.rows, self.positions]

    def within(self, start: int, stop: int) -> Tensor:
        """(n,) bool: which lie from position `start` to `stop`."""
        return (self.positions >= start) & (self.positions < stop)

    def slab(self, start: int, stop: int) -> "Kept":
        """Those from position `start` to `stop`, counted from there."""
        mine = self.within(start, stop)
        return Kept(self.rows[mine], self.positions[mine] - start, self.targets[mine], self.samples[mine])


def kept_positions(labels: Tensor, seq_idx: Tensor | None = None) -> Kept:
    """Where a model is asked for an answer token.

    Args:
        labels: (B, L) int64; `labels[b, t]` is the token at t where it is supervised, -100 elsewhere. A label at t is
            predicted at t - 1; a label at 0 is predicted by nothing and is left out.
        seq_idx: (1, L): the sample of each token, where one row holds all of them. The first label of each is -100.
    """
    shifted = labels[:, 1:]
    rows, positions = (shifted != IGNORE).nonzero(as_tuple=True)
    samples = rows if seq_idx is None else seq_idx[rows, positions].long()
    return Kept(rows, positions, shifted[rows, positions], samples)


def hidden_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    weights: Tensor | Sequence[Tensor],
    *,
    scales: Sequence[float] | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """L_hid, Eq. 6: the mean over layers and tokens of the squared distance of a mixer's output to the attention's.

        1/A sum_l 1/N sum_t weights[t] || student[l][t] - teacher[l][t] ||^2 / scales[l]

    Args:
        student: A tensors (B, L, D): the M-MATE outputs, before the residual addition.
        teacher: A tensors (B, L, D): the teacher's attention outputs at the same layers.
        weights: (B, L), bool or >= 0, 0 at padding; or one such tensor for each layer.
        scales: a number > 0 for each layer; the mean of ||teacher||^2 makes each term a relative error. None: all 1.
        num_tokens: N; the sum of the (first layer's) weights when None.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"hidden_loss: student must have the teacher's {len(teacher)} layers, got {len(student)}")
    each = [weights] * len(teacher) if isinstance(weights, Tensor) else weights
    count = num_weighed(weights) if num_tokens is None else num_tokens
    total = torch.zeros((), dtype=torch.float32, device=each[0].device)
    for layer, (ours, theirs, weight) in enumerate(zip(student, teacher, each, strict=True)):
        if ours.shape != theirs.shape or ours.shape[:2] != weight.shape:
            raise ValueError(
                f"hidden_loss: layer {layer} must be {tuple(theirs.shape)} under a mask {tuple(theirs.shape[:2])}, "
                f"got {tuple(ours.shape)} and {tuple(weight.shape)}"
            )
        error = (ours.float() - theirs.float()).square().sum(-1)
        # where, not a product alone: padding may hold anything, NaN included.
        error = torch.where(weight > 0, error * weight, error.new_zeros(())).sum()
        total = total + (error if scales is None else error / scales[layer])
    return total / (len(student) * max(count, 1))


def joint_weights(
    kinds: Mapping[str, Tensor | Sequence[Tensor]], scales: Mapping[str, Sequence[float]] | None,
    counts: Mapping[str, int], layers: int,
) -> list[Tensor]:  # fmt: skip
    """Weights that make one `hidden_loss` of several, so that errors are computed once.

    With these weights and `num_tokens=1`, `hidden_loss` is a mean over kinds: of the loss of each kind that has a
    token.

    Args:
        kinds: for each kind, the `weights` of its `hidden_loss`.
        scales: for each kind, its `scales`; None: all 1.
        counts: for each kind, its `num_tokens`, of the whole step: parts of a step leave out the same kinds.
        layers: their number.
    """
    # A kind without a token has no mean, and is not a mean of 0.
    there = [kind for kind in kinds if counts[kind] > 0] or list(kinds)
    joint: list[Tensor] = []
    for layer in range(layers):
        shares = [
            (weights if isinstance(weights, Tensor) else weights[layer]).float()
            / (len(there) * max(counts[kind], 1) * (1.0 if scales is None else scales[kind][layer]))
            for kind, weights in kinds.items()
            if kind in there
        ]
        joint.append(torch.stack(shares).sum(0))
    return joint


def num_weighed(weights: Tensor | Sequence[Tensor]) -> int:
    """The sum of the weights of tokens. It is the same at each layer, and a whole number but for rounding."""
    return round(float((weights if isinstance(weights, Tensor) else weights[0]).sum(dtype=torch.float64)))


@dataclass(frozen=True)
class AnswerLosses:
    """Means over answer tokens, in nats."""

    token: Tensor
    """L_tok, Eq. 7."""
    sequence: Tensor
    """L_seq, Eq. 8."""
    supervised: Tensor
    """L_sup, Eq. 9."""


def answer_losses(
    student_states: Tensor,
    student_head: Head,
    targets: Tensor,
    *,
    teacher_states: Tensor | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    in_sequence: Tensor | None = None,
    in_supervised: Tensor | None = None,
    num_token: int | None = None,
    num_sequence: int | None = None,
    num_supervised: int | None = None,
    chunk_size: int = 1024,
) -> AnswerLosses:
    """L_tok, L_seq and L_sup (Eq. 7-9) at the kept positions. Only `chunk_size` rows of logits are alive at a time.

        L_tok = tau^2 / T sum_t KL(softmax(teacher / tau) || softmax(student / tau))
        L_seq = -1 / T sum_t log softmax(student)[targets[t]]        over the positions of the teacher's own answers
        L_sup = the same                                             over the positions of the true answers

    Args:
        student_states: (n, D): hidden states before the language head at the kept positions.
        student_head: maps (c, D) to logits (c, V).
        targets: (n,) int64.
        teacher_states: (m, D'), m <= n: the teacher's at the first m positions; L_tok is over these. None: L_tok is 0.
        teacher_head: the teacher's language head.
        temperature: tau > 0, for L_tok only.
        in_sequence, in_supervised: (n,) bool: the positions that L_seq and L_sup are over. None: no position.
        num_token, num_sequence, num_supervised: the three T; counted here when None.
        chunk_size: logits of so many positions are held at a time, in the forward and in the backward pass.
    """
    num_distilled = 0 if teacher_states is None else len(teacher_states)
    if num_distilled > len(targets):
        raise ValueError(f"answer_losses: teacher_states must have at most {len(targets)} rows, got {num_distilled}")
    if teacher_states is not None and teacher_head is None:
        raise ValueError("answer_losses: teacher_head must be given with teacher_states, got None")
    none = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    in_sequence = none if in_sequence is None else in_sequence
    in_supervised = none if in_supervised is None else in_supervised

    def sums(ours: Tensor, theirs: Tensor | None, target: Tensor, sequence: Tensor, supervised: Tensor) -> Tensor:
        logits = student_head(ours).float()
        kl = logits.new_zeros(())
        if theirs is not None and teacher_head is not None and len(theirs):
            with torch.no_grad():
                reference = functional.log_softmax(teacher_head(theirs).float() / temperature, -1)
            softened = functional.log_softmax(logits[: len(theirs)] / temperature, -1)
            kl = functional.kl_div(softened, reference, log_target=True, reduction="sum") * temperature**2
        nll = functional.cross_entropy(logits, target, reduction="none")
        return torch.stack([kl, *(torch.where(chosen, nll, 0).sum() for chosen in (sequence, supervised))])

    total = torch.zeros(3, dtype=torch.float32, device=targets.device)
    for start in range(0, len(targets), chunk_size):
        part = slice(start, start + chunk_size)
        theirs = None if teacher_states is None else teacher_states[start : min(start + chunk_size, num_distilled)]
        inputs = (student_states[part], theirs, targets[part], in_sequence[part], in_supervised[part])
        total = total + checkpoint(sums, *inputs, use_reentrant=False)
    counts = [
        num_distilled if num_token is None else num_token,
        int(in_sequence.sum()) if num_sequence is None else num_sequence,
        int(in_supervised.sum()) if num_supervised is None else num_supervised,
    ]
    return AnswerLosses(*(value / max(count, 1) for value, count in zip(total, counts, strict=True)))
