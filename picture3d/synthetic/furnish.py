"""Fills a plan with things: what stands at the kerb, on the pavement, in the plots between the roads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from picture3d.formats.lidarseg_categories import INDEX_OF
from picture3d.synthetic import scenery
from picture3d.synthetic.ground import OTHER_FLAT, PARKING, SIDEWALK, TERRAIN, Ground
from picture3d.synthetic.primitives import Parts
from picture3d.synthetic.streets import CELL_M, Plan, Road
from picture3d.synthetic.things import STANDING, Thing, length_of, pedestrian

Rng = np.random.Generator
# One shuffled deck after the other is dealt along the kerbs, so that the rare kinds come up everywhere.
_KERB_DECK = (
    ["car"] * 13 + ["gap"] * 7 + ["truck"] * 2 + ["trailer"] * 2 + ["bus"] * 2 + ["motorcycles"] * 2 + ["bicycles"] * 2
    + ["works"] * 4 + ["barriers"] * 2 + ["cones"] * 2
)  # fmt: skip
_PAVEMENT_DECK = (
    ["tree"] * 10 + ["lamp"] * 3 + ["sign"] * 3 + ["bollard"] * 2 + ["cabinet"] + ["bin"] + ["bush"] * 2 + ["bicycle"] * 3
    + ["people"] * 4 + ["motorcycle"] + ["shelter"] + ["cones"] * 4 + ["barriers"] * 2
)  # fmt: skip
_YARD_DECK = (
    ["car"] * 8 + ["gap"] * 4 + ["truck"] * 2 + ["trailer"] * 2 + ["bus"] + ["construction"] * 4 + ["motorcycle"] * 3
    + ["bicycle"] * 2 + ["barrier"] * 2 + ["cone"] * 2
)  # fmt: skip


@dataclass(slots=True)
class Furnisher:
    """Collects things and scenery while a town is being built."""

    plan: Plan
    cover: np.ndarray  # painted in place
    rng: Rng
    waves: np.ndarray
    things: list[Thing] = field(default_factory=list)
    scenery: list[Parts] = field(default_factory=list)
    scenery_pose: list[tuple[float, float, float, float]] = field(default_factory=list)
    scenery_label: list[int] = field(default_factory=list)
    taken: np.ndarray = field(init=False)  # (rows, columns) bool, cells of 1 m that something fixed stands on
    kerb_deck: list[str] = field(default_factory=list)
    pavement_deck: list[str] = field(default_factory=list)
    yard_deck: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.taken = np.zeros((int(self.plan.size_m), int(self.plan.size_m)), bool)

    # -- putting single things down ---------------------------------------------------------------------------------

    def ground(self) -> Ground:
        """The ground as painted so far."""
        return Ground(self.waves, self.cover, CELL_M)

    def _on_ground(self, x: float, y: float, yaw: float) -> tuple[float, float, float, float]:
        return (x, y, float(self.ground().surface(np.array(x), np.array(y))), yaw)

    def stand(self, name: str, x: float, y: float, yaw: float) -> None:
        """A parked or standing object of `STANDING`."""
        category, build, attribute = STANDING[name]
        self.things.append(Thing(category, build(self.rng), attribute, self._on_ground(x, y, yaw)))

    def person(self, x: float, y: float, *, worker: bool = False) -> None:
        """A standing pedestrian."""
        pose = self._on_ground(x, y, self.rng.uniform(0, 6.28))
        self.things.append(replace(pedestrian(self.rng, "pedestrian.standing", worker=worker), pose=pose))

    def fixed(self, parts: Parts, label: str, x: float, y: float, yaw: float) -> None:
        """Scenery."""
        self.scenery.append(parts)
        self.scenery_pose.append(self._on_ground(x, y, yaw))
        self.scenery_label.append(INDEX_OF[label])

    def deal(self, deck: list[str], cards: list[str]) -> str:
        """The next card; an empty deck is filled and shuffled."""
        if not deck:
            deck.extend(cards[i] for i in self.rng.permutation(len(cards)))
        return deck.pop()

    # -- along the roads ----------------------------------------------------------------------------------------------

    def street(self, road: Road, side: int, low: float, high: float, cut: tuple[float, float]) -> None:
        """One side of a road between two crossings (or a crossing and the edge of the town)."""
        forward = (side < 0) == road.along_x
        turn = 0.0 if forward == self.plan.drives_right else np.pi
        if road.parks(side):
            self._kerb(road, side, low + cut[0] + 9, high - cut[1] - 9, turn)
        self._pavement(road, side, low + cut[0] + 5, high - cut[1] - 5)
        self._fronts(road, side, low + cut[0] + 6, high - cut[1] - 6)

    def _spot(self, road: Road, side: int, along: float, distance: float) -> tuple[float, float, float]:
        x, y = road.beside(along, side * distance)
        return float(x), float(y), float(road.heading(along))

    def _kerb(self, road: Road, side: int, low: float, high: float, turn: float) -> None:
        rng, at = self.rng, low + self.rng.uniform(0, 3)
        while at < high - 4:
            card = self.deal(self.kerb_deck, _KERB_DECK)
            if card in ("motorcycles", "bicycles"):
                for _ in range(int(rng.integers(2, 6))):
                    x, y, yaw = self._spot(road, side, at + 0.4, road.track("parking", side) + 0.1)
                    self.stand(card[:-1], x, y, yaw + np.pi / 2 + rng.normal(0, 0.15))
                    at += rng.uniform(0.8, 1.3)
                at += 1.0
            elif card == "gap":
                at += rng.uniform(3, 8)
            elif card == "works":
                at = self._works(road, side, at, turn)
            elif card == "barriers":
                for _ in range(int(rng.integers(3, 8))):
                    x, y, yaw = self._spot(road, side, at + 1, road.half(side) - rng.uniform(1.9, 2.1))
                    self.stand("barrier", x, y, yaw + np.pi / 2)
                    at += 2.5
            elif card == "cones":
                for _ in range(int(rng.integers(3, 7))):
                    x, y, yaw = self._spot(road, side, at + 1, road.half(side) - rng.uniform(1.6, 2.3))
                    self.stand("cone", x, y, yaw)
                    at += rng.uniform(1.5, 3.0)
            else:
                category, build, attribute = STANDING["bendy" if card == "bus" and rng.random() < 0.2 else card]
                parts = build(rng)
                reach = length_of(parts)
                at += reach / 2
                if at + reach / 2 > high:
                    break
                x, y, yaw = self._spot(road, side, at, road.track("parking", side) + rng.uniform(-0.1, 0.15))
                back = np.pi if card == "car" and rng.random() < 0.1 else 0.0
                self.things.append(
                    Thing(category, parts, attribute, self._on_ground(x, y, yaw + turn + back + rng.normal(0, 0.02)))
                )
                at += reach / 2 + rng.uniform(0.6, 2.0)

    def _works(self, road: Road, side: int, at: float, turn: float) -> float:
        """A fenced-off stretch of the parking lane with a machine and workers."""
        rng = self.rng
        length = rng.uniform(9, 13)
        x, y, yaw = self._spot(road, side, at + length / 2, road.track("parking", side) - 0.1)
        self.stand("construction", x, y, yaw + turn + rng.normal(0, 0.08))
        style = rng.choice(["cone", "barrier"])
        for along in np.arange(at + 0.5, at + length, 2.4):
            x, y, yaw = self._spot(road, side, float(along), road.half(side) - 2.75)
            self.stand(str(style), x, y, yaw + np.pi / 2)
        for along in (at - 0.4, at + length + 0.4):
            for across in (0.5, 1.6):
                x, y, yaw = self._spot(road, side, along, road.half(side) - across)
                self.stand("cone", x, y, yaw)
        for _ in range(int(rng.integers(1, 4))):
            x, y, _ = self._spot(road, side, at + rng.uniform(0, 1.5), road.half(side) - rng.uniform(0.6, 2.2))
            self.person(x, y, worker=True)
        return at + length + 1.5

    def _pavement(self, road: Road, side: int, low: float, high: float) -> None:
        rng, at = self.rng, low + self.rng.uniform(0, 4)
        strip = road.half(side) + (road.verge / 2 if road.verge > 0 else 0.45)
        inward = np.pi if side > 0 else 0.0
        while at < high - 2:
            card = self.deal(self.pavement_deck, _PAVEMENT_DECK)
            x, y, yaw = self._spot(road, side, at, strip)
            to_road = yaw + inward + (0.0 if road.along_x else np.pi)
            if card == "tree":
                self.fixed(scenery.tree(rng), "static.vegetation", x, y, rng.uniform(0, 6.28))
            elif card == "bush":
                x, y, yaw = self._spot(road, side, at, road.edge(side) + 1.2)
                self.fixed(scenery.bush(rng), "static.vegetation", x, y, yaw)
            elif card == "people":
                for _ in range(int(rng.integers(1, 4))):
                    x, y, _ = self._spot(
                        road, side, at + rng.uniform(0, 2), road.track("pavement", side) + rng.uniform(-0.3, 0.3) * road.walk
                    )
                    self.person(x, y)
                    at += 0.6
            elif card == "bicycle":
                for _ in range(int(rng.integers(1, 4))):
                    x, y, yaw = self._spot(road, side, at, strip + rng.uniform(-0.05, 0.2))
                    self.stand("bicycle", x, y, yaw + rng.normal(np.pi / 3, 0.2))
                    at += rng.uniform(0.6, 1.2)
            elif card in ("cones", "barriers"):
                # A dug-up stretch of the kerb.
                for _ in range(int(rng.integers(3, 6))):
                    x, y, yaw = self._spot(
                        road, side, at, road.half(side) + (0.35 if card == "barriers" else rng.uniform(-0.2, 0.4))
                    )
                    self.stand(card[:-1], x, y, yaw + np.pi / 2)
                    at += 2.4 if card == "barriers" else rng.uniform(0.9, 1.8)
                if rng.random() < 0.6:
                    x, y, _ = self._spot(road, side, at + 0.5, road.half(side) + 0.5)
                    self.person(x, y, worker=True)
            elif card in ("bin", "motorcycle"):
                self.stand(card, x, y, yaw + rng.normal(0, 0.3))
            elif card == "shelter":
                x, y, yaw = self._spot(road, side, at + 2, road.edge(side) + 0.9)
                self.fixed(scenery.shelter(rng), "static.manmade", x, y, to_road)
                at += 4
            else:
                build = {"lamp": scenery.lamp, "sign": scenery.sign, "bollard": scenery.bollard, "cabinet": scenery.cabinet}[
                    card
                ]
                self.fixed(build(rng), "static.manmade", x, y, to_road)
            at += rng.uniform(2.0, 5.5)

    def _fronts(self, road: Road, side: int, low: float, high: float) -> None:
        """Walls and hedges at the back of the pavement, buildings behind."""
        rng, at = self.rng, low
        while at < high - 4:
            length = min(rng.uniform(5, 14), high - at)
            x, y, yaw = self._spot(road, side, at + length / 2, road.edge(side) + 0.5)
            style = rng.choice(["none", "wall", "hedge"], p=[0.4, 0.38, 0.22])
            if style == "wall" and self._free(x, y, yaw, length / 2, 0.2):
                self.fixed(scenery.wall(rng, length), "static.manmade", x, y, yaw)
            elif style == "hedge" and self._free(x, y, yaw, length / 2, 0.2):
                self.fixed(scenery.hedge(rng, length), "static.vegetation", x, y, yaw)
            at += length + rng.uniform(0.3, 4)
        at = low
        while at < high - 6:
            length, depth = rng.uniform(8, 24), rng.uniform(8, 15)
            if rng.random() < (0.2 if road.parks(side) else 0.45):
                self._forecourt(road, side, at, length, depth)
            else:
                x, y, yaw = self._spot(road, side, at + length / 2, road.edge(side) + rng.uniform(1.5, 4.5) + depth / 2)
                self.house(x, y, yaw, length, depth)
            at += length + rng.uniform(0.5, 6)
        for along in np.arange(low + 2, high - 2, 5.0):
            x, y, yaw = self._spot(road, side, float(along) + rng.uniform(-2, 2), road.edge(side) + rng.uniform(1.3, 7.0))
            if rng.random() < 0.6 and self._free(x, y, yaw, 0.5, 0.5):
                plant = scenery.tree if rng.random() < 0.55 else scenery.bush
                self.fixed(plant(rng), "static.vegetation", x, y, yaw)

    def _forecourt(self, road: Road, side: int, at: float, length: float, depth: float) -> None:
        """A paved yard behind the pavement with vehicles across it, machines and barriers."""
        rng = self.rng
        x, y, yaw = self._spot(road, side, at + length / 2, road.edge(side) + depth / 2)
        px, py = self._footprint(x, y, yaw, length / 2, depth / 2, per_metre=2 / CELL_M)
        columns, rows = (np.clip((p / CELL_M).astype(int), 0, len(self.cover) - 1) for p in (px, py))
        grass = self.cover[rows, columns] == TERRAIN
        if (
            grass.mean() < 0.9
            or self.taken[np.minimum(py, self.plan.size_m - 1).astype(int), px.astype(int) % len(self.taken)].any()
        ):
            return
        self.cover[rows[grass], columns[grass]] = rng.choice([PARKING, OTHER_FLAT])
        along = at + rng.uniform(1.5, 2.5)
        while along < at + length - 1.5:
            card = self.deal(self.yard_deck, _YARD_DECK)
            if card == "gap":
                along += rng.uniform(1, 4)
            elif card in ("barrier", "cone"):
                for across in np.arange(1.0, depth - 1, 2.3):
                    x, y, yaw = self._spot(road, side, along, road.edge(side) + float(across))
                    self.stand(card, x, y, yaw)
                along += 1.5
            else:
                x, y, yaw = self._spot(road, side, along + 0.5, road.edge(side) + depth / 2 + rng.uniform(0, 0.5))
                self.stand(card, x, y, yaw + rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.05))
                along += {"motorcycle": 1.2, "bicycle": 0.9}.get(card, 3.4) + rng.uniform(0, 0.5)
            if card == "construction":
                x, y, _ = self._spot(road, side, along - 1.2, road.edge(side) + rng.uniform(0.3, 1.5))
                self.person(x, y, worker=True)
        self._take(*self._spot(road, side, at + length / 2, road.edge(side) + depth / 2), length / 2, depth / 2)

    # -- in the plots ---------------------------------------------------------------------------------------------------

    def house(self, x: float, y: float, yaw: float, length: float, depth: float) -> None:
        """A building, if there is room for it."""
        if not self._free(x, y, yaw, length / 2 + 0.4, depth / 2 + 0.9):
            return
        tall = self.rng.choice([self.rng.uniform(3.5, 8), self.rng.uniform(9, 24)])
        self.fixed(scenery.building(self.rng, length, depth, float(tall)), "static.manmade", x, y, yaw)
        self._take(x, y, yaw, length / 2, depth / 2)

    def plot(self, low: tuple[float, float], high: tuple[float, float], kind: str) -> None:
        """What lies between the roads: `houses`, `park`, `yard` or `lot`; `low`, `high` are corners of a free rectangle."""
        rng = self.rng
        width = np.array(high) - np.array(low)
        if width.min() < 12:
            return
        if kind in ("yard", "lot"):
            self._paved_plot(low, high, kind)
        elif kind == "park":
            # Paths of another cover across the grass.
            at = rng.uniform(low[1] + 5, high[1] - 5)
            self._paint_rectangle((low[0], at), (high[0], at + 2.5), int(rng.choice([OTHER_FLAT, SIDEWALK])))
        else:
            for _ in range(10):
                x, y = rng.uniform(low, high)
                self.house(
                    float(x),
                    float(y),
                    rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.05),
                    rng.uniform(8, 20),
                    rng.uniform(7, 13),
                )
        area = float(width.prod())
        trees, bushes = (area / 90, area / 150) if kind == "park" else (area / 350, area / 300)
        for build, count in ((scenery.tree, trees), (scenery.bush, bushes)):
            for _ in range(int(count)):
                x, y = rng.uniform(low, high)
                if self._free(x, y, 0.0, 1.0, 1.0):
                    self.fixed(build(rng), "static.vegetation", float(x), float(y), rng.uniform(0, 6.28))

    def _paved_plot(self, low: tuple[float, float], high: tuple[float, float], kind: str) -> None:
        rng = self.rng
        middle, reach = (np.array(low) + high) / 2, np.minimum((np.array(high) - low) / 2 - 2, 26)
        self._paint_rectangle(tuple(middle - reach), tuple(middle + reach), PARKING if kind == "lot" else OTHER_FLAT)
        names = (
            ["car"] * 12 + ["truck", "motorcycle"]
            if kind == "lot"
            else ["trailer"] * 4 + ["truck"] * 2 + ["construction"] * 4 + ["barrier"] * 4
        )
        for y in np.arange(middle[1] - reach[1] + 4, middle[1] + reach[1] - 3, 12.0 if kind == "lot" else 15.0):
            x = middle[0] - reach[0] + 3
            while x < middle[0] + reach[0] - 3:
                name = str(rng.choice(names))
                if rng.random() < 0.65:
                    self.stand(name, x, float(y), np.pi / 2 + rng.normal(0, 0.05))
                x += 2.9 if kind == "lot" else rng.uniform(3.6, 6)
        self._take(middle[0], middle[1], 0.0, reach[0], reach[1])

    def _paint_rectangle(self, low: tuple[float, ...], high: tuple[float, ...], code: int) -> None:
        (x0, y0), (x1, y1) = (np.maximum(np.array(p) / CELL_M, 0).astype(int) for p in (low, high))
        area = self.cover[y0:y1, x0:x1]
        area[area == TERRAIN] = code

    def _footprint(
        self, x: float, y: float, yaw: float, half_x: float, half_y: float, per_metre: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        columns, rows = (int(half * 2 * per_metre) + 2 for half in (half_x, half_y))
        u, v = np.meshgrid(np.linspace(-half_x, half_x, columns), np.linspace(-half_y, half_y, rows))
        return x + u * np.cos(yaw) - v * np.sin(yaw), y + u * np.sin(yaw) + v * np.cos(yaw)

    def _free(self, x: float, y: float, yaw: float, half_x: float, half_y: float) -> bool:
        px, py = self._footprint(x, y, yaw, half_x, half_y)
        if min(px.min(), py.min()) < 0 or max(px.max(), py.max()) >= self.plan.size_m:
            return False
        grass = self.cover[(py / CELL_M).astype(int), (px / CELL_M).astype(int)] == TERRAIN
        return bool(grass.all()) and not self.taken[py.astype(int), px.astype(int)].any()

    def _take(self, x: float, y: float, yaw: float, half_x: float, half_y: float) -> None:
        px, py = (np.clip(p, 0, self.plan.size_m - 1).astype(int) for p in self._footprint(x, y, yaw, half_x, half_y))
        self.taken[py, px] = True
