"""The results of sweeps over calibration images, on disk until the layers are prepared.

    0007-3.safetensors          statistics of the input of layer 7 on block 3
    0007-3-on-grid.safetensors  the moments of the same input on its grids
    0007-ranges.safetensors     the grids of the input of layer 7, by activation width
    observed-3.safetensors      what corrections of the float network must know about block 3

One task of a sweep writes the files of one block. Its sums do not depend on other tasks, and they are added in the order of the
blocks. So the result is the same bit for bit for any number of workers.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clado.grids import ActivationGrid
from clado.quantization.moments import Moments
from clado.quantization.sweep import LayerInput, joined
from clado.storage.tensor_files import damaged, read_tensors, write_tensors

FORMAT = "clado-inputs/1"


class LayerInputs:
    """A folder of the results of sweeps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, layer: int, block: int, on_grids: bool) -> Path:
        """Where the sums of a layer and a block are kept."""
        return self.folder / f"{layer:04d}-{block}{'-on-grid' if on_grids else ''}.safetensors"

    def ranges_file(self, layer: int) -> Path:
        """Where the grids of a layer's input are kept."""
        return self.folder / f"{layer:04d}-ranges.safetensors"

    def write(self, layer: int, block: int, on_grids: bool, inputs: LayerInput) -> None:
        """Keeps a block's statistics of a layer's input."""
        moments = {f"{width}.": each for width, each in inputs.on_grid.items()}
        if inputs.moments is not None:
            moments[""] = inputs.moments
        tensors: dict[str, Tensor] = {"rows": inputs.rows, "values": inputs.values}
        for prefix, each in moments.items():
            tensors |= {f"{prefix}mean": each.mean, f"{prefix}scatter": each.scatter}
        header = {
            "num_images": inputs.num_images,
            "arguments": inputs.arguments,
            "uses": inputs.uses,
            "counts": {prefix: each.count for prefix, each in moments.items()},
        }
        write_tensors(self.file(layer, block, on_grids), tensors, {"input": json.dumps(header)}, FORMAT)

    def read(self, layer: int, num_blocks: int, on_grids: bool, device: torch.device) -> LayerInput:
        """The statistics of a layer's input over all blocks.

        Raises:
            StoreError: A file is absent or damaged.
        """
        return joined([self._read_block(self.file(layer, block, on_grids), device) for block in range(num_blocks)])

    def _read_block(self, path: Path, device: torch.device) -> LayerInput:
        tensors, texts = read_tensors(path, device, FORMAT)
        try:
            header: dict[str, Any] = json.loads(texts["input"])
            moments = {
                prefix: Moments(count, tensors[f"{prefix}mean"], tensors[f"{prefix}scatter"])
                for prefix, count in header["counts"].items()
            }
            return LayerInput(
                header["num_images"],
                None if header["arguments"] is None else tuple(header["arguments"]),
                header["uses"],
                moments.pop("", None),
                tensors["rows"],
                tensors["values"],
                {int(prefix.rstrip(".")): each for prefix, each in moments.items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, error) from None

    def write_ranges(self, layer: int, grids: Mapping[int, ActivationGrid]) -> None:
        """Keeps the grids of a layer's input."""
        # hexadecimal, to read exactly the same float
        rows = [[grid.bits, grid.scale.hex(), grid.zero_point] for grid in grids.values()]
        write_tensors(self.ranges_file(layer), {}, {"grids": json.dumps(rows)}, FORMAT)

    def read_ranges(self, layer: int) -> dict[int, ActivationGrid]:
        """The grids of a layer's input, by activation width."""
        _, texts = read_tensors(self.ranges_file(layer), torch.device("cpu"), FORMAT)
        try:
            rows = json.loads(texts["grids"])
            return {bits: ActivationGrid(bits, float.fromhex(scale), zero_point) for bits, scale, zero_point in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.ranges_file(layer), error) from None

    def observed_file(self, block: int) -> Path:
        """Where the observations of a block for corrections of the float network are kept."""
        return self.folder / f"observed-{block}.safetensors"

    def write_observed(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the observations of a block, by name."""
        write_tensors(self.observed_file(block), tensors, {}, FORMAT)

    def read_observed(self, block: int, device: torch.device) -> dict[str, Tensor]:
        """The observations of a block, by name.

        Raises:
            StoreError: The file is absent or damaged.
        """
        return read_tensors(self.observed_file(block), device, FORMAT)[0]

    def clear(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
