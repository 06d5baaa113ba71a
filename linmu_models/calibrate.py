"""Give new blocks the size of the attention they replace, by what the teacher makes of a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .attention_mass import record_mass
from .hooks import attention_modules, record_inputs, record_outputs
from .modeling import LinmuAttention


@torch.no_grad()
def calibrate(student: Any, teacher: Any, batches: Iterable[Mapping[str, Any]], *, step_sizes: bool = False) -> None:
    """Scale each M-MATE block of `student` such that its output is as large as that of the teacher's attention.

    The root mean squares over all tokens that are not padding are made equal, with what the teacher's attention sees
    as input; see `MMATE.calibrate`.

    Args:
        student: made from `teacher` by `convert`, on the same devices.
        teacher: runs once for each layer and batch, so that what is kept is that of one layer.
        batches: keywords of the teacher's forward; `labels` are left out.
        step_sizes: before that, fit each block's step sizes to the attention that tokens get from text (see
            `FlexMA.fit_step_sizes`), so that from the start it remembers what the teacher looks at. Attention is
            computed in full for this: keep the batches short.
    """
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    layouts = [student.build_layout(inputs) for inputs in batches]
    for ours, theirs in zip(attention_modules(student), attention_modules(teacher), strict=True):
        if isinstance(ours, LinmuAttention):
            if step_sizes and ours.flex is not None:
                found = [
                    record_mass(teacher, theirs, inputs, None if layout is None else layout.visual_mask())
                    for inputs, layout in zip(batches, layouts, strict=True)
                ]
                ours.flex.fit_step_sizes(*(torch.cat(parts) for parts in zip(*found, strict=True)))
            seen = []
            for inputs, layout in zip(batches, layouts, strict=True):
                with record_inputs([theirs]) as given, record_outputs([theirs]) as made:
                    teacher.model(**inputs, use_cache=False)
                (arguments,), (output,) = given, made
                mask = inputs.get("attention_mask")
                mask = None if mask is None else mask.bool().to(output.device)
                seen.append((dict(arguments, layout=layout, attention_mask=mask), output))
            ours.calibrate(seen)
