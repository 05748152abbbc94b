"""Where a network's tensors stand in a file of weights, whatever wrapped them there.

A file is a dict of tensors, or of dicts of dicts of tensors: {"model_ema": {"module.conv1.weight": ...}}. A
dict's key and the name that DistributedDataParallel, torch.compile, Lightning or Composer puts before a
parameter are here one and the same, a prefix: the one is found under which the network's names stand.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ffcv_imnet.models.blurpool import BlurConv2d

State = dict[str, Tensor]

LONGEST_NAME = 500  # characters
# Components that wrappers put anywhere in a name: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGED = re.compile(r"(^|[._])ema([._]|$)", re.IGNORECASE)  # state_dict_ema, model_ema, ema_model
# No weights: BatchNorm's counter, absent from old files, and BlurPool's fixed filter, here `BlurConv2d.kernel`.
FIXED = ".num_batches_tracked", ".blur_filter"


def tensors_of(content: Any) -> State:
    """All tensors in nested dicts, which `checkpoint.read` has found to be no cycle, by their dotted paths without
    `WRAPPERS`.

    Raises ValueError, in words, where there are none.
    """
    if isinstance(content, Tensor):
        raise ValueError("holds one tensor, which is no state dict")
    found: State = {}
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        path, held = waiting.pop()
        if isinstance(held, Tensor):
            found.setdefault(WRAPPERS.sub("", path.removesuffix(".")), held)
        elif isinstance(held, Mapping):
            named = [(f"{path}{key}.", value) for key, value in reversed(list(held.items()))]
            waiting += [(name, value) for name, value in named if len(name) <= LONGEST_NAME]
    if not found:
        raise ValueError("holds neither a checkpoint of this project nor a state dict")
    return found


def names_of(network: nn.Module) -> dict[str, str]:
    """For each name that a tensor of `network` may have in a file, its name here.

    They differ for convolutions behind a BlurPool, whose wrapper adds `conv` to the name: weights
    from before the blur fit the network that has it, and the other way round.
    """
    state = network.state_dict()
    names = {name: name for name in state}
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            outer, _, last = path.rpartition(".")
            blurred = last == "conv" and isinstance(network.get_submodule(outer), BlurConv2d)
            other = outer if blurred else f"{path}.conv"
            for key in module.state_dict():
                names.setdefault(f"{other}.{key}", f"{path}.{key}")
    return names


def prefixes(state: State, names: Iterable[str]) -> list[str]:
    """Under what `names` stand in `state`, best first: where most of them do, then averaged weights (an average
    that has not begun is none), then the shortest."""
    known, counts = set(names), Counter[str]()
    for key in state:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        counts.update(key[:start] for start in starts if key[start:] in known)

    def unbegun(prefix: str) -> bool:  # by AveragedModel's counter
        count = state.get(prefix[: max(0, prefix.rfind("module."))] + "n_averaged")
        return count is not None and count.numel() == 1 and not count.item()

    found = [prefix for prefix in counts if not unbegun(prefix)]
    return sorted(found, key=lambda p: (-counts[p], not is_averaged(p), len(p), p))


def is_averaged(prefix: str) -> bool:
    """Whether what stands under it is an average of weights, by its name."""
    return AVERAGED.search(prefix) is not None


def under(state: State, prefix: str) -> State:
    """What stands under `prefix`, without it and without what is no weight."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith(FIXED)
    }


def find(state: State, names: Mapping[str, str]) -> tuple[str, State]:
    """The best prefix, and what stands under it, renamed by `names` where they have a name for it."""
    prefix = next(iter(prefixes(state, (n for n in names if not n.endswith(FIXED)))), "")
    return prefix, {names.get(key, key): value for key, value in under(state, prefix).items()}
