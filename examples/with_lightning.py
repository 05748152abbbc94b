"""A LightningModule that trains on two .beton files, on one device or several.

pip install lightning
python examples/with_lightning.py data/beton/train.beton data/beton/val.beton
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchvision.models import resnet18

from ffcv_imnet import ImageLoader


class Classifier(lightning.LightningModule):
    """ResNet-18 and its loaders.

    They are made when Lightning asks for them: its processes know their ranks by then, so that each takes its share.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options, self.loaders = options, list[ImageLoader]()
        self.model = resnet18(num_classes=options.classes)
        self.register_buffer("mean", torch.tensor([123.7, 116.3, 103.5]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([58.4, 57.1, 57.4]).view(3, 1, 1))

    def loader(self, path: str, train: bool) -> ImageLoader:
        """Batches on this process's device, which Lightning then has nothing to move."""
        size, side = self.options.batch_size, self.options.resolution
        self.loaders.append(ImageLoader(path, size, side, train=train, device=self.device))
        return self.loaders[-1]

    def train_dataloader(self) -> ImageLoader:
        """Goes on to the next epoch by itself."""
        return self.loader(self.options.train, True)

    def val_dataloader(self) -> ImageLoader:
        """Every image once."""
        return self.loader(self.options.val, False)

    def teardown(self, stage: str) -> None:
        """No thread outlives the run."""
        for loader in self.loaders:
            loader.close()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of uint8 images."""
        return self.model((images - self.mean) / self.std)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels, label_smoothing=0.1)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Top-1, a mean over all images."""
        images, labels = batch
        right = (self(images).argmax(1) == labels).float().mean()
        self.log("top_1", right, batch_size=len(labels), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD on one cycle."""
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-5)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main(argv: list[str] | None = None) -> float:
    """Top-1 of the last epoch, a fraction of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--devices", default="auto", help="processes, a GPU each")
    options = parser.parse_args(argv)
    trainer = lightning.Trainer(
        max_epochs=options.epochs, devices=options.devices, logger=False, enable_checkpointing=False
    )
    trainer.fit(Classifier(options))
    return float(trainer.callback_metrics["top_1"])


if __name__ == "__main__":
    main()
