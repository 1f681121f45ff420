"""Buffers of the user's model that forward passes write, kept equal on all ranks.

A persistent buffer that a forward pass writes (running statistics, counters) is state. After a
step all ranks have the same value: the mean over ranks weighted by samples for floating-point
buffers, the largest value for integer buffers. Ranks without samples do not count. New values are
exchanged with the step, become current when the step is applied, and are dropped with an abandoned
attempt (rule 6 of docs/protocol.md). Buffers that are not persistent, or that the user names in
``train.scratch_buffers``, are scratch: never compared, sent or saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dispatcher.exchange import Exchange
from lazarus.errors import UserMistakeError
from lazarus.runtime.state.flat_bytes import as_bytes


@dataclass(eq=False)
class _Place:
    """One buffer: where it lies in the model, and its tensor outside of forward passes."""

    name: str
    module: nn.Module
    key: str
    tensor: Tensor
    kept: Tensor  # its content after the last commit

    @property
    def now(self) -> Tensor | None:
        return self.module._buffers.get(self.key)

    def put(self, content: Tensor) -> None:
        """Put the original tensor back into the module, with this content."""
        self.tensor.copy_(content)
        self.module._buffers[self.key] = self.tensor


class Buffers:
    """All buffers of one model.

    Args:
        model: The model; buffers that appear in a forward pass later must not be persistent.
        scratch: Names, or patterns of names, of persistent buffers to treat as scratch.
        own: Names of buffers that the runtime maintains: state that no forward pass writes.
        takes_means: Floating-point state may be written by forward passes; its value is then a mean
            over ranks, which depends on their number.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scratch: Sequence[str] = (),
        own: Sequence[str] = (),
        takes_means: bool = True,
    ) -> None:
        self._model = model
        self._takes_means = takes_means
        self._state: list[_Place] = []
        self._scratch: list[_Place] = []
        for name, module, key in _places(model):
            tensor = module._buffers[key]
            assert tensor is not None
            place = _Place(name, module, key, tensor, tensor.detach().clone())
            is_scratch = any(fnmatchcase(name, pattern) for pattern in scratch)
            is_scratch |= key in module._non_persistent_buffers_set
            (self._scratch if is_scratch else self._state).append(place)
        self._candidates = [place for place in self._state if place.name not in own]
        self._names = {place.name for place in (*self._state, *self._scratch)}
        self._agreed: list[_Place] = []  # written by some rank: exchanged in every step
        self._fresh: list[Tensor] | None = None  # their values after the current step
        self.has_unknown = False  # this rank wrote a buffer outside `_agreed`

    def state(self) -> list[tuple[str, Tensor]]:
        """Buffers that are state, with their names in the model."""
        return [(place.name, place.tensor) for place in self._state]

    def kept(self) -> dict[str, Tensor]:
        """Content of the state buffers after the last commit; forward passes do not change it."""
        return {place.name: place.kept for place in self._state}

    @torch.no_grad()
    def keep(self) -> None:
        """Take the present content as that of the last commit."""
        self._fresh = None
        for place in self._scratch:  # a forward pass may have replaced the tensor
            place.tensor = place.tensor if place.now is None else place.now
        for place in (*self._state, *self._scratch):
            place.kept = place.tensor.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what forward passes have written since the last commit (rule 6)."""
        self._fresh = None
        for place in (*self._state, *self._scratch):
            place.put(place.kept)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Context in which forward passes leave state unchanged, as on a rank without samples."""
        before = [place.now for place in self._candidates]
        content = [None if now is None else now.detach().clone() for now in before]
        yield
        with torch.no_grad():
            for place, now, kept in zip(self._candidates, before, content, strict=True):
                if now is not None and kept is not None:
                    now.copy_(kept)
                place.module._buffers[place.key] = now

    # ---- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def exchange(self, exchange: Exchange, *, samples: int, total: int, agree: bool) -> None:
        """Compute the step's new buffer values, equal on all ranks, without writing them yet.

        Args:
            exchange: The group of all ranks.
            samples: Samples of the step that this rank computed; with 0 its values do not count.
            total: Samples of the step.
            agree: First find out which buffers any rank writes.

        Raises:
            UserMistakeError: A forward pass has changed a buffer's shape or type, or added a
                persistent buffer, or wrote a floating-point one where means are not taken.
        """
        self._fresh, self.has_unknown = None, False
        if not self._candidates:
            return
        written = [self._is_written(place) for place in self._candidates]
        if not self._takes_means:
            self._refuse_means(written)
        if agree:
            self._agree(written, exchange)
        known = {place.name for place in self._agreed}
        pairs = zip(self._candidates, written, strict=True)
        self.has_unknown = any(wrote and place.name not in known for place, wrote in pairs)
        if self._agreed:
            self._fresh = self._combined(exchange, samples=samples, total=total)

    @torch.no_grad()
    def fold(self, *, is_taken: bool) -> None:
        """Write the step's values into the buffers, or the old values if the step is not taken."""
        values = self._fresh if is_taken and self._fresh is not None else None
        for at, place in enumerate(self._agreed):
            place.put(place.kept if values is None else values[at])

    def _agree(self, written: Sequence[bool], exchange: Exchange) -> None:
        """Let all ranks agree which buffers to exchange: those that any rank wrote so far."""
        known = {place.name for place in self._agreed}
        own = [
            float(wrote or place.name in known)
            for place, wrote in zip(self._candidates, written, strict=True)
        ]
        flags = torch.tensor(own, dtype=torch.float32, device=self._candidates[0].tensor.device)
        if exchange.size > 1:
            exchange.all_reduce(flags, label="buffers")
        pairs = zip(self._candidates, flags.tolist(), strict=True)
        self._agreed = [place for place, flag in pairs if flag > 0]
        for name, module, key in _places(self._model):
            if name not in self._names and key not in module._non_persistent_buffers_set:
                raise UserMistakeError(
                    f"buffer {name} appeared in a forward pass; register it when the model is "
                    "built, or with persistent=False"
                )

    def _refuse_means(self, written: Sequence[bool]) -> None:
        for place, wrote in zip(self._candidates, written, strict=True):
            if wrote and (place.tensor.is_floating_point() or place.tensor.is_complex()):
                raise UserMistakeError(
                    f"a forward pass writes buffer {place.name}, whose value after a step is a "
                    "mean over ranks and depends on their number; with train.elastic_determinism "
                    "compute it otherwise, or name it in train.scratch_buffers"
                )

    def _is_written(self, place: _Place) -> bool:
        now, was = place.now, place.kept
        if now is None or now.shape != was.shape or now.dtype != was.dtype:
            found = "None" if now is None else f"{tuple(now.shape)} {now.dtype}"
            raise UserMistakeError(
                f"buffer {place.name} was {tuple(was.shape)} {was.dtype} and is {found} after a "
                "forward pass: state keeps its shape; register it with persistent=False if it can "
                "be made anew, or name it in train.scratch_buffers"
            )
        return not torch.equal(as_bytes(now.contiguous()), as_bytes(was))

    def _combined(self, exchange: Exchange, *, samples: int, total: int) -> list[Tensor]:
        values = [_wide(place.now) for place in self._agreed if place.now is not None]
        if exchange.size > 1:
            floats = [i for i, value in enumerate(values) if value.is_floating_point()]
            counts = [i for i, value in enumerate(values) if not value.is_floating_point()]
            mean = _mean([values[i] for i in floats], exchange, samples=samples, total=total)
            most = _largest([values[i] for i in counts], exchange)
            for i, value in zip((*floats, *counts), (*mean, *most), strict=True):
                values[i] = value
        return [
            _narrow(value, like=place.tensor)
            for value, place in zip(values, self._agreed, strict=True)
        ]


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every buffer once: its name in the model, its module, and its name in the module."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{key}" if path else key, module, key


def _wide(tensor: Tensor) -> Tensor:
    """Convert to float64 or int64, in which sums of equal values over samples are exact."""
    if tensor.is_complex():
        return torch.view_as_real(tensor).double()
    return tensor.double() if tensor.is_floating_point() else tensor.long()


def _narrow(value: Tensor, *, like: Tensor) -> Tensor:
    if like.is_complex():
        value = torch.view_as_complex(value.contiguous())
    return value.to(like.dtype).reshape(like.shape)


def _mean(
    values: Sequence[Tensor], exchange: Exchange, *, samples: int, total: int
) -> list[Tensor]:
    """Mean over ranks, weighted by samples. Ranks without samples add exact zeros, never a NaN."""
    if not values:
        return []
    flat = torch.cat([value.reshape(-1) for value in values])
    flat = flat * samples if samples else torch.zeros_like(flat)
    exchange.all_reduce(flat, label="buffers")
    return _cut(flat / total, values)


def _largest(values: Sequence[Tensor], exchange: Exchange) -> list[Tensor]:
    """Element-wise maximum over all ranks."""
    if not values:
        return []
    flat = torch.cat([value.reshape(-1) for value in values])
    everybody = flat.new_empty(exchange.size * flat.numel())
    exchange.all_gather(everybody, flat, label="buffers")
    return _cut(everybody.view(exchange.size, -1).amax(0), values)


def _cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [value.numel() for value in like])
    return [part.view(value.shape) for part, value in zip(parts, like, strict=True)]
