"""A call of a few tokens that goes on from a state is so many steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from linmu_ops.nn import MMATE, ExactConfig, ExactMMATE, MMATEConfig
from linmu_ops.nn.state import STEPS

SMALL = dict(text_window=4, sink_tokens=2, kept_tokens=3, window=(2, 2, 2), image_window=(1, 2, 2))
BLOCKS = {
    "exact": lambda: ExactMMATE(24, 4, 2, config=ExactConfig(**SMALL)),
    "exact, gated": lambda: ExactMMATE(24, 4, 2, config=ExactConfig(**{**SMALL, "z_gate": True})),
    "exact, delta": lambda: ExactMMATE(24, 4, 2, config=ExactConfig(**SMALL, far="delta")),
    "paper": lambda: MMATE(24, 4, 2, config=MMATEConfig()),
    "paper, text": lambda: MMATE(24, 4, 2, config=MMATEConfig(text_window=4)),
}


class ByToken(nn.Module):
    """A map that gives each token the same bits, whatever tokens stand beside it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.cat([self.inner(token) for token in x.split(1, dim=1)], dim=1)


class Count(TorchDispatchMode):
    """Calls of operators."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def block(kind, dtype):
    torch.manual_seed(0)
    made = BLOCKS[kind]().to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
        if isinstance(made, ExactMMATE):
            made.far_limit.fill_(6)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, last = name.rpartition(".")
            setattr(made.get_submodule(owner), last, ByToken(module))
    return made


def clone(state):
    return copy.deepcopy(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [3, 23], ids=["nothing far", "some far"])
@pytest.mark.parametrize("kind", list(BLOCKS))
@torch.no_grad()
def test_a_call_of_a_few_tokens_is_so_many_steps_bit_for_bit(kind, before, dtype):
    """Given the same projections; rows differ in length, and padding stands among the tokens."""
    made = block(kind, dtype)
    z = torch.randn(2, before + STEPS, 24).to(dtype)
    mask = torch.ones(2, before + STEPS, dtype=torch.bool)
    mask[0, :2] = mask[1, before + 3] = False
    angles = torch.randn(1, before + STEPS, 3).repeat(1, 1, 2)
    rotary = (angles.cos().to(dtype), angles.sin().to(dtype))

    def call(first, last, state):
        part = slice(first, last)
        turned = tuple(t[:, part] for t in rotary)
        return made(
            z[:, part], position_embeddings=turned, attention_mask=mask[:, part], state=state, return_state=True
        )

    _, start = call(0, before, None)
    state, outs = clone(start), []
    for i in range(before, before + STEPS):
        out, state = call(i, i + 1, state)
        outs.append(out)
    out, several = call(before, before + STEPS, clone(start))
    for name, one, other in zip(state._fields, state, several, strict=True):
        assert (one is None and other is None) or torch.equal(one, other), name
    real = mask[:, before:]
    if kind == "paper, text":  # its windows read all of a call at once
        tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
        torch.testing.assert_close(out[real], torch.cat(outs, dim=1)[real], **tolerance)
    else:
        assert torch.equal(out[real], torch.cat(outs, dim=1)[real])


@pytest.mark.parametrize("kind", list(BLOCKS))
@torch.no_grad()
def test_a_longer_call_is_its_steps_to_rounding(kind):
    made, z = block(kind, torch.float64), torch.randn(1, 70, 24, dtype=torch.float64)
    _, start = made(z[:, :9], return_state=True)
    out, several = made(z[:, 9:], state=clone(start), return_state=True)
    state, outs = start, []
    for i in range(9, 70):
        y, state = made(z[:, i : i + 1], state=state, return_state=True)
        outs.append(y)
    torch.testing.assert_close(out, torch.cat(outs, dim=1))
    for one, other in zip(state, several, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("before", [4, 24], ids=["nothing far", "some far"])
@pytest.mark.parametrize("kind", ["exact", "exact, gated"])
@torch.no_grad()
def test_a_step_makes_few_calls(kind, before):
    """In what its maps take, a token has no axis of its own; maps that count on one get it, and give the same."""
    torch.manual_seed(0)
    made = BLOCKS[kind]()
    _, start = made(torch.randn(2, before, 24), return_state=True)
    token, same = torch.randn(2, 1, 24), clone(start)
    with Count() as count:
        out = made(token, state=start)
    assert count.calls <= 26
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(made.windows, name, ByToken(getattr(made.windows, name)))
    assert torch.equal(made(token, state=same), out)


def hooked(module, note):
    module.register_forward_hook(lambda module, args, out: note(args[0], out))


def hooked_before(module, note):
    module.register_forward_pre_hook(lambda module, args: note(args[0], args[0]))


def patched(module, note):
    theirs = module.forward

    def forward(x):
        out = theirs(x)
        note(x, out)
        return out

    module.forward = forward


@pytest.mark.parametrize("see", [hooked, hooked_before, patched], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", list(BLOCKS))
@torch.no_grad()
def test_who_looks_at_a_map_sees_three_axes_in_steps_too(kind, see):
    """As a hook that changes the last token's output counts on them: `out[:, -1] += ...`."""
    torch.manual_seed(0)
    made, shapes = BLOCKS[kind](), []
    names = [name for name, module in made.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        other, found = copy.deepcopy(made), []
        see(other.get_submodule(name), lambda x, out: found.append((tuple(x.shape[:-1]), tuple(out.shape[:-1]))))  # noqa: B023
        _, state = other(torch.randn(2, 24, 24), return_state=True)
        found.clear()
        other(torch.randn(2, 1, 24), state=state)
        shapes += found
    assert set(shapes) == {((2, 1), (2, 1))}


def every_other(t):
    """Every second row of a larger tensor."""
    wide = t.new_zeros(2 * t.shape[0], *t.shape[1:])
    wide[::2] = t
    return wide[::2]


def turned(t):
    """The last dimension outermost."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def offset(t):
    """Not at the start of its storage."""
    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("layout", [every_other, turned, offset], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", list(BLOCKS))
@torch.no_grad()
def test_a_state_is_written_wherever_it_lies(kind, layout):
    made = block(kind, torch.float64)
    _, packed = made(torch.randn(2, 23, 24, dtype=torch.float64), return_state=True)
    held = clone(packed).map(layout)
    for tokens in (1, 1, 3, STEPS + 1, 1):
        z = torch.randn(2, tokens, 24, dtype=torch.float64)
        torch.testing.assert_close(made(z, state=held), made(z, state=packed))
    for mine, theirs in zip(held, packed, strict=True):
        assert (mine is None and theirs is None) or torch.testing.assert_close(mine, theirs) is None


@pytest.mark.parametrize("tokens", [1, STEPS + 1])
@pytest.mark.parametrize("kind", list(BLOCKS))
@torch.no_grad()
def test_rows_that_are_kept_once_are_refused_before_any_is_written(kind, tokens):
    """As of `expand`, where one was meant to go on in several ways."""
    made, name = block(kind, torch.float32), "MMATE" if kind.startswith("paper") else "ExactMMATE"
    _, one = made(torch.randn(1, 23, 24), return_state=True)
    for field in (f for f, t in one._asdict().items() if t is not None):
        two = one.repeat(2)
        two = two._replace(**{field: getattr(one, field).expand(2, *getattr(one, field).shape[1:])})
        before = clone(two)
        with pytest.raises(ValueError, match=rf"^{name}: state\.{field} must be in memory of its own, .*repeat"):
            made(torch.randn(2, tokens, 24), state=two)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(two, before, strict=True))
