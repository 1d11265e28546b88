"""Procedural textures with something to match: noise, checkers, stripes, mosaics and dots in random palettes.

A texture belongs to one face of one object and is a function of two coordinates in the units of the scene. Its scale
is drawn at random, so it says nothing about the size of what carries it. Detail smaller than a pixel fades to its
mean, so that the same point looks the same from near and from far.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["FACES", "Textures"]

FACES = 6  # textures per object: one for each direction a surface can mainly face
_TABLE = 128  # the random lattice repeats after this many cells
_OCTAVES = 3
_CHECKER, _STRIPES, _MOSAIC, _DOTS, _PLAIN = range(5)


def _lattice(table: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Smoothly interpolated values of a random lattice: table [K, K], coordinates [R] -> [R] in [0, 1]."""
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    column, row = x0.long() & (_TABLE - 1), y0.long() & (_TABLE - 1)
    column1, row1 = (column + 1) & (_TABLE - 1), ((row + 1) & (_TABLE - 1)) * _TABLE
    row = row * _TABLE
    flat = table.view(-1)
    top = torch.lerp(flat[row + column], flat[row + column1], fx)
    bottom = torch.lerp(flat[row1 + column], flat[row1 + column1], fx)
    return torch.lerp(top, bottom, fy)


def _wave(x: Tensor, footprint: Tensor) -> Tensor:
    """A square wave of period 2 in [-1, 1], its edges as wide as a pixel, fading where the pixel is wider."""
    edge = (1 / (math.pi * footprint.clamp(min=0.02))).clamp(max=12)
    return (torch.sin(math.pi * x) * edge.clamp(min=1)).clamp(-1, 1) * (1.6 - footprint).clamp(0, 1)


class Textures:
    """The textures of ``objects * FACES`` faces, drawn from ``draw``: vivid, but muted ones for the last object."""

    def __init__(self, draw: np.random.Generator, objects: int) -> None:
        count = objects * FACES
        self.table = torch.from_numpy(draw.random((2, _TABLE, _TABLE), dtype=np.float32))
        self.kind = torch.from_numpy(draw.choice(5, count, p=[0.2, 0.15, 0.3, 0.15, 0.2]))
        angle = draw.uniform(0, 2 * math.pi, count) * (draw.random(count) < 0.5)
        frequency = np.exp(draw.uniform(math.log(0.9), math.log(5.0), count))
        vivid = draw.uniform(0.3, 1.0, (count, 1, 3)) ** draw.choice([0.3, 2.5], (count, 1, 3))
        muted = draw.uniform(0.4, 0.75, (count, 1, 1)) + draw.normal(0, 0.05, (count, 1, 3))
        last = np.arange(count) >= count - FACES
        palette = np.where(last[:, None, None], muted, vivid) + draw.normal(0, 0.13, (count, 3, 3))
        palette = np.clip(palette, 0.05, 1)
        rows = np.stack(
            [
                frequency * np.cos(angle),
                frequency * np.sin(angle),
                *draw.uniform(0, _TABLE, (2, count)),
                frequency,
                draw.uniform(0.25, 0.75, count),  # how much of the pattern is noise
                draw.uniform(0.45, 0.8, count),  # weight of an octave beside the one before
            ],
            axis=1,
        )
        self.rows = torch.from_numpy(rows.astype(np.float32))
        self.palette = torch.from_numpy(palette.astype(np.float32))

    def colour(self, face: Tensor, u: Tensor, v: Tensor, footprint: Tensor) -> Tensor:
        """Colours of surface points.

        Args:
            face: [R] texture of each point.
            u: [R] first coordinate on the surface.
            v: [R] second coordinate.
            footprint: [R] width of a pixel on the surface, in the same unit.

        Returns:
            [R, 3] in [0, 1].
        """
        cosine, sine, shift_u, shift_v, frequency, noisy, decay = self.rows[face].unbind(1)
        x, y = cosine * u - sine * v + shift_u, sine * u + cosine * v + shift_v
        cells = footprint * frequency
        noise, weight, total = torch.zeros_like(u), torch.ones_like(u), torch.zeros_like(u)
        for octave in range(_OCTAVES):
            scale = 2.0**octave
            visible = (1.5 - cells * scale).clamp(0, 1)
            value = _lattice(self.table[0], x * scale + 17 * octave, y * scale + 5 * octave) - 0.5
            noise = noise + weight * visible * value
            total = total + weight
            weight = weight * decay
        noise = (0.5 + 1.6 * noise / total).clamp(0, 1)
        pattern = self._pattern(self.kind[face], x, y, cells)
        first = torch.lerp(pattern, noise, torch.where(self.kind[face] == _PLAIN, torch.ones_like(noisy), noisy))
        second = _lattice(self.table[1], x * 0.37, y * 0.37)
        base, one, two = self.palette[face].unbind(1)
        return base + (one - base) * first[:, None] + (two - base) * (second * (1 - 0.5 * first))[:, None]

    def _pattern(self, kind: Tensor, x: Tensor, y: Tensor, cells: Tensor) -> Tensor:
        """The regular part of each texture, [R] in [0, 1]."""
        wave_x, wave_y = _wave(x, cells), _wave(y, cells)
        cell = self.table[1].view(-1)[(y.floor().long() & (_TABLE - 1)) * _TABLE + (x.floor().long() & (_TABLE - 1))]
        fade = (1.6 - cells).clamp(0, 1)
        distance = ((x - x.floor() - 0.5).square() + (y - y.floor() - 0.5).square()).sqrt()
        dot = ((0.22 + 0.2 * cell - distance) / cells.clamp(min=0.04) + 0.5).clamp(0, 1)
        choices = {
            _CHECKER: 0.5 + 0.5 * wave_x * wave_y,
            _STRIPES: 0.5 + 0.5 * wave_x,
            _MOSAIC: 0.5 + (cell - 0.5) * fade,
            _DOTS: 0.4 + (dot - 0.4) * fade,
        }
        result = torch.full_like(x, 0.5)
        for name, value in choices.items():
            result = torch.where(kind == name, value, result)
        return result
