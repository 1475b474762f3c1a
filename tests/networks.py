"""Small networks for tests: each has what makes cutting a graph hard."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Convolutions of every kind, a shortcut that stays alive over cuts, in-place operators, batch norm, a linear head."""

    def __init__(self, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.head = nn.Linear(channels, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.stem(x)))
        y = F.relu_(self.depthwise(x))
        y = self.grouped(y)
        y += x
        y = F.hardswish(self.up(y))
        return self.head(self.dropout(y.mean((2, 3))))


class Attention(nn.Module):
    """Self-attention with a fused in_proj, a class token and layer norm: the batch is not the first axis inside."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + F.gelu(self.mlp(self.norm(x)))
        return self.head(x[:, 0])


class Tied(nn.Module):
    """One weight used by two layers: one decision."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.third.weight = self.second.weight
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.third(x)).mean((2, 3)))


class Branching(nn.Module):
    """Runs one of two layers as the images have it: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.calm = nn.Conv2d(4, 4, 3, padding=1)
        self.loud = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.calm(x) if x.mean() > 0 else self.loud(x)
        return self.head(F.relu(x).mean((2, 3)))


class Volume(nn.Module):
    """One-dimensional and three-dimensional convolutions, plain, grouped and transposed, on images read as volumes and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1))
        self.grown = nn.ConvTranspose3d(4, 4, (1, 2, 2), stride=(1, 2, 2), groups=2)
        self.rows = nn.Conv1d(4, 6, 3, padding="same", groups=2)
        self.longer = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grown(F.relu(self.volume(x.unsqueeze(2)))))
        x = F.relu(self.longer(F.relu(self.rows(x.flatten(2)))))
        return self.head(x.mean(2))


def build(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network with seeded weights and batch-norm statistics that are not trivial."""
    torch.manual_seed(seed)
    network = kind()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network


def images(count: int, seed: int = 1, size: int = 8) -> Tensor:
    """Seeded normal images (count, 1, size, size)."""
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def labels(count: int, classes: int = 4, seed: int = 2) -> Tensor:
    """Seeded labels."""
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def replaced_logits(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The reference: the module itself, run whole in eval mode with weights replaced by name."""
    was = model.training
    model.eval()
    with torch.no_grad():
        logits = torch.func.functional_call(model, weights, (x,))
    model.train(was)
    return logits


def all_assignments(widths: tuple[tuple[int, ...], ...]):
    """Every full choice of one bit-width a layer."""
    return itertools.product(*widths)
