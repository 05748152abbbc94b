"""The study's optimizers: every one takes the schedule's share of its peak learning rate at each step.

`Kernels` is Muon with the variants that are asked about (rules for shape, kernels held at a fixed norm,
decay), on the package's Newton-Schulz polynomials. Rivals come from the packages that their
users take them from.
"""

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ffcv_imnet.train.muon import POLYNOMIALS
from ffcv_imnet.train.soap import SOAP


def is_kernel(parameter: Tensor) -> bool:
    """Muon's: the kernels of convolutions that mix channels."""
    return parameter.ndim == 4 and parameter.shape[1] > 1


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """Newton-Schulz in float32 with the package's polynomials, as its `newton_schulz` had it when the
    study began, so that the last run is made as the first was. (n, rows, columns) -> the same."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for block in (POLYNOMIALS[steps][:3], POLYNOMIALS[steps][3:]):
        gram, product = x @ x.mT, None
        if block and steps == 3:
            scale = 1.02 * gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).sqrt()
            x, gram = x / scale, gram / scale.square()
        for a, b, c in block:
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal(dim1=1, dim2=2).add_(a)
            product = polynomial if product is None else polynomial @ product
            gram = polynomial @ gram @ polynomial
        x = x if product is None else product @ x
    return x.mT if tall else x


def shape_factor(rule: str, rows: int, columns: int) -> float:
    """What a rule for shape multiplies the orthogonal direction of a kernel by."""
    return {
        "none": 1.0,
        "keller": math.sqrt(max(1.0, rows / columns)),  # kellerjordan.github.io/posts/muon
        "spectral": math.sqrt(rows / columns),  # arXiv:2310.17813
        "rms": 0.2 * math.sqrt(max(rows, columns)),  # AdamW's usual size, arXiv:2502.16982
    }[rule]


class Kernels(torch.optim.Optimizer):
    """Muon on kernels; kernels of one shape are stepped together.

    Args:
        hold: keep each kernel at the Frobenius norm sqrt(rows), so that lr is the relative step
            (airbench94's way, github.com/KellerJordan/cifar10-airbench).
        decay: decoupled, lr x decay a step.
    """

    def __init__(
        self,
        kernels: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        decay: float,
        scale: str,
        hold: bool,
        ns_steps: int,
        second: float = 0.0,
        taps: bool = False,
    ) -> None:
        super().__init__(list(kernels), {"lr": lr})
        self.second, self.taps, self.steps = second, taps, 0
        self.momentum, self.decay, self.scale = momentum, decay, scale
        self.hold, self.ns_steps = hold, ns_steps
        self.shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for kernel in self.param_groups[0]["params"]:
            self.shapes.setdefault(kernel.shape, []).append(kernel)
        self.averages = {
            shape: torch.zeros(len(kernels), *shape) for shape, kernels in self.shapes.items()
        }
        self.squares = {
            shape: torch.zeros(len(kernels), shape[0], 1) for shape, kernels in self.shapes.items()
        }

    def direction(self, grads: Tensor) -> Tensor:
        """(n, outputs, inputs, height, width) -> the same, orthogonal as a whole or at each position."""
        if not self.taps:
            return orthogonal(grads.flatten(2), self.ns_steps).view_as(grads)
        places = grads.permute(0, 3, 4, 1, 2)
        straight = orthogonal(places.flatten(0, 2), self.ns_steps).view(places.shape)
        # as long as the whole kernel's: sqrt(outputs), if that is the shorter side
        return straight.permute(0, 3, 4, 1, 2) / math.sqrt(grads.shape[3] * grads.shape[4])

    def even(self, straight: Tensor, shape: torch.Size) -> Tensor:
        """Divided by each output's root mean square over time, and as long as before (NorMuon,
        arXiv:2510.05491)."""
        flat = straight.flatten(2)
        squares = self.squares[shape].lerp_(flat.square().mean(2, keepdim=True), 1 - self.second)
        evened = flat / (squares / (1 - self.second**self.steps)).sqrt().clamp(min=1e-8)
        lengths = [x.norm(dim=(1, 2), keepdim=True) for x in (flat, evened)]
        return (evened * (lengths[0] / lengths[1].clamp(min=1e-8))).view_as(straight)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all kernels."""
        lr = self.param_groups[0]["lr"]
        self.steps += 1
        for shape, kernels in self.shapes.items():
            grads = torch.stack([kernel.grad for kernel in kernels if kernel.grad is not None])
            average = self.averages[shape].lerp_(grads, 1 - self.momentum)
            straight = self.direction(grads.lerp_(average, self.momentum))
            if self.second:
                straight = self.even(straight, shape)
            rows, columns = shape[0], shape.numel() // shape[0]
            factor = shape_factor(self.scale, rows, columns)
            for kernel, direction in zip(kernels, straight, strict=True):
                if self.hold:
                    kernel.mul_(math.sqrt(rows) / kernel.norm().clamp(min=1e-7))
                elif self.decay:
                    kernel.mul_(1 - lr * self.decay)
                kernel.add_(direction, alpha=-lr * factor)


class Flattened:
    """torch.optim.Muon on kernels: it takes matrices, so it gets views of them as such."""

    def __init__(
        self, kernels: list[nn.Parameter], lr: float, decay: float, momentum: float
    ) -> None:
        self.kernels = kernels
        self.matrices = [nn.Parameter(self.view(kernel.data)) for kernel in kernels]
        self.inner = torch.optim.Muon(
            self.matrices,
            lr=lr,
            weight_decay=decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self.param_groups = self.inner.param_groups

    @staticmethod
    def view(kernel: Tensor) -> Tensor:
        """(outputs, height * width * inputs), sharing memory with a channels-last kernel."""
        matrix = kernel.permute(0, 2, 3, 1)
        return matrix.view(len(matrix), -1)

    def step(self) -> None:
        """One step of all kernels."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            assert kernel.grad is not None
            matrix.grad = kernel.grad.permute(0, 2, 3, 1).reshape(matrix.shape)
        self.inner.step()


class Stepper:
    """One or two optimizers under one schedule."""

    def __init__(self, optimizers: list[Any], schedule_free: bool = False) -> None:
        self.optimizers, self.schedule_free = optimizers, schedule_free
        self.peaks = [[group["lr"] for group in each.param_groups] for each in optimizers]
        self.mode(training=True)

    def step(self, share: float) -> None:
        """Step with `share` of the peak learning rates."""
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            optimizer.step()

    def mode(self, training: bool) -> None:
        """Schedule-free weights are two sets, one to train and one to evaluate."""
        if self.schedule_free:
            self.optimizers[0].train() if training else self.optimizers[0].eval()


def build(run: Any, model: nn.Module) -> Stepper:
    """What `run.optimizer` names; see `experiment.Run` for the settings."""
    parameters = list(model.parameters())
    plain = run.optimizer in ("muon", "torch_muon", "soap_kernels")
    kernels = [p for p in parameters if is_kernel(p)] if plain else []
    if run.stem == "sgd":
        kernels = kernels[1:]
    taken = set(map(id, kernels))
    rest = [p for p in parameters if id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": run.sgd_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if run.bias_mult != 1:
        shifts = [m.bias for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        taken = set(map(id, shifts))
        groups[1]["params"] = [p for p in groups[1]["params"] if id(p) not in taken]
        groups.append({"params": shifts, "weight_decay": 0.0})
    if run.optimizer in ("sgd", "muon", "torch_muon", "soap_kernels"):
        lr = (run.lr if run.optimizer == "sgd" else run.sgd_lr) * run.batch / 256
        if run.rest != "sgd":
            lr, groups[0]["weight_decay"] = run.rest_lr, run.rest_decay
        if run.bias_mult != 1:
            groups[2]["lr"] = lr * run.bias_mult
        sgd: Any
        if run.rest == "adamw":
            sgd = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), foreach=True)
        elif run.rest == "soap":
            sgd = importlib.import_module("pytorch_optimizer").SOAP(groups, lr=lr)
        else:
            sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, foreach=True)
        if run.optimizer == "sgd":
            return Stepper([sgd])
        if run.optimizer == "soap_kernels":
            package = importlib.import_module("pytorch_optimizer")
            options = {"weight_decay": run.decay, "precondition_frequency": run.every}
            return Stepper([package.SOAP(kernels, lr=run.lr, **options), sgd])
        if run.optimizer == "torch_muon":
            return Stepper([Flattened(kernels, run.lr, run.decay, run.momentum), sgd])
        muon = Kernels(
            kernels, run.lr, run.momentum, run.decay, run.scale, run.hold, run.ns_steps, run.second, run.taps
        )  # fmt: skip
        return Stepper([muon, sgd])
    groups[0]["weight_decay"] = run.decay
    if run.optimizer == "adamw":
        return Stepper([torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.98), foreach=True)])
    if run.optimizer == "schedulefree":
        package = importlib.import_module("schedulefree")
        return Stepper([package.AdamWScheduleFree(groups, lr=run.lr, betas=(0.95, 0.98))], True)
    if run.optimizer == "our_soap":
        for group in groups:
            group["lr"] = run.lr
        ours = SOAP(groups, run.every)
        if not run.places:
            for stack in ours.stacks:
                stack.sides[:] = [side for side in stack.sides if side.dim != 2]
        return Stepper([ours])
    package = importlib.import_module("pytorch_optimizer")
    if run.optimizer == "soap":
        return Stepper([package.SOAP(groups, lr=run.lr, precondition_frequency=run.every)])
    if run.optimizer == "shampoo":
        shampoo = package.ScalableShampoo(
            groups,
            lr=run.lr,
            betas=(0.9, 0.98),
            decoupled_weight_decay=True,
            start_preconditioning_step=25,
            preconditioning_compute_steps=20,
            block_size=256,
            graft_type=3,  # RMSProp's step length
        )
        return Stepper([shampoo])
    raise ValueError(f"unknown optimizer {run.optimizer!r}")
