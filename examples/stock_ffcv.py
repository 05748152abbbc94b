"""A training script on FFCV's own Loader, of which two lines changed: both are marked.

python examples/stock_ffcv.py data/beton/train.beton data/beton/val.beton

Any .beton does, also one of FFCV's DatasetWriter without a manifest of this project.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from ffcv.fields.basics import IntDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import (  # fmt: skip
    NormalizeImage,
    RandomHorizontalFlip,
    Squeeze,
    ToDevice,
    ToTensor,
    ToTorchImage,
)
from torchvision.models import resnet18

# CHANGED, was: from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv_imnet import CropDecoder

MEAN, STD = np.array([123.7, 116.3, 103.5]), np.array([58.4, 57.1, 57.4])  # ImageNet's


def loader(path: str, train: bool, options: argparse.Namespace, device: torch.device) -> Loader:
    """Of normalised float images and labels on `device`."""
    size = options.resolution, options.resolution
    # CHANGED, was: RandomResizedCropRGBImageDecoder(size) if train else CenterCropRGBImageDecoder(size, ratio=224 / 256)
    decoder = CropDecoder(size) if train else CropDecoder(size, ratio=224 / 256)
    flip = [RandomHorizontalFlip()] if train else []
    normalize = NormalizeImage(MEAN, STD, np.float32)
    image = [decoder, *flip, normalize, ToTensor(), ToDevice(device), ToTorchImage()]
    return Loader(
        path,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        order=OrderOption.RANDOM if train else OrderOption.SEQUENTIAL,
        drop_last=train,
        pipelines={
            "image": image,
            "label": [IntDecoder(), ToTensor(), Squeeze(1), ToDevice(device)],
        },
    )


def main(argv: list[str] | None = None) -> float:
    """Top-1 of the last epoch, a fraction of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--num_workers", type=int, default=1)
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = loader(options.train, True, options, device)
    val = loader(options.val, False, options, device)
    model = resnet18(num_classes=options.classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, options.epochs * len(train))
    for epoch in range(options.epochs):
        model.train()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        right = seen = 0
        with torch.no_grad():
            for images, labels in val:
                right += int((model(images).argmax(1) == labels).sum())
                seen += len(labels)
        print(f"epoch {epoch}: loss {loss:.3f}, top-1 {right / seen:.2%}", flush=True)
    return right / seen


if __name__ == "__main__":
    main()
