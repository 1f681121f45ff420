"""Where a step of ours goes: CPU time of this rank's threads by section, collectives by label."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import dispatcher.layer.path
import lazarus.model.moe
from lazarus.model.moe import moe_layers

_SECTIONS: list[tuple[Any, str, str]] = [
    (dispatcher.layer.path, "experts_forward", "experts forward"),
    (dispatcher.layer.path, "experts_backward", "experts backward"),
    (dispatcher.layer.path, "gather_copies", "gather and combine"),
    (dispatcher.layer.path, "combine_copies", "gather and combine"),
    (dispatcher.layer.path, "sum_copies", "gather and combine"),
    (dispatcher.layer.path, "output_gradients", "gather and combine"),
    (lazarus.model.moe, "choose_experts", "router"),
    (lazarus.model.moe, "start_routing", "count and sort"),
    (lazarus.model.moe, "finish_routing", "split and index"),
]


class Profile:
    """Times the sections of one contender while it is entered; nested time is not counted twice."""

    def __init__(self, contender: Any) -> None:
        self.contender = contender
        self.spent: dict[str, float] = {}
        self._inner: list[float] = []
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Profile:
        for place, name, section in _SECTIONS:
            self._patch(place, name, section)
        exchange = self.contender.exchange
        for name in ("all_to_all", "all_reduce", "start_all_reduce"):
            self._patch(exchange, name, "")
        self._patch(self.contender.optimizer, "step", "optimizer")
        self._patch(self.contender, "_synchronise", "norm, packing of replica gradients")
        self._patch(self.contender, "step", "dense forward and backward, rest")
        for layer in moe_layers(self.contender.model).values():
            layer.context.exchange = exchange
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, original in reversed(self._undo):
            if original is None:
                delattr(place, name)
            else:
                setattr(place, name, original)

    def _patch(self, place: Any, name: str, section: str) -> None:
        original = getattr(place, name)
        self._undo.append((place, name, original if name in vars(place) else None))
        setattr(place, name, self._timed(original, section))

    def _timed(self, function: Callable[..., Any], section: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - begin
                name = section or "collective: " + str(kwargs.get("label"))
                self.spent[name] = self.spent.get(name, 0.0) + spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return timed
