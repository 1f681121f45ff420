"""The map of the packages: rooms, floors and circles from imports, arrows against stated floors."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("p", "p.roof", "p.hall", "p.hall.a", "p.hall.b", "p.cellar", "p.cellar.c")
DOWN = {("p.roof", "p.hall.a"), ("p.hall.a", "p.hall.b"), ("p.hall.b", "p.cellar.c")}
LAYERS = {"type": "layers", "containers": ["p"], "layers": ["roof", "hall", "cellar"]}


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("rooms")


def test_floors_are_the_longest_way_down_and_imports_within_a_room_are_no_arrows(
    rooms: ModuleType,
) -> None:
    house = rooms.house_of("p", MODULES, DOWN)
    assert house.floors == (("cellar",), ("hall",), ("roof",))
    assert sorted(house.arrows) == [("hall", "cellar"), ("roof", "hall")]
    assert house.circles == ()
    assert rooms.wrong_arrows(house, LAYERS) == []
    assert rooms.described(house, with_arrows=False) == [
        "p: 3 rooms, 2 arrows, 3 floors, no circle",
        "   3  roof",
        "   2  hall",
        "   1  cellar",
    ]


def test_rooms_that_import_each_other_over_a_third_are_one_circle_on_one_floor(
    rooms: ModuleType,
) -> None:
    house = rooms.house_of("p", MODULES, {*DOWN, ("p.cellar", "p.roof")})
    assert house.circles == (("cellar", "hall", "roof"),)
    assert house.floors == (("cellar", "hall", "roof"),)


def test_an_arrow_up_is_told_with_the_import_that_it_is_made_of(rooms: ModuleType) -> None:
    house = rooms.house_of("p", MODULES, {("p.cellar.c", "p.hall.b")})
    assert house.circles == ()
    assert rooms.wrong_arrows(house, LAYERS) == [
        "cellar -> hall points up: p.cellar.c imports p.hall.b"
    ]


def test_rooms_that_share_a_stated_floor_do_not_know_each_other_unless_it_says_so(
    rooms: ModuleType,
) -> None:
    house = rooms.house_of("p", MODULES, DOWN)
    beside = {**LAYERS, "layers": ["roof | hall", "cellar"]}
    assert rooms.wrong_arrows(house, beside) == [
        "roof -> hall points sideways: p.roof imports p.hall.a"
    ]
    assert rooms.wrong_arrows(house, {**LAYERS, "layers": ["roof : hall", "cellar"]}) == []


def test_a_package_has_rooms_if_it_has_folders_or_many_modules(rooms: ModuleType) -> None:
    many = [f"p.cellar.m{n}" for n in range(rooms.MANY)]
    assert rooms.house_names(MODULES, ["p"]) == ["p"]
    assert rooms.house_names((*MODULES, *many), ["p"]) == ["p", "p.cellar"]


def test_this_project_has_no_circle_and_no_arrow_up() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/rooms.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("no circle, no arrow up\n")
