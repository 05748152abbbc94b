"""Muon: momentum orthogonalised by Newton-Schulz, for the kernels of convolutions."""

from typing import Any

import torch
from torch import Tensor, nn

from ffcv_imnet.train.sgd import FusedSGD


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


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of each matrix by values near one, which serves as well as one.

    X <- p(X X^T) X for the polynomials of `POLYNOMIALS[steps]`. Kernels are wide (512 x 4608 in a
    ResNet-18's last stage), so the polynomials are multiplied up among the small Gram matrices and
    applied to X once for three of them, for a quarter of the plain five's operations, and twice for
    five. Once would do in exact arithmetic; in bfloat16 the Gram matrix's rounding errors then grow
    without bound when one singular value outweighs the others.

    Five start from a Frobenius norm of one, as published. Three start closer, from a Schatten 4-norm just below
    one, which is a norm of the Gram matrix at hand; the 2 % keep rounding from lifting a
    singular value above one, where the first polynomial is steep.

    Args:
        matrices: (n, rows, columns), any float type.
        steps: 3 or 5.
        dtype: computed in it.

    Returns:
        The same shape, in `dtype`.
    """
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for block in (POLYNOMIALS[steps][:3], POLYNOMIALS[steps][3:]):
        if not block:
            continue
        gram = x @ x.mT
        if steps == 3:
            scale = 1.02 * gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).sqrt()
            x, gram = x / scale, gram / scale.square()
        product: Tensor | None = None
        for step, (a, b, c) in enumerate(block, 1):
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal(dim1=1, dim2=2).add_(a)
            product = polynomial if product is None else polynomial @ product
            if step < len(block):
                gram = polynomial @ gram @ polynomial  # of the next X; all of them commute
        assert product is not None
        x = product @ x
    return x.mT if tall else x


class MuonSGD(FusedSGD):
    """Muon for the kernels of convolutions, SGD for all other parameters, as one optimizer.

    Muon steps along the orthogonalised Nesterov momentum of a kernel flattened to
    (outputs, inputs * height * width) (kellerjordan.github.io/posts/muon); `step` puts that
    direction in the gradient's place and leaves the rest to fused SGD, whose weight decay without
    momentum is the decoupled one. The direction is not scaled by shape (there: by
    sqrt(max(1, rows / columns)), one for 3x3 kernels, sqrt(2) to 2 for a ResNet's widening 1x1
    kernels). torch.optim.Muon takes two-dimensional parameters only, a matrix at a time, and makes the
    host wait for fp16's overflow flag, which two optimizers would moreover each judge for themselves.
    Kernels of one shape are orthogonalised together.

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
        super().start()
        for group in self.param_groups:
            for kernel in group["params"] if "ns_steps" in group else ():
                self.state[kernel].setdefault("muon_momentum", torch.zeros_like(kernel))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters; none moves where fp16's gradients overflowed."""
        # GradScaler sets both for the time of a step, and multiplies by a scale that is there before.
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            if "ns_steps" not in group:
                continue
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for kernels in by_shape.values():
                moving = [
                    self._momentum(kernel, group["muon_momentum"], scale, overflow)
                    for kernel in kernels
                ]
                matrices = torch.stack([direction.flatten(1) for direction in moving])
                straight = newton_schulz(matrices, group["ns_steps"], self.dtype)
                for kernel, matrix in zip(kernels, straight, strict=True):
                    assert kernel.grad is not None
                    kernel.grad.copy_(matrix.reshape(kernel.shape))
                    if scale is not None:
                        kernel.grad.mul_(scale)  # fused SGD divides by it
        return super().step(closure)

    def _momentum(
        self, kernel: nn.Parameter, momentum: float, scale: Tensor | None, overflow: Tensor | None
    ) -> Tensor:
        """Nesterov's momentum after this gradient; it stays as it was where fp16 overflowed."""
        assert kernel.grad is not None
        grad = kernel.grad if scale is None else kernel.grad / scale
        average: Tensor = self.state[kernel]["muon_momentum"]
        new = average.lerp(grad, 1 - momentum)
        average.copy_(new if overflow is None else torch.where(overflow > 0, average, new))
        return grad.lerp(average, momentum)
