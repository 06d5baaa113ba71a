"""Blocks on rows split over processes give what they give on whole rows: outputs, states, every gradient."""

from __future__ import annotations

import pytest
import torch
from blocks import DIM, GROUPS, HEADS, OPTIONS, P, build, layout_of, prompt
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from linmu_ops import ExactConfig, ExactMMATE, MMATEConfig, MMATEState
from linmu_ops.context_parallel import ContextParallel, SlabLayout
from tests.context_parallel.gang import assert_whole, results, slabs

SPLIT = {name: config for name, config in OPTIONS.items() if isinstance(config, MMATEConfig)}
LENGTHS = {1: [24], 2: [10, 14], 3: [5, 12, 7], 4: [8, 0, 1, 15]}
PER_TOKEN = {"z", "cos", "sin", "mask", "seq_idx", "output 0"}


def inputs_of(kind):
    """Arguments of a block, whole, and a layout."""
    z, (cos, sin), blocks = prompt()
    given = dict(z=z, cos=cos, sin=sin)
    if kind == "padded":
        mask = torch.ones(2, 24, dtype=torch.bool)
        mask[0, [0, 1, 12, 20, 21]] = mask[1, [2, 3, 16, 17, 18, 19, 20, 21, 22, 23]] = False
        given |= dict(mask=mask)
    if kind in ("packed", "packed and padded"):
        blocks = [[((2, 2, 2), list(range(4, 12)))], [((1, 3, 2), [4, 5, 7, 8, 10, 11])]]
        seq_idx = torch.zeros(2, 24, dtype=torch.int32)
        seq_idx[0, 3:] = 5
        seq_idx[0, 14:] = 0
        seq_idx[1, 20:] = -1
        given |= dict(seq_idx=seq_idx)
    if kind == "packed and padded":
        given["mask"] = torch.ones(2, 24, dtype=torch.bool)
        for row, at in ((0, [0, 2, 3, 13, 15, 16]), (1, [*range(12, 21)])):
            given["mask"][row, at] = False
            given["seq_idx"][row, at] = 9
    if kind == "continued":
        given |= dict(ssm=torch.randn(2, HEADS, P, P, dtype=torch.float64))
    return given, layout_of(blocks, 24)


def called(block, layout, context=None):
    """The block as a function of its tensors and parameters, all of which are to get gradients."""
    asked = block.config.flex and not block.config.text_window

    def call(z, cos, sin, mask=None, seq_idx=None, ssm=None, **parameters):
        out = torch.func.functional_call(block, parameters, (z,), dict(
            layout=layout, position_embeddings=(cos.detach(), sin.detach()), attention_mask=mask, seq_idx=seq_idx,
            state=None if ssm is None else MMATEState(ssm=ssm), return_state=asked, context=context,
        ))  # fmt: skip
        out, *state = (out[0], out[1].ssm) if asked else (out,)
        return (out if mask is None else out.masked_fill(~mask[..., None], 0), *state)

    return call


def work(group, name, kind, layer, lengths, weights):
    context = ContextParallel(group, lengths)
    torch.manual_seed(0)
    block = build(SPLIT[name], layer, perturb=0.1)
    given, layout = inputs_of(kind)
    mine = slabs(lengths, PER_TOKEN, given)[context.rank] | {k: p.detach() for k, p in block.named_parameters()}
    layout = SlabLayout(context, layout) if layer % 2 else layout
    return results(called(block, layout, context), mine, weights[context.rank])


def check(gang, name, kind, layer, lengths):
    torch.manual_seed(0)
    block = build(SPLIT[name], layer, perturb=0.1)
    given, layout = inputs_of(kind)
    parameters = {k: p.detach() for k, p in block.named_parameters()}
    call = called(block, layout)
    weights = [torch.randn(o.shape, dtype=torch.float64) for o in call(**given, **parameters)]
    want = results(call, given | parameters, weights)
    shares = [[out, *(w / len(lengths) for w in weights[1:])] for out in weights[0].split(lengths, dim=1)]
    got = gang(len(lengths), work, name, kind, layer, lengths, shares)
    assert_whole(lengths, PER_TOKEN, ["output 1"] * (len(weights) - 1), got, want)


KINDS = ["plain", "padded", "packed", "packed and padded"]
FEW = {(name, "plain") for name in SPLIT} | {(name, kind) for name in ("default", "text_window") for kind in KINDS}
EVERY = [
    pytest.param(name, kind, marks=() if (name, kind) in FEW else pytest.mark.sweep) for name in SPLIT for kind in KINDS
]


@pytest.mark.parametrize("name, kind", EVERY)
def test_a_split_row_is_the_row(gang, name, kind):
    """Blocks of several ranks, whose frames are cut, visited across ranks; padding and sequences on borders."""
    check(gang, name, kind, 2, LENGTHS[4])


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_row_split_by_any_number_is_the_row(gang, n, layer):
    check(gang, "default", "plain", layer, LENGTHS[n])


def test_a_state_goes_on_over_split_rows(gang):
    check(gang, "default", "continued", 2, LENGTHS[4])


CUT = [5, 6, 7, 8, 9, 10, 12, 13]


def refusals(group):
    context = ContextParallel(group, 24)
    z = torch.randn(1, 12, DIM)
    texts = []
    for block, options in (
        (ExactMMATE(DIM, HEADS, GROUPS), dict(return_state=True)),
        (ExactMMATE(DIM, HEADS, GROUPS, config=ExactConfig(far="delta")), {}),
        (ExactMMATE(DIM, HEADS, GROUPS, causal_windows=False), dict(layout=layout_of([[((2, 2, 2), CUT)]], 24))),
        (build(SPLIT["text_window"], dtype=torch.float32), dict(return_state=True)),
        (build(SPLIT["default"], dtype=torch.float32), dict(layout=layout_of([[]], 12))),
        (build(SPLIT["default"], dtype=torch.float32), dict(grid=(2, 3, 2))),
    ):
        with pytest.raises(ValueError) as caught:
            block(z, context=context, **options)
        texts.append(str(caught.value))
    block, z = build(SPLIT["default"], dtype=torch.float32), z.clone()

    def total(z):
        return block(z, context=context).sum()

    for transformed in (torch.func.grad(total), lambda z: torch.func.jvp(total, (z,), (z,))):
        with pytest.raises(RuntimeError) as caught:
            transformed(z)
        texts.append(str(caught.value))
    return texts


def test_what_is_not_split_says_so(gang):
    derivatives = "MMATE: context must be None under torch.func.grad, jvp and forward-mode AD, got one"
    for texts in gang(2, refusals):
        assert texts[6:] == [derivatives] * 2
        assert texts[:6] == [
            "ExactMMATE: state must be None, and not asked for, with a context, got one",
            'ExactMMATE: context must be None with far="delta", got one',
            "ExactMMATE: context must not cut an image or video whose tokens see later ones, got a border at token 12 "
            "of row 0",
            "MMATE: state must be None, and not asked for, with a context and a text_window, got one",
            "ContextParallel: layout must be of L=24 tokens, got 12",
            "ContextParallel: layout must be of L=24 tokens, got 12",
        ]


def beside_fsdp(group, name, lengths, given, parameters, weights, blocks):
    """Two rows of data, each split over two ranks; the parameters are sharded over all four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "cp"))
    context, row = ContextParallel(mesh["cp"], lengths), mesh.get_local_rank("data")
    block = build(OPTIONS[name], 2)
    block.load_state_dict(parameters)
    fully_shard(block, mesh=mesh["data", "cp"]._flatten("all"))
    here = slice(sum(lengths[: context.rank]), sum(lengths[: context.rank + 1]))
    z, cos, sin = (given[name][row : row + 1, here] for name in ("z", "cos", "sin"))
    z = z.clone().requires_grad_()
    out = block(z, position_embeddings=(cos, sin), layout=layout_of(blocks[row : row + 1], 24), context=context)
    # FSDP takes the mean of its ranks' gradients, which are shares of one sum.
    loss = 4 * (out * weights[row : row + 1, here]).sum()
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in block.named_parameters()}
    return out.detach(), z.grad / 4, gradients


@pytest.mark.parametrize("name", ["default", "exact"])
def test_rows_are_split_beside_sharded_parameters(gang, name):
    given, _ = inputs_of("plain")
    blocks = [[((3, 1, 3), list(range(2, 11)))], [((1, 3, 2), [4, 5, 7, 8, 10, 11])]]
    block = build(OPTIONS[name], 2)
    z, weights, lengths = given["z"].clone().requires_grad_(), torch.randn(2, 24, DIM).double(), [9, 15]
    out = block(z, position_embeddings=(given["cos"], given["sin"]), layout=layout_of(blocks, 24))
    (out * weights).sum().backward()
    found = gang(4, beside_fsdp, name, lengths, given, block.state_dict(), weights, blocks)
    for row in range(2):
        mine = found[2 * row : 2 * row + 2]
        for at, want in ((0, out.detach()), (1, z.grad)):
            assert (torch.cat([r[at] for r in mine], dim=1) - want[row : row + 1]).abs().max() < 1e-12
    for _, _, gradients in found:
        for name, parameter in block.named_parameters():
            assert (gradients[name] - parameter.grad).abs().max() <= 1e-12 * max(1, parameter.grad.abs().max()), name


def checkpointed(group, name, lengths, given, parameters):
    """Gradients of a block whose forward runs twice, the second time within the backward pass."""
    context = ContextParallel(group, lengths)
    block = build(OPTIONS[name], 2)
    block.load_state_dict(parameters)
    mine = slabs(lengths, PER_TOKEN, given)[context.rank]
    layout = SlabLayout(context, inputs_of("plain")[1])
    found = []
    for again in (False, True):
        z = mine["z"].clone().requires_grad_()

        def call(z):
            return block(z, position_embeddings=(mine["cos"], mine["sin"]), layout=layout, context=context)

        out = checkpoint(call, z, use_reentrant=False) if again else call(z)
        found.append(torch.autograd.grad(out.square().sum(), [z, *block.parameters()]))
    return all(a.equal(b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["default", "exact"])
def test_a_checkpointed_split_block_is_the_block(gang, name):
    given, _ = inputs_of("plain")
    assert gang(3, checkpointed, name, LENGTHS[3], given, build(OPTIONS[name], 2).state_dict()) == [True] * 3
