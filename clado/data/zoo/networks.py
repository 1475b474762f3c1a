"""The architectures of the zoo: small networks for 28 x 28 grey images and ten classes, and one for composites of such images.

They are plain torch modules. Their weights are safetensors files next to this module. `clado.data.sources.load_network`
loads both.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al., arXiv 1512.03385, figure 2; a 1 x 1 projection where shapes change)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet20(nn.Module):
    """ResNet-20 of widths 16/32/64 for 28 x 28 grey images: 22 searched layers, about 0.27 M weights."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.fc = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, out_channels, stride),
            BasicBlock(out_channels, out_channels, 1),
            BasicBlock(out_channels, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28), normalised -> logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; a shortcut where shapes allow (Sandler et al., arXiv 1801.04381, figure 4)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.body = nn.Sequential(*layers)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        y: Tensor = self.body(x)
        return x + y if self.is_residual else y


class MobileNetV2(nn.Module):
    """A MobileNetV2 for 28 x 28 grey images: 23 searched layers, 7 of them depthwise, about 0.1 M weights."""

    STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 40, 2, 2), (4, 64, 2, 1))  # expansion, channels, blocks, first stride

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        channels, head = 16, 160
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()]
        for expansion, out_channels, blocks, stride in self.STAGES:
            for k in range(blocks):
                layers.append(InvertedResidual(channels, out_channels, stride if k == 0 else 1, expansion))
                channels = out_channels
        layers += [nn.Conv2d(channels, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(head, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28), normalised -> logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and with a shortcut (arXiv 2010.11929, figure 1)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> the same shape."""
        y = self.ln1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """A small ViT for 28 x 28 grey images: 4 x 4 patches, 50 tokens of width 64, 6 blocks: 26 searched layers, 0.2 M weights."""

    def __init__(self, num_classes: int = 10, width: int = 64, depth: int = 6, heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 50, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28), normalised -> logits (N, num_classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class _DoubleConvolution(nn.Sequential):
    """Two 3 x 3 convolutions, each with a batch norm and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [nn.Conv2d(channels, out_channels, 3, 1, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al., arXiv 1505.04597) for grey images whose sides are multiples of 4.

    13 searched layers, 0.03 M weights.
    """

    def __init__(self, num_classes: int = 11, width: int = 8) -> None:
        super().__init__()
        self.down1 = _DoubleConvolution(1, width)
        self.down2 = _DoubleConvolution(width, 2 * width)
        self.bottom = _DoubleConvolution(2 * width, 4 * width)
        self.lift2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up2 = _DoubleConvolution(4 * width, 2 * width)
        self.lift1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up1 = _DoubleConvolution(2 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, H, W), normalised -> logits (N, num_classes, H, W)."""
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.bottom(F.max_pool2d(coarse, 2))
        x = self.up2(torch.cat([coarse, self.lift2(x)], 1))
        x = self.up1(torch.cat([fine, self.lift1(x)], 1))
        logits: Tensor = self.head(x)
        return logits
