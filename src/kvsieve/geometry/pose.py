"""Camera poses as nine numbers: translation (3), quaternion xyzw (4), vertical and horizontal field of view (radians).

Extrinsics are world-to-camera in OpenCV axes (x right, y down, z forward); the principal point is the image centre.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_pose", "matrix_to_quaternion", "pose_encoding", "quaternion_to_matrix"]


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternions xyzw with w >= 0 of rotation matrices: [..., 3, 3] -> [..., 4].

    Each row of ``candidates`` is the quaternion times four times one of its components; the row of the largest
    component is the accurate one.
    """
    m = [[rotation[..., i, j] for j in range(3)] for i in range(3)]
    x, y, z = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]  # 4 w times the vector part
    xy, xz, yz = m[0][1] + m[1][0], m[0][2] + m[2][0], m[1][2] + m[2][1]
    diagonal = [
        1 + m[0][0] - m[1][1] - m[2][2],
        1 - m[0][0] + m[1][1] - m[2][2],
        1 - m[0][0] - m[1][1] + m[2][2],
        1 + m[0][0] + m[1][1] + m[2][2],
    ]
    candidates = torch.stack(
        [
            torch.stack([diagonal[0], xy, xz, x], -1),
            torch.stack([xy, diagonal[1], yz, y], -1),
            torch.stack([xz, yz, diagonal[2], z], -1),
            torch.stack([x, y, z, diagonal[3]], -1),
        ],
        -2,
    )
    best = torch.stack(diagonal, -1).argmax(-1)[..., None, None].expand(*rotation.shape[:-2], 1, 4)
    quaternion = candidates.gather(-2, best).squeeze(-2)
    quaternion = quaternion / quaternion.norm(dim=-1, keepdim=True)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices of quaternions xyzw of any length but zero: [..., 4] -> [..., 3, 3]."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2 / quaternion.square().sum(-1)
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def pose_encoding(extrinsics: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """Encode cameras.

    Args:
        extrinsics: [..., 3, 4] world to camera.
        intrinsics: [..., 3, 3] in pixels.
        size: height and width of the image.

    Returns:
        [..., 9]: translation, quaternion xyzw (w >= 0), field of view (vertical, horizontal).
    """
    height, width = size
    fov_h = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    fov_w = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = matrix_to_quaternion(extrinsics[..., :3])
    return torch.cat([extrinsics[..., 3], quaternion, fov_h[..., None], fov_w[..., None]], -1)


def decode_pose(pose_enc: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The inverse of `pose_encoding`; the quaternion need not have unit length.

    Args:
        pose_enc: [..., 9].
        size: height and width of the image.

    Returns:
        Extrinsics [..., 3, 4] and intrinsics [..., 3, 3].
    """
    height, width = size
    extrinsics = torch.cat([quaternion_to_matrix(pose_enc[..., 3:7]), pose_enc[..., :3, None]], -1)
    focal_y = height / 2 / torch.tan(pose_enc[..., 7] / 2)
    focal_x = width / 2 / torch.tan(pose_enc[..., 8] / 2)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    rows = [[focal_x, zero, one * (width / 2)], [zero, focal_y, one * (height / 2)], [zero, zero, one]]
    return extrinsics, torch.stack([torch.stack(row, -1) for row in rows], -2)
