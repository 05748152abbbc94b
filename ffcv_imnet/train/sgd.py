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
        """Momenta for all parameters, zero where none was loaded, each laid out as its parameter: the fused
        step reads and writes as many numbers as that has, wherever they lie.

        Raises:
            ValueError: a loaded one is of another shape, or none.
        """
        for group in self.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                state = self.state[parameter]
                state["momentum_buffer"] = like(parameter, state.get("momentum_buffer"))


def like(parameter: torch.Tensor, loaded: Any) -> torch.Tensor:
    """A loaded average in memory of its own, as `parameter` is; zeros for None. Raises ValueError."""
    average = torch.zeros_like(parameter)
    if loaded is None:
        return average
    if not isinstance(loaded, torch.Tensor) or loaded.shape != parameter.shape:
        found = list(loaded.shape) if isinstance(loaded, torch.Tensor) else loaded
        raise ValueError(
            f"{found} among the optimizer's averages, where {list(parameter.shape)} is needed"
        )
    return average.copy_(loaded)


def _start(optimizer: torch.optim.Optimizer) -> None:
    cast(FusedSGD, optimizer).start()
