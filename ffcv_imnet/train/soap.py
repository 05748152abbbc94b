"""SOAP: Adam in the bases in which a layer's gradients are uncorrelated (arXiv:2409.11321)."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ffcv_imnet.train.sgd import like

BETA = 0.95  # of the averages of gradients, of their squares and of their products, as published
EPSILON = 1e-8
WIDEST = 4096  # a longer side keeps its own coordinates
SIDES = {1: "outputs", 2: "places", 3: "inputs"}  # by dimension of a stack
Memory = dict[int, Tensor]  # by width w: (n, w, w), of all sides that long


class Side(NamedTuple):
    """One of the sides of the layers of one shape, and where its square matrices lie in a `Memory`."""

    dim: int  # a key of SIDES
    width: int
    which: slice

    def of(self, memory: Memory) -> Tensor:
        """(layers, width, width), a view."""
        return memory[self.width][self.which]


class Stack(NamedTuple):
    """Layers of one shape, one behind another wherever there is a number for each weight."""

    parameters: list[nn.Parameter]
    begin: int
    shape: tuple[int, int, int, int]  # layers, outputs, positions in the kernel, inputs
    sides: list[Side]  # none for BatchNorm and biases

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    def of(self, numbers: Tensor) -> Tensor:
        """(layers, outputs, places, inputs), a view."""
        return numbers[self.begin : self.begin + self.size].view(self.shape)

    def each(self, numbers: Tensor) -> list[Tensor]:
        """For each layer a view with the parameter's shape; a kernel's in the order of channels_last."""
        parts = self.of(numbers).unbind()
        shape = self.parameters[0].shape
        if len(shape) > 2:
            return [part.unflatten(1, shape[2:]).movedim(-1, 1) for part in parts]
        return [part.view(shape) for part in parts]


def stacks_of(parameters: Sequence[nn.Parameter]) -> tuple[list[Stack], dict[int, int]]:
    """All parameters, by shape, and how many sides there are of each width."""
    by_shape = sorted(parameters, key=lambda p: (-p.ndim, tuple(p.shape)))
    stacks, begin, counts = [], 0, dict[int, int]()
    for size, same in groupby(by_shape, key=lambda p: p.shape):
        layers = list(same)
        outputs, inputs = (*size, 1, 1)[:2]
        shape = len(layers), outputs, size[2:].numel(), inputs
        sides = []
        for dim in SIDES if len(size) > 1 else ():
            width = shape[dim]
            if 1 < width <= WIDEST:
                first = counts.get(width, 0)
                counts[width] = first + len(layers)
                sides.append(Side(dim, width, slice(first, counts[width])))
        stacks.append(Stack(layers, begin, shape, sides))
        begin += stacks[-1].size
    return stacks, counts


def product(x: Tensor, dim: int, out: Tensor) -> None:
    """Each layer's inner products of the slices along `dim`: (n, outputs, places, inputs) -> (n, w, w)."""
    if dim == 3:
        columns = x.flatten(1, 2)
        torch.bmm(columns.mT, columns, out=out)
    else:
        rows = x.transpose(1, dim).flatten(2)
        torch.bmm(rows, rows.mT, out=out)


def rotated(x: Tensor, dim: int, bases: Tensor) -> Tensor:
    """Each layer's coordinates along `dim` in its basis, whose columns are the vectors. Shapes as in `product`."""
    if dim == 1:
        return torch.bmm(bases.mT, x.flatten(2)).view_as(x)
    if dim == 2:
        return bases.mT[:, None] @ x
    return torch.bmm(x.flatten(1, 2), bases).view_as(x)


class SOAP(torch.optim.Optimizer):
    """Adam with each layer's gradient rotated, side by side, into the eigenvectors of its average product with itself.

    A kernel has three sides: outputs, positions in the kernel, inputs; a linear layer has two. BatchNorm's scales and
    shifts and biases are Adam's unrotated. The bases start as the unit ones and follow by a step of orthogonal
    iteration after each of the first `every` steps and every `every` steps then, so that no step waits for an
    eigendecomposition. Adam's averages live in the bases and turn with them. Weight decay is decoupled
    (arXiv:1711.05101). One count of steps corrects all averages: what waited while the head trained alone starts with steps
    of a fifth of Adam's, which grow in about twenty.

    A step is few launches: weights of one shape are rotated together, and what is done to each number
    is done to all weights at once. fp16's scale and overflow flag are read on the device. Products and rotations may be
    TF32's: rounded to its ten bits they ended 0.6 points lower, within the noise (one seed, records/2026-11-25_transfer).

    Args:
        groups: parameters with "weight_decay"; the learning rate is set at every step.
        every: steps between turns of the bases.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves both to `step`

    def __init__(self, groups: list[dict[str, Any]], every: int) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.every = every
        self.register_state_dict_pre_hook(_keep_calls)
        self.register_load_state_dict_post_hook(_start)
        self.start()

    def start(self) -> None:
        """The state of all parameters, each number's in one memory: zero, or as it was loaded.

        Raises:
            ValueError: something loaded is of another shape, or no count of steps.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.stacks, counts = stacks_of(parameters)
        new = parameters[0].detach().new_zeros
        size = sum(p.numel() for p in parameters)
        self.average, self.square = new(size), new(size)
        self.steps = new(())  # without those that overflowed
        self.calls = 0  # with them, which the host knows
        self.grams = {width: new(count, width, width) for width, count in counts.items()}
        self.bases = {width: new(count, width, width) for width, count in counts.items()}
        for basis in self.bases.values():
            basis.diagonal(dim1=1, dim2=2).fill_(1)
        for stack in self.stacks:
            numbers = {"average": stack.each(self.average), "square": stack.each(self.square)}
            for side in stack.sides:
                numbers[f"{SIDES[side.dim]}_gram"] = list(side.of(self.grams))
                numbers[f"{SIDES[side.dim]}_basis"] = list(side.of(self.bases))
            for index, parameter in enumerate(stack.parameters):
                loaded = self.state[parameter]
                own = {name: views[index] for name, views in numbers.items()}
                own["steps"] = self.steps  # the same of all
                self.calls = loaded.get("calls", self.calls)
                for name, view in own.items():
                    if name in loaded:
                        view.copy_(like(view, loaded[name]))
                self.state[parameter] = own
        if not isinstance(self.calls, int) or self.calls < 0:
            raise ValueError("an optimizer without a count of its steps")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all parameters; nothing moves where fp16's gradients overflowed."""
        # GradScaler sets both for the time of a step.
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        gradient = torch.zeros_like(self.average)
        parts = {
            p: part
            for stack in self.stacks
            for p, part in zip(stack.parameters, stack.each(gradient), strict=True)
            if p.grad is not None
        }
        torch._foreach_copy_(list(parts.values()), [cast(Tensor, p.grad) for p in parts])
        if scale is not None:
            gradient.div_(scale)
        weight: Any = 1 - BETA
        if overflow is None:
            self.steps.add_(1)
        else:
            good = 1 - overflow.view(())
            gradient.masked_fill_(overflow > 0, 0.0)
            weight = good * weight
            self.steps.add_(good)
        products = {width: torch.empty_like(gram) for width, gram in self.grams.items()}
        for stack in self.stacks:
            for side in stack.sides:
                product(stack.of(gradient), side.dim, side.of(products))
        self._rotate(gradient, self.bases)
        self.average.lerp_(gradient, weight)
        self.square.lerp_(gradient.square_(), weight)
        update = torch.sqrt(self.square, out=gradient)  # in whose memory `parts` are
        update.add_(EPSILON).reciprocal_().mul_(self.average)
        # Adam's corrections of both averages, which have one BETA: sqrt(c) / c
        update.mul_((1 - BETA ** self.steps.clamp(min=1)).rsqrt())
        self._rotate(update, self.bases, back=True)
        if overflow is not None:
            update.mul_(good)
        self._move(parts, None if overflow is None else good)
        for width, gram in self.grams.items():
            gram.lerp_(products[width], weight)
        self.calls += 1
        if self.calls < self.every or self.calls % self.every == 0:
            self._turn()

    def _move(self, updates: dict[nn.Parameter, Tensor], good: Tensor | None) -> None:
        """The weights, by their updates, and decay, which `good` of 0 leaves out."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p in updates]
            if not moved:
                continue
            if group["weight_decay"]:
                left: Any = 1 - group["lr"] * group["weight_decay"]
                torch._foreach_mul_(moved, left if good is None else 1 + (left - 1) * good)
            torch._foreach_add_(moved, [updates[p] for p in moved], alpha=-group["lr"])

    def _turn(self) -> None:
        """One step of orthogonal iteration of all bases, by falling eigenvalue; Adam's averages follow."""
        turns, orders = Memory(), Memory()
        for width, basis in self.bases.items():
            image = self.grams[width] @ basis
            order = (basis * image).sum(1).argsort(1, descending=True)
            new = torch.linalg.qr(image.take_along_dim(order[:, None], 2)).Q
            # At first most gradients are zero, behind BatchNorms that start so: whatever QR makes of that.
            sound = new.isfinite().all(2).all(1)[:, None]
            orders[width] = torch.where(sound, order, torch.arange(width, device=order.device))
            new = torch.where(sound[:, None], new, basis)
            turns[width] = basis.mT @ new
            basis.copy_(new)
        self._rotate(self.average, turns)
        for stack in self.stacks:
            squares = stack.of(self.square)
            for side in stack.sides:
                order = side.of(orders)
                shape = [len(order), 1, 1, 1]
                shape[side.dim] = side.width
                squares.copy_(squares.take_along_dim(order.view(shape), side.dim))

    def _rotate(self, numbers: Tensor, bases: Memory, back: bool = False) -> None:
        """The numbers of all layers, in place, into the coordinates of `bases`, or back."""
        for stack in self.stacks:
            part = turned = stack.of(numbers)
            for side in stack.sides:
                basis = side.of(bases)
                turned = rotated(turned, side.dim, basis.mT if back else basis)
            if stack.sides:
                part.copy_(turned)


def _keep_calls(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        state["calls"] = cast(SOAP, optimizer).calls


def _start(optimizer: torch.optim.Optimizer) -> None:
    cast(SOAP, optimizer).start()
