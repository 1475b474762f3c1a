"""Small networks for tests: each has what makes cutting a graph hard; and what they compute, by the modules themselves."""

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clado import paper
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.engine import Call
from clado.network.network import Network


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


class Recurrent(nn.Module):
    """One weight used by two layers with another layer between them: what is replaced must last until the second use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.between = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.first(x))))
        x = F.relu(self.again(F.relu(self.between(x))))
        return self.head(x.mean((2, 3)))


class Normed(nn.Module):
    """Batch norm after layers of every kind, with and without a bias. A shortcut reads one of them too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.first = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.second = nn.BatchNorm2d(6, eps=1e-3)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False)
        self.third = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 5, bias=False)
        self.fourth = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)))
        x = x + F.relu6(self.second(self.depthwise(x)))
        x = F.relu(self.third(self.up(x)))
        return self.head(F.relu(self.fourth(self.hidden(x.mean((2, 3))))))


class Tokens(nn.Module):
    """Linear layers on tokens; batch norm over as many tokens as there are channels, then over channels with the tokens of all
    images in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.over_tokens = nn.BatchNorm1d(8)
        self.mix = nn.Linear(8, 6, bias=False)
        self.over_channels = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.over_tokens(self.embed(x.flatten(1, 2))))
        x = self.mix(x)
        x = F.relu(self.over_channels(x.flatten(0, 1)).reshape_as(x))
        return self.head(x.mean(1))


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
        if isinstance(module, _BatchNorm):
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
    """The reference: a copy of the module, run whole in eval mode with tensors replaced by name."""
    return paper.forward(paper.replaced(model, weights), x)


class PlainAttention(nn.Module):
    """What nn.MultiheadAttention computes of one sequence, from two linear layers that hooks can reach."""

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = source.num_heads
        self.in_proj = nn.Linear(source.embed_dim, 3 * source.embed_dim)
        self.out_proj = nn.Linear(source.embed_dim, source.embed_dim)
        self.in_proj.load_state_dict({"weight": source.in_proj_weight, "bias": source.in_proj_bias})
        self.out_proj.load_state_dict(source.out_proj.state_dict())

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.in_proj(query).chunk(3, -1))
        y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2)), None


def rebuilt(model: nn.Module, replaced: Mapping[str, QuantizedLayer]) -> nn.Module:
    """The reference for replaced layers, by name: a copy of the module, its parameters set, its inputs rounded by hooks."""
    model = copy.deepcopy(model).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            model.set_submodule(name, PlainAttention(module))
    for name, layer in replaced.items():
        owner, rows = owner_of(model, name)
        with torch.no_grad():
            owner.weight[rows] = layer.weight
            if layer.bias is not None and owner.bias is None:
                owner.bias = nn.Parameter(layer.bias.clone())
            elif layer.bias is not None:
                owner.bias[rows] = layer.bias
        if layer.activation is not None:
            for module in model.modules():
                if getattr(module, "weight", None) is owner.weight:
                    module.register_forward_pre_hook(_rounding(layer.activation))
    return model


def on_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy whose batch norms are in training mode, and nothing else."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    return model


def renormalised(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Statistics of batch norms that one after another take in, whole, what a run of the module shows them."""
    model = copy.deepcopy(model).eval()
    for norm in [module for module in model.modules() if isinstance(module, _BatchNorm)]:
        norm.momentum = 1.0
        norm.train()
        with torch.no_grad():
            model(x)
        norm.eval()
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def rematched(source: nn.Module, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Statistics of a quantized module's batch norms, one after another: its output gets the mean and deviation, ε included, that
    the float module `source` has there."""
    model, source = copy.deepcopy(model).eval(), source.eval()

    def seen(module: nn.Module, name: str) -> Tensor:
        inputs = []
        hook = module.get_submodule(name).register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        with torch.no_grad():
            module(x)
        hook.remove()
        return inputs[0].movedim(1, 0).flatten(1).double()

    for name, norm in model.named_modules():
        if isinstance(norm, _BatchNorm):
            trained, floats, ours = source.get_submodule(name), seen(source, name), seen(model, name)
            deviation = (trained.running_var.double() + norm.eps).sqrt()
            target = (floats.mean(1) - trained.running_mean.double()) / deviation
            spread = ((ours.var(1) + norm.eps) / (floats.var(1) + norm.eps)).sqrt() * deviation
            norm.running_mean.copy_(ours.mean(1) - target * spread)
            norm.running_var.copy_(spread.square() - norm.eps)
    return {name: buffer for name, buffer in model.named_buffers() if "running" in name}


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, slice]:
    """The module of a rebuilt network that has a layer's weight, and which rows are the layer's: a third for .q, .k, .v."""
    path, _, part = name.replace("in_proj_weight", "in_proj.weight").partition(".weight")
    owner = model.get_submodule(path)
    third = len(owner.weight) // 3
    return owner, slice("qkv".index(part[1]) * third, ("qkv".index(part[1]) + 1) * third) if part else slice(None)


def _rounding(grid: ActivationGrid):
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = arguments
        codes = (x / grid.scale + grid.zero_point).round().clamp(0, 2**grid.bits - 1)
        return ((codes - grid.zero_point) * grid.scale, *rest)

    return hook


def all_assignments(widths: tuple[tuple[int, ...], ...]):
    """Every full choice of one bit-width a layer."""
    return itertools.product(*widths)


def calls_of(network: Network, x: Tensor, layer: int) -> list[Call]:
    """The calls that read a layer's weight in a float run, in order, with copies of their inputs."""
    calls: list[Call] = []
    network.observe(x, [layer], lambda _, call: calls.append(replace(call, input=call.input.clone())))
    return calls
