"""The trained state of one rank: model, optimizer and load history, addressed by global names.

Rules named in this module are those of docs/protocol.md.

Shapes: L MoE layers, E experts, S slots on this rank, P parameters of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from lazarus.control.messages import Held
from lazarus.control.vector import StepSums, advance_history, start_history
from lazarus.data.units import Units
from lazarus.errors import UserMistakeError
from lazarus.model.balance import updated_bias
from lazarus.model.experts import ExpertBank
from lazarus.model.protocol import checked_layers
from lazarus.runtime.state.banks import gradients, grow
from lazarus.runtime.state.buffers import Buffers
from lazarus.runtime.state.building import built
from lazarus.runtime.state.dense import DenseParameters, tied_names
from lazarus.runtime.state.dense_chains import DenseChains
from lazarus.runtime.state.dense_sync import DenseSync
from lazarus.runtime.state.flat_bytes import (
    DenseImage,
    as_bytes,
    fill_state,
    read_scalars,
    read_settings,
    state_tensors,
    write_scalars,
    write_settings,
)
from lazarus.runtime.state.groups import OptimizerFactory, make_optimizer, vector_fields
from lazarus.runtime.state.norms import square_sums
from lazarus.runtime.state.rates import Rates, Schedule
from lazarus.runtime.state.records import ExpertRecords, FrozenSource
from placement import Plan

Expert = tuple[int, int]


class Replica:
    """One rank's part of the model: all dense state, and the experts that its plan assigns to it.

    Args:
        build: Builds the model; experts are created only when the rank is to hold them.
        optimizer: Makes an optimizer from parameter groups.
        schedule: Learning-rate multiplier of each step.
        clip_norm: Largest gradient norm; 0 for no clipping.
        seed: Seed of the model's initial values.
        device: Where the state lives.
        num_slots: Experts of each layer that this rank has room for.
        overlaps: Sum dense gradients during the backward pass.
        scratch_buffers: Names or patterns of buffers that are not state.
        units: Sum dense gradients unit by unit, in an order that no number of ranks changes. None:
            each rank adds up its own micro-batches first.
        num_chains: With ``units``: partial sums of dense gradients (see ``DenseChains``).

    Raises:
        ValueError: The model has no layer with experts, its layers differ in their number of
            experts or share them, or a dense parameter is not float32.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        *,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        clip_norm: float,
        seed: int,
        device: torch.device,
        num_slots: int = 1,
        overlaps: bool = False,
        scratch_buffers: Sequence[str] = (),
        units: Units | None = None,
        num_chains: int = 1,
    ) -> None:
        self.model = built(build, seed=seed, device=device)
        self.device = device
        self.rates = Rates(schedule)
        self._clip_norm = clip_norm
        found = checked_layers(self.model)
        self.layer_names = list(found)
        self.layers = list(found.values())
        self.banks: list[ExpertBank] = [layer.experts for layer in self.layers]
        self.num_experts = self.layers[0].num_experts
        for bank in self.banks:
            if bank.expert_of_slot == list(range(self.num_experts)) and not bank.weight.is_meta:
                bank.expert_of_slot = []  # built before the run: its rows are the initial values
            bank.allocate(num_slots=num_slots, device=device)
            if not bank.is_frozen:
                bank.weight.grad = gradients(bank.weight)
        parameters = DenseParameters(
            self.model,
            without={id(p) for bank in self.banks for p in bank.parameters()},
            device=device,
        )
        self.dense = parameters.all
        self.frozen_names = tuple(f"model.{name}" for name, _ in parameters.frozen)
        self.frozen_source: FrozenSource | None = None
        self.flat, self.flat_grad = parameters.flat, parameters.flat_grad
        self._parameters = parameters
        self.tied = tied_names(self.model)
        trained = [p for _, p in parameters.trained]
        self.dense_sync: DenseSync | DenseChains
        if units is None:
            self.dense_sync = DenseSync(trained, self.flat_grad, overlaps=overlaps)
        else:
            self.dense_sync = DenseChains(self.flat_grad, units, num_chains=num_chains)
        self._make_optimizer(optimizer)
        self.history = start_history(len(self.layers), self.num_experts)
        biases = {id(layer.router_bias) for layer in self.layers}  # of any name in the model
        routers = [name for name, buffer in self.model.named_buffers() if id(buffer) in biases]
        self.buffers = Buffers(
            self.model, scratch=scratch_buffers, own=routers, takes_means=units is None
        )

    # ---- building ------------------------------------------------------------------------------

    def _make_optimizer(self, factory: OptimizerFactory) -> None:
        named = zip(self.layer_names, self.banks, strict=True)
        banks = self._trained_banks = [(name, bank) for name, bank in named if not bank.is_frozen]
        vectors = vector_fields(banks)
        self._vectors = [fields for _, fields in vectors]
        self.optimizer = make_optimizer(
            factory, dense=self._parameters.trained, banks=banks, vectors=vectors
        )
        self._base_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        fill_state(self.optimizer)
        self.records = [
            ExpertRecords(bank, self.optimizer, name)
            for name, bank in zip(self.layer_names, self.banks, strict=True)
        ]

    def require_unchanged(self) -> None:
        """Check that no parameter was frozen or unfrozen since the model was built.

        Raises:
            UserMistakeError: One was; names it.
        """
        changed = self._parameters.changed()
        for path, bank in zip(self.layer_names, self.banks, strict=True):
            if bank.weight.requires_grad == bank.is_frozen:
                changed.append(f"{path}.experts.weight")
        if changed:
            raise UserMistakeError(
                f"{', '.join(changed[:8])} changed requires_grad after the model was built; which "
                f"parameters are trained is decided by the model function, for the whole run"
            )

    @property
    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return self._parameters.trained + [
            (f"{name}.experts", bank.weight) for name, bank in self._trained_banks
        ]

    # ---- experts -------------------------------------------------------------------------------

    def slot_of(self, layer: int, expert: int) -> int:
        """Slot of an expert in its layer's bank.

        Raises:
            ValueError: This rank does not hold the expert.
        """
        return self.banks[layer].expert_of_slot.index(expert)

    def held(self, plan: Plan | None = None) -> tuple[Held, ...]:
        """Experts that this rank holds, by layer.

        Args:
            plan: The plan in force so far. If given, experts that other ranks hold too come with
                their checksums.
        """
        return tuple(self._held(layer, plan) for layer in range(len(self.banks)))

    def _held(self, layer: int, plan: Plan | None) -> Held:
        experts = tuple(sorted(e for e in self.banks[layer].expert_of_slot if e >= 0))
        sums: tuple[int, ...] = ()
        if plan is not None:
            sums = tuple(
                self.record_checksum(layer, e) if len(plan.ranks_of(layer, e)) > 1 else 0
                for e in experts
            )
        return Held(layer=layer, experts=experts, sums=sums)

    def drop(self, layer: int, expert: int) -> None:
        """Give up this expert's slot, if this rank holds the expert."""
        bank = self.banks[layer]
        if expert in bank.expert_of_slot:
            bank.assign(self.slot_of(layer, expert), -1)

    def shape(self) -> dict[str, Any]:
        """What the controller must know of the model to make a plan; ranks report it at ALIGN."""
        return {
            "num_layers": len(self.layers),
            "num_experts": self.num_experts,
            "top_k": self.layers[0].top_k,
            "dense_bytes": self.dense_image().num_bytes,
            "expert_bytes": -(-sum(r.num_bytes for r in self.records) // len(self.records)),
        }

    def record_bytes(self, layer: int) -> int:
        """Bytes of the record of an expert of this layer."""
        return self.records[layer].num_bytes

    def read_record(self, layer: int, expert: int) -> Tensor:
        """One expert's record, uint8 on the host."""
        return self.records[layer].read(self.slot_of(layer, expert))

    def record_checksum(self, layer: int, expert: int) -> int:
        """Fast checksum of one expert's record; never 0."""
        return self.records[layer].checksum(self.slot_of(layer, expert))

    def write_record(self, layer: int, slot: int, record: Tensor) -> None:
        """Fill a slot's weights and optimizer state from a record."""
        self.records[layer].write(slot, record)

    def record_of(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Build an expert's record from its tensors, given by global name.

        Frozen tensors that are not among them are those that the model was built with, or those of
        the checkpoint that the run was resumed from.

        Raises:
            KeyError: A tensor is missing.
        """
        return self.records[layer].record_of(
            expert, tensors, frozen=lambda: self._frozen_fields(layer, expert)
        )

    def _frozen_fields(self, layer: int, expert: int) -> Mapping[str, Tensor]:
        if self.frozen_source is not None:
            return self.frozen_source(layer, expert)
        return self.banks[layer].initial(expert)

    def load_dense(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy all dense state from tensors given by global name.

        Raises:
            KeyError: A tensor is missing.
            ValueError: A tensor has another shape than in the model.
        """
        with torch.no_grad():
            for name, own in self.dense_tensors():
                if tensors[name].shape != own.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint, "
                        f"{tuple(own.shape)} in the model"
                    )
                own.copy_(tensors[name])
        self.keep_buffers()

    def forget_experts(self) -> None:
        """Empty every slot, because the experts held belong to no committed step."""
        for bank in self.banks:
            bank.expert_of_slot[:] = [-1] * len(bank.expert_of_slot)

    def place(self, layer: int, experts: Sequence[int], staged: Mapping[Expert, Tensor]) -> None:
        """Hold exactly ``experts`` in this layer.

        Experts that are held already stay, others are dropped. New experts are filled from
        ``staged`` records, or initialised if there is none.
        """
        bank = self.banks[layer]
        wanted = set(experts)
        if not wanted - set(bank.expert_of_slot) and wanted == {
            e for e in bank.expert_of_slot if e >= 0
        }:
            return
        for slot, expert in enumerate(bank.expert_of_slot):
            if expert >= 0 and expert not in wanted:
                bank.assign(slot, -1)
        for expert in sorted(wanted - set(bank.expert_of_slot)):
            slot = bank.expert_of_slot.index(-1)
            bank.assign(slot, expert)
            record = staged.get((layer, expert))
            if record is None:
                self.records[layer].initialise(slot)
            else:
                self.write_record(layer, slot, record)

    def ensure_slots(self, num_slots: int) -> None:
        """Grow every bank to at least ``num_slots``, keeping its rows and their optimizer state."""
        for bank in self.banks:
            have = bank.weight.shape[0]
            if have >= num_slots:
                continue
            grow(bank, self.optimizer, num_slots)

    # ---- dense state ---------------------------------------------------------------------------

    def dense_tensors(self) -> list[tuple[str, Tensor]]:
        """Every dense tensor that is state, with its global name, in a fixed order."""
        found = [(f"model.{name}", p.detach()) for name, p in self.dense]
        for name, param in self._parameters.trained:
            for key, value in state_tensors(self.optimizer, param):
                found.append((f"optimizer.{key}.{name}", value))
        found += [(f"model.{name}", value) for name, value in self.buffers.state()]
        return found

    def dense_image(self) -> DenseImage:
        """All dense state as one virtual byte string."""
        return DenseImage([tensor for _, tensor in self.dense_tensors()])

    def scalars(self) -> str:
        """The single numbers that the optimizer keeps, as JSON; equal on all ranks."""
        return read_scalars(self.optimizer, self._trained)

    def take_scalars(self, text: str) -> None:
        """Set what ``scalars`` returned on another rank."""
        write_scalars(self.optimizer, self._trained, text)

    def settings(self) -> str:
        """The optimizer's settings as JSON: not trained, but equal on all ranks."""
        return read_settings(self.optimizer, base_lr=self._base_lr)

    def take_settings(self, text: str) -> None:
        """Set what ``settings`` returned on another rank."""
        self._base_lr = write_settings(self.optimizer, text)

    def dense_digest(self) -> str:
        """Fast checksum of all dense state, compared between ranks at every ALIGN."""
        digest = xxhash.xxh3_128()
        for _, tensor in self.dense_tensors():
            digest.update(as_bytes(tensor).cpu().numpy().data)
        digest.update(self.scalars().encode())
        return digest.hexdigest()

    def history_digest(self) -> str:
        """Fast checksum of the load history."""
        return xxhash.xxh3_128_hexdigest(self.history.tobytes())

    # ---- the step ------------------------------------------------------------------------------

    def zero_gradients(self) -> None:
        """Zero the dense gradients; a step's first backward overwrites those of the experts."""
        self.flat_grad.zero_()
        self.dense_sync.start_step()

    def dense_square_sum(self) -> float:
        """Square sum of the reduced dense gradient; equal on all ranks, so never added up."""
        return square_sums([self.flat_grad])[0] if self.flat_grad.numel() else 0.0

    def expert_square_sums(self, home_LE: NDArray[np.int32], rank: int) -> NDArray[np.float64]:
        """Square sums of the gradients of the experts whose home is this rank, [L, E]."""
        squares = np.zeros((len(self.layers), self.num_experts), dtype=np.float64)
        rows: dict[Expert, Tensor] = {}
        for layer, bank in enumerate(self.banks):
            if bank.is_frozen:
                continue
            assert bank.weight.grad is not None
            for slot, expert in enumerate(bank.expert_of_slot):
                if expert >= 0 and home_LE[layer, expert] == rank:
                    rows[layer, expert] = bank.weight.grad[slot]
        for place, value in zip(rows, square_sums(list(rows.values())), strict=True):
            squares[place] = value
        return squares

    def apply(self, sums: StepSums, *, dense_square: float) -> float:
        """Make one optimizer step from the gradient sums and the committed vector.

        Uses no collective, no waiting and no randomness: every rank gets the same bits (rule 13).

        Args:
            sums: The committed sums of the step.
            dense_square: Square sum of the dense gradient.

        Returns:
            The global gradient norm, before clipping.
        """
        norm = float(np.sqrt(dense_square + sums.squares.sum())) / (sums.count or 1.0)
        is_taken = not sums.skips and bool(np.isfinite(norm)) and sums.count > 0
        if is_taken:
            self._descend(sums, norm)
        self.buffers.fold(is_taken=is_taken)
        self.history = advance_history(self.history, sums.counts)
        for layer, counts in zip(self.layers, sums.counts, strict=True):
            if layer.router_bias is not None:
                fresh_E = updated_bias(
                    layer.router_bias, torch.from_numpy(counts.copy()), rate=layer.bias_rate
                )
                layer.router_bias.copy_(fresh_E)
        self.keep_buffers()
        return norm

    def _descend(self, sums: StepSums, norm: float) -> None:
        clip = self._clip_norm
        factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
        scale = factor / sums.count
        self.flat_grad.mul_(scale)
        for _, bank in self._trained_banks:
            assert bank.weight.grad is not None
            bank.weight.grad.mul_(scale)
        rate = self.rates.of(sums.step)
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * rate
        for fields in self._vectors:
            fields.take(self.optimizer)
        self.optimizer.step()
        for fields in self._vectors:
            fields.give_back(self.optimizer)

    def keep_buffers(self) -> None:
        """Take the present content of the buffers as that of the last committed step."""
        self.buffers.keep()

    def restore_scratch(self) -> None:
        """Undo what an abandoned attempt changed outside the optimizer (rule 6)."""
        self.buffers.restore()

    def expected_fractions(self, layer: int) -> Tensor:
        """Expert fractions of the last committed step, f32 [E]; uniform before the first step."""
        last = self.history[2, layer]
        total = last.sum()
        if total > 0:
            return torch.from_numpy((last / total).astype(np.float32)).to(self.device)
        uniform = (self.num_experts,), 1.0 / self.num_experts
        return torch.full(*uniform, dtype=torch.float32, device=self.device)

    # ---- names ---------------------------------------------------------------------------------

    def expert_tensors(self, layer: int, expert: int) -> Iterator[tuple[str, Tensor]]:
        """One expert's state by global name: the fields, then the optimizer's tensors of each."""
        for _, name, tensor in self.expert_parts(layer, expert):
            yield name, tensor

    def expert_parts(self, layer: int, expert: int) -> Iterator[tuple[str, str, Tensor]]:
        """The same as ``expert_tensors``, each with its part: weights, optimizer or frozen."""
        return self.records[layer].named(self.slot_of(layer, expert), expert)

    def snapshot_tensors(self) -> list[tuple[str, Tensor]]:
        """Dense state that does not change before the next apply, for a snapshot.

        A forward pass may write buffers while the snapshot is read, so buffers are given as the
        last commit left them.
        """
        names = {f"model.{name}": kept for name, kept in self.buffers.kept().items()}
        return [(name, names.get(name, tensor)) for name, tensor in self.dense_tensors()]

    def expert_names(self, layer: int) -> Iterator[tuple[str, str, Tensor]]:
        """Part, name and shape of one expert's tensors in this layer, with ``{e}`` for the id."""
        return self.records[layer].named(0, "{e}")
