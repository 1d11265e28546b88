"""Muon: momentum with updates orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalise(stack: Tensor) -> Tensor:
    """Approximately replaces the singular values of [n, rows, columns] matrices (rows <= columns) by one."""
    a, b, c = QUINTIC
    x = stack.bfloat16() if stack.is_cuda else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.to(stack.dtype)


class Muon:
    """Steps a list of matrices; those of one shape (up to transposition) are orthogonalised together."""

    def __init__(self, matrices: Sequence[Tensor], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self.matrices = list(matrices)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.averages = [torch.zeros_like(m) for m in self.matrices]
        self.groups: dict[tuple[int, int], list[int]] = {}
        for index, matrix in enumerate(self.matrices):
            rows, columns = sorted(matrix.shape)
            self.groups.setdefault((rows, columns), []).append(index)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group in self.groups.values():
            wide = []
            for index in group:
                gradient, average = self.matrices[index].grad, self.averages[index]
                assert gradient is not None
                average.lerp_(gradient, 1 - self.momentum)
                update = gradient.lerp(average, self.momentum)
                wide.append(update if update.shape[0] <= update.shape[1] else update.mT)
            for index, direction in zip(group, orthogonalise(torch.stack(wide)), strict=True):
                matrix = self.matrices[index]
                rows, columns = matrix.shape
                direction = direction if rows <= columns else direction.mT
                size = learning_rate * max(1.0, rows / columns) ** 0.5
                matrix.mul_(1 - learning_rate * self.weight_decay).add_(direction, alpha=-size)

    def state(self) -> list[Tensor]:
        return self.averages

    def restore(self, averages: Sequence[Tensor]) -> None:
        for mine, saved in zip(self.averages, averages, strict=True):
            mine.copy_(saved)
