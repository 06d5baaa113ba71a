"""Eq. 6-9 against their definitions, written out; and the mistakes of earlier converters, each as a test."""

import pytest
import torch
from torch.nn import functional

from linmu_distill.losses import IGNORE, answer_losses, hidden_loss, joint_weights, kept_positions, num_weighed


def _labels(rows, length):
    """Answers of unequal length in the middle of the rows, and padding after them."""
    labels = torch.full((rows, length), IGNORE)
    for row in range(rows):
        labels[row, 3 + row : 6 + 2 * row] = torch.randint(11, (3 + row,))
    return labels


def _setup(rows=3, length=14, width=8, vocabulary=11):
    labels = _labels(rows, length)
    ours, theirs = torch.randn(2, rows, length, width, dtype=torch.float64)
    heads = [torch.nn.Linear(width, vocabulary, bias=False, dtype=torch.float64) for _ in range(2)]
    return labels, ours.requires_grad_(), theirs, heads


def _all(labels, ours, theirs, heads, **options):
    kept = kept_positions(labels)
    everywhere = torch.ones(len(kept), dtype=torch.bool)
    return answer_losses(
        kept.select(ours), heads[0], kept.targets, teacher_states=kept.select(theirs), teacher_head=heads[1],
        in_sequence=everywhere, in_supervised=everywhere, **options,
    )  # fmt: skip


def _definition(labels, ours, theirs, heads, tau):
    """Token by token, from the paper's text."""
    kl, nll, count = 0.0, 0.0, 0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] == IGNORE:
                continue
            s, q = heads[0](ours[b, t - 1]).float(), heads[1](theirs[b, t - 1]).float()
            p, log_s = functional.softmax(q / tau, -1), functional.log_softmax(s / tau, -1)
            kl = kl + (p * (p.log() - log_s)).sum()
            nll = nll - functional.log_softmax(s, -1)[labels[b, t]]
            count += 1
    return tau**2 * kl / count, nll / count


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_answer_losses_are_their_definition(tau, chunk_size):
    case = _setup()
    found = _all(*case, temperature=tau, chunk_size=chunk_size)
    kl, nll = _definition(*case, tau)
    for value, wanted in ((found.token, kl), (found.sequence, nll), (found.supervised, nll)):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(found.token + found.sequence, [case[1], heads_weight(case)])
    wanted = torch.autograd.grad(kl + nll, [case[1], heads_weight(case)])
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def heads_weight(case):
    return case[3][0].weight


def test_kl_does_not_grow_with_length_or_batch():
    """`batchmean` divides by the batch only: a longer sequence, or the same one twice, would give another loss."""
    labels, ours, theirs, heads = _setup(1)
    once = _all(labels, ours, theirs, heads)
    twice = _all(labels.repeat(2, 2), ours.repeat(2, 2, 1), theirs.repeat(2, 2, 1), heads)
    torch.testing.assert_close(once.token, twice.token)
    torch.testing.assert_close(once.supervised, twice.supervised)


def test_predictions_are_shifted_by_one():
    labels = torch.tensor([[IGNORE, IGNORE, 5, 7, IGNORE]])
    kept = kept_positions(labels)
    assert kept.positions.tolist() == [1, 2]
    assert kept.targets.tolist() == [5, 7]
    assert len(kept_positions(torch.tensor([[4, IGNORE]]))) == 0


def test_padding_and_unsupervised_tokens_do_not_count():
    labels, ours, theirs, heads = _setup()
    spoiled, spoiled_too = ours.detach().clone(), theirs.clone()
    kept = kept_positions(labels)
    elsewhere = torch.ones(labels.shape, dtype=torch.bool)
    elsewhere[kept.rows, kept.positions] = False
    spoiled[elsewhere] = spoiled_too[elsewhere] = torch.nan
    assert torch.equal(_all(labels, ours, theirs, heads).token, _all(labels, spoiled, spoiled_too, heads).token)


def test_parts_of_a_step_add_up_to_one_mean():
    labels, ours, theirs, heads = _setup(4)
    whole = _all(labels, ours, theirs, heads)
    count = len(kept_positions(labels))
    counts = dict(num_token=count, num_sequence=count, num_supervised=count)
    parts = [_all(labels[i], ours[i], theirs[i], heads, **counts) for i in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0].token + parts[1].token, whole.token)
    torch.testing.assert_close(parts[0].sequence + parts[1].sequence, whole.sequence)


def test_teacher_covers_the_first_positions_only():
    """Rows with the teacher's own answers are for L_seq, not for L_tok."""
    labels, ours, theirs, heads = _setup()
    kept = kept_positions(labels)
    first = kept.rows < 2
    some = answer_losses(
        kept.select(ours), heads[0], kept.targets, teacher_states=kept.select(theirs)[first], teacher_head=heads[1],
        in_sequence=~first, in_supervised=first, chunk_size=3,
    )  # fmt: skip
    fewer = _all(labels[:2], ours[:2], theirs[:2], heads)
    rest = _all(labels[2:], ours[2:], theirs[2:], heads)
    torch.testing.assert_close(some.token, fewer.token)
    torch.testing.assert_close(some.supervised, fewer.supervised)
    torch.testing.assert_close(some.sequence, rest.sequence)


def test_logits_of_all_positions_never_exist_at_once():
    """Neither in the forward pass nor kept for the backward pass."""
    labels, ours, theirs, heads = _setup(4, 40)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[-1] == 11:
                largest = max(largest, out.shape[0])
            return out

    with Watch():
        found = _all(labels, ours, theirs, heads, chunk_size=2)
        found.token.backward()
    # (width, 11) is the gradient of the head's weight, transposed.
    assert largest <= 8


def test_hidden_loss_is_its_definition():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    ours, theirs = [torch.randn(2, 4, 6) for _ in range(3)], [torch.randn(2, 4, 6) for _ in range(3)]
    wanted = sum(
        sum(float((a[b, t] - c[b, t]).square().sum()) for b, t in mask.nonzero().tolist()) / 5
        for a, c in zip(ours, theirs, strict=True)
    )
    assert float(hidden_loss(ours, theirs, mask)) == pytest.approx(wanted / 3, rel=1e-5)
    scaled = hidden_loss(ours, theirs, mask, scales=[2.0] * 3)
    assert float(scaled) == pytest.approx(wanted / 6, rel=1e-5)
    for a in ours:
        a[~mask] = torch.nan
    assert float(hidden_loss(ours, theirs, mask)) == pytest.approx(wanted / 3, rel=1e-5)


def test_hidden_loss_weighs_tokens_at_each_layer():
    ours, theirs = [torch.randn(2, 4, 6) for _ in range(3)], [torch.randn(2, 4, 6) for _ in range(3)]
    weights = [torch.rand(2, 4) for _ in range(3)]
    for weight in weights:
        weight[1, 2:] = 0  # padding
        weight *= 5 / weight.sum()
    wanted = sum(
        (w * (a - b).square().sum(-1)).sum() for w, a, b in zip(weights, ours, theirs, strict=True)
    ) / 15  # fmt: skip
    for a in ours:
        a[1, 2:] = torch.nan
    torch.testing.assert_close(hidden_loss(ours, theirs, weights), wanted)
    torch.testing.assert_close(hidden_loss(ours, theirs, weights, num_tokens=10), wanted / 2)


def test_joint_weights_are_the_mean_over_the_kinds_that_are_there():
    """A kind without a token has no mean: it is not one of 0."""
    torch.manual_seed(0)
    ours, theirs = [torch.randn(2, 5, 3) for _ in range(2)], [torch.randn(2, 5, 3) for _ in range(2)]
    kinds = {"visual": torch.rand(2, 5) < 0.5, "read": [torch.rand(2, 5) for _ in range(2)], "text": torch.zeros(2, 5)}
    scales, counts = {"visual": [2.0, 3.0], "read": [0.5, 0.1], "text": [1.0, 1.0]}, {"visual": 4, "read": 7, "text": 0}
    for divided in (scales, None):
        each = [
            hidden_loss(ours, theirs, w, scales=divided and divided[kind], num_tokens=counts[kind])
            for kind, w in kinds.items()
            if counts[kind]
        ]
        joint = hidden_loss(ours, theirs, joint_weights(kinds, divided, counts, 2), num_tokens=1)
        torch.testing.assert_close(joint, torch.stack(each).mean())


@pytest.mark.parametrize("absent", [(), ("visual",), ("text", "read")])
def test_saying_nothing_is_an_error_of_one_whatever_kinds_are_there(absent):
    """Relative to the teacher's mean squares; also where parts of a step lack kinds that others of it have."""
    torch.manual_seed(0)
    theirs = [[torch.randn(2, 5, 3) for _ in range(2)] for _ in range(2)]
    visual = [torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool(), torch.zeros(2, 5, dtype=torch.bool)]
    parts = [{"visual": seen, "text": ~seen, "read": [torch.rand(2, 5) for _ in range(2)]} for seen in visual]
    for part in parts:
        for kind in absent:
            part[kind] = [0.0 * torch.ones(2, 5)] * 2 if kind == "read" else torch.zeros(2, 5, dtype=torch.bool)
        for weight in part["read"]:
            weight *= 4 / max(float(weight.sum()), 1e-9)  # as many as there are answers
    counts = {kind: sum(num_weighed(part[kind]) for part in parts) for kind in ("visual", "text", "read")}

    def square(kind, layer):
        weights = [part[kind] if kind != "read" else part[kind][layer] for part in parts]
        return sum(float((t[layer].square().sum(-1) * w).sum()) for t, w in zip(theirs, weights, strict=True))

    scales = {kind: [square(kind, i) / n if n else 1.0 for i in range(2)] for kind, n in counts.items()}
    nothing = [torch.zeros(2, 5, 3)] * 2
    found = sum(
        hidden_loss(nothing, t, joint_weights(part, scales, counts, 2), num_tokens=1)
        for t, part in zip(theirs, parts, strict=True)
    )
    assert float(found) == pytest.approx(1, rel=1e-5)


def test_hidden_loss_refuses_other_shapes():
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="layer 0 must be"):
        hidden_loss([torch.zeros(4, 6)], [torch.zeros(2, 4, 6)], mask)
    with pytest.raises(ValueError, match="teacher's 1 layers, got 2"):
        hidden_loss([torch.zeros(2, 4, 6)] * 2, [torch.zeros(2, 4, 6)], mask)
