"""Makes a Qwen2.5-VL-like model's tensors of samples. For videos transformers would need torchvision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from linmu_models.chat import IGNORE

from .drawing import Sample
from .tasks import generate

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Processor:
    """Turns samples into a padded batch: `<bos><vision_start>pads<vision_end>question\\nanswer<eos>question\\n...`.

    Pixels are scaled to -1..1. Patches are ordered as Qwen2-VL's image processor orders them.
    """

    tokenizer: PreTrainedTokenizerBase
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def from_config(cls, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> "Processor":
        """The processor that fits a model with this config: any whose config is laid out as Qwen2.5-VL's is."""
        vision = config.vision_config
        return cls(
            tokenizer,
            vision.patch_size,
            vision.spatial_merge_size,
            vision.temporal_patch_size,
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        )

    def patchify(self, frames: np.ndarray) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Cut frames into patches.

        Args:
            frames: grey `(T, H, W)` or colour `(T, H, W, 3)` uint8; H and W multiples of `patch_size * merge_size`.

        Returns:
            patches `(t * h * w, 3 * temporal_patch_size * patch_size**2)` float32, and the grid `(t, h, w)`.
        """
        patch, merge, temporal = self.patch_size, self.merge_size, self.temporal_patch_size
        height, width = frames.shape[1:3]
        if height % (patch * merge) or width % (patch * merge):
            raise ValueError(f"frames of {height}x{width} pixels do not divide into tokens of {patch * merge} pixels")
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).float().div_(127.5).sub_(1.0)
        pixels = pixels[..., None].expand(*pixels.shape, 3) if pixels.ndim == 3 else pixels
        if missing := -len(pixels) % temporal:
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])])
        t, h, w = len(pixels) // temporal, height // patch, width // patch
        tiles = pixels.reshape(t, temporal, h // merge, merge, patch, w // merge, merge, patch, 3)
        patches = tiles.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
        return patches, (t, h, w)

    def __call__(
        self, samples: Sequence[Sample], *, answers: bool = True, padding_side: Literal["left", "right"] = "right"
    ) -> Batch:
        """Process samples; images and videos may be mixed.

        Args:
            answers: append the answers; without, a sequence ends where the answer to its first question begins.
            padding_side: `"left"` for generation.

        Returns:
            `input_ids`, `attention_mask`, `labels` (-100 outside the answers) and `mm_token_type_ids`
            (0 text, 1 image, 2 video), each `(B, L)` int64; and as needed `pixel_values` with `image_grid_thw`,
            `pixel_values_videos` with `video_grid_thw`.
        """
        pixels: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        grids: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
        rows, targets = [], []
        for sample in samples:
            patches, grid = self.patchify(sample.frames)
            pixels[sample.is_video].append(patches)
            grids[sample.is_video].append(grid)
            visual = grid[0] * grid[1] * grid[2] // self.merge_size**2
            ids = [
                self.tokenizer.bos_token_id,
                self.vision_start_token_id,
                *[self.video_token_id if sample.is_video else self.image_token_id] * visual,
                self.vision_end_token_id,
            ]
            labels = [IGNORE] * len(ids)
            for question, answer in sample.turns if answers else sample.turns[:1]:
                asked = self.tokenizer.encode(question + "\n", add_special_tokens=False)
                ids += asked
                labels += [IGNORE] * len(asked)
                if answers:
                    said = [*self.tokenizer.encode(answer, add_special_tokens=False), self.tokenizer.eos_token_id]
                    ids += said
                    labels += said
            rows.append(ids)
            targets.append(labels)
        batch = self._pad(rows, targets, padding_side)
        for is_video, values, grid_name in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels[is_video]:
                batch[values] = torch.cat(pixels[is_video])
                batch[grid_name] = torch.tensor(grids[is_video])
        return batch

    def _pad(self, rows: list[list[int]], targets: list[list[int]], padding_side: Literal["left", "right"]) -> Batch:
        shape = (len(rows), max(map(len, rows)))
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        labels = torch.full(shape, IGNORE)
        mask = torch.zeros(shape, dtype=torch.int64)
        for i, (row, target) in enumerate(zip(rows, targets, strict=True)):
            at = slice(shape[1] - len(row), None) if padding_side == "left" else slice(len(row))
            ids[i, at], labels[i, at], mask[i, at] = torch.tensor(row), torch.tensor(target), 1
        types = (ids == self.image_token_id).long() + 2 * (ids == self.video_token_id).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types}


@dataclass(frozen=True)
class TaskStream:
    """An endless stream of training batches with random access: batch `i` depends on nothing but `i` and the fields.

    So a run that resumes at step `i` sees the data it would have seen. Every batch is of one group, which keeps
    padding small.
    """

    processor: Processor
    mixture: dict[str, float]
    """How often each group is drawn; need not sum to 1."""
    batch_size: int | dict[str, int] = 16
    turns: int | dict[str, int] = 1
    seed: int = 0
    split: str = "train"
    options: dict[str, dict[str, Any]] | None = None
    """Per group, more arguments of its generator: `{"needle": {"frames": (8, 16)}}`. `batch_frames`, an int beside
    `frames`: all videos of a batch have one length, drawn from `frames`, so that none is padded, and there are as many
    as have about so many frames together, at most `batch_size`."""

    def __post_init__(self) -> None:
        weights = self.mixture if isinstance(self.mixture, Mapping) else {}
        if not all(isinstance(w, Real) and float(w) >= 0 for w in weights.values()) or not any(weights.values()):
            raise ValueError(f"TaskStream: mixture must hold weights of groups, not all 0, got {self.mixture!r}")
        for name, given in (("batch_size", self.batch_size), ("turns", self.turns)):
            if not isinstance(given, int | Mapping):
                raise TypeError(f"TaskStream: {name} must be a whole number, or one for each group, got {given!r}")
            missing = [group for group in weights if isinstance(given, Mapping) and group not in given]
            if missing:
                raise ValueError(f"TaskStream: {name} must have every group of mixture, got none for {missing[0]}")

    def group(self, step: int) -> str:
        """The group of batch `step`."""
        names = list(self.mixture)
        weights = np.array([self.mixture[name] for name in names], dtype=np.float64)
        return names[np.random.default_rng((self.seed, step)).choice(len(names), p=weights / weights.sum())]

    def samples(self, step: int) -> list[Sample]:
        """The samples of batch `step`."""
        group = self.group(step)
        n, turns = (x[group] if isinstance(x, dict) else x for x in (self.batch_size, self.turns))
        options = dict((self.options or {}).get(group, {}))
        if total := options.pop("batch_frames", None):
            low, high = options["frames"]
            length = int(np.random.default_rng((self.seed, step, 1)).integers(low, high + 1))
            options["frames"], n = (length, length), min(n, max(1, round(total / length)))
        return generate(group, n, (self.seed, step), self.split, turns, **options)

    def __getitem__(self, step: int) -> Batch:
        """Batch `step`, as tensors."""
        return self.processor(self.samples(step))
