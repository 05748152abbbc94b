"""Optimizers and averages of weights against references and by hand."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.models import build_model
from ffcv_imnet.train.checkpoint import _optimizer_state
from ffcv_imnet.train.muon import POLYNOMIALS, is_kernel, newton_schulz
from ffcv_imnet.train.optim import build_average, build_optimizer, parameter_groups
from ffcv_imnet.train.soap import SOAP


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two take longer over networks of this size, and wait for each other where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def muon(**overrides: object) -> Settings:
    return load(training__optimizer="muon", **overrides)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, bias=False), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    (model(images).square().mean() * scale).backward()


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_factor"]
    for seed in seeds:
        backward(model, seed)
        optimizer.step()


def spectrum(values: Tensor, columns: int) -> Tensor:
    """A (1, n, columns) matrix with these n singular values."""
    generator = torch.Generator().manual_seed(1)
    n = len(values)
    left = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64))[0]
    return ((left * values.double()) @ right.T)[None]


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """As one stack among others: a wider one, a taller one, one of the same width."""
    others = [
        torch.ones(2, *shape, dtype=matrices.dtype) for shape in ((160, 170), (200, 30), (32, 40))
    ]
    return newton_schulz([others[0], matrices, *others[1:]], steps)[1]


SPECTRA = {
    "flat": torch.ones(32),
    "falling": torch.logspace(0, -4, 32),
    "outlier": torch.cat([torch.tensor([100.0]), torch.ones(31)]),
    "of rank 3": torch.cat([torch.ones(3), torch.zeros(29)]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", POLYNOMIALS)
def test_newton_schulz_is_the_plain_iteration(name: str, steps: int) -> None:
    matrix = spectrum(SPECTRA[name], 100)
    sigma = torch.linalg.svdvals(matrix)
    x = matrix / (sigma.norm() if steps == 5 else 1.02 * sigma.pow(4).sum() ** 0.25)
    for a, b, c in POLYNOMIALS[steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    for given, expected in ((matrix, x), (matrix.mT, x.mT)):
        assert torch.allclose(orthogonalised(given, steps), expected, atol=1e-10)
        ours = orthogonalised(given.float(), steps).double()
        assert float((ours - expected).norm() / expected.norm()) < 1e-3
    # Rounding in bfloat16 does not run away: five in one block reach 5 to 20,000.
    rough = orthogonalised(matrix.bfloat16(), steps).double()
    assert 0.5 < float(torch.linalg.svdvals(rough)[0, 0]) < 1.9
    assert bool((orthogonalised(0 * matrix.bfloat16(), steps) == 0).all())


def test_three_polynomials_are_minimax() -> None:
    low, high = 0.01, 1.0
    for a, b, c in POLYNOMIALS[3]:
        sigma = torch.linspace(low, high, 100_001, dtype=torch.float64)
        after = a * sigma + b * sigma**3 + c * sigma**5
        turns = [float(after[0]), *extrema(after), float(after[-1])]
        worst = max(abs(value - 1) for value in turns)
        # Three coefficients are the best that there are if four errors are equal, in turn below and above.
        assert len(turns) == 4
        for turn, side in zip(turns, (-1, 1, -1, 1), strict=True):
            assert turn - 1 == pytest.approx(side * worst, abs=2e-3)
        low, high = 1 - worst, 1 + worst
    assert high < 1.28


def extrema(values: Tensor) -> list[float]:
    """The values where a curve turns."""
    rising = values.diff() > 0
    return values[1:-1][rising[1:] != rising[:-1]].tolist()


def test_muon_is_torchs_on_flattened_kernels() -> None:
    model, settings = network(), muon(muon__weight_decay=0.1, muon__lr=0.03, lr__lr=0.5)
    kernels = [p.detach().flatten(1).clone() for p in model.parameters() if p.ndim == 4]
    reference = torch.optim.Muon(
        [nn.Parameter(kernel) for kernel in kernels], weight_decay=0.1, momentum=0.95
    )
    optimizer = build_optimizer(model, settings)
    for seed in range(3):
        backward(model, seed)
        ours = [p for p in model.parameters() if p.ndim == 4]
        theirs = reference.param_groups[0]["params"]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.grad is not None
            other.grad = mine.grad.flatten(1).clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * group["lr_factor"]
        reference.param_groups[0]["lr"] = 0.03
        optimizer.step()
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            # torch computes the directions in bfloat16: within 10 % of the way.
            length = 0.03 * (seed + 1) * other.shape[0] ** 0.5
            assert float((mine - other.view_as(mine)).detach().norm()) < 0.1 * length


def test_the_rest_is_plain_sgd() -> None:
    settings = muon(training__nesterov=True, training__weight_decay=0.01)
    model = network()
    twin = copy.deepcopy(model)
    take_steps(model, build_optimizer(model, settings), range(1))
    sgd = load(training__nesterov=True, training__weight_decay=0.01)
    take_steps(twin, build_optimizer(twin, sgd), range(1))
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs) != is_kernel(ours), name


def test_groups_partition_the_network() -> None:
    model = build_model(muon(), 10)
    groups = build_optimizer(model, muon()).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    kernels = {names[id(p)] for p in groups[0]["params"]}
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(kernels) == 20
    assert kernels == {
        name for name in names.values() if name.removesuffix(".weight") in convolutions
    }
    assert not is_kernel(nn.Conv2d(8, 8, 3, groups=8).weight)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("overflows", [{0}, {1}, {0, 3}, set(range(10)), set(range(2, 12))])
def test_overflow_moves_nothing(optimizer: str, overflows: set[int]) -> None:
    """fp16 under a real GradScaler: the weights are those of the same steps without the ones that overflowed."""
    settings = load(training__optimizer=optimizer, training__nesterov=True)
    model = network()
    twin = copy.deepcopy(model)
    with_overflow = fp16_steps(model, settings, overflows, skipping=False)
    without = fp16_steps(twin, settings, overflows, skipping=True)
    assert with_overflow.get_scale() == without.get_scale() == 1024 / 2 ** len(overflows)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs) and bool(ours.isfinite().all()), name
    start = dict(network().named_parameters())
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters())


def fp16_steps(
    model: nn.Module, settings: Settings, overflows: set[int], *, skipping: bool
) -> torch.amp.GradScaler:
    """14 steps; those in `overflows` have infinite gradients, or are left out but for what they do to the scale."""
    optimizer = build_optimizer(model, settings, "fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_factor"]
    torch.full((2000,), torch.nan)  # where an unwritten momentum may come to lie
    for step in range(14):
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        if step in overflows and skipping:
            scaler.scale(torch.ones(()))  # the scale comes to be at its first use
            scaler.update(scaler.get_scale() / 2)
            continue
        with torch.autocast("cpu", torch.float16):
            loss = model(images).float().square().mean()
        scaler.scale(loss * torch.inf if step in overflows else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return scaler


def test_overflow_moves_nothing_of_soap() -> None:
    """Nor an average; but SOAP's bases turn by the number of all steps, as only the device knows which counted."""
    settings = load(training__optimizer="soap", soap__weight_decay=1.0, soap__every=6)
    model = network()
    assert fp16_steps(model, settings, {0, 3, 4, 13}, skipping=False).get_scale() == 64
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    optimizer = build_optimizer(model, settings)
    # A turn of the bases comes after the sixth step and after the twelfth.
    take_steps(model, optimizer, range(9))
    before = copy.deepcopy([*model.parameters(), *optimizer.state_dict()["state"].values()])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    scaler.scale(torch.ones(()))
    backward(model, 9, math.inf)
    scaler.step(optimizer)
    after = [*model.parameters(), *optimizer.state_dict()["state"].values()]
    for old, new in zip(before, after, strict=True):
        if isinstance(old, Tensor):
            assert torch.equal(old, new)
        else:
            assert old.pop("calls") + 1 == new.pop("calls") == 10
            assert all(torch.equal(value, new[name]) for name, value in old.items())


def test_a_loaded_state_of_soap_fits() -> None:
    settings = load(training__optimizer="soap")
    model = network()
    rule = build_optimizer(model, settings)
    take_steps(model, rule, range(1))
    for name, odd in (
        ("average", torch.zeros(2)),
        ("inputs_basis", torch.zeros(1)),
        ("steps", torch.zeros(3)),
        ("calls", -1),
        ("calls", 0.5),
    ):
        state = copy.deepcopy(rule.state_dict())
        for kept in state["state"].values():
            kept[name] = odd
        with pytest.raises(ValueError, match=r"averages, where|a count of its steps"):
            build_optimizer(network(), settings).load_state_dict(state)


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "soap"])
def test_loss_scale_changes_nothing(optimizer: str) -> None:
    results = []
    for scaled in (False, True):
        model = network()
        rule = build_optimizer(model, load(training__optimizer=optimizer), "fp16")
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for group in rule.param_groups:
            group["lr"] = 0.1 * group["lr_factor"]
        for seed in range(3):
            backward(model, seed, float(scaler.get_scale()))
            scaler.scale(torch.ones(()))
            scaler.step(rule)
            scaler.update()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_momenta_start_at_zero_after_a_state_without_them() -> None:
    """A checkpoint from before the first step, by an older version, holds none."""
    model = network()
    for settings in (load(), muon()):
        optimizer = build_optimizer(model, settings)
        names = {key for state in optimizer.state.values() for key in state}
        empty = optimizer.state_dict() | {"state": {}}
        optimizer.load_state_dict(empty)
        momenta = [m for state in optimizer.state.values() for m in state.values()]
        assert len(momenta) == len(list(model.parameters())) and not any(m.any() for m in momenta)
        assert names == {key for state in optimizer.state.values() for key in state}


# Calls of the dispatcher that a GPU makes no kernel for.
FREE = {
    "view", "_unsafe_view", "transpose", "t", "diagonal", "unsqueeze", "detach", "select", "slice", "permute",
    "as_strided", "empty", "empty_like", "new_empty", "alias", "split", "split_with_sizes", "expand",
    "promote_types", "unbind",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would be given: one for each call, but for those in `FREE`. Lists of tensors go
    in pieces (MultiTensorApply.cuh): so many tensors, by how many lists there are, and 320 blocks of 65,536 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = op._schema.name.split("::")[1]
        if op.namespace == "aten" and name not in FREE:
            self.kinds[name] += self.pieces(args) if name.startswith(("_foreach", "_fused")) else 1
        return op(*args, **(kwargs or {}))

    def total(self) -> int:
        """Once this process has used torch.compile, zeros are dispatched as two: themselves, and a filling."""
        zeros = self.kinds["zeros_like"] + self.kinds["new_zeros"]
        return self.kinds.total() - min(self.kinds["fill_"], zeros)

    def pieces(self, args: tuple[Any, ...]) -> int:
        lists = [a for a in args if isinstance(a, list) and a and isinstance(a[0], Tensor)]
        blocks = sum(math.ceil(t.numel() / 65536) for t in lists[0])
        tensors = {1: 110, 2: 64, 3: 48}[len(lists)]
        return max(math.ceil(len(lists[0]) / tensors), math.ceil(blocks / 320))


@pytest.mark.parametrize(
    ("optimizer", "arch", "most"),
    [("muon", "resnet18", 120), ("muon", "resnet50", 200), ("soap", "resnet18", 170), ("soap", "resnet50", 240)],
)  # fmt: skip
def test_launches_of_an_update_and_of_the_average(optimizer: str, arch: str, most: int) -> None:
    """In fp16, under a scale, Muon with five iterations: 412 and 796 when each kernel and each shape had its own.
    SOAP in a step that turns no basis."""
    settings = load(training__optimizer=optimizer, model__arch=arch)
    with torch.device("meta"):  # no time for random weights
        model = build_model(settings, 1000).to(memory_format=torch.channels_last)
    model.to_empty(device="cpu")
    rule = build_optimizer(model, settings, "fp16")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if isinstance(rule, SOAP):
        rule.calls = rule.every
    step = Launches()
    rule.register_step_pre_hook(lambda *_: step.__enter__() and None)
    rule.register_step_post_hook(lambda *_: step.__exit__(None, None, None))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(rule)
    assert most / 2 < step.total() <= most, step.kinds
    average = build_average(model, 0.9)
    assert average is not None
    average.update_parameters(model)  # the first copies
    with Launches() as moved:
        average.update_parameters(model)
    # The count of updates is read and raised on the host.
    assert set(moved.kinds) == {"_foreach_lerp_", "_foreach_copy_", "_local_scalar_dense", "add_"}
    assert moved.kinds.total() <= 8


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_optimizers_resume(optimizer: str) -> None:
    settings = load(training__optimizer=optimizer, soap__every=4)
    model = network()
    rule = build_optimizer(model, settings)
    take_steps(model, rule, range(3))
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, settings)
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    # SOAP's bases turn in the first of these, not in the others.
    take_steps(model, rule, range(3, 6))
    take_steps(twin, resumed, range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("odd", [torch.zeros(1), torch.zeros(()), torch.zeros(3, 0), 3, "x"])
@pytest.mark.parametrize("name", ["momentum_buffer", "muon_momentum"])
def test_a_loaded_momentum_fits_its_weights(name: str, odd: Any) -> None:
    """The fused step asks none of them for its shape, and would write beyond it."""
    model = network()
    optimizer = build_optimizer(model, muon())
    take_steps(model, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    for kept in state["state"].values():
        if name in kept:
            kept[name] = odd
    with pytest.raises(ValueError, match=r"averages, where .* is needed"):
        build_optimizer(network(), muon()).load_state_dict(state)


def test_of_a_loaded_optimizer_only_momenta_are_believed() -> None:
    model = network()
    optimizer = build_optimizer(model, muon())
    take_steps(model, optimizer, range(1))
    held = copy.deepcopy(optimizer.state_dict())
    for group in held["param_groups"]:
        group |= {"weight_decay": None, "ns_steps": 10**9, "momentum": "x", "maximize": True}
    for kept in held["state"].values():  # one number in the place of all
        for name, value in kept.items():
            kept[name] = torch.full((1,), 2.0).expand(value.shape)
    resumed = build_optimizer(network(), muon())
    options = [group | {"params": None} for group in resumed.param_groups]
    resumed.load_state_dict(_optimizer_state(resumed, held))
    assert [group | {"params": None} for group in resumed.param_groups] == options
    for parameter, kept in resumed.state.items():
        for value in kept.values():
            assert value.stride() == parameter.stride() and (value == 2).all()
    with pytest.raises(ValueError):
        _optimizer_state(resumed, held | {"param_groups": held["param_groups"][1:]})


class PlainSoap:
    """SOAP (arXiv:2409.11321) of one parameter in float64, by the letter: Adam's averages kept where its bases are."""

    def __init__(self, parameter: Tensor, every: int) -> None:
        self.every, self.steps = every, 0
        self.weights = parameter.detach().double().clone()
        x = self.seen(self.weights)
        self.average, self.square = torch.zeros_like(x), torch.zeros_like(x)
        dims = [dim for dim in range(x.ndim) if x.ndim > 1 and x.shape[dim] > 1]
        self.bases = {dim: torch.eye(x.shape[dim], dtype=x.dtype) for dim in dims}
        self.grams = {dim: torch.zeros_like(basis) for dim, basis in self.bases.items()}

    @staticmethod
    def seen(x: Tensor) -> Tensor:
        return x.flatten(2) if x.ndim > 2 else x

    def rotated(self, x: Tensor, bases: dict[int, Tensor]) -> Tensor:
        for dim, basis in bases.items():
            x = torch.tensordot(x, basis, dims=([dim], [0])).movedim(-1, dim)
        return x

    def step(self, gradient: Tensor, lr: float, decay: float) -> None:
        self.steps += 1
        x = self.seen(gradient.double())
        self.average = 0.95 * self.average + 0.05 * x
        self.square = 0.95 * self.square + 0.05 * self.rotated(x, self.bases) ** 2
        correction = 1 - 0.95**self.steps
        step = self.rotated(self.average, self.bases) / (self.square.sqrt() + 1e-8)
        step *= math.sqrt(correction) / correction
        step = self.rotated(step, {dim: basis.T for dim, basis in self.bases.items()})
        decay = decay if gradient.ndim > 1 else 0.0
        self.weights -= lr * (decay * self.weights + step.view_as(self.weights))
        for dim, gram in self.grams.items():
            others = [other for other in range(x.ndim) if other != dim]
            self.grams[dim] = 0.95 * gram + 0.05 * torch.tensordot(x, x, dims=(others, others))
        if self.steps < self.every or self.steps % self.every == 0:
            self.turn()

    def turn(self) -> None:
        for dim, basis in self.bases.items():
            image = self.grams[dim] @ basis
            order = (basis * image).sum(0).argsort(descending=True)
            self.square = self.square.index_select(dim, order)
            self.bases[dim] = torch.linalg.qr(image[:, order]).Q


def test_soap_by_the_letter() -> None:
    """Two kernels of one shape, one of 1x1, a head, shifts, of one and three dimensions and none, a transformer's places;
    sides of one width in different layers."""
    settings = load(
        training__optimizer="soap", soap__weight_decay=0.1, soap__lr=0.01, soap__every=5
    )
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(8, 3, 3, 3), (8, 3, 3, 3), (8, 8, 1, 1), (8, 8), (8,), (10,)]
    shapes += [(4, 3, 5), (3, 4, 2, 2, 2), (1, 4, 4), ()]
    model = nn.ParameterList([torch.randn(shape, dtype=torch.float64) for shape in shapes])
    kernels_last = [p.contiguous(memory_format=torch.channels_last) for p in list(model)[:2]]
    model[0].data, model[1].data = (kernel.detach() for kernel in kernels_last)
    optimizer = build_optimizer(model, settings)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    plain = [PlainSoap(p, every=5) for p in model]
    for step in range(23):
        for parameter, twin in zip(model, plain, strict=True):
            outputs, *others = parameter.shape or (1,)
            growing = torch.arange(1.0, 1.0 + outputs).view(-1, *[1] * len(others))
            growing = growing.view(parameter.shape) if parameter.ndim == 0 else growing
            parameter.grad = torch.randn_like(parameter) * growing  # full rank, a basis to be found
            twin.step(parameter.grad, lr=0.01, decay=0.1)
        optimizer.step()
        for parameter, twin in zip(model, plain, strict=True):
            assert torch.allclose(parameter, twin.weights, rtol=0, atol=1e-9), (
                step,
                parameter.shape,
            )
    state = optimizer.state[model[0]]
    assert set(state) == {
        "average", "square", "steps", "outputs_gram", "outputs_basis", "places_gram", "places_basis",
        "inputs_gram", "inputs_basis",
    }  # fmt: skip
    gram = state["outputs_basis"].mT @ state["outputs_gram"] @ state["outputs_basis"]
    assert float(gram.diagonal().square().sum() / gram.square().sum()) > 0.9


def test_parameter_groups_partition_the_network() -> None:
    model = build_model(load(), 10)
    decayed, plain = (group["params"] for group in parameter_groups(model, 1e-4))
    assert len({id(p) for p in [*decayed, *plain]}) == len(list(model.parameters()))
    ours = {id(p) for p in plain}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # downsample's too, whose name says nothing
            assert id(module.weight) in ours and id(module.bias) in ours
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert id(module.weight) not in ours
            assert module.bias is None or id(module.bias) in ours


def test_sgd_by_hand() -> None:
    model = nn.Linear(1, 1)
    settings = load(
        training__momentum=0.5,
        training__weight_decay=0.1,
        training__nesterov=True,
    )
    optimizer = build_optimizer(model, settings)
    weight, bias = model.weight.item(), model.bias.item()
    for group in optimizer.param_groups:
        group["lr"] = 0.2 * group["lr_factor"]
    model(torch.tensor([[3.0]])).sum().backward()
    optimizer.step()
    # First step: the momentum buffer is the gradient, Nesterov adds half of it once more.
    assert model.weight.item() == pytest.approx(weight - 0.2 * 1.5 * (3 + 0.1 * weight))
    assert model.bias.item() == pytest.approx(bias - 0.2 * 1.5)  # no decay in one dimension


def test_the_average_by_hand() -> None:
    expected = 0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 5.0
    model = nn.BatchNorm1d(1)
    average = build_average(model, 0.9)
    assert average is not None and build_average(model, 0.0) is None
    for value in (1.0, 2.0, 5.0):
        model.weight.data.fill_(value)
        assert model.running_mean is not None
        model.running_mean.fill_(10 * value)
        average.update_parameters(model)
    state = average.module.state_dict()
    assert float(state["weight"]) == pytest.approx(expected)
    assert float(state["running_mean"]) == pytest.approx(10 * expected)


def test_the_average_is_torchs() -> None:
    """Bit for bit, but for the batches that BatchNorm has seen: those are copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    ours = build_average(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    assert ours is not None
    for _ in range(4):
        model(torch.randn(2, 3, 5, 5))
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    expected = theirs.state_dict() | {"module.1.num_batches_tracked": torch.tensor(4)}
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())


def test_soap_survives_a_qr_that_makes_nothing_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a BatchNorm that starts at zero the first gradients are; a GPU's QR may answer otherwise than LAPACK."""
    qr = torch.linalg.qr

    def strict(images: torch.Tensor) -> Any:
        q, r = qr(images)
        return SimpleNamespace(
            Q=torch.where((images == 0).all(2).all(1)[:, None, None], torch.nan, q), R=r
        )

    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 8, 3, 3)) for _ in range(2)]
    before = weights[0].clone()
    monkeypatch.setattr(torch.linalg, "qr", strict)
    optimizer = SOAP([{"params": weights, "weight_decay": 0.0, "lr": 0.01}], 10)
    for step in range(3):
        weights[0].grad = torch.zeros(8, 8, 3, 3) if step == 0 else torch.randn(8, 8, 3, 3)
        weights[1].grad = torch.randn(8, 8, 3, 3)
        optimizer.step()
    assert all(weight.isfinite().all() for weight in weights)
    assert not torch.equal(weights[0], before)
    for bases in optimizer.bases.values():
        assert torch.allclose(
            bases.mT @ bases, torch.eye(bases.shape[1]).expand_as(bases), atol=1e-4
        )
