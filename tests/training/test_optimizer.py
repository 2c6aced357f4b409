"""The optimizer against AdamW, SGD's geometry, GaLore as its paper writes it, galore-torch, and itself in another
mode."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.galore import NaiveGaLore
from training.q_galore.group_codes import GroupCodes
from training.q_galore.int8_linear import Int8Linear
from training.q_galore.optimizer import (
    Projection,
    SubspaceAdamW,
    TrainedWeight,
    build_optimizer,
)
from training.q_galore.sizes import code_bytes, moment_bytes
from training.spec import Refresh

LEARNING_RATE = 1e-2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def projection(**changes: Any) -> Projection:
    settings: dict[str, Any] = {"rank": 3, "scale": 0.5, "refresh_interval": 4, "refresh": "svd"}
    return Projection(**{**settings, **changes})


def optimizer_of(
    weights: list[TrainedWeight], projected: Projection | None = None, **changes: Any
) -> SubspaceAdamW:
    settings: dict[str, Any] = {
        "state_bits": 32, "per_layer": False, "max_gradient_norm": None, "weight_decay": 0.0, "seed": 0,
    }  # fmt: skip
    return build_optimizer(weights, projection=projected, **{**settings, **changes})


def matrix(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator(seed)))


def gradients(shape: tuple[int, ...], count: int, seed: int = 1) -> Iterator[Tensor]:
    source = generator(seed)
    for _ in range(count):
        yield torch.randn(shape, generator=source)


def run(optimizer: SubspaceAdamW, parameter: nn.Parameter, found: Iterator[Tensor]) -> None:
    """Steps whose gradients are given: the loss is their product with the weight."""
    for number, gradient in enumerate(found):
        optimizer.start_step(number, LEARNING_RATE)
        optimizer.backward((parameter * gradient).sum(), last=True)
        optimizer.finish_step()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (5, 5), (1, 7)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_identity_basis_is_adamw_to_the_bit(shape: tuple[int, int], weight_decay: float) -> None:
    parameter = matrix(*shape)
    oracle_parameter = nn.Parameter(parameter.detach().clone())
    optimizer = optimizer_of(
        [TrainedWeight(name="w", parameter=parameter, projected=True)],
        projection(rank=99, scale=1.0),
        weight_decay=weight_decay,
    )
    slot = optimizer.slots[0]
    assert slot.rank == min(shape)
    assert slot.schedule is not None
    slot.basis, slot.schedule.due_at = torch.eye(min(shape)), 10**9
    oracle = torch.optim.AdamW(
        [oracle_parameter], lr=LEARNING_RATE, weight_decay=weight_decay, foreach=False
    )
    for number, gradient in enumerate(gradients(shape, 20)):
        optimizer.start_step(number, LEARNING_RATE)
        optimizer.backward((parameter * gradient).sum(), last=True)
        optimizer.finish_step()
        oracle_parameter.grad = gradient
        oracle.step()
        assert torch.equal(parameter, oracle_parameter)


def test_full_rank_orthogonal_basis_changes_no_gradient_step() -> None:
    """What goes into the subspace and back is the gradient itself: with SGD inside, the step would be SGD's. AdamW's
    is another one, since its moments are those of turned coordinates."""
    from training.q_galore.subspace import project, project_back

    gradient = next(gradients((12, 8), 1))
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator(5))).Q
    through = project_back(project(gradient, basis, "right"), basis, "right")
    torch.testing.assert_close(through, gradient, atol=1e-6, rtol=1e-5)
    ends = []
    for chosen in (torch.eye(8), basis):
        parameter = matrix(12, 8)
        weights = [TrainedWeight(name="w", parameter=parameter, projected=True)]
        optimizer = optimizer_of(weights, projection(rank=8))
        optimizer.slots[0].basis = chosen
        optimizer.slots[0].schedule.due_at = 10**9  # type: ignore[union-attr]
        run(optimizer, parameter, gradients((12, 8), 3))
        ends.append(parameter.detach())
    assert float((ends[0] - ends[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (6, 6), (2, 9)])
@pytest.mark.parametrize("refresh", ["svd", "gram_eigh"])
def test_galore_is_what_its_paper_says(shape: tuple[int, int], refresh: Refresh) -> None:
    parameter = matrix(*shape)
    naive = NaiveGaLore(parameter.detach().double(), min(3, *shape), 0.5, 4, LEARNING_RATE)
    weights = [TrainedWeight(name="w", parameter=parameter, projected=True)]
    optimizer = optimizer_of(weights, projection(refresh=refresh))
    for number, gradient in enumerate(gradients(shape, 12)):
        optimizer.start_step(number, LEARNING_RATE)
        optimizer.backward((parameter * gradient).sum(), last=True)
        optimizer.finish_step()
        basis = optimizer.slots[0].basis
        assert isinstance(basis, Tensor)
        naive.step(gradient, basis)
        torch.testing.assert_close(parameter.detach().double(), naive.weight, atol=2e-5, rtol=0)
        if number % 4 == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            best = vh.T if shape[0] >= shape[1] else u
            cosines = (basis * best[:, : basis.shape[1]]).sum(dim=0).abs()
            torch.testing.assert_close(cosines, torch.ones(basis.shape[1]), atol=1e-3, rtol=0)
    assert optimizer.num_refreshes == 3


@pytest.mark.parametrize(("shape", "interval"), [((12, 8), 4), ((8, 12), 100)])
def test_galore_is_galore_torchs(shape: tuple[int, int], interval: int) -> None:
    """Its AdamW adds epsilon before the bias correction, which gradients of this size hide."""
    adamw = pytest.importorskip("galore_torch.adamw")
    parameter = matrix(*shape)
    theirs = nn.Parameter(parameter.detach().clone())
    group = {
        "params": [theirs], "rank": 3, "update_proj_gap": interval, "scale": 0.5, "proj_type": "std",
    }  # fmt: skip
    oracle = adamw.AdamW([group], lr=LEARNING_RATE, weight_decay=0.0, no_deprecation_warning=True)
    weights = [TrainedWeight(name="w", parameter=parameter, projected=True)]
    optimizer = optimizer_of(weights, projection(refresh_interval=interval))
    for number, gradient in enumerate(gradients(shape, 12)):
        optimizer.start_step(number, LEARNING_RATE)
        optimizer.backward((parameter * gradient).sum(), last=True)
        optimizer.finish_step()
        theirs.grad = gradient.clone()
        oracle.step()
        torch.testing.assert_close(parameter, theirs, atol=1e-5, rtol=0)


class Net(nn.Module):
    """An embedding used twice (tied), a norm, a float32 or bfloat16 layer and an INT8 one; the last has a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        source = generator(7)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=source) * 0.3).to(dtype)

        self.embedding = nn.Parameter(draw(11, 24))
        self.norm = nn.Parameter(torch.ones(24, dtype=dtype))
        self.up = nn.Parameter(draw(40, 24))
        self.down = Int8Linear(draw(24, 40).float(), nn.Parameter(draw(24)), dtype)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = nn.functional.embedding(ids, self.embedding)
        normed = hidden * self.norm
        hidden = hidden + self.down(torch.tanh(normed @ self.up.T))
        logits = (hidden @ self.embedding.T).float()
        return nn.functional.cross_entropy(logits[:-1], ids[1:])

    def weights(self) -> list[TrainedWeight]:
        assert self.down.bias is not None
        return [
            TrainedWeight(name="embedding", parameter=self.embedding),
            TrainedWeight(name="norm", parameter=self.norm),
            TrainedWeight(name="up", parameter=self.up, projected=True),
            TrainedWeight(name="down", parameter=self.down.anchor, layer=self.down, projected=True),
            TrainedWeight(name="bias", parameter=self.down.bias),
        ]

    def values(self) -> dict[str, Tensor]:
        values = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        return {name: value for name, value in values.items() if "anchor" not in name}

    @torch.no_grad()
    def set_values(self, values: dict[str, Tensor]) -> None:
        own = dict([*self.named_parameters(), *self.named_buffers()])
        for name, value in values.items():
            own[name].copy_(value)


def train(
    net: Net,
    optimizer: SubspaceAdamW,
    first: int,
    last: int,
    *,
    accumulation: int = 1,
    rows: int = 8,
) -> list[float]:
    losses = []
    for number in range(first, last):
        optimizer.start_step(number, LEARNING_RATE)
        source = generator(number)
        total = 0.0
        for index in range(accumulation):
            ids = torch.randint(0, 11, (rows,), generator=source)
            loss = net(ids) / accumulation
            total += float(loss.detach())
            optimizer.backward(loss, last=index == accumulation - 1)
        optimizer.finish_step()
        losses.append(total)
    return losses


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


Q_GALORE = {"basis_bits": 4, "lazy": True, "refresh_interval": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_per_layer_gives_the_same_weights(
    dtype: torch.dtype, accumulation: int, max_norm: float | None
) -> None:
    ends = []
    for per_layer in (False, True):
        net = Net(dtype)
        before = net.values()
        optimizer = optimizer_of(
            net.weights(),
            projection(**Q_GALORE),
            per_layer=per_layer,
            max_gradient_norm=max_norm,
            weight_decay=0.1,
            state_bits=8,
        )
        train(net, optimizer, 0, 7, accumulation=accumulation)
        ends.append(net.values() | optimizer.state_dict())
        for name, value in net.values().items():
            if name not in ("down.scale_G", "down.zero_point_G"):  # a grid stays while it fits
                assert not torch.equal(value, before[name]), name
        assert all(parameter.grad is None for parameter in net.parameters())
    assert_equal(*ends)


def test_per_layer_holds_one_gradient_at_a_time() -> None:
    held = []
    for per_layer in (False, True):
        net = Net(torch.float32)
        optimizer = optimizer_of(net.weights(), projection(), per_layer=per_layer)
        train(net, optimizer, 0, 3)
        held.append(optimizer.gradient_bytes)
    whole = 4 * (11 * 24 + 24 + 40 * 24 + 24 * 40 + 24)
    assert held[0] == whole
    # the largest, and at most a gradient of another weight that waits for its turn
    assert held[1] < whole - 4 * 24 * 40


def test_accumulation_sums_what_one_batch_would_give() -> None:
    """Two passes of half the loss each are the pass of the mean, but for the order of float sums."""
    parameter = matrix(12, 8)
    parts = [TrainedWeight(name="w", parameter=parameter, projected=True)]
    optimizer = optimizer_of(parts, projection(refresh_interval=2))
    other = matrix(12, 8)
    oracle = optimizer_of(
        [TrainedWeight(name="w", parameter=other, projected=True)], projection(refresh_interval=2)
    )
    for built in (optimizer, oracle):  # the very first basis would be that of the first pass
        built.slots[0].basis = torch.eye(8)[:, :3]
    pairs = zip(gradients((12, 8), 6, seed=1), gradients((12, 8), 6, seed=2), strict=True)
    for number, (one, two) in enumerate(pairs):
        optimizer.start_step(number, LEARNING_RATE)
        optimizer.backward((parameter * one).sum(), last=False)
        optimizer.backward((parameter * two).sum(), last=True)
        optimizer.finish_step()
        oracle.start_step(number, LEARNING_RATE)
        oracle.backward((other * (one + two)).sum(), last=True)
        oracle.finish_step()
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("refresh", ["svd", "gram_eigh", "randomized", "warm"])
def test_resuming_is_exact(refresh: Refresh) -> None:
    def fresh() -> tuple[Net, SubspaceAdamW]:
        net = Net(torch.bfloat16)
        chosen = projection(**Q_GALORE, refresh=refresh)
        return net, optimizer_of(net.weights(), chosen, state_bits=8, max_gradient_norm=1.0)

    net, optimizer = fresh()
    train(net, optimizer, 0, 9)
    for stop in (1, 4, 7):
        stopped_net, stopped = fresh()
        train(stopped_net, stopped, 0, stop)
        resumed_net, resumed = fresh()
        resumed_net.set_values(stopped_net.values())
        resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
        train(resumed_net, resumed, stop, 9)
        assert_equal(net.values(), resumed_net.values())
        assert_equal(optimizer.state_dict(), resumed.state_dict())


def test_state_is_plain_tensors_of_the_promised_size() -> None:
    parameter = nn.Parameter(torch.randn(96, 64, generator=generator()))
    weights = [TrainedWeight(name="w", parameter=parameter, projected=True)]
    chosen = projection(rank=48, basis_bits=4)
    optimizer = optimizer_of(weights, chosen, state_bits=8)
    run(optimizer, parameter, gradients((96, 64), 2))
    assert all(type(tensor) is Tensor for tensor in optimizer.state_dict().values())
    assert isinstance(optimizer.slots[0].basis, GroupCodes)
    assert optimizer.basis_bytes() == code_bytes(64 * 48, 4) == 64 * 48 // 2 + 12 * 5
    assert optimizer.moment_bytes() == moment_bytes(96 * 48, 8) == 2 * (96 * 48 + 18 * 4)


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_skipped(bad: float, max_norm: float | None) -> None:
    """At a refresh and between two; weight, moments and basis stay what they were."""
    for number_of_bad in (3, 4):
        parameter = matrix(12, 8)
        weights = [TrainedWeight(name="w", parameter=parameter, projected=True)]
        optimizer = optimizer_of(weights, projection(), max_gradient_norm=max_norm)
        run(optimizer, parameter, gradients((12, 8), 3))
        before = parameter.detach().clone()
        state = copy.deepcopy(optimizer.state_dict())
        gradient = next(gradients((12, 8), 1))
        gradient[3, 5] = bad
        optimizer.start_step(number_of_bad, LEARNING_RATE)
        optimizer.backward((parameter * gradient).sum(), last=True)
        optimizer.finish_step()
        assert torch.equal(parameter, before)
        assert optimizer.num_skipped == 1
        state["num_skipped"] = torch.tensor([1])
        assert_equal(optimizer.state_dict(), state)


def test_a_zero_gradient_at_the_first_step_waits_for_one_that_has_a_direction() -> None:
    parameter = matrix(12, 8)
    weights = [TrainedWeight(name="w", parameter=parameter, projected=True)]
    optimizer = optimizer_of(weights, projection())
    before = parameter.detach().clone()
    run(optimizer, parameter, iter([torch.zeros(12, 8)]))
    assert torch.equal(parameter, before)
    assert optimizer.num_refreshes == 0
    run(optimizer, parameter, gradients((12, 8), 1))
    assert optimizer.num_refreshes == 1
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("projected", [False, True])
def test_zeros_of_a_pruned_weight_stay(projected: bool) -> None:
    for make in (lambda w: (nn.Parameter(w), None), int8):
        dense = matrix(16, 32).detach()
        mask = torch.rand(16, 32, generator=generator(4)) < 0.5
        parameter, layer = make(dense * mask)
        weight = TrainedWeight(
            name="w", parameter=parameter, layer=layer, keep_mask=mask, projected=projected
        )
        optimizer = optimizer_of([weight], projection(), weight_decay=0.1)
        run(optimizer, parameter, gradients((16, 32), 6))
        after = parameter.detach() if layer is None else layer.dequantize()
        assert ((after == 0) | mask).all()
        assert float((after - dense * mask).abs().max()) > 0.01


def int8(weight: Tensor) -> tuple[nn.Parameter, Int8Linear]:
    layer = Int8Linear(weight, None, torch.float32)
    return layer.anchor, layer


def test_clipping_is_torchs_where_nothing_is_projected() -> None:
    ours = [matrix(4, 6, seed=1), matrix(5, seed=2)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    weights = [TrainedWeight(name=str(i), parameter=p) for i, p in enumerate(ours)]
    optimizer = optimizer_of(weights, max_gradient_norm=0.5, per_layer=True)
    oracle = torch.optim.AdamW(theirs, lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
    for number in range(5):
        norms = []
        found = [next(gradients(tuple(p.shape), 1, seed=number + 10)) for p in ours]
        optimizer.start_step(number, LEARNING_RATE)
        loss = sum((p * g).sum() for p, g in zip(ours, found, strict=True))
        assert isinstance(loss, Tensor)
        optimizer.backward(loss, last=True)
        norms.append(optimizer.finish_step())
        for p, g in zip(theirs, found, strict=True):
            p.grad = g
        norms.append(float(nn.utils.clip_grad_norm_(theirs, 0.5)))
        oracle.step()
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_layer_has_the_gradients_of_the_weight_it_stands_for(dtype: torch.dtype) -> None:
    """Used twice in one pass, its input frozen once: both uses count, as for a dense layer of the same weight."""
    layer = Int8Linear(matrix(6, 10).detach(), nn.Parameter(matrix(6).detach().to(dtype)), dtype)
    dense = nn.Linear(10, 6, dtype=dtype)
    dense.weight.data, dense.bias.data = layer.dequantize(dtype), matrix(6).detach().to(dtype)
    results: list[list[Tensor]] = []
    for module, weight in ((layer, layer.anchor), (dense, dense.weight)):
        call: Callable[[Tensor], Tensor] = module
        frozen = torch.randn(2, 3, 10, generator=generator(3)).to(dtype)
        x = torch.randn(4, 10, generator=generator(4)).to(dtype).requires_grad_()
        loss = call(frozen).float().square().sum() + call(x).float().square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert weight.grad is not None
        assert module.bias is not None
        assert module.bias.grad is not None
        assert weight.grad.dtype == dtype
        results.append([call(x), x.grad, weight.grad, module.bias.grad])
    for ours, theirs in zip(*results, strict=True):
        error = float((ours - theirs).detach().float().norm() / theirs.detach().float().norm())
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_an_int8_layer_keeps_no_copy_of_its_weight() -> None:
    layer = Int8Linear(matrix(64, 64).detach(), None, torch.bfloat16)
    held = sum(t.untyped_storage().nbytes() for t in [*layer.parameters(), *layer.buffers()])
    assert held == code_bytes(64 * 64, 8) + 2


def _one_of_two(rank: int, folder: str) -> None:
    """A process of two: its half of every step's rows."""
    import torch.distributed

    from training.q_galore.optimizer import DistributedCollective

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    net, optimizer = two_pass_net()
    optimizer.collective = DistributedCollective()
    for number in range(5):
        optimizer.start_step(number, LEARNING_RATE)
        optimizer.backward(net(rows_of(number)[rank]) / 2, last=True)
        optimizer.finish_step()
    torch.save(net.values(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def two_pass_net() -> tuple[Net, SubspaceAdamW]:
    net = Net(torch.float32)
    chosen = projection(refresh_interval=2)
    optimizer = optimizer_of(net.weights(), chosen, per_layer=True, max_gradient_norm=0.5)
    for (
        slot
    ) in optimizer.slots:  # the very first basis of one process would be that of its first pass
        if slot.schedule is not None:
            slot.basis = torch.eye(24)[:, :3]
    return net, optimizer


def rows_of(number: int) -> list[Tensor]:
    source = generator(number)
    return [torch.randint(0, 11, (8,), generator=source) for _ in range(2)]


@pytest.mark.processes
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Each on half of the rows: coordinates are summed, whole gradients where a basis is due, and weights stay
    alike."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_one_of_two, args=(r, str(tmp_path))) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    net, optimizer = two_pass_net()
    for number in range(5):
        optimizer.start_step(number, LEARNING_RATE)
        for index, ids in enumerate(rows_of(number)):
            optimizer.backward(net(ids) / 2, last=index == 1)
        optimizer.finish_step()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first, second)
    for name, value in net.values().items():
        found = first[name]
        if value.dtype == torch.uint8:
            # a sum in another order may round one code the other way
            assert float((found.int() - value.int()).abs().float().mean()) < 0.02
            continue
        torch.testing.assert_close(found, value, atol=2e-4, rtol=1e-3)
