"""The store of measurements: a Zarr v3 group of shards. The only module that imports zarr.

One task writes one whole chunk: a tile is the unit of work, of storage and of retry, so repeating or killing one is harmless and
resume is the list of absent tiles. Every chunk carries a checksum (crc32c over zstd). An array `done` beside each array of sums
holds one cell per tile, written after the tile: a tile of NaNs is not a missing tile.

    store.zarr/                attributes: format, identity, coverage, provenance, rows_per_tile
      counts       (blocks,)            images per sample block
      singles/sums (blocks, 1 + K)      singles/done (blocks, 1)
      pairs/sums   (blocks, K, K)       pairs/done   (blocks, row tiles)
      gram/sums    (blocks, 1 + K, K)   gram/done    (blocks, 1)
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from clado.config import fingerprint
from clado.errors import IdentityMismatch, StoreError
from clado.probes import KINDS, Kind, Plan, Tile

FORMAT = "clado-store/1"
Array = NDArray[np.float64]


class Store:
    """Measurements of one identity, tile by tile. Opened by path, by any number of processes; each tile has one writer."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self.group = group

    @classmethod
    def create(
        cls, path: Path, plan: Plan, identity: Mapping[str, Any], coverage: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> "Store":
        """A new store for a plan, complete under a temporary name before it appears under `path`."""
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(part, mode="w", zarr_format=3)
        k, blocks = plan.space.num_options, len(plan.blocks)
        shapes: dict[Kind, tuple[tuple[int, ...], tuple[int, ...], int]] = {
            "singles": ((blocks, 1 + k), (1, 1 + k), 1),
            "pairs": ((blocks, k, k), (1, plan.rows_per_tile, k), plan.num_row_tiles),
            "gram": ((blocks, 1 + k, k), (1, 1 + k, k), 1),
        }
        names = {
            "singles": ("block", "probe"),
            "pairs": ("block", "option", "later_option"),
            "gram": ("block", "probe", "option"),
        }
        for kind, (shape, chunks, tiles) in shapes.items():
            options: dict[str, Any] = {
                "compressors": [ZstdCodec(level=1), Crc32cCodec()],
                "serializer": BytesCodec(),
                "filters": None,
            }
            group.create_array(
                f"{kind}/sums",
                shape=shape,
                chunks=chunks,
                dtype="f8",
                fill_value=np.nan,
                dimension_names=names[kind],
                **options,
            )
            group.create_array(f"{kind}/done", shape=(blocks, tiles), chunks=(1, 1), dtype="u1", fill_value=0, **options)
        counts = np.array([plan.block_images(block) for block in range(blocks)], dtype="i8")
        group.create_array("counts", data=counts, compressors=[ZstdCodec(level=1), Crc32cCodec()])
        group.attrs.update(
            format=FORMAT,
            fingerprint=fingerprint(dict(identity)),
            identity=dict(identity),
            coverage=dict(coverage),
            provenance=dict(provenance),
            rows_per_tile=plan.rows_per_tile,
        )
        part.rename(path)
        return cls(path, zarr.open_group(path, mode="r+"))

    @classmethod
    def open(cls, path: Path) -> "Store":
        """An existing store, refused unless it is ours."""
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise StoreError(f"{path} {what}; expected a store that `clado run` made")
        try:
            group = zarr.open_group(path, mode="r+", zarr_format=3)
            found = group.attrs.get("format")
        except (FileNotFoundError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
            raise StoreError(
                f"{path} is not a store of ours: it holds no Zarr v3 group ({type(error).__name__}); choose another folder"
            ) from None
        if found != FORMAT:
            raise StoreError(
                f"{path} is not a store of ours: its format is {found!r}, expected {FORMAT!r}; choose another folder"
            )
        return cls(path, group)

    def check(self, identity: Mapping[str, Any], coverage: Mapping[str, Any]) -> None:
        """Refuses other settings than those the store was measured under, and says which differ."""
        rows = [*differences(self.identity, identity), *differences(self.coverage, coverage)]
        if rows:
            raise IdentityMismatch(
                f"{self.path} was measured under other settings, so its numbers mean something else:\n  "
                + "\n  ".join(rows)
                + "\n  Use the old settings, or name another folder for this run (folder: runs/…)"
            )

    def provenance_differences(self, provenance: Mapping[str, Any]) -> list[str]:
        """How code, libraries and device differ from those that began the store: a warning, not an error."""
        return differences(self._attribute("provenance"), provenance)

    def _attribute(self, name: str) -> dict[str, Any]:
        value = self.group.attrs[name]
        assert isinstance(value, dict)
        return dict(value)

    @property
    def identity(self) -> dict[str, Any]:
        """What changes the meaning of a number."""
        return self._attribute("identity")

    @property
    def coverage(self) -> dict[str, Any]:
        """What was measured: layers, bits, images."""
        return self._attribute("coverage")

    @property
    def fingerprint(self) -> str:
        """Hash of the identity."""
        return str(self.group.attrs["fingerprint"])

    @property
    def rows_per_tile(self) -> int:
        """Rows of a `pairs` chunk: set when the store was made."""
        return int(str(self.group.attrs["rows_per_tile"]))

    def _array(self, name: str) -> zarr.Array[Any]:
        found = self.group[name]
        assert isinstance(found, zarr.Array)
        return found.with_config({"write_empty_chunks": True})  # not kept in the store, and a tile of NaNs must be written

    def _where(self, tile: Tile) -> tuple[Any, ...]:
        return (tile.block, slice(tile.first, tile.stop)) if tile.kind == "pairs" else (tile.block,)

    def write(self, tile: Tile, sums: Array) -> None:
        """Writes one tile whole, then marks it done."""
        self._array(f"{tile.kind}/sums")[self._where(tile)] = sums
        self._array(f"{tile.kind}/done")[tile.block, tile.number] = 1

    def read(self, tile: Tile) -> Array:
        """The sums of one tile; StoreError where its chunk fails its checksum or is gone."""
        array = self._array(f"{tile.kind}/sums")
        try:
            values = np.asarray(array[self._where(tile)], dtype=np.float64)
        except Exception as error:  # codecs raise ValueError, RuntimeError or their own kinds
            raise StoreError(f"the chunk of {tile} in {self.path} is damaged ({error})") from error
        if not self._chunk_file(tile).exists():
            raise StoreError(f"the chunk of {tile} in {self.path} is gone")
        return values

    def _chunk_file(self, tile: Tile) -> Path:
        key = (
            [tile.block, tile.number, 0]
            if tile.kind == "pairs"
            else [tile.block] + [0] * (self._array(f"{tile.kind}/sums").ndim - 1)
        )
        return self.path / tile.kind / "sums" / "c" / Path(*map(str, key))

    def missing(self, plan: Plan) -> list[Tile]:
        """Tiles of the plan that are not done, in the plan's order."""
        done = {kind: np.asarray(self._array(f"{kind}/done")[:]) for kind in KINDS}
        return [tile for tile in plan.tiles if not done[tile.kind][tile.block, tile.number]]

    def damaged(self, tiles: Iterable[Tile]) -> list[Tile]:
        """Those of the tiles whose chunk fails its checksum or is gone; they are marked as not done."""
        bad = []
        for tile in tiles:
            try:
                self.read(tile)
            except StoreError:
                self._array(f"{tile.kind}/done")[tile.block, tile.number] = 0
                bad.append(tile)
        return bad

    def gather(self, plan: Plan) -> dict[Kind, Array]:
        """All sums of the plan's kinds; StoreError where a tile is missing or damaged."""
        missing = self.missing(plan)
        if missing:
            raise StoreError(
                f"{self.path} lacks {len(missing)} of {len(plan.tiles)} tiles, the first {missing[0]}; "
                "run `clado run` again to measure them"
            )
        gathered: dict[Kind, Array] = {}
        for tile in plan.tiles:
            whole = gathered.setdefault(tile.kind, np.full(self._array(f"{tile.kind}/sums").shape, np.nan))
            whole[self._where(tile)] = self.read(tile)
        return gathered

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images per sample block."""
        return np.asarray(self._array("counts")[:], dtype=np.int64)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """One line for each leaf in which two plain documents differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted({*old, *new}):
            lines += differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return lines
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if list(old) == list(new):
            return []
        if len(old) == len(new):
            first = next(k for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
            return [f"{where}[{first}]: the store has {old[first]!r}, this run {new[first]!r}"]
        return [f"{where}: the store has {len(old)} entries, this run {len(new)}"]
    return [] if old == new else [f"{where}: the store has {old!r}, this run {new!r}"]
