"""A training loop in plain PyTorch on two .beton files, with progressive resizing.

python examples/plain_pytorch.py data/beton/train.beton data/beton/val.beton
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from ffcv_imnet import ImageLoader
from ffcv_imnet.core.errors import RunError, UsageError

MEAN, STD = torch.tensor([123.7, 116.3, 103.5]), torch.tensor([58.4, 57.1, 57.4])  # ImageNet's


def main(argv: list[str] | None = None) -> float:
    """Top-1 of the last epoch, a fraction of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=128, help="from half of the epochs on")
    options = parser.parse_args(argv)
    side, epochs = options.resolution, options.epochs

    train = ImageLoader(options.train, options.batch_size, side)
    val = ImageLoader(options.val, options.batch_size, side, train=False)
    device = train.world.device
    model = resnet18(num_classes=len(train.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, epochs * len(train))
    mean, std = MEAN.view(3, 1, 1).to(device), STD.view(3, 1, 1).to(device)

    with train, val:  # ends their threads
        for epoch in range(epochs):
            train.resolution = side if epoch >= epochs // 2 else side * 3 // 4
            model.train()
            for images, labels in train:  # uint8 (n, 3, side, side) and int64 (n,), on the device
                loss = F.cross_entropy(model((images - mean) / std), labels, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            model.eval()
            right = torch.zeros((), dtype=torch.int64, device=device)
            with torch.inference_mode():
                for images, labels in val:
                    right += (model((images - mean) / std).argmax(1) == labels).sum()
            print(f"epoch {epoch}: loss {loss:.3f}, top-1 {right / val.samples:.2%}", flush=True)
    return float(right / val.samples)


if __name__ == "__main__":
    try:
        main()
    except (UsageError, RunError) as error:  # a file or an option is wrong: one sentence
        sys.exit(f"error: {error}")
