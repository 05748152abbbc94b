"""Batches straight from an ImageFolder tree, for evaluating networks on pixels that no .beton changed."""

import itertools
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ffcv_imnet.core.errors import RunError
from ffcv_imnet.data.loader import Batches, exact_share, pad
from ffcv_imnet.images import Pixels
from ffcv_imnet.images.folder import ImageFolderTree, alike
from ffcv_imnet.images.pixels import BadImage
from ffcv_imnet.images.preprocess import Preprocess, preprocess
from ffcv_imnet.machine.distributed import World


class FolderLoader:
    """Each image once over all processes, in the order and shape of `data.ValLoader`.

    `batch_size` is global, `workers` are this process's decoding threads.

    Raises:
        UsageError: `root` is not an ImageFolder tree.
    """

    def __init__(
        self, root: Path, how: Preprocess, batch_size: int, world: World, workers: int
    ) -> None:
        self.tree, self.how = ImageFolderTree(root, may_be_empty=True), how
        self.world, self.workers = world, workers
        odd = [*self.tree.oddities, *alike(self.tree.classes)]
        for remark in odd if world.is_main else ():
            print(f"warning: {remark}", file=sys.stderr, flush=True)
        self.samples = len(self.tree)
        self.order, self.local_batch = exact_share(self.samples, batch_size, world)

    def batches(self) -> Batches:
        """uint8 (batch, 3, side, side), channels last, and int64 labels, on the world's device.

        Raises:
            RunError: an image cannot be read; names it.
        """
        size, device = self.local_batch, self.world.device
        parts = [self.order[i : i + size] for i in range(0, len(self.order), size)]
        none = self.order[:0]
        with ThreadPoolExecutor(self.workers) as pool:  # Pillow decodes outside Python's lock
            try:
                ahead: list[Future[Pixels]] = []
                for part, following in itertools.pairwise([none, *parts, none]):
                    waiting, ahead = ahead, [pool.submit(self._photo, i) for i in following]
                    if not waiting:
                        continue
                    pixels = np.stack([future.result() for future in waiting])
                    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # channels last, no copy
                    labels = torch.from_numpy(self.tree.labels[part])
                    yield pad(images.to(device), labels.to(device), size)
            finally:  # the consumer may have left
                pool.shutdown(wait=False, cancel_futures=True)

    def _photo(self, index: int) -> Pixels:
        try:
            data, _ = self.tree.read(index)
            return preprocess(data, self.how)
        except (OSError, BadImage) as error:
            name = f"{self.tree.where}/{self.tree.name(index)}"
            raise RunError(f"{name}: the image cannot be read ({error})") from error
