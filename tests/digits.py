"""scikit-learn's digits as an image folder, and a small network for them."""

import numpy as np
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from tests import nets


class DigitNet(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem, self.bn = nets.conv(1, 16), nn.BatchNorm2d(16)
        self.block1, self.down, self.block2 = nets.Residual(16), nets.Projected(16, 32), nets.Residual(32)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.fc(self.block2(self.down(self.block1(x))).mean((2, 3)))


def write_digits(root, num=1797):
    """Write train/ and val/, each with a folder a class; every fourth image validates."""
    digits = load_digits()
    for i, (image, target) in enumerate(zip(digits.images[:num], digits.target[:num], strict=True)):
        folder = root / ("val" if i % 4 == 3 else "train") / str(target)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(folder / f"{i:04d}.png")
    return root
