"""AdamW in subspaces: one optimizer for every method here, from plain AdamW to Q-GaLore (Zhang et al. 2024,
arXiv:2407.08296; GaLore, Zhao et al. 2024, arXiv:2403.03507).

Each weight has a slot. A *projected* slot sees its gradient as coordinates in a subspace, and its moments are those
of the coordinates; any other slot is plain AdamW. Weights are float32, bfloat16 or INT8 codes; sums are made in
float32, and to the latter two rounded stochastically.

One optimizer step is `start_step`, some backward passes, `finish_step`. Gradients are taken after each pass or, per
layer, by hooks inside it, so that never more than one whole gradient of a projected slot is alive. What is done with
them is the same,
in the same order for each slot, and so are the results, to the bit:
- a projected slot adds up coordinates, in float32, over the passes of a step. In a step in which its basis is due it
  adds up whole gradients instead, since the basis should be that of all of them. Only the very first basis is that of
  the first pass: all slots need one then, and their whole gradients would not fit together;
- when the last pass has brought a slot's gradient, it is summed over processes (`Collective`): coordinates, not
  gradients, where it can be;
- without clipping the weight is updated at once; with clipping when the norm over all slots is known.

Departures from the papers: clipping counts projected slots by their coordinates, and covers all slots; what is not
finite is skipped, basis included, and counted; zeros of pruned weights stay zero.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from training.q_galore.group_codes import (
    GroupCodes,
    add_,
    add_to_bfloat16_,
    dequantize,
    quantize,
)
from training.q_galore.int8_linear import Int8Linear
from training.q_galore.moments import BlockCodes, Moment, Moments, zero_moments
from training.q_galore.schedule import RefreshSchedule
from training.q_galore.sizes import coordinate_shape, side_of
from training.q_galore.subspace import find_basis, project, project_back, similarity
from training.spec import Refresh, Similarity, StateBits


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """How slots are projected.

    Attributes:
        basis_bits: 4, or 32 for a basis as it is found.
    """

    rank: int
    scale: float
    refresh_interval: int
    refresh: Refresh
    lazy: bool = False
    similarity: Similarity = "overlap"
    basis_bits: int = 32


class Collective(Protocol):
    """What processes that train the same weights on different rows do together."""

    def sum_(self, tensor: Tensor) -> None:
        """Replace it by its sum over the processes."""

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace it by the first process' one."""


class Alone:
    """The only process."""

    def sum_(self, tensor: Tensor) -> None:
        pass

    def broadcast_(self, tensor: Tensor) -> None:
        pass


class DistributedCollective:
    """The processes of `torch.distributed`'s default group."""

    def sum_(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        torch.distributed.broadcast(tensor, src=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedWeight:
    """A weight to train.

    Attributes:
        parameter: the weight, or the anchor of an INT8 one.
        layer: the layer that has the INT8 weight, else None.
        keep_mask: where the weight may differ from zero; None where it may everywhere.
    """

    name: str
    parameter: nn.Parameter
    layer: Int8Linear | None = None
    keep_mask: Tensor | None = None
    projected: bool = False


@dataclass(slots=True, kw_only=True)
class Slot:
    """A trained weight and its state.

    Attributes:
        schedule: None where it is not projected.
        gradient: float32 coordinates so far in this step; once complete, of any slot what its moments will see, in the
            precision that it came in.
    """

    name: str
    index: int
    parameter: nn.Parameter
    layer: Int8Linear | None
    keep_mask: Tensor | None
    rank: int
    moments: Moments
    schedule: RefreshSchedule | None
    basis: Tensor | GroupCodes | None = None
    gradient: Tensor | None = None
    complete: bool = False

    def basis_as(self, dtype: torch.dtype) -> Tensor:
        assert self.basis is not None
        if isinstance(self.basis, GroupCodes):
            return dequantize(self.basis, dtype)
        return self.basis.to(dtype)


@dataclass(slots=True, kw_only=True)
class _Step:
    """The optimizer step under way."""

    number: int
    learning_rate: float
    last_pass: bool = False


@dataclass(slots=True, kw_only=True)
class SubspaceAdamW:
    """The optimizer. Built by `build_optimizer`.

    Attributes:
        max_gradient_norm: None for no clipping.
        seed: stochastic rounding draws from it, the step and the slot alone.
        num_skipped: updates not made since something was not finite.
        gradient_bytes: the most that gradients and coordinates held at once.
    """

    slots: list[Slot]
    projection: Projection | None
    per_layer: bool
    max_gradient_norm: float | None
    weight_decay: float
    seed: int
    collective: Collective = field(default_factory=Alone)
    num_skipped: int = 0
    gradient_bytes: int = 0
    _step: _Step | None = None
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def start_step(self, number: int, learning_rate: float) -> None:
        """Args: number: of the step, from 0; bases are due by it."""
        self._step = _Step(number=number, learning_rate=learning_rate)
        if self.per_layer and not self._hooks:
            for slot in self.slots:
                hook = partial(self._take_inside, slot)
                handle = slot.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._hooks.append(handle)
        for slot in self.slots:
            slot.complete = False

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """One backward pass; `last` of the step's. The losses of a step are summed."""
        assert self._step is not None
        self._step.last_pass = last
        loss.backward()  # type: ignore[no-untyped-call]
        if not self.per_layer:
            self._note_bytes()
            for slot in self.slots:
                self._take(slot)

    def finish_step(self) -> float | None:
        """Update what is not yet; returns the norm that clipping went by, None without clipping."""
        step, self._step = self._step, None
        assert step is not None
        for slot in self.slots:  # those that the last pass did not reach
            if not slot.complete and (slot.gradient is not None or slot.parameter.grad is not None):
                self._complete(slot, step)
        norm = None
        if self.max_gradient_norm is not None:
            self._note_bytes()
            gradients = [slot.gradient for slot in self.slots if slot.gradient is not None]
            squares = [gradient.float().square().sum() for gradient in gradients]
            norm = math.sqrt(float(sum(squares, torch.zeros(()))))
            if math.isfinite(norm):
                # torch.nn.utils.clip_grad_norm_ has the same 1e-6
                coefficient = min(1.0, self.max_gradient_norm / (norm + 1e-6))
                for slot in self.slots:
                    self._update(slot, step, coefficient)
            else:
                self.num_skipped += len(gradients)
        self._drop_gradients()
        return norm

    def abandon_step(self) -> None:
        """Forget the step under way: a loss was not finite."""
        self._step = None
        self.num_skipped += len(self.slots)
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for slot in self.slots:
            slot.gradient = slot.parameter.grad = None

    def _take_inside(self, slot: Slot, parameter: Tensor) -> None:
        """A hook: this slot's gradient of the pass is whole, and nothing in the pass needs the weight any more."""
        self._note_bytes()
        self._take(slot)

    def _note_bytes(self) -> None:
        held = 0
        for slot in self.slots:
            for tensor in (slot.gradient, slot.parameter.grad):
                if tensor is not None:
                    held += tensor.numel() * tensor.element_size()
        self.gradient_bytes = max(self.gradient_bytes, held)

    def _take(self, slot: Slot) -> None:
        """Take the gradient that a backward pass has left."""
        step, gradient = self._step, slot.parameter.grad
        assert step is not None
        if gradient is None:
            return
        if slot.schedule is not None and slot.basis is None:
            whole = gradient.clone()
            self.collective.sum_(whole)
            if not self._refresh(slot, whole, step.number):
                self.num_skipped += step.last_pass
                slot.parameter.grad = None
                return
        if slot.schedule is not None and not slot.schedule.is_due(step.number):
            coordinates = self._project(slot, gradient)
            if slot.gradient is None:
                slot.gradient = coordinates
            else:
                slot.gradient += coordinates
            slot.parameter.grad = None
        if step.last_pass:
            self._complete(slot, step)

    def _project(self, slot: Slot, gradient: Tensor) -> Tensor:
        if slot.keep_mask is not None:
            gradient = gradient * slot.keep_mask
        side = side_of(tuple(gradient.shape))
        return project(gradient, slot.basis_as(gradient.dtype), side).float()

    def _complete(self, slot: Slot, step: _Step) -> None:
        slot.complete = True
        whole = slot.parameter.grad
        if whole is None:
            assert slot.gradient is not None
            self.collective.sum_(slot.gradient)
        else:
            self.collective.sum_(whole)
            if slot.schedule is None:
                slot.gradient = whole
            else:
                self._refresh(slot, whole, step.number)
                slot.gradient = self._project(slot, whole)
            slot.parameter.grad = None
        if self.max_gradient_norm is None:
            self._update(slot, step, 1.0)

    def _refresh(self, slot: Slot, gradient: Tensor, number: int) -> bool:
        """Find the basis anew; False, and the old one stays, where the gradient is zero or not finite."""
        projection, schedule = self.projection, slot.schedule
        assert projection is not None
        assert schedule is not None
        if slot.keep_mask is not None:
            gradient = gradient * slot.keep_mask
        largest = float(gradient.abs().max())
        if not 0 < largest < math.inf:
            return False
        old = None if slot.basis is None else slot.basis_as(torch.float32)
        found = find_basis(
            gradient,
            slot.rank,
            projection.refresh,
            old_DK=old,
            generator=self._generator(slot, number, "basis"),
        )
        self.collective.broadcast_(found)
        stayed = None if old is None else similarity(old, found, projection.similarity)
        slot.basis = quantize(found, 4) if projection.basis_bits == 4 else found
        schedule.refreshed(number, stayed)
        return True

    def _update(self, slot: Slot, step: _Step, coefficient: float) -> None:
        gradient, slot.gradient = slot.gradient, None
        if gradient is None:
            return
        if not bool(torch.isfinite(gradient).all()):
            self.num_skipped += 1
            return
        gradient = gradient.float()
        if coefficient != 1.0:
            gradient = gradient * coefficient
        update = slot.moments.update(gradient, step.learning_rate)
        if slot.schedule is not None:
            assert self.projection is not None
            side = side_of(tuple(slot.parameter.shape))
            update = project_back(update, slot.basis_as(torch.float32), side)
            update *= self.projection.scale
        if slot.keep_mask is not None:
            update *= slot.keep_mask
        self._add(slot, step, update)

    @torch.no_grad()
    def _add(self, slot: Slot, step: _Step, update: Tensor) -> None:
        weight = slot.parameter
        decay = step.learning_rate * self.weight_decay
        if weight.dtype == torch.float32 and slot.layer is None:
            weight.mul_(1 - decay).add_(update)  # in the order of torch.optim.AdamW
            return
        generator = self._generator(slot, step.number, "rounding")
        if decay:
            whole = weight.float() if slot.layer is None else slot.layer.dequantize()
            update = update.sub_(whole, alpha=decay)
        if slot.layer is None:
            add_to_bfloat16_(weight, update, generator)
        else:
            add_(slot.layer.quantized, update, generator)

    def _generator(self, slot: Slot, number: int, purpose: str) -> torch.Generator:
        """Nothing else decides what is drawn, so neither the order of the slots nor a resumption changes it."""
        text = f"{self.seed} {number} {slot.index} {purpose}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = torch.Generator(slot.parameter.device)
        return generator.manual_seed(int.from_bytes(digest) >> 1)

    @property
    def num_refreshes(self) -> int:
        return sum(slot.schedule.num_refreshes for slot in self.slots if slot.schedule is not None)

    def moment_bytes(self) -> int:
        moments = [m for slot in self.slots for m in (slot.moments.first, slot.moments.second)]
        return sum(_num_bytes(tensor) for m in moments for tensor in _tensors(m).values())

    def basis_bytes(self) -> int:
        bases = [slot.basis for slot in self.slots if slot.basis is not None]
        return sum(_num_bytes(tensor) for b in bases for tensor in _tensors(b).values())

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, by "<slot>.<part>"; not the weights."""
        state: dict[str, Tensor] = {"num_skipped": torch.tensor([self.num_skipped])}
        for slot in self.slots:
            parts = {"num_updates": torch.tensor([slot.moments.num_updates])}
            for name, moment in (("first", slot.moments.first), ("second", slot.moments.second)):
                parts |= {f"{name}{suffix}": tensor for suffix, tensor in _tensors(moment).items()}
            if slot.basis is not None:
                found = _tensors(slot.basis)
                parts |= {f"basis{suffix}": tensor for suffix, tensor in found.items()}
            if (schedule := slot.schedule) is not None:
                counts = [schedule.interval, schedule.due_at, schedule.num_refreshes]
                parts["schedule"] = torch.tensor(counts)
                parts["similarities"] = torch.tensor(schedule.similarities, dtype=torch.float64)
            state |= {f"{slot.name}.{part}": tensor for part, tensor in parts.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave to an optimizer of the same settings.

        Raises:
            KeyError: a tensor is missing.
        """
        self.num_skipped = int(state["num_skipped"])
        for slot in self.slots:
            device = slot.parameter.device
            parts = {
                name.removeprefix(f"{slot.name}."): tensor.to(device)
                for name, tensor in state.items()
                if name.startswith(f"{slot.name}.")
            }
            slot.moments = Moments(
                _moment(parts, "first"), _moment(parts, "second"), int(parts["num_updates"])
            )
            if (schedule := slot.schedule) is not None:
                slot.basis = _basis(parts, (min(slot.parameter.shape), slot.rank))
                counts = parts["schedule"].tolist()
                schedule.interval, schedule.due_at, schedule.num_refreshes = counts
                schedule.similarities = parts["similarities"].tolist()


def build_optimizer(
    weights: Iterable[TrainedWeight],
    *,
    projection: Projection | None,
    state_bits: StateBits,
    per_layer: bool,
    max_gradient_norm: float | None,
    weight_decay: float,
    seed: int,
) -> SubspaceAdamW:
    """An optimizer over these weights; `projection` applies to those that are `projected`."""
    weights = list(weights)
    num_projected = sum(weight.projected for weight in weights)
    slots: list[Slot] = []
    for index, weight in enumerate(weights):
        shape = weight.parameter.shape
        rank, schedule = 0, None
        if weight.projected:
            assert projection is not None
            rank = min(projection.rank, *shape)
            schedule = RefreshSchedule(
                interval=projection.refresh_interval,
                lazy=projection.lazy,
                phase=sum(slot.schedule is not None for slot in slots) / num_projected,
            )
            shape = torch.Size(coordinate_shape(tuple(shape), rank))
        slots.append(
            Slot(
                name=weight.name,
                index=index,
                parameter=weight.parameter,
                layer=weight.layer,
                keep_mask=weight.keep_mask,
                rank=rank,
                moments=zero_moments(shape, state_bits, weight.parameter.device),
                schedule=schedule,
            )
        )
    return SubspaceAdamW(
        slots=slots,
        projection=projection,
        per_layer=per_layer,
        max_gradient_norm=max_gradient_norm,
        weight_decay=weight_decay,
        seed=seed,
    )


def _moment(parts: Mapping[str, Tensor], name: str) -> Moment:
    if name in parts:
        return parts[name]
    return BlockCodes(parts[f"{name}_codes"], parts[f"{name}_largest"])


def _basis(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | GroupCodes | None:
    if "basis_codes" in parts:
        return GroupCodes(
            parts["basis_codes"], parts["basis_scale"], parts["basis_zero_point"], shape
        )
    return parts.get("basis")


def _tensors(kept: Moment | GroupCodes) -> dict[str, Tensor]:
    if isinstance(kept, Tensor):
        return {"": kept}
    if isinstance(kept, BlockCodes):
        return {"_codes": kept.codes, "_largest": kept.largest_B}
    return {"_codes": kept.codes, "_scale": kept.scale_G, "_zero_point": kept.zero_point_G}


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
