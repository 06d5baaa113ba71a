"""Give new blocks the size of the attention they replace, by what the teacher makes of a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .attention_mass import record_mass
from .hooks import attention_modules, record_inputs, record_outputs
from .modeling import LinmuAttention

# Layers whose inputs and outputs are kept at a time: fewer cost more runs of the teacher, more cost memory.
_TOGETHER = 8


@torch.no_grad()
def calibrate(student: Any, teacher: Any, batches: Iterable[Mapping[str, Any]], *, step_sizes: bool = False) -> None:
    """Scale each M-MATE block of `student` such that its output is as large as that of the teacher's attention.

    The root mean squares over all tokens that are not padding are made equal, with what the teacher's attention sees
    as input; see `MMATE.calibrate`.

    Args:
        student: made from `teacher` by `convert`, on the same devices.
        teacher: runs once for each batch and each few layers, so that what is kept is that of a few layers.
        batches: keywords of the teacher's forward; `labels` are left out.
        step_sizes: before that, fit each block's step sizes to the attention that tokens get from text (see
            `FlexMA.fit_step_sizes`), so that from the start it remembers what the teacher looks at. Attention is
            computed in full for this, one layer in a run of the teacher: keep the batches short.
    """
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    layouts = [student.build_layout(inputs) for inputs in batches]
    pairs = zip(attention_modules(student), attention_modules(teacher), strict=True)
    linear = [(ours, theirs) for ours, theirs in pairs if isinstance(ours, LinmuAttention)]
    for block, attention in linear if step_sizes else ():
        if block.flex is not None:
            found = [
                record_mass(teacher, attention, inputs, None if layout is None else layout.visual_mask())
                for inputs, layout in zip(batches, layouts, strict=True)
            ]
            block.flex.fit_step_sizes(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    for start in range(0, len(linear), _TOGETHER):
        blocks, attentions = zip(*linear[start : start + _TOGETHER], strict=True)
        seen: list[list[tuple[dict[str, Any], Any]]] = [[] for _ in blocks]
        for inputs, layout in zip(batches, layouts, strict=True):
            with record_inputs(attentions) as given, record_outputs(attentions) as made:
                teacher.model(**inputs, use_cache=False)
            mask = inputs.get("attention_mask")
            for kept, arguments, output in zip(seen, given, made, strict=True):
                padding = None if mask is None else mask.bool().to(output.device)
                kept.append((dict(arguments, layout=layout, attention_mask=padding), output))
        for block, kept in zip(blocks, seen, strict=True):
            block.calibrate(kept)
