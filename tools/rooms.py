"""Print the rooms of the packages, the arrows between them, and the floors they stand on.

A room is a folder with modules, or a loose module, of a package that has folders. An arrow says
that a module of one room imports a module of another one. A room's floor is the longest way down
from it; rooms that import each other, over however many others, are a circle and share a floor.
Everything is taken from the imports themselves; imports for type checking alone do not count.

    python tools/rooms.py            one line for each package, then its floors
    python tools/rooms.py --arrows   each arrow too, with an import that it is made of

The exit code is 1 if there is a circle, or an arrow that points up or sideways on the floors that
the ``layers`` contracts in ``pyproject.toml`` state.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MANY = 14  # loose modules of a package without folders that are looked at like rooms

Import = tuple[str, str]  # importer, imported
Arrow = tuple[str, str]  # two rooms of a house


@dataclass(frozen=True, kw_only=True, slots=True)
class House:
    """A package with rooms, and how they use each other."""

    name: str
    floors: tuple[tuple[str, ...], ...]  # from the lowest to the highest
    arrows: Mapping[Arrow, tuple[Import, ...]]
    circles: tuple[tuple[str, ...], ...]

    @property
    def rooms(self) -> tuple[str, ...]:
        """All rooms by name."""
        return tuple(sorted(room for floor in self.floors for room in floor))


def house_names(modules: Iterable[str], roots: Sequence[str]) -> list[str]:
    """The packages that have rooms: root packages, those with folders, those with many modules."""
    parents: dict[str, set[str]] = {}
    for module in modules:
        parents.setdefault(module.rpartition(".")[0], set()).add(module)
    return sorted(
        name
        for name, children in parents.items()
        if name and (name in roots or len(children) > MANY or any(c in parents for c in children))
    )


def house_of(name: str, modules: Iterable[str], imports: Iterable[Import]) -> House:
    """The house of the package ``name``, from all modules and imports there are."""
    rooms = {room for m in modules if (room := _room(m, name))}
    arrows: dict[Arrow, list[Import]] = {}
    for importer, imported in sorted(imports):
        upper, lower = _room(importer, name), _room(imported, name)
        if upper and lower and upper != lower:
            arrows.setdefault((upper, lower), []).append((importer, imported))
    below = _reached({room: {b for a, b in arrows if a == room} for room in rooms})
    circles = {
        tuple(sorted(r for r in rooms if r in below[room] and room in below[r]))
        for room in rooms
        if room in below[room]
    }
    height = {room: _height(room, below) for room in rooms}
    floors = tuple(
        tuple(sorted(r for r in rooms if height[r] == h)) for h in sorted(set(height.values()))
    )
    return House(
        name=name,
        floors=floors,
        arrows={arrow: tuple(found) for arrow, found in arrows.items()},
        circles=tuple(sorted(circles)),
    )


def _room(module: str, house: str) -> str:
    """The room of a module; empty for the package itself and for what lies elsewhere."""
    inside = module.removeprefix(house + ".")
    return "" if inside == module else inside.partition(".")[0]


def _reached(below: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    """For each room all rooms that arrows lead to, over however many others."""
    reached = {}
    for room in below:
        seen: set[str] = set()
        ahead = list(below[room])
        while ahead:
            if (other := ahead.pop()) not in seen:
                seen.add(other)
                ahead += below[other]
        reached[room] = frozenset(seen)
    return reached


def _height(room: str, reached: Mapping[str, frozenset[str]]) -> int:
    """Floors below a room; a circle counts once, since its rooms reach the same rooms."""
    lower = {r for r in reached[room] if room not in reached[r]}
    return 1 + max((_height(r, reached) for r in lower), default=-1)


def wrong_arrows(house: House, contract: Mapping[str, Any]) -> list[str]:
    """Arrows that a ``layers`` contract forbids in this house, each as a sentence."""
    containers = contract.get("containers")
    if containers is not None and house.name not in containers:
        return []
    level: dict[str, int] = {}
    alone = set()  # levels whose rooms do not know each other
    for number, layer in enumerate(contract["layers"]):
        mates = [part.strip(" ()") for part in layer.replace(":", "|").split("|")]
        if containers is None:
            mates = [room for mate in mates if (room := _room(mate, house.name))]
        level.update(dict.fromkeys(mates, number))
        if ":" not in layer:
            alone.add(number)
    found = []
    for upper, lower in sorted(house.arrows):
        if upper not in level or lower not in level or level[upper] < level[lower]:
            continue
        sideways = level[upper] == level[lower]
        if not sideways or level[upper] in alone:
            way = "sideways" if sideways else "up"
            importer, imported = house.arrows[upper, lower][0]
            found.append(f"{upper} -> {lower} points {way}: {importer} imports {imported}")
    return found


def described(house: House, *, with_arrows: bool) -> list[str]:
    """The house as lines: its figures, then its floors from the top."""
    circles = {0: "no circle", 1: "1 circle"}.get(n := len(house.circles), f"{n} circles")
    lines = [
        f"{house.name}: {len(house.rooms)} rooms, {len(house.arrows)} arrows, "
        f"{len(house.floors)} floors, {circles}"
    ]
    for number in range(len(house.floors), 0, -1):
        lines.append(f"  {number:2}  {'  '.join(house.floors[number - 1])}")
    if with_arrows:
        for (upper, lower), found in sorted(house.arrows.items()):
            importer, imported = found[0]
            lines.append(
                f"      {upper} -> {lower}: {len(found)}, as {importer} imports {imported}"
            )
    return lines


def main() -> int:
    """Print every house; 1 if one of them has a circle or an arrow that points up."""
    import grimp

    parser = argparse.ArgumentParser(description="Rooms, arrows, floors and circles.")
    parser.add_argument("--arrows", action="store_true", help="print each arrow too")
    with_arrows = parser.parse_args().arrows
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    sys.path.insert(0, str(ROOT))
    roots = settings["root_packages"]
    graph = grimp.build_graph(*roots, exclude_type_checking_imports=True, cache_dir=None)
    imports = {(m, n) for m in graph.modules for n in graph.find_modules_directly_imported_by(m)}
    wrong = []
    for name in house_names(graph.modules, roots):
        house = house_of(name, graph.modules, imports)
        print("\n".join(described(house, with_arrows=with_arrows)))
        wrong += [f"{name}: a circle: {' <-> '.join(circle)}" for circle in house.circles]
        for contract in settings["contracts"]:
            if contract["type"] == "layers":
                wrong += [f"{name}: {problem}" for problem in wrong_arrows(house, contract)]
    print("\n".join(wrong) if wrong else "no circle, no arrow up")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
