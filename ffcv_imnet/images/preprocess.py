"""An image to the square of pixels that a network sees: torchvision's resize and central crop.

deploy/evaluate_onnx.py does the same on the device and must not import us: tests/test_deploy.py
compares the two pixel for pixel. A .beton goes another way (its stored JPEG is cropped, then
resized by area averaging, decoders.py), so its numbers differ a little.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ffcv_imnet.images import Pixels
from ffcv_imnet.images.pixels import decode_rgb

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,  # Pillow's: antialiased, as torchvision's default
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input. The defaults are torchvision's: 256, then 224."""

    resolution: int = 224  # side of the square, px
    crop_ratio: float = 0.875  # that side over the shorter side of the resized image
    interpolation: str = "bilinear"

    @property
    def resize(self) -> int:
        """Shorter side before the crop, px."""
        return max(self.resolution, round(self.resolution / self.crop_ratio))


def resize_and_crop(rgb: Pixels, how: Preprocess) -> Pixels:
    """`Resize(how.resize)` and `CenterCrop(how.resolution)` of torchvision, on uint8 RGB.

    Returns:
        (resolution, resolution, 3) uint8.
    """
    height, width = rgb.shape[:2]
    short = how.resize
    if width <= height:  # the longer side is rounded down, as torchvision does
        size = short, int(short * height / width)
    else:
        size = int(short * width / height), short
    image = Image.fromarray(rgb).resize(size, INTERPOLATIONS[how.interpolation])
    left = round((size[0] - how.resolution) / 2)
    top = round((size[1] - how.resolution) / 2)
    box = (left, top, left + how.resolution, top + how.resolution)
    return np.asarray(image.crop(box))


def preprocess(data: bytes, how: Preprocess) -> Pixels:
    """An encoded image as the network sees it, (resolution, resolution, 3) uint8 RGB.

    Raises:
        BadImage: it cannot be decoded.
    """
    return resize_and_crop(decode_rgb(data), how)
