"""Packs the outputs of a network into one tensor. Measuring uses (N, M). Criteria and metrics get the network's own form."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from clado.errors import CladoError, ConfigurationError, NetworkError
from clado.network.tensors import logits_of

NUM_EXAMPLES = 2
"""Number of images of the run that shows which axis is that of the images."""


@dataclass(frozen=True)
class Outputs:
    """The form of a network's outputs: tensors in any nesting of tuples, lists and dictionaries, with the images first."""

    form: TreeSpec | None = None
    """The nesting. None: one tensor (N, M), such as logits, which is packed and unpacked as it is."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shape of each tensor, without the axis of images."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Type of each tensor. The packed tensor has a type into which all floating ones fit."""

    @classmethod
    def of(cls, value: Any, num_images: int) -> "Outputs":
        """The form of a network's outputs for this number of images.

        Raises:
            NetworkError: The outputs are not only tensors with the images first.
        """
        if isinstance(value, Tensor) and value.ndim == 2 and len(value) == num_images:
            return LOGITS
        leaves, form = tree_flatten(value)
        for leaf in leaves:
            shown = tuple(leaf.shape) if isinstance(leaf, Tensor) else f"an object of type {type(leaf).__name__}"
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != (num_images,) or not leaf.numel():
                raise NetworkError(
                    f"the network returns {shown} for {num_images} images; expected tensors with the images first, alone or in "
                    "tuples, lists and dictionaries: wrap it in a module that returns them"
                )
        if not any(leaf.is_floating_point() for leaf in leaves):
            raise NetworkError("the network returns no floating-point tensor; expected logits, or other outputs before rounding")
        return cls(form, tuple(tuple(leaf.shape[1:]) for leaf in leaves), tuple(leaf.dtype for leaf in leaves))

    @property
    def are_logits(self) -> bool:
        """Whether the outputs are one tensor (N, M)."""
        return self.form is None

    @property
    def shape(self) -> list[int] | None:
        """Shape of the outputs without the axis of images. None for logits, and for several tensors."""
        return list(self.shapes[0]) if self.form is not None and self.form.is_leaf() else None

    def packed(self, value: Any) -> Tensor:
        """The outputs as one tensor (N, M): each tensor flattened, one after the other."""
        if self.form is None:
            return logits_of(value)
        leaves, form = tree_flatten(value)
        if form != self.form or tuple(tuple(leaf.shape[1:]) for leaf in leaves) != self.shapes:
            raise NetworkError(
                "the network returns outputs of another form than for its example input; expected the same form and shape"
            )
        flat = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
        return flat[0] if len(flat) == 1 else torch.cat(flat, 1)

    def unpacked(self, flat: Tensor) -> Any:
        """The outputs in the network's own form, from one tensor (N, M). Floating-point tensors keep the type of `flat`."""
        if self.form is None:
            return flat
        parts = torch.split(flat, [prod(shape) for shape in self.shapes], 1)
        leaves = [
            part.reshape(len(flat), *shape).to(flat.dtype if dtype.is_floating_point else dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return tree_unflatten(leaves, self.form)

    def text(self) -> str:
        """The form for messages, such as `{'masks': (10, 56, 56)}` or `(N, M)`."""
        return "(N, M)" if self.form is None else str(tree_unflatten([("N", *shape) for shape in self.shapes], self.form))

    def called(self, subject: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a user-defined function on outputs. Its exceptions become a message about `subject`."""
        try:
            return function(*arguments)
        except CladoError:
            raise
        except Exception as error:  # a user-defined function may raise any exception
            raise ConfigurationError(
                f"{subject} failed: {type(error).__name__}: {error}; outputs have the form {self.text()}, and the last argument "
                f"was {_shown(arguments[-1])}"
            ) from error

    def numbers(self, subject: str, function: Callable[..., Any], flat: Tensor, *arguments: Any) -> Tensor:
        """The result of a user-defined function of packed outputs (N, M) and other arguments: float64 (N,), one for each sample.

        Raises:
            ConfigurationError: The function fails, or does not return this.
        """
        values = self.called(subject, function, self.unpacked(flat), *arguments)
        if not isinstance(values, Tensor) or values.shape != flat.shape[:1]:
            raise ConfigurationError(
                f"{subject} gives {_shown(values)} for {len(flat)} images; expected one number for each of them: a tensor "
                f"({len(flat)},), such as values.flatten(1).mean(1)"
            )
        return values.double()

    def packing(self, model: nn.Module) -> nn.Module:
        """The module with packed outputs. It shares the parameters of the original."""
        if self.form is None:
            return model
        own_class, packed_of = type(model), self.packed

        def forward(self: nn.Module, images: Tensor) -> Tensor:
            return packed_of(own_class.forward(self, images))

        packing = copy(model)
        packing.__class__ = type(own_class.__name__, (own_class,), {"forward": forward})
        return packing


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return "None" if value is None else f"an object of type {type(value).__name__}"


LOGITS = Outputs()
"""One tensor (N, M)."""
