"""How each kind of thing looks: parts in its own frame (x forward, y left, z up, origin on the ground below its middle)."""

from __future__ import annotations

import numpy as np

from picture3d.synthetic.primitives import BOX, CYLINDER, ELLIPSOID, Parts, extent, part

Rng = np.random.Generator
_DARK = 5.0  # tyres and glass give little back


def centred(rows: list[list[float]]) -> Parts:
    """Parts as an array, shifted so that the middle of their footprint is the origin."""
    parts = np.array(rows, dtype=np.float64)
    low, high = extent(parts)
    parts[:, 1:3] -= ((low + high) / 2)[:2]
    return parts


def _wheels(length: float, width: float, radius: float, axles: tuple[float, ...]) -> list[list[float]]:
    y = width / 2 - 0.13
    return [
        part(ELLIPSOID, (x * length, side * y, radius), (radius, 0.12, radius), reflectivity=_DARK)
        for x in axles
        for side in (-1, 1)
    ]


def _paint(rng: Rng) -> float:
    # Dark paint is common and returns almost nothing; some bodies shine.
    return float(rng.choice([4.0, 12.0, 30.0, 60.0]) * rng.uniform(0.7, 1.3))


def car(rng: Rng) -> Parts:
    """Saloon, estate, van or pick-up."""
    length, width, paint = rng.uniform(3.8, 5.1), rng.uniform(1.72, 2.0), _paint(rng)
    kind = rng.choice(["saloon", "estate", "van", "pickup"], p=[0.45, 0.35, 0.12, 0.08])
    belt = rng.uniform(0.85, 1.05)
    low = rng.uniform(0.22, 0.3)
    rows = [part(BOX, (0, 0, (low + belt) / 2), (length / 2, width / 2, (belt - low) / 2), reflectivity=paint)]
    roof = {"saloon": 1.45, "estate": 1.65, "van": 2.05, "pickup": 1.8}[str(kind)] * rng.uniform(0.95, 1.06)
    back, front = {"saloon": (-0.33, 0.22), "estate": (-0.48, 0.2), "van": (-0.49, 0.36), "pickup": (-0.08, 0.25)}[str(kind)]
    cabin = (front - back) * length
    middle = (front + back) / 2 * length
    rows.append(
        part(
            BOX,
            (middle, 0, (belt + roof) / 2),
            (cabin / 2 * 0.86, width / 2 * 0.88, (roof - belt) / 2),
            reflectivity=paint * 0.6,
        )
    )
    # Wind screens lean: flat slabs at both ends of the cabin.
    lean = (roof - belt) * 0.55
    for end, sign in ((front, 1), (back, -1)):
        rows.append(
            part(
                BOX,
                (end * length - sign * cabin * 0.06, 0, belt + lean * 0.7),
                (lean * 0.75, width * 0.42, 0.05),
                pitch=sign * 0.85,
                reflectivity=_DARK,
            )
        )
    return centred(rows + _wheels(length, width, 0.32, (-0.3, 0.3)))


def truck(rng: Rng) -> Parts:
    """A cab and a box, a tipper or a flat bed behind it; sometimes an open gap between them."""
    length, width, height = rng.uniform(6.0, 11.0), rng.uniform(2.2, 2.6), rng.uniform(2.7, 3.7)
    cab, paint = rng.uniform(1.7, 2.3), _paint(rng)
    front = length / 2
    rows = [
        part(
            BOX,
            (front - cab / 2, 0, 0.45 + (height * 0.8 - 0.45) / 2),
            (cab / 2, width / 2 * 0.95, (height * 0.8 - 0.45) / 2),
            reflectivity=paint,
        ),
        part(BOX, (-0.2, 0, 0.75), (length / 2 - 0.2, 0.45, 0.22), reflectivity=9.0),
    ]
    cargo = length - cab - rng.uniform(0.25, 0.6)
    style = rng.choice(["box", "tipper", "flat"], p=[0.65, 0.2, 0.15])
    middle = -length / 2 + cargo / 2
    if style == "box":
        rows.append(
            part(
                BOX,
                (middle, 0, (1.0 + height) / 2),
                (cargo / 2, width / 2, (height - 1.0) / 2),
                reflectivity=rng.uniform(25, 70),
            )
        )
    elif style == "tipper":
        rows.append(
            part(
                BOX,
                (middle, 0, 1.55),
                (cargo / 2, width / 2, 0.6),
                pitch=float(rng.uniform(0, 0.05)),
                reflectivity=rng.uniform(15, 40),
            )
        )
        rows.append(part(ELLIPSOID, (middle, 0, 2.1), (cargo * 0.45, width * 0.4, rng.uniform(0.2, 0.5)), reflectivity=20.0))
    else:
        rows.append(part(BOX, (middle, 0, 1.1), (cargo / 2, width / 2, 0.12), reflectivity=18.0))
        rows.append(part(BOX, (middle + cargo * 0.44, 0, 1.7), (0.06, width / 2, 0.5), reflectivity=18.0))
        rows.append(
            part(BOX, (middle - cargo * 0.1, 0, 1.6), (cargo * 0.3, width * 0.38, 0.4), reflectivity=rng.uniform(10, 50))
        )
    return centred(rows + _wheels(length, width, 0.48, (-0.36, -0.24, 0.36)))


def trailer(rng: Rng) -> Parts:
    """A long box, tank or flat bed without a cab, on wheels at its end and legs at its front."""
    length, width, height = rng.uniform(8.0, 13.0), rng.uniform(2.4, 2.6), rng.uniform(3.4, 4.0)
    style = rng.choice(["box", "tank", "flat", "container"], p=[0.35, 0.2, 0.2, 0.25])
    rows = [part(BOX, (0, 0, 1.08), (length / 2, 0.5, 0.14), reflectivity=12.0)]
    shine = rng.uniform(30, 80)
    if style == "box":
        rows.append(part(BOX, (0, 0, (1.2 + height) / 2), (length / 2, width / 2, (height - 1.2) / 2), reflectivity=shine))
    elif style == "container":
        rows.append(part(BOX, (0, 0, 1.28), (length / 2, width / 2, 0.08), reflectivity=14.0))
        rows.append(part(BOX, (0.3, 0, 2.55), (length * 0.46, 1.2, 1.2), reflectivity=shine * 0.6))
    elif style == "tank":
        for x in (-0.25, 0.0, 0.25):
            rows.append(part(ELLIPSOID, (x * length, 0, 2.3), (length * 0.26, width * 0.46, 1.05), reflectivity=shine))
    else:
        rows.append(part(BOX, (0, 0, 1.28), (length / 2, width / 2, 0.1), reflectivity=14.0))
        rows.append(part(BOX, (-length * 0.2, 0, 1.8), (length * 0.2, width * 0.42, 0.45), reflectivity=shine * 0.5))
    rows += [part(BOX, (length * 0.28, y, 0.5), (0.08, 0.08, 0.5), reflectivity=12.0) for y in (-0.7, 0.7)]
    return centred(rows + _wheels(length, width, 0.5, (-0.42, -0.32, -0.22)))


def rigid_bus(rng: Rng) -> Parts:
    """One long body close to the ground, glazed above the belt, with boxes on its roof."""
    return centred(_bus_body(rng, rng.uniform(10.0, 12.5)))


def bendy_bus(rng: Rng) -> Parts:
    """Two bodies with a bellows between them, seen on a straight."""
    front = np.array(_bus_body(rng, 9.5))
    back = front.copy()
    front[:, 1] += 5.1
    back[:, 1] -= 5.1
    bellows = part(BOX, (0, 0, 1.6), (0.45, 1.1, 1.15), reflectivity=8.0)
    return centred([*front.tolist(), *back.tolist(), bellows])


def _bus_body(rng: Rng, length: float) -> list[list[float]]:
    width, height, paint = 2.55, rng.uniform(2.9, 3.25), rng.uniform(20, 60)
    rows = [
        part(BOX, (0, 0, 0.75), (length / 2, width / 2, 0.45), reflectivity=paint),
        part(
            BOX, (0, 0, (1.2 + height) / 2), (length / 2 - 0.06, width / 2 - 0.06, (height - 1.2) / 2), reflectivity=paint * 0.5
        ),
        part(BOX, (-length * 0.25, 0, height + 0.12), (length * 0.12, 0.8, 0.14), reflectivity=25.0),
        part(BOX, (length * 0.2, 0, height + 0.1), (length * 0.1, 0.8, 0.12), reflectivity=25.0),
    ]
    return rows + _wheels(length, width, 0.48, (-0.3, 0.3))


def excavator(rng: Rng) -> Parts:
    """Tracks, a turned upper body with a counterweight, boom, arm and bucket."""
    paint, turn = rng.uniform(35, 80), rng.uniform(-0.35, 0.35)
    c, s = np.cos(turn), np.sin(turn)
    length = rng.uniform(3.2, 4.4)
    rows = [part(BOX, (0, y, 0.42), (length / 2, 0.28, 0.42), reflectivity=9.0) for y in (-1.0, 1.0)]
    rows.append(part(BOX, (-0.4 * c, -0.4 * s, 1.5), (1.6, 1.2, 0.5), yaw=turn, reflectivity=paint))
    rows.append(part(BOX, (0.4 * c - 0.7 * s, 0.4 * s + 0.7 * c, 2.2), (0.7, 0.48, 0.85), yaw=turn, reflectivity=paint * 0.6))
    lift = rng.uniform(0.5, 0.85)
    boom = rng.uniform(1.7, 2.2)
    tip = np.array([0.9 + 2 * boom * np.cos(lift), 1.6 + 2 * boom * np.sin(lift)])
    reach = 0.9 + boom * np.cos(lift)
    rows.append(
        part(
            BOX,
            (reach * c, reach * s, 1.6 + boom * np.sin(lift)),
            (boom, 0.22, 0.28),
            yaw=turn,
            pitch=-lift,
            reflectivity=paint,
        )
    )
    drop = rng.uniform(0.9, 1.25)
    arm = min(1.5, (tip[1] - 0.6) / 2 / np.sin(drop))
    x = tip[0] + arm * np.cos(drop)
    rows.append(
        part(BOX, (x * c, x * s, tip[1] - arm * np.sin(drop)), (arm, 0.18, 0.2), yaw=turn, pitch=drop, reflectivity=paint)
    )
    x = tip[0] + 2 * arm * np.cos(drop) - 0.2
    z = max(tip[1] - 2 * arm * np.sin(drop), 0.45)
    rows.append(part(ELLIPSOID, (x * c, x * s, z), (0.55, 0.6, 0.44), yaw=turn, reflectivity=18.0))
    return centred(rows)


def wheel_loader(rng: Rng) -> Parts:
    """Big wheels, a high cab, an engine behind and a wide bucket in front."""
    paint, length = rng.uniform(35, 80), rng.uniform(5.2, 6.6)
    up = rng.uniform(0.3, 0.9)
    rows = [
        part(BOX, (-length * 0.22, 0, 1.35), (length * 0.2, 0.95, 0.55), reflectivity=paint),
        part(BOX, (length * 0.02, 0, 2.1), (0.75, 0.7, 1.0), reflectivity=paint * 0.5),
        part(BOX, (length * 0.26, 0, 0.75 + up * 0.5), (length * 0.16, 0.35, 0.2), pitch=-0.25, reflectivity=paint),
        part(BOX, (length * 0.43, 0, 0.2 + up), (0.35, 1.3, 0.12), reflectivity=22.0),
        part(BOX, (length * 0.38, 0, 0.55 + up), (0.1, 1.3, 0.42), pitch=0.3, reflectivity=22.0),
    ]
    for x in (-0.24, 0.18):
        rows += [part(ELLIPSOID, (x * length, y, 0.78), (0.78, 0.3, 0.78), reflectivity=_DARK) for y in (-0.95, 0.95)]
    return centred(rows)


def roller(rng: Rng) -> Parts:
    """Road roller: a drum, a body and a canopy on posts."""
    paint = rng.uniform(35, 80)
    rows = [
        part(ELLIPSOID, (1.25, 0, 0.65), (0.65, 0.95, 0.65), reflectivity=20.0),
        part(BOX, (1.25, 0, 0.75), (0.9, 1.0, 0.1), reflectivity=paint),
        part(BOX, (-0.7, 0, 1.0), (1.1, 0.8, 0.45), reflectivity=paint),
        part(BOX, (-0.2, 0, 2.65), (0.85, 0.85, 0.07), reflectivity=paint),
    ]
    rows += [part(BOX, (x, y, 2.0), (0.05, 0.05, 0.6), reflectivity=14.0) for x in (-0.9, 0.5) for y in (-0.7, 0.7)]
    rows += [part(ELLIPSOID, (-1.2, y, 0.62), (0.62, 0.26, 0.62), reflectivity=_DARK) for y in (-0.75, 0.75)]
    return centred(rows)


def construction_vehicle(rng: Rng) -> Parts:
    """An excavator, a wheel loader or a roller."""
    return [excavator, wheel_loader, roller][int(rng.choice(3, p=[0.45, 0.35, 0.2]))](rng)


def _rider(rng: Rng, saddle: float, lean: float) -> list[list[float]]:
    cloth = rng.uniform(15, 60)
    return [
        part(BOX, (0.06, 0, saddle + 0.3), (0.14, 0.21, 0.33), pitch=lean, reflectivity=cloth),
        part(ELLIPSOID, (0.22, 0, saddle + 0.78), (0.12, 0.11, 0.14), reflectivity=30.0),
        part(BOX, (0.16, 0.13, saddle - 0.2), (0.09, 0.07, 0.3), pitch=-0.3, reflectivity=cloth * 0.7),
        part(BOX, (0.16, -0.13, saddle - 0.2), (0.09, 0.07, 0.3), pitch=-0.3, reflectivity=cloth * 0.7),
        part(BOX, (0.35, 0, saddle + 0.38), (0.24, 0.2, 0.05), pitch=0.5, reflectivity=cloth),
    ]


def bicycle(rng: Rng, *, ridden: bool = False) -> Parts:
    """Two thin wheels and a frame; the rider belongs to it, as in nuScenes."""
    wheel, base, metal = rng.uniform(0.3, 0.36), rng.uniform(0.5, 0.56), rng.uniform(8, 40)
    rows = [part(ELLIPSOID, (x, 0, wheel), (wheel, 0.035, wheel), reflectivity=8.0, free_path=0.05) for x in (-base, base)]
    rows += [
        part(BOX, (0, 0, 0.55), (0.36, 0.03, 0.05), pitch=0.25, reflectivity=metal),
        part(BOX, (-0.02, 0, 0.72), (0.3, 0.03, 0.035), reflectivity=metal),
        part(BOX, (-0.22, 0, 0.92), (0.13, 0.07, 0.04), reflectivity=10.0),
        part(BOX, (0.42, 0, 0.8), (0.03, 0.03, 0.22), pitch=-0.3, reflectivity=metal),
        part(BOX, (0.42, 0, 1.02), (0.04, 0.28, 0.03), reflectivity=metal),
    ]
    if rng.random() < 0.3:
        rows.append(part(BOX, (0.58, 0, 0.85), (0.14, 0.17, 0.11), reflectivity=20.0, free_path=0.1))
    return centred(rows + (_rider(rng, 0.95, 0.35) if ridden else []))


def motorcycle(rng: Rng, *, ridden: bool = False) -> Parts:
    """Fat wheels with a body, tank and engine between them, or a scooter with a shield."""
    metal, base = rng.uniform(10, 50), rng.uniform(0.62, 0.75)
    rows = [part(ELLIPSOID, (x, 0, 0.31), (0.31, 0.09, 0.31), reflectivity=_DARK) for x in (-base, base)]
    rows.append(part(BOX, (0, 0, 0.5), (base * 0.62, 0.17, 0.22), reflectivity=metal))
    rows.append(part(BOX, (-0.35, 0, 0.8), (0.42, 0.15, 0.09), reflectivity=9.0))
    rows.append(part(BOX, (base - 0.12, 0, 0.75), (0.06, 0.1, 0.42), pitch=-0.4, reflectivity=metal))
    rows.append(part(BOX, (base - 0.28, 0, 1.08), (0.06, 0.36, 0.04), reflectivity=14.0))
    if rng.random() < 0.5:
        rows.append(part(BOX, (base * 0.45, 0, 0.72), (0.06, 0.22, 0.36), pitch=-0.25, reflectivity=metal))
    else:
        rows.append(part(ELLIPSOID, (0.2, 0, 0.86), (0.3, 0.16, 0.15), reflectivity=metal))
    if rng.random() < 0.3:
        rows.append(part(BOX, (-base - 0.02, 0, 1.0), (0.2, 0.2, 0.17), reflectivity=30.0))
    return centred(rows + (_rider(rng, 0.9, 0.15) if ridden else []))


def pedestrian(rng: Rng, *, child: bool = False, worker: bool = False) -> Parts:
    """Legs, torso, arms and head; some carry a bag, workers wear bright vests and helmets."""
    tall = rng.uniform(1.05, 1.4) if child else rng.uniform(1.55, 1.92)
    broad = tall * rng.uniform(0.125, 0.15)
    cloth = rng.uniform(70, 120) if worker else rng.uniform(12, 70)
    stride = rng.uniform(0.0, 0.18) * tall / 1.7
    hip, neck = 0.47 * tall, 0.83 * tall
    rows = [
        part(CYLINDER, (side * stride, side * broad * 0.45, hip / 2), (0.085, 0.075, hip / 2), reflectivity=cloth * 0.6)
        for side in (-1, 1)
    ]
    rows.append(part(ELLIPSOID, (0, 0, (hip + neck) / 2), (broad * 0.62, broad, (neck - hip) * 0.62), reflectivity=cloth))
    rows.append(part(ELLIPSOID, (0.02, 0, 0.92 * tall), (0.11, 0.095, 0.08 * tall), reflectivity=60.0 if worker else 30.0))
    for side in (-1, 1):
        swing = side * stride * 0.8
        rows.append(part(CYLINDER, (-swing, side * broad, 0.62 * tall), (0.05, 0.05, 0.19 * tall), reflectivity=cloth))
    if not worker and rng.random() < 0.25:
        rows.append(part(BOX, (-broad * 0.9, 0, 0.68 * tall), (0.1, 0.15, 0.22), reflectivity=20.0))
    return centred(rows)


def barrier(rng: Rng) -> Parts:
    """One element of a row: a concrete wall that narrows upwards, a plastic one, or a fence of planks on feet."""
    length = rng.uniform(1.6, 2.4)
    style = rng.choice(["concrete", "plastic", "planks"], p=[0.5, 0.3, 0.2])
    shine = rng.uniform(28, 60)
    if style == "planks":
        rows = [part(BOX, (0, 0, z), (0.04, length / 2, 0.1), reflectivity=shine * 1.6) for z in (0.55, 0.95)]
        rows += [part(BOX, (0, y * length, 0.5), (0.25, 0.05, 0.06), reflectivity=15.0) for y in (-0.4, 0.4)]
        rows += [part(BOX, (0, y * length, 0.52), (0.05, 0.05, 0.52), reflectivity=15.0) for y in (-0.4, 0.4)]
    else:
        tall = rng.uniform(0.8, 1.1)
        foot = 0.3 if style == "concrete" else 0.24
        rows = [
            part(BOX, (0, 0, 0.14), (foot, length / 2, 0.14), reflectivity=shine),
            part(BOX, (0, 0, 0.28 + (tall - 0.28) / 2), (foot * 0.45, length / 2, (tall - 0.28) / 2), reflectivity=shine),
        ]
    return centred(rows)


def traffic_cone(rng: Rng) -> Parts:
    """A cone of three steps on a square foot with bright bands, or a slim bollard-like post."""
    tall = rng.uniform(0.6, 1.05)
    if rng.random() < 0.2:
        rows = [part(CYLINDER, (0, 0, tall / 2), (0.11, 0.11, tall / 2), reflectivity=90.0)]
    else:
        rows = [
            part(
                CYLINDER,
                (0, 0, tall * (0.2 + 0.3 * i)),
                (0.17 - 0.05 * i, 0.17 - 0.05 * i, tall * 0.2),
                reflectivity=(35.0, 95.0, 35.0)[i],
            )
            for i in range(3)
        ]
    rows.append(part(BOX, (0, 0, 0.03), (0.22, 0.22, 0.03), reflectivity=15.0))
    return centred(rows)


def trash_bin(rng: Rng) -> Parts:
    """A wheeled bin."""
    return centred([part(BOX, (0, 0, 0.55), (0.3, 0.28, rng.uniform(0.45, 0.6)), reflectivity=22.0)])
