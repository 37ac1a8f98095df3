"""A ray-caster for rooms of boxes and spheres: exact depth and normals, Lambert's shading, one light with shadows.

World coordinates are x, y and, upwards, z, in metres. The camera's are x right, y up, and z towards it: normals are
given in these, so that mirroring the image changes the sign of x. Depth is the distance along the optical axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Box", "Camera", "Look", "Room", "Sphere", "View", "cast", "render"]

FAR = np.inf
AMBIENT = 0.35


@dataclass(frozen=True)
class Look:
    """Colour [3] in [0, 1], and stripes: a wave vector [3] in radians per metre and how strong they are."""

    colour: np.ndarray
    wave: np.ndarray
    contrast: float


@dataclass(frozen=True)
class Box:
    """A box, turned around the vertical by `yaw`; `half` are half its sizes."""

    centre: np.ndarray
    half: np.ndarray
    yaw: float
    kind: int
    instance: int
    look: Look

    def hit(self, origin: np.ndarray, direction: np.ndarray, inside: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Where rays [N, 3] enter the box (leave it: `inside`), in units of their direction, and the normals there."""
        turn = _turn(self.yaw)
        o, d = (origin - self.centre) @ turn, direction @ turn
        with np.errstate(divide="ignore", invalid="ignore"):
            middle, reach = -o / d, self.half / np.abs(d)
            # Parallel to two faces: between them throughout, or never.
            parallel = d == 0
            between = np.abs(o) < self.half
            near = np.where(parallel, np.where(between, -FAR, FAR), middle - reach)
            far = np.where(parallel, np.where(between, FAR, -FAR), middle + reach)
        axis = far.argmin(1) if inside else near.argmax(1)
        entry, leave = near.max(1), far.min(1)
        t = np.where((entry < leave) & (entry > 0), entry, FAR)
        if inside:
            t = leave
        rows = np.arange(len(d))
        normal = np.zeros_like(d)
        normal[rows, axis] = -np.sign(d[rows, axis])
        return t, normal @ turn.T


@dataclass(frozen=True)
class Sphere:
    """A sphere."""

    centre: np.ndarray
    radius: float
    kind: int
    instance: int
    look: Look

    def hit(self, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rays [N, 3] enter the sphere, in units of their direction, and the normals there."""
        o = origin - self.centre
        square = (direction * direction).sum(1)
        half = (o * direction).sum(1)
        root = half * half - square * ((o * o).sum(1) - self.radius**2)
        t = (-half - np.sqrt(np.maximum(root, 0))) / square
        t = np.where((root > 0) & (t > 0), t, FAR)
        normal = (o + np.where(t < FAR, t, 0)[:, None] * direction) / self.radius
        return t, normal


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along `yaw` (0 is x) and `pitch` (up is positive); `view` is its horizontal angle."""

    position: np.ndarray
    yaw: float
    pitch: float
    view: float

    def axes(self) -> np.ndarray:
        """Right, up and backwards, as columns [3, 3]."""
        cy, sy, cp, sp = np.cos(self.yaw), np.sin(self.yaw), np.cos(self.pitch), np.sin(self.pitch)
        forward = np.array([cy * cp, sy * cp, sp])
        right = np.array([sy, -cy, 0.0])
        return np.stack([right, np.cross(right, forward), -forward], 1)

    def rays(self, height: int, width: int) -> np.ndarray:
        """Through the middle of each pixel [H W, 3], of length 1 along the optical axis."""
        focal = width / 2 / np.tan(self.view / 2)
        x = (np.arange(width) + 0.5 - width / 2) / focal
        y = (height / 2 - np.arange(height) - 0.5) / focal
        grid = np.stack([*np.meshgrid(x, y), np.full((height, width), -1.0)], -1)
        return grid.reshape(-1, 3) @ self.axes().T


@dataclass(frozen=True)
class Room:
    """A room seen from inside, with things in it. The shell's kinds and looks are those of floor, ceiling and walls."""

    shell: Box
    kinds: tuple[int, int, int]
    looks: tuple[Look, Look, Look]
    things: Sequence[Box | Sphere]
    light: np.ndarray
    camera: Camera


class View(NamedTuple):
    """What a camera sees, in float64 and int64.

    Attributes:
        image: [H, W, 3] in [0, 1].
        depth: [H, W].
        normal: of unit length [H, W, 3].
        kind: [H, W].
        instance: [H, W]; 0 is the room.
        thing: index of what it is [H, W]; -1 is the room.
    """

    image: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    kind: np.ndarray
    instance: np.ndarray
    thing: np.ndarray


def cast(
    things: Sequence[Box | Sphere], origin: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest hit of rays [N, 3]: how far [N] (infinite: none), the normal [N, 3], which thing [N] (-1: none)."""
    nearest = np.full(len(direction), FAR)
    normal = np.zeros_like(direction)
    which = np.full(len(direction), -1)
    for i, thing in enumerate(things):
        t, n = thing.hit(origin, direction)
        closer = t < nearest
        nearest[closer], normal[closer], which[closer] = t[closer], n[closer], i
    return nearest, normal, which


def render(room: Room, height: int, width: int) -> View:
    """What the room's camera sees."""
    rays = room.camera.rays(height, width)
    origin = np.broadcast_to(room.camera.position, rays.shape)
    depth, normal, thing = cast(room.things, origin, rays)
    wall, inward = room.shell.hit(origin, rays, inside=True)
    behind = thing < 0
    depth = np.where(behind, wall, depth)
    normal = np.where(behind[:, None], inward, normal)
    surface = np.where(normal[:, 2] > 0.5, 0, np.where(normal[:, 2] < -0.5, 1, 2))  # of the room
    kind = np.array([t.kind for t in room.things] + [0])[thing]
    instance = np.array([t.instance for t in room.things] + [0])[thing]
    kind = np.where(behind, np.array(room.kinds)[surface], kind)
    looks = [*(t.look for t in room.things), *room.looks]
    look = np.where(behind, len(room.things) + surface, thing)

    point = origin + depth[:, None] * rays
    wave, contrast = np.stack([x.wave for x in looks])[look], np.array([x.contrast for x in looks])[look]
    colour = np.stack([x.colour for x in looks])[look] * (1 + contrast * np.sin((wave * point).sum(1)))[:, None]
    towards = room.light - point
    distance = np.linalg.norm(towards, axis=1)
    facing = np.maximum((normal * towards).sum(1) / distance, 0)
    lit = cast(room.things, point + 1e-6 * normal, towards)[0] > 1
    image = np.clip(colour * (AMBIENT + (1 - AMBIENT) * lit * facing)[:, None], 0, 1)
    grid = height, width
    return View(
        image.reshape(*grid, 3),
        depth.reshape(grid),
        (normal @ room.camera.axes()).reshape(*grid, 3),
        kind.reshape(grid),
        instance.reshape(grid),
        thing.reshape(grid),
    )


def _turn(yaw: float) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
