"""Norms of gradient, weights and update, by which a run's log shows where its learning rate stood.

Measured only in the steps after which the host reads from the device anyway (`Watch.will_look`), so no step waits
for them; they read numbers and change none. What such a step costs: three passes over all parameters and a copy
of them, while no activation is in memory: for a ResNet-50 100 MB and, by a GPU's memory bandwidth, under a
millisecond every five seconds.
"""

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

QUANTITIES = "gradient", "weights", "update"


def group_name(group: dict[str, Any]) -> str:
    """muon: kernels that Muon moves; sgd: other parameters of two and more dimensions; sgd_1d: BatchNorm's and
    biases; soap and soap_1d: the same two of SOAP. Told from what is in the group: checkpoints keep groups, and older ones have no names. Of a body with a
    factor of its own (lr.body_lr_mult) and of its head: muon_body, sgd_head and so on."""
    part = f"_{group['part']}" if "part" in group else ""
    if "ns_steps" in group:
        return "muon" + part
    rule = "sgd" if "momentum" in group else "soap"
    return (rule if group["params"][0].ndim > 1 else f"{rule}_1d") + part


def norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all elements together, a float32 scalar on their device."""
    return torch.stack(torch._foreach_norm(tensors)).norm()


class Norms:
    """Of one step, for each of the optimizer's groups that has gradients. On the device until `read`."""

    @torch.no_grad()
    def before_update(self, optimizer: Optimizer, scaler: GradScaler) -> None:
        """Between backward and the optimizer's step, which may write over the gradients."""
        self.names: list[str] = []
        self.parameters: list[list[Tensor]] = []
        self.values: list[list[Tensor]] = []  # for each group: of its `QUANTITIES`
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradient = norm([p.grad for p in parameters])
            gradient /= scaler.scale(torch.ones_like(gradient))  # fp16's; one otherwise
            self.names.append(group_name(group))
            self.parameters.append(parameters)
            self.values.append([gradient, norm(parameters)])
        self.before = [[p.detach().clone() for p in group] for group in self.parameters]

    @torch.no_grad()
    def after_update(self) -> None:
        """Behind the optimizer's step."""
        for values, before, after in zip(self.values, self.before, self.parameters, strict=True):
            torch._foreach_sub_(before, after)
            values.append(norm(before))
        self.before = []

    def read(self, step: int, loss: Tensor) -> dict[str, float]:
        """The log's row: step, its loss and `GROUP_QUANTITY`, without what is not finite. Waits for the device."""
        names = ["loss", *(f"{name}_{what}" for name in self.names for what in QUANTITIES)]
        values = torch.stack([loss.float(), *chain(*self.values)]).tolist()
        finite = {n: v for n, v in zip(names, values, strict=True) if math.isfinite(v)}
        return {"step": step} | {name: float(f"{value:.6g}") for name, value in finite.items()}
