"""A network's parts: its head, whose size is the number of classes, and the stages of the body before it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffcv_imnet.config.schedules import resolutions
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.models.registry import build


@dataclass(frozen=True)
class Parts:
    """The modules that hold parameters or buffers of their own, in the order in which they run."""

    head: tuple[nn.Module, ...]
    stages: tuple[tuple[nn.Module, ...], ...]  # of the body: a stage works at one resolution

    @property
    def body(self) -> tuple[nn.Module, ...]:
        """All but the head."""
        return tuple(module for stage in self.stages for module in stage)


def parts_of(model: nn.Sequential, settings: Settings, classes: int) -> Parts:
    """Of `build_model`'s network. Raises UsageError; see `head_names`."""
    names = head_names(model, settings, classes)
    owners = {name.rpartition(".")[0] for name in names}
    head = [module for path, module in model.named_modules() if path in owners]
    stages = _stages(model, resolutions(settings)[-1])
    body = [[module for module in stage if module not in head] for stage in stages]
    return Parts(tuple(head), tuple(tuple(stage) for stage in body if stage))


def needs_parts(settings: Settings) -> bool:
    """Whether head and body are treated differently."""
    model = settings.model
    return model.freeze != "none" or model.freeze_epochs > 0 or settings.lr.body_lr_mult != 1.0


def freeze(parts: Parts, what: str) -> tuple[nn.Module, ...]:
    """Have no gradients computed for what `model.freeze` says, and return its modules.

    Raises:
        UsageError: there are fewer stages.
    """
    if what == "none":
        return ()
    count = len(parts.stages) if what == "body" else int(what)
    if count > len(parts.stages):
        raise UsageError(
            f"model.freeze {what}: the network has {len(parts.stages)} stages before its head"
        )
    frozen = tuple(module for stage in parts.stages[:count] for module in stage)
    for parameter in parameters_of(frozen):
        parameter.requires_grad_(False)
    return frozen


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Their own, without those of modules within them."""
    return [parameter for module in modules for parameter in module.parameters(recurse=False)]


def head_names(model: nn.Sequential, settings: Settings, classes: int) -> list[str]:
    """Names of the parameters that are larger where there is one class more.

    Raises:
        UsageError: there are none.
    """
    with torch.random.fork_rng(devices=[]):
        larger = build(settings.model.arch, classes + 1, False)
    ours = dict(model.named_parameters())
    named = ((f"1.{name}", parameter.shape) for name, parameter in larger.named_parameters())
    names = [name for name, shape in named if name in ours and ours[name].shape != shape]
    if not names:
        raise UsageError(
            f"model.arch {settings.model.arch!r} has no parameter whose size is the number of classes: there "
            f"is no head to tell from the body"
        )
    return names


def _stages(model: nn.Sequential, side: int) -> list[list[nn.Module]]:
    """The network's modules with parameters or buffers of their own, in the order in which one image of `side` px
    meets them; a new stage begins with the block in which feature maps become smaller than they ever were."""
    paths = {m: path for path, m in model[1].named_modules() if any(True for _ in _own(m))}
    stages: list[list[nn.Module]] = [[]]
    smallest = side * side

    def enter(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal smallest
        area = output.shape[2:].numel() if isinstance(output, Tensor) and output.ndim == 4 else None
        if area is not None and 1 < area < smallest:  # 1: averaged, as in a gate or before the head
            smallest = area
            start = _begun(_block(model[1], paths[module]), stages, paths)
            if stages[-1][:start]:
                stages.append(stages[-1][start:])
                del stages[-2][start:]
        if not any(module in stage for stage in stages):
            stages[-1].append(module)

    device = next(model.parameters()).device
    with ExitStack() as stack, torch.no_grad(), torch.random.fork_rng(devices=[]):
        for module in paths:
            stack.callback(module.register_forward_hook(enter).remove)
        model.eval()
        model(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
        model.train()
    # What only holds parameters (a class token) is of the input.
    stages[0] += [module for module in paths if not any(module in stage for stage in stages)]
    return stages


def _block(network: nn.Module, path: str) -> str:
    """The outermost module on `path` that is more than a list of others: a residual block, for one."""
    names = path.split(".")
    for depth in range(1, len(names) + 1):
        outer = ".".join(names[:depth])
        if not isinstance(network.get_submodule(outer), nn.Sequential | nn.ModuleList):
            return outer
    return path


def _begun(block: str, stages: list[list[nn.Module]], paths: dict[nn.Module, str]) -> int:
    """Where in the last stage `block` begins; at its end if it is not there, or began before that stage."""
    inside = [[f"{paths[module]}.".startswith(f"{block}.") for module in stage] for stage in stages]
    if any(map(any, inside[:-1])) or True not in inside[-1]:
        return len(stages[-1])
    return inside[-1].index(True)


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
