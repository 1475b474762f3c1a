"""The store of measurements: a Zarr v3 group of shards. The only module that imports zarr.

One task writes one whole chunk. A tile is the unit of work, of storage and of retry. So repeating or killing a task is harmless,
and a resumed run measures the missing tiles. Every chunk has a checksum (crc32c over zstd). For each array of sums, an array
`done` has one cell per tile, which is written after the tile. So a tile of NaNs is not a missing tile.

    store.zarr/                attributes: format, identity, coverage, provenance, rows_per_tile
      counts       (blocks,)            images per sample block
      singles/sums (blocks, 1 + K)      singles/done (blocks, 1)
      pairs/sums   (blocks, K, K)       pairs/done   (blocks, row tiles)
      …                                 each other tile kind is a group too; the first axis is the sample blocks

If the numbers of a kind depend on more than the identity, its group has the attribute `terms`. If the terms differ, its tiles
count as missing.

More sample blocks lengthen the arrays. Layers and their candidates are part of the identity, and never change in a store.

A store is a folder, or a prefix of a bucket named by URL (s3://BUCKET/PREFIX): Zarr's own store on obstore, which takes keys and
the endpoint from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP).
"""

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as Backend
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.sync import sync
from zarr.storage import ObjectStore

from clado.errors import IdentityMismatch, StoreError
from clado.measuring.kinds import tile_kind, tile_kinds
from clado.measuring.plan import Plan, Tile
from clado.settings.identity import fingerprint
from clado.settings.redaction import redact
from clado.space import Layer, SearchSpace
from clado.storage.buckets import open_bucket
from clado.storage.differences import differences

FORMAT = "clado-store/1"
Array = NDArray[np.float64]
DTYPES: dict[str, np.dtype[Any]] = {"sums": np.dtype("f8"), "done": np.dtype("u1")}
COMPRESSORS = (ZstdCodec(level=1), Crc32cCodec())
DONE = 1
RESTORE = "restore the store from a copy"


class MeasurementStore:
    """Measurements of one identity, tile by tile. Opened by path, by any number of processes; each tile has one writer."""

    def __init__(self, path: Path | str, group: zarr.Group) -> None:
        self.path = path
        self.group = group
        self._kinds = _KindArrays(path, group)

    @classmethod
    def create(
        cls,
        path: Path | str,
        plan: Plan,
        identity: Mapping[str, Any],
        coverage: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> "MeasurementStore":
        """A new store for a plan. A folder appears whole under `path`. A bucket cannot rename, so `format` is written last."""
        if isinstance(path, str):
            group = zarr.open_group(_bucket(path), mode="a", zarr_format=3)
            # an incomplete store is made again
            if group.attrs or not set(group.keys()) <= {*tile_kinds(), "counts"}:
                raise StoreError(f"{redact(path)} holds something that clado did not write; name another prefix (store: s3://…)")
            _fill(group, plan, identity, coverage, provenance)
            return cls(path, group)
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        _fill(zarr.open_group(part, mode="w", zarr_format=3), plan, identity, coverage, provenance)
        part.rename(path)
        return cls(path, zarr.open_group(path, mode="r+"))

    @classmethod
    def open(cls, path: Path | str) -> "MeasurementStore":
        """An existing store. Raises StoreError if clado did not make it."""
        if isinstance(path, Path) and not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise StoreError(f"{path} {what}; expected a store that `clado run` made")
        try:
            group = zarr.open_group(path if isinstance(path, Path) else _bucket(path), mode="r+", zarr_format=3)
            stored_format = group.attrs.get("format")
        except (FileNotFoundError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
            raise StoreError(
                f"{path} is not a store of clado: it holds no Zarr v3 group ({type(error).__name__}); choose another folder"
            ) from None
        if stored_format != FORMAT:
            raise StoreError(
                f"{path} is not a store of clado: its format is {stored_format!r}, expected {FORMAT!r}; choose another folder"
            )
        return cls(path, group)

    def check(self, identity: Mapping[str, Any], coverage: Mapping[str, Any]) -> None:
        """Raises IdentityMismatch if the settings differ from those of the store, and says which differ."""
        if self.fingerprint != fingerprint(self.identity):
            raise StoreError(f"the attributes of {self.path} are damaged: the fingerprint is not that of the identity; {RESTORE}")
        rows = [*differences(self.identity, identity), *differences(self.coverage, coverage)]
        if rows:
            raise IdentityMismatch(
                f"{self.path} was measured under other settings, so its numbers mean something else:\n  "
                + "\n  ".join(rows)
                + "\n  Use the old settings, or name another folder for this run (folder: runs/…)"
            )

    def provenance_differences(self, provenance: Mapping[str, Any]) -> list[str]:
        """Differences of code, libraries and device from those that began the store. They cause a warning, not an error."""
        return differences(self._attribute("provenance"), provenance)

    @cached_property
    def space(self) -> SearchSpace:
        """The measured layers and candidates. Ties and blocks of layers come from the settings."""
        identity, layers, bits = self.identity, [], []
        for row in identity["layers"]:
            fields = {**row, "shape": tuple(row["shape"])}
            bits.append(tuple(fields.pop("bits")))
            layers.append(Layer(**fields))
        return SearchSpace(tuple(layers), tuple(bits)).with_activations(identity.get("activations", {}).get("bits", ()))

    def _attribute(self, name: str) -> dict[str, Any]:
        value = self.group.attrs.get(name)
        if not isinstance(value, dict):
            raise StoreError(f"the attributes of {self.path} are damaged: {name} is {value!r}; {RESTORE}")
        return dict(value)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that changes the meaning of a number."""
        return self._attribute("identity")

    @property
    def coverage(self) -> dict[str, Any]:
        """The measured images and their sample blocks."""
        return self._attribute("coverage")

    @property
    def fingerprint(self) -> str:
        """Hash of the identity."""
        return str(self.group.attrs.get("fingerprint"))

    @property
    def rows_per_tile(self) -> int:
        """Rows of a `pairs` chunk: set when the store was made."""
        rows = self.group.attrs.get("rows_per_tile")
        if not isinstance(rows, int) or rows < 1:
            raise StoreError(f"the attributes of {self.path} are damaged: rows_per_tile is {rows!r}; {RESTORE}")
        return rows

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images of each sample block, from the coverage. Every run compares it with its own.

        The array `counts` says the same to other readers of the store.
        """
        return np.array([stop - start for start, stop in self.coverage["blocks"]], dtype=np.int64)

    def grow(self, plan: Plan, coverage: Mapping[str, Any]) -> None:
        """Adds the plan's new sample blocks, without measurements. Chunks of other blocks are not changed.

        The coverage is written last. If the process dies before, the old coverage stays, and growing again is harmless.
        """
        self._kinds.lengthen(len(plan.sample_blocks))
        _write_counts(self.group, plan)
        self.group.attrs["coverage"] = dict(coverage)

    def extend(self, plan: Plan) -> None:
        """Adds the plan's kinds. Kinds that are missing, or have other terms, begin empty."""
        covered = self._covered(plan)
        for kind in plan.kinds:
            if not self._kinds.holds(covered, kind):
                self._kinds.create(plan, kind)

    def _covered(self, plan: Plan) -> Plan:
        """The part of the plan for which the store has arrays. The store may still have to grow for the rest."""
        return replace(plan, sample_blocks=plan.sample_blocks[: len(self.counts)])

    def write(self, tile: Tile, sums: Array) -> None:
        """Writes one tile whole, then marks it done; StoreError if the disk takes neither."""
        try:
            self._kinds.array(tile.kind, "sums")[_place(tile)] = sums
            self._kinds.array(tile.kind, "done")[tile.sample_block, tile.number] = DONE
        except OSError as error:
            raise StoreError(
                f"{tile} could not be written to {self.path} ({error.strerror or error}); expected a disk with room that may be "
                "written to. What was measured is kept: make room, and the same command continues from there"
            ) from error

    def read(self, tile: Tile) -> Array:
        """The sums of one tile; StoreError if its chunk fails its checksum or is gone."""
        array = self._kinds.array(tile.kind, "sums")
        try:
            values = np.asarray(array[_place(tile)], dtype=np.float64)
        except Exception as error:  # codecs raise ValueError, RuntimeError or their own exceptions
            raise StoreError(f"the chunk of {tile} in {self.path} is damaged ({error})") from error
        if not sync(self.group.store.exists(_chunk_key(tile))):
            raise StoreError(f"the chunk of {tile} in {self.path} is missing")
        return values

    def missing(self, plan: Plan) -> list[Tile]:
        """Tiles of the plan that are not done, in the plan's order.

        Sample blocks without arrays are not done. A mark that cannot be read counts as not done.
        """
        done: set[tuple[Any, ...]] = set()
        covered = self._covered(plan)
        for kind in plan.kinds:
            if self._kinds.holds(covered, kind):
                done |= {(kind, *where) for where in zip(*np.nonzero(self._kinds.marks(kind) == DONE), strict=True)}
        return [tile for tile in plan.tiles if (tile.kind, tile.sample_block, tile.number) not in done]

    def damaged(self, tiles: Iterable[Tile]) -> list[Tile]:
        """The tiles whose chunk is missing or fails its checksum. They are marked as not done."""
        bad = []
        for tile in tiles:
            try:
                self.read(tile)
            except StoreError:
                self._kinds.array(tile.kind, "done")[tile.sample_block, tile.number] = 0
                bad.append(tile)
        return bad

    def gather(self, plan: Plan) -> dict[str, Array]:
        """All sums of the plan's kinds; StoreError if a tile is missing or damaged."""
        missing = self.missing(plan)
        if missing:
            raise StoreError(
                f"{self.path} lacks {len(missing)} of {len(plan.tiles)} tiles, the first {missing[0]}; "
                "run `clado run` again to measure them"
            )
        gathered: dict[str, Array] = {}
        for tile in plan.tiles:
            shape = (len(plan.sample_blocks), *tile_kind(tile.kind).shape(plan.space))
            whole = gathered.setdefault(tile.kind, np.full(shape, np.nan))
            whole[_place(tile)] = self.read(tile)
        return gathered


class _KindArrays:
    """The arrays `sums` and `done` of each tile kind. The error for damaged arrays says what to do."""

    def __init__(self, path: Path | str, group: zarr.Group) -> None:
        self._path = path
        self._group = group
        self._opened: dict[str, zarr.Array[Any]] = {}  # kept open, because opening takes as long as writing a chunk

    def array(self, kind: str, part: str) -> zarr.Array[Any]:
        """The array `sums` or `done` of a kind; StoreError if it is gone."""
        name = f"{kind}/{part}"
        if name not in self._opened:
            array = self._node(name)
            if not isinstance(array, zarr.Array):
                raise StoreError(f"{self._path}/{name} is missing; run `clado run` again to measure it")
            # otherwise zarr would not write a tile of NaNs
            self._opened[name] = array.with_config({"write_empty_chunks": True})
        return self._opened[name]

    def create(self, plan: Plan, kind: str) -> None:
        """Empty arrays of a kind, in place of any that exist."""
        _create_kind(self._group, plan, kind)
        self._opened.clear()

    def lengthen(self, num_blocks: int) -> None:
        """Makes room for more sample blocks."""
        for kind in filter(self._exists, tile_kinds()):
            for part in ("sums", "done"):
                array = self.array(kind, part)
                array.resize((num_blocks, *array.shape[1:]))
        self._opened.clear()

    def holds(self, plan: Plan, kind: str) -> bool:
        """Whether the arrays of a kind exist, under the plan's terms; StoreError if they have another shape."""
        if not self._exists(kind) or self._node(kind).attrs.get("terms", {}) != tile_kind(kind).terms(plan):
            return False
        for part, (shape, chunks) in _geometry(plan, kind).items():
            array = self.array(kind, part)
            # an interrupted growth leaves more sample blocks than the coverage has
            stored, expected = (array.shape[1:], array.chunks, array.dtype), (shape[1:], chunks, DTYPES[part])
            if stored != expected or array.shape[0] < shape[0]:
                raise StoreError(
                    f"{self._path}/{kind}/{part} is damaged: it is {array.shape} in chunks of {array.chunks}, "
                    f"{array.dtype}, expected {shape} in chunks of {chunks}, {DTYPES[part]}; {self._remedy(kind)}"
                )
        return True

    def marks(self, kind: str) -> NDArray[np.uint8]:
        """The cells of `done`. Cells that cannot be read are 0."""
        array = self.array(kind, "done")
        try:
            return np.asarray(array[:], dtype=np.uint8)
        except Exception:  # one by one, so that only the damaged ones are lost
            marks = np.zeros(array.shape, dtype=np.uint8)
            for where in np.ndindex(array.shape):
                with suppress(Exception):
                    marks[where] = array[where]
            return marks

    def _exists(self, kind: str) -> bool:
        """Whether a kind has its group and both arrays. `done` is made last."""
        return all(self._node(name) is not None for name in (kind, f"{kind}/sums", f"{kind}/done"))

    def _node(self, name: str) -> Any:
        """A group or an array. None if there is none. StoreError if its metadata cannot be read."""
        try:
            return self._group[name]
        except KeyError:
            return None
        except Exception as error:  # damaged metadata can cause any exception
            raise StoreError(
                f"{self._path}/{name}/zarr.json is damaged ({type(error).__name__}: {error}); {self._remedy(name)}"
            ) from error

    def _remedy(self, name: str) -> str:
        return f"{RESTORE}, or delete {self._path}/{name.partition('/')[0]}: that kind of tiles is then measured again"


def _place(tile: Tile) -> tuple[Any, ...]:
    """The place of a tile in the array of its kind."""
    rows = (slice(tile.first, tile.stop),) if tile_kind(tile.kind).has_row_tiles else ()
    return tile.sample_block, *rows


def _chunk_key(tile: Tile) -> str:
    """The key of a tile's chunk in the store."""
    later = [0] * (len(tile_kind(tile.kind).dimensions) - 1)  # only the first dimension is split into chunks
    return "/".join([tile.kind, "sums", "c", *map(str, (tile.sample_block, tile.number, *later))])


def _geometry(plan: Plan, kind: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape and chunks of the arrays of one kind, with one chunk for each tile. `done` is last: it marks that the kind exists."""
    shape, blocks, has_row_tiles = tile_kind(kind).shape(plan.space), len(plan.sample_blocks), tile_kind(kind).has_row_tiles
    chunks = (1, plan.rows_per_tile, *shape[1:]) if has_row_tiles else (1, *shape)
    tiles = plan.num_row_tiles if has_row_tiles else 1
    return {"sums": ((blocks, *shape), chunks), "done": ((blocks, tiles), (1, 1))}


def _create_kind(group: zarr.Group, plan: Plan, kind: str) -> None:
    """Empty arrays of one kind, in place of any that exist."""
    kind_group, terms = group.create_group(kind, overwrite=True), tile_kind(kind).terms(plan)
    names = {"sums": tile_kind(kind).dimensions, "done": ("tile",)}
    for part, (shape, chunks) in _geometry(plan, kind).items():
        kind_group.create_array(
            part,
            shape=shape,
            chunks=chunks,
            dtype=DTYPES[part],
            dimension_names=("block", *names[part]),
            fill_value=0 if part == "done" else np.nan,
            compressors=COMPRESSORS,
            serializer=BytesCodec(),
            filters=None,
        )
    if terms:
        kind_group.attrs["terms"] = terms


def _fill(
    group: zarr.Group, plan: Plan, identity: Mapping[str, Any], coverage: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Makes the empty arrays of a plan, and then the attributes that mark the group as a store."""
    for kind in tile_kinds():
        _create_kind(group, plan, kind)
    _write_counts(group, plan)
    group.attrs.update(
        format=FORMAT,
        fingerprint=fingerprint(dict(identity)),
        identity=dict(identity),
        coverage=dict(coverage),
        provenance=dict(provenance),
        rows_per_tile=plan.rows_per_tile,
    )


def _write_counts(group: zarr.Group, plan: Plan) -> None:
    counts = np.array([stop - start for start, stop in plan.sample_blocks], dtype="i8")
    group.create_array("counts", data=counts, compressors=COMPRESSORS, overwrite=True)


def exists(path: Path | str) -> bool:
    """Whether a path exists, or a store in a bucket. StoreError if the bucket does not answer."""
    if isinstance(path, Path):
        return path.exists()
    try:
        return bool(zarr.open_group(_bucket(path), mode="r", zarr_format=3).attrs.get("format") == FORMAT)
    except FileNotFoundError:  # zarr raises subclasses of it
        return False


def _bucket(url: str) -> Backend:
    """Zarr's store for a prefix of a bucket."""
    return ObjectStore(open_bucket(url))
