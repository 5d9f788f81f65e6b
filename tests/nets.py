"""Small networks, one for each way in which a merge can be written."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(inp, out, stride=1, kernel=3):
    return nn.Conv2d(inp, out, kernel, stride, kernel // 2, bias=False)


class Residual(nn.Module):
    """The plain residual block; subclasses write the sum in other ways."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)

    def branch(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return F.relu(self.branch(x) + x)


class ResidualInPlace(Residual):
    def forward(self, x):
        out = self.branch(x)
        out += x
        return F.relu(out, inplace=True)


class ResidualTorchAdd(Residual):
    def forward(self, x):
        return torch.add(x, self.branch(x))


class ResidualMethodAdd(Residual):
    def forward(self, x):
        return self.branch(x).add(x)


class ResidualAddStatement(Residual):
    """`out.add_(x)` as a statement: what follows reads the sum under the old name."""

    def forward(self, x):
        out = self.branch(x)
        out.add_(x)
        return F.relu(out)


class Projected(nn.Module):
    def __init__(self, inp=16, out=24):
        super().__init__()
        self.conv1, self.bn1 = conv(inp, out, 2), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(conv(inp, out, 2, 1), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)


class SumOfThree(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.a, self.b = Branch(channels), Branch(channels)

    def forward(self, x):
        return x + self.a(x) + self.b(x)


class Branch(nn.Sequential):
    def __init__(self, channels):
        super().__init__(conv(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(), conv(channels, channels))


class Dropped(Residual):
    """Layer scale, dropout and a dropped path after the branch's last layer."""

    def __init__(self, channels=16):
        super().__init__(channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))
        self.dropout = nn.Dropout2d(0.3)

    def forward(self, x):
        out = self.branch(x)
        out = out * self.gamma.reshape(1, -1, 1, 1)
        out = self.dropout(out)
        return x + F.dropout(out, 0.2, self.training)


class TrainBranch(Residual):
    """Different code in train and eval mode."""

    def forward(self, x):
        if self.training:
            return x + self.branch(x) * torch.rand(x.shape[0], 1, 1, 1, device=x.device)
        out = self.branch(x)
        return x + out


class Optional(Residual):
    """A shortcut that may be handed in, and arguments that are not used."""

    def forward(self, x, shortcut=None, *, children=None, scale=1.0):
        if shortcut is None:
            shortcut = x
        return self.branch(x) * scale + shortcut


class Dense(nn.Module):
    def __init__(self, channels=16, growth=8, num=3):
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(channels + i * growth, growth) for i in range(num))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseLayer(nn.Module):
    def __init__(self, inp, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inp), conv(inp, growth)

    def forward(self, features):
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class Fire(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.squeeze = conv(channels, 8, kernel=1)
        self.expand1x1, self.expand3x3 = conv(8, 12, kernel=1), conv(8, 20)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class Shuffle(nn.Module):
    """The untouched half of a channel split passes through."""

    def __init__(self, channels=32):
        super().__init__()
        self.branch = Branch(channels // 2)

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        out = torch.cat((left, self.branch(right)), dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Attentive(Residual):
    """Has channel attention of its own."""

    def __init__(self, channels=16):
        super().__init__(channels)
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        out = self.branch(x)
        return x + out * torch.sigmoid(self.fc(F.adaptive_avg_pool2d(out, 1)))


class RepVgg(nn.Module):
    """Parallel linear layers that are folded into one convolution later."""

    def __init__(self, channels=16):
        super().__init__()
        self.dense = nn.Sequential(conv(channels, channels), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(conv(channels, channels, kernel=1), nn.BatchNorm2d(channels))
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))


class UpStage(nn.Module):
    """A U-Net's stage: both maps that it joins are handed to it."""

    def __init__(self, inp, skip, out):
        super().__init__()
        self.conv = conv(inp + skip, out)

    def forward(self, x, skip):
        x = F.interpolate(x, size=skip.shape[2:])
        return F.relu(self.conv(torch.cat([skip, x], dim=1)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.bottom = conv(3, 8), conv(8, 16, 2), conv(16, 32, 2)
        self.up2, self.up1, self.head = UpStage(32, 16, 16), UpStage(16, 8, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(a))
        c = F.relu(self.bottom(b))
        return self.head(self.up1(self.up2(c, b), a))


class TwoBranches(nn.Module):
    """Everything in the root's forward: a concatenation of two branches and a residual sum."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem, self.left, self.right = conv(3, 16), conv(16, 8), conv(16, 8, kernel=1)
        self.conv1, self.conv2 = conv(16, 16), conv(16, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = x + self.conv2(F.relu(self.conv1(x)))
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """No merge at all."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = conv(3, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class Split(nn.Module):
    """timm's division of the forward into features and head, with the merge in the features."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2, self.head = conv(3, 16), conv(16, 16), conv(16, 16), nn.Linear(16, 4)

    def forward_features(self, x):
        x = self.stem(x)
        return x + self.conv2(F.relu(self.conv1(x)))

    def forward_head(self, x):
        return self.head(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class Shared(nn.Module):
    """One block that runs twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = conv(3, 16), Residual(), nn.Linear(16, 4)

    def forward(self, x):
        x = self.block(self.block(self.stem(x)))
        return self.head(x.mean((2, 3)))


class WrittenOver(Residual):
    """The branch is read again and written over after the sum."""

    def forward(self, x):
        out = self.branch(x)
        total = x + out
        out.mul_(2)
        return torch.cat([total, out], 1)


class ShapeCondition(Residual):
    """Code that depends on the size of the input."""

    def forward(self, x):
        out = self.branch(x)
        if x.shape[2] > 8:
            out = F.relu(out)
        return x + out


def enliven(model):
    """Give norms weights as training does: timm starts a block's last one at zero, and then its branch is all zeros."""
    for module in model.modules():
        if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model


def wrap(block, channels=16, num_classes=4):
    """Put a block between a stem and a head."""
    probe = torch.zeros(2, channels, 8, 8)
    training = block.training
    with torch.no_grad():
        out = block.eval()(probe).shape[1]
    block.train(training)
    return nn.Sequential(conv(3, channels), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, num_classes))
