"""Networks of the papers (ResNet-34, WRN-28-10), a small one for two CPU cores and a fast one for a GPU.

All take uint8 images (N, 3, 32, 32) and return scores (N, outputs); `features` gives what stands before the last layer.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network"]

MEAN, DEVIATION = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10's training pixels; close to those of the others


class Network(nn.Module):
    """A body that turns standardised pixels into `width` features, and a linear layer on top, whose outputs are scaled."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, body: nn.Module, width: int, outputs: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)
        self.body = body
        self.head = nn.Linear(width, outputs)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, width)"""
        pixels = (images.float() - self.mean) / self.deviation
        return self.body(pixels.contiguous(memory_format=torch.channels_last))

    def scores(self, features: Tensor) -> Tensor:
        """(N, width) -> (N, outputs)"""
        return self.head(features) * self.scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(self.features(images))


def small(outputs: int, *, width: int = 32) -> Network:
    """Four convolutions, 0.24 M parameters: an epoch of 10,000 images takes 5 to 13 s on one CPU core."""
    # The first convolution has stride 2: at full resolution it alone would take half the time.
    body = nn.Sequential(
        *_conv(3, width, size=4, stride=2),
        *_conv(width, 2 * width, pool=True),
        *_conv(2 * width, 4 * width, pool=True),
        *_conv(4 * width, 4 * width),
        *_pooled(),
    )
    return Network(body, 4 * width, outputs)


def fast(outputs: int) -> Network:
    """Seven convolutions, three of them in two residual parts, 1.3 M parameters, for a GPU."""
    body = nn.Sequential(
        *_conv(3, 64),
        *_conv(64, 128, pool=True),
        Residual(nn.Sequential(*_conv(128, 128), *_conv(128, 128))),
        *_conv(128, 192, pool=True),
        *_conv(192, 192, pool=True),
        Residual(nn.Sequential(*_conv(192, 192))),
        *_pooled(),
    )
    # Maxima over an image are large: scores of full size would saturate the softmax before the body has learned anything.
    return Network(body, 192, outputs, scale=0.125)


def resnet34(outputs: int) -> Network:
    """ResNet-34 with a 3 x 3 stem for 32 x 32 images, 21.3 M parameters.  He, Zhang, Ren, Sun (CVPR 2016)."""
    layers: list[nn.Module] = [*_conv(3, 64)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(blocks):
            layers.append(BasicBlock(inputs, width, stride if number == 0 else 1))
            inputs = width
    return Network(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 512, outputs)


def wrn28_10(outputs: int) -> Network:
    """WideResNet-28-10 without dropout, 36.5 M parameters.  Zagoruyko, Komodakis (BMVC 2016)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    inputs = 16
    for width, stride in ((160, 1), (320, 2), (640, 2)):
        for number in range(4):
            layers.append(WideBlock(inputs, width, stride if number == 0 else 1))
            inputs = width
    return Network(nn.Sequential(*layers, nn.BatchNorm2d(640), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 640, outputs)


NETWORKS: dict[str, Callable[[int], Network]] = {
    "small": small,
    "smaller": partial(small, width=24),
    "fast": fast,
    "resnet34": resnet34,
    "wrn28_10": wrn28_10,
}


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each followed by its norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *_conv(inputs, outputs, stride=stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x) + self.shortcut(x))


class WideBlock(nn.Module):
    """Norm before each of two convolutions; the shortcut starts behind the first norm where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        started = self.start(x)
        return self.inner(started) + (x if self.shortcut is None else self.shortcut(started))


def _conv(inputs: int, outputs: int, *, size: int = 3, stride: int = 1, pool: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, size, stride=stride, padding=1, bias=False)]
    # Pooling before the norm: four times fewer numbers to normalise.
    return [*layers, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(outputs), nn.ReLU()]


def _pooled() -> list[nn.Module]:
    return [nn.AdaptiveMaxPool2d(1), nn.Flatten()]
