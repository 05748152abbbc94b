"""Muon: momentum orthogonalised by Newton-Schulz, for the kernels of convolutions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ffcv_imnet.train.sgd import FusedSGD, like


def is_kernel(parameter: Tensor) -> bool:
    """Whether Muon takes it: the kernel of a convolution that mixes channels.

    Not a depthwise one (BlurPool's are no parameters at all): its rows do not act on a common space.
    The linear head is left to SGD as in the published uses (kellerjordan.github.io/posts/muon).
    """
    return parameter.ndim == 4 and parameter.shape[1] > 1


POLYNOMIALS = {
    # Minimax on [0.01, 1], each on what the one before makes of it (arXiv:2505.16932): of all odd quintics
    # the ones that bring the farthest singular value nearest to one. The third leaves 0.73 to 1.27.
    3: ((8.0934, -23.6206, 17.4463), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)),
    # Keller Jordan's (kellerjordan.github.io/posts/muon), steep at zero: about 0.7 to 1.2.
    5: ((3.4445, -4.7750, 2.0315),) * 5,
}


NARROWEST = 128  # narrower Gram matrices are padded to it: a little arithmetic for fewer launches
SMALLEST = 1e-18  # of a squared norm: what float32 can still square


def newton_schulz(
    stacks: Sequence[Tensor], steps: int, out: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Replace the singular values of each matrix by values near one, which serves as well as one.

    X <- p(X X^T) X for the polynomials of `POLYNOMIALS[steps]`. Kernels are wide (512 x 4608 in a
    ResNet-18's last stage), so the polynomials are multiplied up among the small Gram matrices and
    applied to X once for three of them, for a quarter of the plain five's FLOPs, and twice for
    five. Once would do in exact arithmetic; in bfloat16 the Gram matrix's rounding errors then grow
    without bound when one singular value outweighs the others.

    Five start from a Frobenius norm of one, as published. Three start closer, from a Schatten 4-norm just below
    one, which is a norm of the Gram matrix at hand; the 2 % keep rounding from lifting a
    singular value above one, where the first polynomial is steep. X is not divided by its norm: the
    Gram matrix is, and the product of the polynomials.

    On a GPU this is so little arithmetic that launches cost more: a stack is multiplied at once, and
    between X and X the Gram matrices of one width, of whatever stacks.

    Args:
        stacks: matrices of one shape each, (n, rows, columns), of one float type, which is computed in.
        steps: 3 or 5.
        out: of the same shapes, to put the results into; new memory if None.

    Returns:
        `out`.
    """
    squares = _Squares(stacks)
    first, second = POLYNOMIALS[steps][:3], POLYNOMIALS[steps][3:]
    gram = squares.gram(stacks)
    norms = [_squared_norm(matrices, steps) for matrices in squares.of_width(gram)]
    torch._foreach_clamp_min_(norms, SMALLEST)
    for matrices, norm in zip(squares.of_width(gram), norms, strict=True):
        matrices.div_(norm)
    product = squares.product(first, gram)
    torch._foreach_sqrt_(norms)
    for matrices, norm in zip(squares.of_width(product), norms, strict=True):
        matrices.div_(norm)
    if not second:
        return squares.apply(product, stacks, out)
    stacks = squares.apply(product, stacks, None)
    return squares.apply(squares.product(second, squares.gram(stacks)), stacks, out)


def _squared_norm(gram: Tensor, steps: int) -> Tensor:
    """That of X by whose root the first polynomial wants X divided. (n, w, w) -> (n, 1, 1), at least float32."""
    dtype = torch.promote_types(gram.dtype, torch.float32)
    if steps == 3:
        return torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True, dtype=dtype).mul_(1.02**2)
    return gram.diagonal(dim1=1, dim2=2).sum(1, dtype=dtype)[:, None, None]


class _Squares:
    """The square matrices that belong to stacks of matrices, all in one memory, those of one width together."""

    def __init__(self, stacks: Sequence[Tensor]) -> None:
        self.sides = [min(x.shape[1:]) for x in stacks]
        self.counts: dict[int, int] = {}  # of matrices of a width
        self.places: list[tuple[int, slice]] = []  # of a stack: width, and which of its matrices
        for x, side in zip(stacks, self.sides, strict=True):
            width = max(side, NARROWEST)
            begin = self.counts.get(width, 0)
            self.counts[width] = begin + len(x)
            self.places.append((width, slice(begin, begin + len(x))))
        self.identity = stacks[0].new_zeros(sum(n * w * w for w, n in self.counts.items()))
        for matrices in self.of_width(self.identity):
            matrices.diagonal(dim1=1, dim2=2).fill_(1)

    def of_width(self, memory: Tensor) -> list[Tensor]:
        """(n, w, w) for each width."""
        parts = memory.split([n * w * w for w, n in self.counts.items()])
        return [part.view(n, w, w) for part, (w, n) in zip(parts, self.counts.items(), strict=True)]

    def of_stack(self, memory: Tensor) -> list[Tensor]:
        """(n, side, side) for each stack, without the padding."""
        matrices = dict(zip(self.counts, self.of_width(memory), strict=True))
        return [
            matrices[width][which, :side, :side]
            for side, (width, which) in zip(self.sides, self.places, strict=True)
        ]

    def gram(self, stacks: Sequence[Tensor]) -> Tensor:
        """X X^T of each wide matrix X, X^T X of each tall one; zero in the padding."""
        memory = torch.zeros_like(self.identity)
        for x, target in zip(stacks, self.of_stack(memory), strict=True):
            wide = x if x.shape[1] <= x.shape[2] else x.mT
            torch.bmm(wide, wide.mT, out=target)
        return memory

    def apply(
        self, memory: Tensor, stacks: Sequence[Tensor], out: Sequence[Tensor] | None
    ) -> Sequence[Tensor]:
        """Each square matrix times its wide X, or its tall X times it."""
        out = [torch.empty_like(x) for x in stacks] if out is None else out
        for x, square, target in zip(stacks, self.of_stack(memory), out, strict=True):
            if x.shape[1] <= x.shape[2]:
                torch.bmm(square, x, out=target)
            else:
                torch.bmm(x, square.mT, out=target)
        return out

    def product(self, polynomials: Sequence[tuple[float, float, float]], memory: Tensor) -> Tensor:
        """a + b G + c G^2 of the Gram matrices in `memory`, times the next polynomial of what this one makes
        of them, and so on. All of them commute."""
        product: Tensor | None = None
        for step, (a, b, c) in enumerate(polynomials, 1):
            polynomial = torch.add(memory, self.identity, alpha=a / b)
            for p, gram in zip(self.of_width(polynomial), self.of_width(memory), strict=True):
                torch.baddbmm(p, gram, gram, beta=b, alpha=c, out=p)  # b (G + a / b) + c G^2
            product = polynomial if product is None else self._times(polynomial, product)
            if step < len(polynomials):
                memory = self._times(self._times(polynomial, memory), polynomial)
        assert product is not None
        return product

    def _times(self, left: Tensor, right: Tensor) -> Tensor:
        memory = torch.empty_like(left)
        for a, b, target in zip(*map(self.of_width, (left, right, memory)), strict=True):
            torch.bmm(a, b, out=target)
        return memory


@dataclass(frozen=True)
class _Kernels:
    """A group of kernels in one memory, those of one shape together: what is done to each element is one launch."""

    parameters: list[nn.Parameter]  # by shape
    momentum: Tensor  # (elements,)

    @staticmethod
    def of(group: dict[str, Any]) -> "_Kernels":
        parameters = sorted(group["params"], key=lambda kernel: tuple(kernel.shape))
        size = sum(kernel.numel() for kernel in parameters)
        return _Kernels(parameters, parameters[0].new_zeros(size, requires_grad=False))

    def each(self, memory: Tensor) -> list[Tensor]:
        """Views of `memory` with the kernels' shapes and strides: a row of the matrix is an output, its columns are
        in the order in which the kernel has them in memory, of which the result does not depend."""
        parts = memory.split([kernel.numel() for kernel in self.parameters])
        return [
            part.as_strided(kernel.shape, kernel.stride(), part.storage_offset())
            for part, kernel in zip(parts, self.parameters, strict=True)
        ]

    def gradients(self, memory: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients that there are, and the views of `memory` of those kernels."""
        every = zip(self.parameters, self.each(memory), strict=True)
        pairs = [(kernel.grad, part) for kernel, part in every if kernel.grad is not None]
        return [grad for grad, _ in pairs], [part for _, part in pairs]

    def stacks(self, memory: Tensor) -> list[Tensor]:
        """(n, outputs, inputs * height * width) for each shape."""
        shapes = [
            (shape, len(list(same))) for shape, same in groupby(p.shape for p in self.parameters)
        ]
        parts = memory.split([n * shape.numel() for shape, n in shapes])
        return [part.view(n, shape[0], -1) for part, (shape, n) in zip(parts, shapes, strict=True)]


class MuonSGD(FusedSGD):
    """Muon for the kernels of convolutions, SGD for all other parameters, as one optimizer.

    Muon steps along the orthogonalised Nesterov momentum of a kernel flattened to
    (outputs, inputs * height * width) (kellerjordan.github.io/posts/muon); `step` puts that
    direction in the gradient's place and leaves the rest to fused SGD, whose weight decay without
    momentum is the decoupled one. The direction is not scaled by shape (there: by
    sqrt(max(1, rows / columns)), one for 3x3 kernels, sqrt(2) to 2 for a ResNet's widening 1x1
    kernels). torch.optim.Muon takes two-dimensional parameters only, a matrix at a time, and makes the
    host wait for fp16's overflow flag, which two optimizers would moreover each evaluate for themselves.

    Args:
        groups: as SGD's; a group with "ns_steps" is Muon's and has "muon_momentum" as well, with
            "momentum" 0.
        nesterov: of the SGD groups.
        dtype: of Newton-Schulz.
    """

    def __init__(
        self, groups: list[dict[str, Any]], nesterov: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(groups, nesterov)
        self.dtype = dtype

    def start(self) -> None:
        """Momenta for all parameters, Muon's as parts of one memory; a loaded state's are copied there."""
        super().start()
        self.kernels = [
            (group, _Kernels.of(group))
            for group in self.param_groups
            if "ns_steps" in group and group["params"]
        ]
        for _, kernels in self.kernels:
            for kernel, part in zip(
                kernels.parameters, kernels.each(kernels.momentum), strict=True
            ):
                part.copy_(like(kernel, self.state[kernel].get("muon_momentum")))
                self.state[kernel]["muon_momentum"] = part

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters; none moves where fp16's gradients overflowed."""
        # GradScaler sets both for the time of a step, and multiplies by a scale that is there before.
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group, kernels in self.kernels:
            gradient = torch.zeros_like(kernels.momentum)
            grads, parts = kernels.gradients(gradient)
            if not grads:
                continue
            torch._foreach_copy_(parts, grads)
            if scale is not None:
                gradient.div_(scale)
            if overflow is not None:  # from itself the momentum then moves nowhere
                gradient = torch.where(overflow > 0, kernels.momentum, gradient)
            kernels.momentum.lerp_(gradient, 1 - group["muon_momentum"])
            direction = gradient.lerp_(kernels.momentum, group["muon_momentum"]).to(self.dtype)
            straight = torch.empty_like(direction)
            newton_schulz(kernels.stacks(direction), group["ns_steps"], kernels.stacks(straight))
            if scale is not None:
                straight.mul_(scale)  # fused SGD divides by it
            torch._foreach_copy_(grads, kernels.gradients(straight)[1])
        return super().step(closure)
