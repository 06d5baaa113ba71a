"""ONNX Runtime's LinearAttention, as a peer of the scans."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .peers import Missing, need

OPSET = 27  # the first with LinearAttention


def linear_attention(rule: str, heads: int) -> Callable[..., Tensor]:
    """A function of q, k (B, L, heads, N), v (B, L, heads, P), g (B, L, heads) and, for "gated_delta", beta, all
    float32, that gives (B, L, heads, P).

    Raises:
        Missing: a package is not installed, or its runtime has no such operator.
    """
    runtime, onnx = need("onnxruntime"), need("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = ["q", "k", "v", "", "g", *(["beta"] if rule == "gated_delta" else [])]
    node = helper.make_node(
        "LinearAttention", names, ["y", "state"], update_rule=rule, q_num_heads=heads, kv_num_heads=heads, scale=1.0
    )
    inputs = [helper.make_tensor_value_info(name, kind, ["B", "L", f"{name} size"]) for name in names if name]
    outputs = [
        helper.make_tensor_value_info("y", kind, ["B", "L", "y size"]),
        helper.make_tensor_value_info("state", kind, ["B", "H", "N", "P"]),  # without it, the operator is refused
    ]
    # That of its first opset: a runtime need not know the newest.
    version = helper.find_min_ir_version_for([helper.make_opsetid("", OPSET)], True)
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs), opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=version,
    )  # fmt: skip
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what is wrong comes as an exception
    try:
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Its errors have no class in common.
        raise Missing(f"onnxruntime {runtime.__version__} has no LinearAttention: {error}"[:200]) from None

    def run(*tensors: Tensor) -> Tensor:
        if any(t.requires_grad for t in tensors):
            raise Missing("LinearAttention has no backward")
        if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
            raise Missing("float32 on a CPU is what is asked of it")
        given = zip([n for n in names if n], tensors, strict=True)
        (y,) = session.run(["y"], {name: t.flatten(2).numpy() if t.dim() == 4 else t.numpy() for name, t in given})
        return torch.from_numpy(y).view(*tensors[2].shape[:2], heads, -1)

    return run
