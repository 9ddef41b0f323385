"""What the vision tower makes of a step's images, kept from chunk to chunk of a prompt.

A long prompt may be cut in the middle of an image, which the tower sees as a whole. So an image is
looked at when its first token comes and remembered until a step has no more to do with it; one that
comes again, with a sequence that starts anew, is looked at again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from kttrio.layers.batch import ImageRows, sent
from kttrio.plan import Chunk
from kttrio.request import ImageInput
from kttrio.runner.tensors import StepTensors


class Tower(Protocol):
    """`layers.vision.VisionTower` says what is promised."""

    def __call__(self, pixels: Tensor) -> Tensor: ...


class Eyes:
    """Puts the tower's features where a step has tokens of images."""

    def __init__(self, tower: Tower | None, *, device: torch.device) -> None:
        self._tower = tower
        self._device = device
        self._seen: dict[ImageInput, Tensor] = {}

    def look(self, step: StepTensors, *, ahead: int = 0) -> StepTensors:
        """The step with its `Batch.images`; the tokens are `ahead` of the step's positions.

        ValueError for images that this model cannot see.
        """
        if not ahead:
            self.forget(step.chunks)
        if step.batch.rope_positions is None:  # no sequence has an image
            return step
        rows: list[int] = []
        features = []
        for chunk, offset in zip(step.chunks, step.batch.offsets, strict=False):
            first = chunk.start + ahead
            for image, begin, end in _overlaps(chunk, first, first + len(chunk.token_ids)):
                rows += range(offset + begin - first, offset + end - first)
                features.append(self._features(image)[begin - image.start : end - image.start])
        if not rows:
            return step
        images = ImageRows(sent(rows, self._device), torch.cat(features))
        return replace(step, batch=replace(step.batch, images=images))

    def forget(self, chunks: Sequence[Chunk]) -> None:
        """All images but those that the chunks reach, the token after them included."""
        if self._seen:
            reached = {
                image
                for chunk in chunks
                for image, *_ in _overlaps(
                    chunk, chunk.start, chunk.start + len(chunk.token_ids) + 1
                )
            }
            self._seen = {image: seen for image, seen in self._seen.items() if image in reached}

    def _features(self, image: ImageInput) -> Tensor:
        """[rows * columns, hidden]"""
        if image not in self._seen:
            if self._tower is None:
                raise ValueError("the model takes no images")
            self._seen[image] = self._tower(_normalised(image).to(self._device))
        return self._seen[image]


def _overlaps(chunk: Chunk, first: int, last: int) -> Iterator[tuple[ImageInput, int, int]]:
    """The images with tokens in [first, last), and the positions where these begin and end."""
    for image in chunk.images:
        begin, end = max(first, image.start), min(last, image.end)
        if begin < end:
            yield image, begin, end


def _normalised(image: ImageInput) -> Tensor:
    """[height, width, 3] float32"""
    side = image.token_side
    values = torch.frombuffer(bytearray(image.pixels), dtype=torch.uint8)
    colours = values.view(image.rows * side, image.columns * side, 3).float() / 255
    return (colours - torch.tensor(image.mean)) / torch.tensor(image.deviation)
