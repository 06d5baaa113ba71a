"""A few processes that work together: a test's work runs in the first n of them, which form a group."""

from __future__ import annotations

import os
import pickle
import traceback
from multiprocessing import get_context
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = 4


class Gang:
    """Four processes. `gang(n, work, *args)` is [work(group, *args) in each of the first n].

    One that fails leaves the others waiting for it: all are ended, and the next call forks anew.
    """

    def __init__(self, folder):
        self.folder, self.children, self.pipes = folder, [], []

    def __call__(self, n, work, *args):
        if not self.children:
            self.start()
        for pipe in self.pipes[:n]:
            pipe.send_bytes(pickle.dumps((n, work, args)))
        replies = {}
        while len(replies) < n:
            ready = wait([p for p in self.pipes[:n] if p not in replies], timeout=60)
            replies |= {pipe: pickle.loads(pipe.recv_bytes()) for pipe in ready}
            errors = [error for _, error in replies.values() if error]
            if errors or not ready:
                self.close()
            assert not errors, errors[0]
            assert ready, f"{n - len(replies)} of {n} processes do not answer"
        return [replies[pipe][0] for pipe in self.pipes[:n]]

    def start(self):
        fork = get_context("fork")
        pairs = [fork.Pipe() for _ in range(SIZE)]
        meeting = self.folder / str(len(list(self.folder.iterdir())))
        self.pipes = [ours for ours, _ in pairs]
        self.children = [fork.Process(target=serve, args=(rank, pairs, meeting), daemon=True) for rank in range(SIZE)]
        for child in self.children:
            child.start()
        for _, theirs in pairs:
            theirs.close()

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for child in self.children:
            child.kill()
            child.join()
        self.children, self.pipes = [], []


def serve(rank, pairs, meeting):
    # Of a pipe whose other end is open in a sister too, the end would not be seen.
    for i, (theirs, ours) in enumerate(pairs):
        theirs.close()
        if i != rank:
            ours.close()
    pipe = pairs[rank][1]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, SIZE + 1)}
    while True:
        try:
            n, work, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            reply = (work(groups[n], *args), None)
        except Exception:
            reply = (None, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))


def slabs(lengths, per_token, whole):
    """What each rank has of {name: value}: its slab of those `per_token`, all of the others."""
    parts = [{k: v.split(lengths, dim=1) for k, v in whole.items() if k in per_token}]
    return [{k: parts[0][k][r] if k in per_token else v for k, v in whole.items()} for r in range(len(lengths))]


def results(call, inputs, weights):
    """{"output 0": ..., name: gradient}: the outputs of `call(**inputs)`, and the gradients of their sum, weighed, with
    respect to every float input."""
    inputs = {
        k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    leaves = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    outputs = call(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | dict(zip(leaves, grads, strict=True))


def joined(lengths, per_token, results):
    """{name: value} of whole rows, of each rank's: slabs joined, the rest, parts of gradients, summed."""
    return {
        k: torch.cat([r[k] for r in results], dim=1) if k in per_token else torch.stack([r[k] for r in results]).sum(0)
        for k in results[0]
    }


def assert_whole(lengths, per_token, same, results, want):
    """Each rank's results, those named in `same` equal on all, are of the whole rows' to float64's rounding."""
    for name in same:
        assert all(r[name].equal(results[0][name]) for r in results), f"{name} differs between ranks"
    got = joined(lengths, per_token, results) | {name: results[0][name] for name in same}
    assert set(got) == set(want)
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        if value.numel():
            error = (got[name] - value).abs().max()
            assert error <= 1e-12 * max(1, value.abs().max()), f"{name}: {error:.1e}"


class _Sent(TorchDispatchMode):
    """Bytes that each collective takes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("_c10d_functional") and isinstance(args[0], torch.Tensor) and len(args) > 1:
            self.sizes.append(args[0].numel() * args[0].element_size())
        return func(*args, **(kwargs or {}))


def bytes_sent(call):
    """Of each collective in turn: that a rank gives to it, those of other ranks and its own."""
    with _Sent() as sent:
        call()
    return sent.sizes
