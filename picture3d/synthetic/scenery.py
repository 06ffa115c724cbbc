"""Things that never move and are never annotated: buildings, walls, street furniture, plants. Frames as in `shapes`."""

from __future__ import annotations

import numpy as np

from picture3d.synthetic.primitives import BOX, CYLINDER, ELLIPSOID, Parts, part

Rng = np.random.Generator
# What is made of solid boxes of these reflectivities, and is not annotated, are plates of signs and lamps of traffic lights.
SIGN_PLATE_REFLECTIVITY = 170.0
TRAFFIC_LIGHT_REFLECTIVITY = 12.0


def building(rng: Rng, length: float, width: float, height: float) -> Parts:
    """A block with a plinth, and at times a wing, a stepped roof, balconies or a porch; 1 m of it is below ground."""
    shine = rng.uniform(14, 55)
    rows = [part(BOX, (0, 0, height / 2 - 0.5), (length / 2, width / 2, height / 2 + 0.5), reflectivity=shine)]
    if rng.random() < 0.5:
        rows.append(
            part(BOX, (rng.uniform(-0.2, 0.2) * length, 0, height + 0.8), (length * 0.3, width * 0.3, 0.8), reflectivity=shine)
        )
    else:  # gable: two leaning slabs
        rise = rng.uniform(0.35, 0.7)
        run = width / 4 / np.cos(rise)
        for side in (-1, 1):
            rows.append(
                part(
                    BOX,
                    (0, side * width / 4, height + width / 4 * np.tan(rise) - 0.1),
                    (run, length / 2 + 0.3, 0.12),
                    yaw=np.pi / 2 * side,
                    pitch=rise,
                    reflectivity=shine * 0.7,
                )
            )
    for _ in range(int(rng.integers(0, 4))):  # bays and balconies
        side = rng.choice([-1, 1])
        x, z = rng.uniform(-0.4, 0.4) * length, rng.uniform(0.3, 0.8) * height
        rows.append(
            part(
                BOX,
                (x, side * (width / 2 + 0.4), z),
                (rng.uniform(0.8, 1.8), 0.5, rng.uniform(0.4, 1.3)),
                reflectivity=shine * 1.2,
            )
        )
    return np.array(rows)


def wall(rng: Rng, length: float) -> Parts:
    """A garden wall or a railing, `length` metres along x."""
    if rng.random() < 0.55:
        tall = rng.uniform(0.9, 2.3)
        return np.array(
            [
                part(
                    BOX,
                    (0, 0, tall / 2 - 0.2),
                    (length / 2, rng.uniform(0.1, 0.2), tall / 2 + 0.2),
                    reflectivity=rng.uniform(15, 50),
                )
            ]
        )
    tall = rng.uniform(1.0, 2.0)
    posts = int(length / 2.5) + 1
    rows = [
        part(CYLINDER, (x, 0, tall / 2), (0.05, 0.05, tall / 2), reflectivity=25.0)
        for x in np.linspace(-length / 2, length / 2, posts)
    ]
    # Rails let most rays pass.
    rows.append(part(BOX, (0, 0, tall / 2 + 0.1), (length / 2, 0.04, tall / 2 - 0.1), reflectivity=25.0, free_path=0.15))
    return np.array(rows)


def lamp(rng: Rng) -> Parts:
    """A lamp post with an arm over the road (+y)."""
    tall, r = rng.uniform(5, 9), rng.uniform(0.07, 0.13)
    reach = rng.uniform(0.6, 2.0)
    return np.array(
        [
            part(CYLINDER, (0, 0, tall / 2), (r, r, tall / 2), reflectivity=32.0),
            part(CYLINDER, (0, 0, 0.5), (r * 1.7, r * 1.7, 0.5), reflectivity=32.0),
            part(BOX, (0, reach / 2, tall), (0.05, reach / 2, 0.05), reflectivity=30.0),
            part(BOX, (0, reach, tall - 0.05), (0.16, 0.35, 0.08), reflectivity=30.0),
        ]
    )


def sign(rng: Rng) -> Parts:
    """A traffic sign: a thin post and a retro-reflecting plate that faces along x."""
    tall = rng.uniform(2.2, 3.0)
    size = rng.uniform(0.28, 0.5)
    return np.array(
        [
            part(CYLINDER, (0, 0, tall / 2), (0.04, 0.04, tall / 2), reflectivity=35.0),
            part(BOX, (0, 0, tall - size * 0.5), (0.02, size, size), reflectivity=SIGN_PLATE_REFLECTIVITY),
        ]
    )


def bollard(rng: Rng) -> Parts:
    """A post as high as a child, or a hydrant: what a pedestrian or a cone can be mistaken for."""
    tall = rng.uniform(0.7, 1.3)
    return np.array(
        [
            part(CYLINDER, (0, 0, tall / 2), (0.1, 0.1, tall / 2), reflectivity=30.0),
            part(ELLIPSOID, (0, 0, tall), (0.12, 0.12, 0.1), reflectivity=30.0),
        ]
    )


def cabinet(rng: Rng) -> Parts:
    """A switch box, a parking meter's big brother."""
    tall = rng.uniform(1.0, 1.8)
    return np.array(
        [part(BOX, (0, 0, tall / 2), (rng.uniform(0.25, 0.7), rng.uniform(0.2, 0.35), tall / 2), reflectivity=28.0)]
    )


def traffic_light(rng: Rng) -> Parts:
    """A post with a box of lamps, some with a mast arm over the road (+y)."""
    tall = 5.6 if rng.random() < 0.5 else 3.2
    rows = [
        part(CYLINDER, (0, 0, tall / 2), (0.09, 0.09, tall / 2), reflectivity=30.0),
        part(BOX, (0, 0, 2.7), (0.16, 0.16, 0.45), reflectivity=TRAFFIC_LIGHT_REFLECTIVITY),
    ]
    if tall > 5:
        rows += [
            part(BOX, (0, 2.2, tall), (0.06, 2.2, 0.06), reflectivity=30.0),
            part(BOX, (0, 4.2, tall - 0.3), (0.16, 0.16, 0.45), reflectivity=TRAFFIC_LIGHT_REFLECTIVITY),
        ]
    return np.array(rows)


def shelter(rng: Rng) -> Parts:
    """A bus stop: roof, posts, back wall and a bench."""
    rows = [
        part(BOX, (0, 0, 2.5), (2.0, 0.75, 0.07), reflectivity=30.0),
        part(BOX, (0, -0.65, 1.3), (1.9, 0.03, 1.0), reflectivity=20.0, free_path=0.1),
    ]
    rows += [part(CYLINDER, (x, y, 1.25), (0.05, 0.05, 1.25), reflectivity=30.0) for x in (-1.8, 1.8) for y in (-0.6, 0.6)]
    rows.append(part(BOX, (0, -0.35, 0.5), (1.2, 0.2, 0.06), reflectivity=25.0))
    return np.array(rows)


def tree(rng: Rng) -> Parts:
    """A trunk and one to four crowns, round, columnar or conifer."""
    tall, trunk = rng.uniform(4.5, 13.0), rng.uniform(0.1, 0.32)
    green = rng.uniform(11, 24)
    clear = tall * rng.uniform(0.22, 0.4)
    rows = [part(CYLINDER, (0, 0, clear * 0.7), (trunk, trunk, clear * 0.7), reflectivity=18.0)]
    if rng.random() < 0.2:
        for i in range(3):
            wide = tall * (0.22 - 0.05 * i)
            rows.append(
                part(ELLIPSOID, (0, 0, tall * (0.3 + 0.24 * i)), (wide, wide, tall * 0.19), reflectivity=green, free_path=0.25)
            )
        return np.array(rows)
    wide = tall * rng.uniform(0.2, 0.36)
    for _ in range(int(rng.integers(2, 5))):
        x, y = rng.uniform(-0.45, 0.45, 2) * wide
        z = rng.uniform(clear + 0.25 * (tall - clear), tall - 0.25 * (tall - clear))
        r = wide * rng.uniform(0.55, 0.9)
        rows.append(
            part(
                ELLIPSOID,
                (x, y, z),
                (r, r * rng.uniform(0.8, 1.2), (tall - clear) * rng.uniform(0.3, 0.45)),
                reflectivity=green,
                free_path=rng.uniform(0.25, 0.7),
            )
        )
    return np.array(rows)


def bush(rng: Rng) -> Parts:
    """One to three leafy lumps on the ground."""
    rows = []
    for _ in range(int(rng.integers(1, 4))):
        x, y = rng.uniform(-0.6, 0.6, 2)
        r, tall = rng.uniform(0.4, 1.2), rng.uniform(0.4, 1.3)
        rows.append(
            part(
                ELLIPSOID,
                (x, y, tall * 0.7),
                (r, r * rng.uniform(0.7, 1.3), tall),
                reflectivity=rng.uniform(11, 26),
                free_path=0.15,
            )
        )
    return np.array(rows)


def hedge(rng: Rng, length: float) -> Parts:
    """A clipped hedge of lumps, `length` metres along x: as high as a wall, but soft."""
    tall, wide, green = rng.uniform(0.8, 2.0), rng.uniform(0.35, 0.7), rng.uniform(11, 24)
    rows = [part(BOX, (0, 0, tall * 0.48), (length / 2, wide * 0.7, tall * 0.45), reflectivity=green, free_path=0.18)]
    for x in np.arange(-length / 2 + 0.8, length / 2 - 0.5, 1.7):
        rows.append(
            part(
                ELLIPSOID,
                (x, rng.uniform(-0.1, 0.1), tall * 0.6),
                (1.1, wide, tall * rng.uniform(0.38, 0.5)),
                reflectivity=green,
                free_path=0.18,
            )
        )
    return np.array(rows)
