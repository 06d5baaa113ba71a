"""What recipes of other projects need and the blocks have no option for: `Row` explains the options."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linmu_distill.config import Config
from linmu_distill.objective import Objective
from linmu_distill.run import Run, Student
from linmu_distill.stages import Stage
from linmu_distill.student import add_lora
from linmu_ops import causal_conv1d
from linmu_ops.nn import MMATE, MMATEState
from linmu_ops.nn._inputs import Call, last_tokens, real_tokens_first
from linmu_ops.nn.scan import Scan

from .table import Row


class ConvolvedScan(Scan):
    """A causal scan without rotary embedding, whose x, B and C pass through a short causal convolution, as Mamba-2's.

    The convolution starts as the identity. It has no activation: maps that come from attention have none. The state's
    `ssm` has more rows, (B, H, P + R, N): the last R hold the inputs of the convolution that the next token needs.

    Args:
        taps: of the convolution, 2 to 8.
        options: as `Scan` takes them.
    """

    def __init__(self, taps: int, **options: Any) -> None:
        super().__init__(**options, reverse=False)
        H, G, P = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        self.sizes = (G, G, H)  # heads of x, B and C
        channels, (rows, columns) = sum(self.sizes) * P, self.state_size
        self.own_rows, self.kept = rows, (taps - 1, channels)
        self.state_size = (rows + math.ceil((taps - 1) * channels / (H * columns)), columns)
        self.conv_weight = nn.Parameter(torch.zeros(channels, taps))
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        nn.init.ones_(self.conv_weight[:, -1])

    @classmethod
    def of(cls, block: MMATE, taps: int) -> "ConvolvedScan":
        """The scan of a block, with a convolution."""
        config = block.config
        if block.scan is None or config.reverse or config.major_scan or config.literal:
            raise ValueError("convolution must go with a scan without reverse, major_scan and literal")
        scan = cls(
            taps, shape=block.shape, major_scan=False, initial_decay=config.initial_decay,
            initial_scale=config.initial_scale, z_gate=config.z_gate, head_norm=config.head_norm,
        )  # fmt: skip
        scan.load_state_dict({**scan.state_dict(), **block.scan.state_dict()})
        return scan

    def forward(self, hidden_states: Tensor, call: Call) -> Any:
        return super().forward(hidden_states, call._replace(rotary=None))

    def _scan(self, z: Tensor, x: Tensor, B: Tensor, C: Tensor, call: Call) -> Any:
        if call.seq_idx is not None or call.context is not None:
            raise ValueError("ConvolvedScan: rows must be whole and hold one sequence each, got packed or split rows")
        state, kept, before = call.state, None, None
        if state is not None and state.ssm is not None:
            own, before = self._parted(state.ssm)
            before, state = before.to(x.dtype), MMATEState(ssm=own)
        inputs = torch.cat((x, B, C), dim=2).flatten(2)
        visits = None if call.mask is None else real_tokens_first(call.mask)
        if call.keep:
            kept = last_tokens(inputs, before, self.kept[0], call.mask, visits)
        order = None if visits is None else visits.int()
        y = causal_conv1d(inputs, self.conv_weight, self.conv_bias, token_order=order, initial_state=before)
        assert isinstance(y, Tensor)
        x, B, C = y.unflatten(2, (-1, self.shape.head_dim)).split(self.sizes, dim=2)
        *found, ssm = super()._scan(z, x, B, C, call._replace(state=state))
        if ssm is not None and kept is not None:
            ssm = self._joined(ssm, kept)
        return (*found, ssm)

    def _parted(self, ssm: Tensor) -> tuple[Tensor, Tensor]:
        """Of a state, the scan's own (B, H, P, N) and the convolution's inputs (B, taps - 1, channels)."""
        own, more = ssm.split((self.own_rows, self.state_size[0] - self.own_rows), dim=2)
        return own.contiguous(), more.flatten(1)[:, : math.prod(self.kept)].unflatten(1, self.kept)

    def _joined(self, own: Tensor, kept: Tensor) -> Tensor:
        """The state of both: what `_parted` parts."""
        rows, columns = self.state_size
        more = own.new_zeros(len(own), self.shape.num_heads, rows - self.own_rows, columns)
        more.flatten(1)[:, : math.prod(self.kept)] = kept.flatten(1)
        return torch.cat((own, more), dim=2)


class RivalRun(Run):
    """A run of another project's recipe."""

    def __init__(self, config: Config, row: Row) -> None:
        super().__init__(config)
        self.row = row
        if row.temperature is not None:
            self.objective = type("SoftObjective", (Objective,), {"temperature": row.temperature})

    def stage(self, number: int) -> Stage:
        stage = super().stage(number)
        more = () if self.row.freeze is None else self.row.freeze.get(f"stage{number}", ())  # type: ignore[call-overload]
        stage = dataclasses.replace(stage, freeze=(*stage.freeze, *more))
        if self.row.lora_alone is not None:
            stage = dataclasses.replace(stage, freeze=(r"^(?!.*\.lora_)",))
        return stage

    def add_lora(self, student: PreTrainedModel) -> Any:
        if self.row.lora_alone is None:
            return super().add_lora(student)
        return add_lora(student, self.config.lora_rank, self.config.seed, self.row.lora_alone)

    def fresh_student(self, *, lora: bool = False) -> Student:
        student = super().fresh_student(lora=lora)
        if self.row.convolution is not None:
            for block in student.blocks.values():
                if not isinstance(block, MMATE):
                    raise ValueError('convolution must go with preset = "paper"')
                block.scan = ConvolvedScan.of(block, self.row.convolution).float().eval()
        return student
