"""Batches straight from an ImageFolder tree, for judging networks on pixels that no .beton changed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ffcv_imnet.data import Batches, pad
from ffcv_imnet.distributed import World
from ffcv_imnet.errors import RunError
from ffcv_imnet.images import Pixels
from ffcv_imnet.images.folder import ImageFolderTree
from ffcv_imnet.images.pixels import BadImage
from ffcv_imnet.images.preprocess import Preprocess, preprocess


class FolderLoader:
    """Each photograph once over all processes, in the order and shape of `data.ValLoader`.

    Args:
        root: the tree, holding a folder a class.
        how: resize and crop.
        batch_size: global.
        world: whose share to take.
        workers: decoding threads of this process.

    Raises:
        UsageError: `root` is not an ImageFolder tree.
    """

    def __init__(
        self, root: Path, how: Preprocess, batch_size: int, world: World, workers: int
    ) -> None:
        self.tree, self.how, self.world, self.workers = ImageFolderTree(root), how, world, workers
        self.samples = len(self.tree)
        share = -(-self.samples // world.size)
        self.local_batch = max(1, min(batch_size // world.size, share))

    def batches(self) -> Batches:
        """uint8 (batch, 3, side, side), channels last, and int64 labels, on the world's device.

        Raises:
            RunError: a photograph cannot be read; names it.
        """
        order = np.arange(self.world.rank, self.samples, self.world.size)
        parts = [order[i : i + self.local_batch] for i in range(0, len(order), self.local_batch)]
        with ThreadPoolExecutor(self.workers) as pool:  # Pillow decodes outside Python's lock
            ahead = [pool.submit(self._photo, index) for index in parts[0]] if parts else []
            for position, part in enumerate(parts):
                waiting = ahead
                following = parts[position + 1 : position + 2]
                ahead = [
                    pool.submit(self._photo, index)
                    for next_part in following
                    for index in next_part
                ]
                try:
                    pixels = np.stack([future.result() for future in waiting])
                except RunError:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # channels last, no copy
                labels = torch.from_numpy(self.tree.labels[part])
                device = self.world.device
                yield pad(images.to(device), labels.to(device), self.local_batch)

    def _photo(self, index: int) -> Pixels:
        try:
            data, _ = self.tree.read(index)
            return preprocess(data, self.how)
        except (OSError, BadImage) as error:
            name = f"{self.tree.where}/{self.tree.name(index)}"
            raise RunError(f"{name}: the photograph cannot be read ({error})") from error
