"""The ground of the town: gently rolling height, kerbs, and what covers it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.formats.lidarseg_categories import INDEX_OF

# Codes of the cover raster.
ROAD, MARKING, PARKING, OTHER_FLAT, SIDEWALK, TERRAIN = range(6)
COVER_LABEL = np.array(
    [INDEX_OF["flat.driveable_surface"]] * 3 + [INDEX_OF["flat.other"], INDEX_OF["flat.sidewalk"], INDEX_OF["flat.terrain"]],
    np.uint8,
)
COVER_STEP = np.array([0.0, 0.0, 0.0, 0.12, 0.15, 0.11], np.float32)  # metres above the road
COVER_REFLECTIVITY = np.array([13.0, 42.0, 16.0, 22.0, 27.0, 40.0], np.float32)
COVER_ROUGHNESS = np.array([0.0, 0.0, 0.0, 0.01, 0.0, 0.07], np.float32)  # metres along the ray: grass against concrete
_SHORT_STRETCH_M = 0.6  # narrower than any raised strip
HIGHEST_STEP = float(COVER_STEP.max())


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """Height and cover. Global frame: x east, y north, z up; the raster covers [0, size) in x and y."""

    waves: NDArray[np.float64]  # (W, 4): amplitude m, wave number x and y 1/m, phase
    cover: NDArray[np.uint8]  # (rows along y, columns along x) codes above
    cell_m: float

    @staticmethod
    def flat(code: int = ROAD, size_m: float = 8.0) -> Ground:
        """A level plane of one cover at z = its step; outside the raster the border goes on."""
        return Ground(np.zeros((1, 4)), np.full((8, 8), code, np.uint8), size_m / 8)

    def height(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float64]:
        """Height of the road level at positions of any shape, without kerbs, metres."""
        return sum(  # type: ignore[return-value]
            (a * np.sin(kx * x + ky * y + p) for a, kx, ky, p in self.waves), np.zeros(np.broadcast(x, y).shape)
        )

    def slope(self, x: float, y: float) -> tuple[float, float]:
        """Gradient of the road level along x and y."""
        a, kx, ky, p = self.waves.T
        c = a * np.cos(kx * x + ky * y + p)
        return float((c * kx).sum()), float((c * ky).sum())

    def code(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Cover codes at positions; outside the raster the border goes on."""
        rows, columns = self.cover.shape
        column = np.clip((x * (1 / self.cell_m)).astype(np.int32), 0, columns - 1)
        row = np.clip((y * (1 / self.cell_m)).astype(np.int32), 0, rows - 1)
        return self.cover.ravel()[row * columns + column]

    def surface(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float64]:
        """Height of what one stands on, kerbs included, metres."""
        return self.height(x, y) + COVER_STEP[self.code(x, y)]

    def cast(
        self, origin: NDArray[np.float64], directions: NDArray[np.float32], max_range: float
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
        """First hits of rays (n, 3) from `origin` (3,): range (n,) with inf where none, cover code, cosine of incidence."""
        reached = np.full(len(directions), np.inf, np.float32)
        codes = np.zeros(len(directions), np.uint8)
        cosine = np.ones(len(directions), np.float32)
        rays = np.flatnonzero(directions[:, 2] < 0.05)
        if not len(rays):
            return reached, codes, cosine
        d = directions[rays]
        waves = self.waves[:, :, None].astype(np.float32)
        phase = (self.waves[:, 1] * origin[0] + self.waves[:, 2] * origin[1] + self.waves[:, 3]).astype(np.float32)
        turn = waves[:, 1] * d[:, 0] + waves[:, 2] * d[:, 1]  # (W, n) phase per metre of range
        start = np.float32(origin[2])

        def clearance(t: NDArray[np.float32], which: NDArray[np.intp] | slice) -> NDArray[np.float32]:
            """Height of the ray above the road level at ranges t (..., n)."""
            bumps = sum(a * np.sin(p + t * k) for a, p, k in zip(waves[:, 0], phase, turn[:, which], strict=True))
            return start + t * d[which, 2] - bumps

        # Shallow rays may graze a rise: march until the clearance changes sign. Steep ones converge by themselves.
        base = np.full(len(rays), np.inf, np.float32)
        shallow = np.flatnonzero(d[:, 2] > -0.16)
        steep = np.flatnonzero(d[:, 2] <= -0.16)
        if len(shallow):
            stations = np.geomspace(4.0, max_range, 14, dtype=np.float32)
            above = clearance(stations[:, None], shallow)
            below = above < 0
            step = below.argmax(0)
            found = np.flatnonzero(below.any(0) & (step > 0))
            step, which = step[found], shallow[found]
            low, high = stations[step - 1], stations[step]
            c_low, c_high = above[step - 1, found], above[step, found]
            for _ in range(2):
                middle = low + (high - low) * c_low / (c_low - c_high)
                c = clearance(middle, which)
                under = c < 0
                low, c_low = np.where(under, low, middle), np.where(under, c_low, c)
                high, c_high = np.where(under, middle, high), np.where(under, c, c_high)
            base[which] = low + (high - low) * c_low / np.maximum(c_low - c_high, 1e-9)
        if len(steep):
            t = -(start - np.float32(self.height(origin[0], origin[1]))) / d[steep, 2]
            for _ in range(3):
                t = t - clearance(t, steep) / d[steep, 2]
            base[steep] = t
        ok = np.flatnonzero(np.isfinite(base) & (base < max_range) & (base > 0))
        rays, d, base, turn = rays[ok], d[ok], base[ok], turn[:, ok]
        slope = sum(a * k * np.cos(p + base * k) for a, p, k in zip(waves[:, 0], phase, turn, strict=True))
        fall = np.minimum(d[:, 2] - slope, -1e-3)  # change of clearance per metre of range
        reached[rays], codes[rays] = self._over_kerbs(origin, d, base, fall)
        cosine[rays] = -fall
        return reached, codes, cosine

    def _over_kerbs(
        self, origin: NDArray[np.float64], d: NDArray[np.float32], base: NDArray[np.float32], fall: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Moves hits on the road level to the first raised cover that the ray meets before it."""
        ox, oy = np.float32(origin[0]), np.float32(origin[1])
        first = np.maximum(base + HIGHEST_STEP / fall, 0)
        code = self.code(ox + base * d[:, 0], oy + base * d[:, 1])
        result = base + COVER_STEP[code] / fall
        # Where the ray drops through all steps within a short stretch of one cover, that is its hit.
        alike = code == self.code(ox + first * d[:, 0], oy + first * d[:, 1])
        open_rays = np.flatnonzero(~alike | (base - first > _SHORT_STRETCH_M))
        previous = first[open_rays]

        def landed_at(t: NDArray[np.float32], rows: NDArray[np.intp]) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
            """Whether the rays are at or below the cover at ranges t, and what it is."""
            here = self.code(ox + t * d[rows, 0], oy + t * d[rows, 1])
            return COVER_STEP[here] >= (t - base[rows]) * fall[rows] - 1e-6, here

        for share in np.linspace(0, 1, 7, dtype=np.float32):
            t = first[open_rays] + share * (base[open_rays] - first[open_rays])
            landed, _ = landed_at(t, open_rays)
            rows, low, high = open_rays[landed], previous[landed], t[landed]
            for _ in range(4):  # the kerb, or the point on a level cover, lies between the last two stations
                middle = (low + high) / 2
                under, _ = landed_at(middle, rows)
                low, high = np.where(under, low, middle), np.where(under, middle, high)
            _, code[rows] = landed_at(high, rows)
            result[rows] = np.clip(base[rows] + COVER_STEP[code[rows]] / fall[rows], low, high)
            open_rays, previous = open_rays[~landed], t[~landed]
            if not len(open_rays):
                break
        return result.astype(np.float32, copy=False), code
