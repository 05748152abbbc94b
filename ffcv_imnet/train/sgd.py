"""torch's fused SGD, with momenta that are zero and not nothing before the first step."""

from typing import Any, cast

import torch


class FusedSGD(torch.optim.SGD):
    """SGD that reads fp16's overflow flag on the device; torch's others make the host wait for it.

    torch's own makes its momenta in the first step, by empty_like, and leaves them unwritten if the
    gradients overflow in it, as they do under GradScaler's first scale of 65536. From zero the
    first step that counts has the same bits: momentum * 0 + gradient.

    Args:
        groups: parameters, weight decay and momentum. The learning rate is set at every step.
        nesterov: of the groups that have momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], nesterov: bool) -> None:
        super().__init__(groups, lr=0.0, fused=True)
        for group in self.param_groups:
            group["nesterov"] = nesterov and group["momentum"] > 0
        self.register_load_state_dict_post_hook(_start)
        self.start()

    def start(self) -> None:
        """Momenta for all parameters that have none: at first, and after loading the state of a run that
        had made no step."""
        for group in self.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                state = self.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def _start(optimizer: torch.optim.Optimizer) -> None:
    cast(FusedSGD, optimizer).start()
