"""Transformer blocks of the visual-geometry model, and the attention that is handed to them.

A block does not know where keys and values live: it computes queries, keys and values and passes them to an
`Attend` function. In one batched forward pass that is masked attention; in a stream it is a cached layer.

Shapes: `B` batch, `S` frames, `P` tokens of a frame, `N` tokens of a sequence, `C` channels, `H` heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ..errors import PolicyError

__all__ = ["MODES", "Attend", "Block", "batch_attention", "frames_seen", "rotary_table", "rotate"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`attend(q, k, v)`, each `[B, H, N, D]`, gives `[B, H, N, D]`."""

MODES = ("full", "causal", "window")
WINDOW = 5
"""Frames of the window mask, the current one included; the first frame is always seen."""
MASKED = 2048
"""Sequences up to this many tokens go through one masked call, longer ones frame by frame without a mask."""


class Attention(nn.Module):
    """Multi-head attention with optional normalised queries and keys and 2-D rotation."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm: nn.Module = nn.LayerNorm(head) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(head) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attend: Attend, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        dim: channels `C`.
        num_heads: heads; `C / num_heads` must be a multiple of 4 where rotation is used.
        qk_norm: normalise queries and keys per head.
        layer_scale: initial value of both layer scales.
        eps: of the two layer norms.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, layer_scale: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim, dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, attend: Attend, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        x = x + self.ls1(self.attn(self.norm1(x), attend, rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


# ---- rotation: half of a head turns with the row, the other half with the column


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rotary_table(
    height: int, width: int, specials: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`(cos, sin)`, each `[P, D]`, for `specials` tokens at (0, 0) and a grid of patches at (row + 1, column + 1).

    Base 100. There is no rotation in time: the table is the same for every frame.
    """
    quarter = head_dim // 4
    frequency = 100.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    y, x = torch.meshgrid(torch.arange(1, height + 1), torch.arange(1, width + 1), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], -1).to(device, torch.float32)
    place = torch.cat([place.new_zeros(specials, 2), place])
    angle = place[:, :, None] * frequency
    angle = torch.cat([angle, angle], -1).flatten(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, H, S * P, D]` by the table `[P, D]` of one frame, repeated over the frames."""
    frames = x.unflatten(2, (-1, cos.shape[0]))
    halves = frames.unflatten(-1, (2, 2, -1))
    turned = torch.stack([-halves[..., 1, :], halves[..., 0, :]], -2).flatten(-3)
    return (frames * cos + turned * sin).flatten(2, 3)


# ---- attention of one batched forward pass, where modes are masks over frames


def frames_seen(mode: str, frame: int, frames: int) -> list[int]:
    """Frames that the tokens of `frame` attend to.

    Raises:
        PolicyError: unknown mode.
    """
    if mode == "full":
        return list(range(frames))
    if mode == "causal":
        return list(range(frame + 1))
    if mode == "window":
        return [0, *range(max(1, frame - WINDOW + 1), frame + 1)] if frame else [0]
    raise PolicyError(f"unknown mode {mode!r}; it must be one of {', '.join(MODES)}")


def batch_attention(mode: str, frames: int, tokens: int) -> Attend:
    """Attention over a whole sequence of `frames` frames of `tokens` tokens each."""
    seen = [frames_seen(mode, i, frames) for i in range(frames)]
    if mode == "full" or frames == 1:
        return scaled_dot_product_attention
    if frames * tokens <= MASKED:
        mask = torch.zeros(frames, frames, dtype=torch.bool)
        for i, row in enumerate(seen):
            mask[i, row] = True
        return _masked(mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1))
    return _frame_by_frame(seen, tokens)


def _masked(mask: Tensor) -> Attend:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device))


def _frame_by_frame(seen: list[list[int]], tokens: int) -> Attend:
    """The same without a mask: every frame's queries against the keys of the frames that it sees."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for i, row in enumerate(seen):
            here = slice(i * tokens, (i + 1) * tokens)
            past = row[0] if row == list(range(row[0], row[-1] + 1)) else None
            if past is not None:
                span = slice(past * tokens, (row[-1] + 1) * tokens)
                keys, values = k[:, :, span], v[:, :, span]
            else:
                keys = torch.cat([k[:, :, f * tokens : (f + 1) * tokens] for f in row], 2)
                values = torch.cat([v[:, :, f * tokens : (f + 1) * tokens] for f in row], 2)
            out[:, :, here] = scaled_dot_product_attention(q[:, :, here], keys, values)
        return out

    return attend
