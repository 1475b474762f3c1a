"""The store of measurements: a Zarr v3 group of shards. The only module that imports zarr.

One task writes one whole chunk: a tile is the unit of work, of storage and of retry, so repeating or killing one is harmless and
resume is the list of absent tiles. Every chunk carries a checksum (crc32c over zstd). An array `done` beside each array of sums
holds one cell per tile, written after the tile: a tile of NaNs is not a missing tile.

    store.zarr/                attributes: format, identity, coverage, provenance, rows_per_tile
      counts       (blocks,)            images per sample block
      singles/sums (blocks, 1 + K)      singles/done (blocks, 1)
      pairs/sums   (blocks, K, K)       pairs/done   (blocks, row tiles)
      …                                 the other kinds of `plan.py`, each a group with its shape behind the blocks

A kind whose numbers depend on more than the identity keeps that as the attribute `terms` of its group; under other terms its
tiles count as missing.

More sample blocks lengthen the arrays. Layers and their candidates are part of the identity: a store has those it was made with.

A store is a folder, or a prefix of a bucket named by URL (s3://BUCKET/PREFIX): Zarr's own store on obstore, which takes keys and
the endpoint from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP).
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as Backend
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.sync import sync

from clado.errors import ConfigurationError, IdentityMismatch, StoreError
from clado.measuring.plan import KINDS, OF_PAIRS, Kind, Plan, Tile
from clado.settings.identity import fingerprint
from clado.settings.redaction import redact
from clado.space import Layer, SearchSpace

FORMAT = "clado-store/1"
NAMES: dict[Kind, tuple[str, ...]] = {
    "singles": ("probe",),
    "plain_singles": ("probe",),
    "pairs": ("option", "later_option"),
    "gram": ("probe", "option"),
    "block_pairs": ("option", "later_option"),
    "gradients": ("estimator", "probe"),
    "trace": ("probe",),
}
Array = NDArray[np.float64]
DTYPES: dict[str, np.dtype[Any]] = {"sums": np.dtype("f8"), "done": np.dtype("u1")}
DONE = 1
RESTORE = "restore the store from a copy"


class MeasurementStore:
    """Measurements of one identity, tile by tile. Opened by path, by any number of processes; each tile has one writer."""

    def __init__(self, path: Path | str, group: zarr.Group) -> None:
        self.path = path
        self.group = group
        self._arrays: dict[str, zarr.Array[Any]] = {}  # opened: to open one takes as long as to write a chunk

    @classmethod
    def create(
        cls,
        path: Path | str,
        plan: Plan,
        identity: Mapping[str, Any],
        coverage: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> "MeasurementStore":
        """A new store for a plan: a folder appears whole under `path`; in a bucket, which renames nothing, `format` is last."""
        if isinstance(path, str):
            group = zarr.open_group(_bucket(path), mode="a", zarr_format=3)
            if group.attrs or not set(group.keys()) <= {*KINDS, "counts"}:  # else: one whose making was cut short is made anew
                raise StoreError(f"{redact(path)} holds something that is not ours; name another prefix (store: s3://…)")
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
        """An existing store, refused unless it is ours."""
        if isinstance(path, Path) and not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise StoreError(f"{path} {what}; expected a store that `clado run` made")
        try:
            group = zarr.open_group(path if isinstance(path, Path) else _bucket(path), mode="r+", zarr_format=3)
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
        if self.fingerprint != fingerprint(self.identity):
            raise StoreError(f"the attributes of {self.path} are damaged: the fingerprint is not that of the identity; {RESTORE}")
        rows = [*differences(self.identity, identity), *differences(self.coverage, coverage)]
        if rows:
            raise IdentityMismatch(
                f"{self.path} was measured under other settings, so its numbers mean something else:\n  "
                + "\n  ".join(rows)
                + "\n  Use the old settings, or name another folder for this run (folder: runs/…)"
            )

    def grow(self, plan: Plan, coverage: Mapping[str, Any]) -> None:
        """Makes room for the plan's further sample blocks, which are absent; no chunk of the others is touched.

        The coverage is written last: a process that dies before leaves the old coverage, and growing again is harmless.
        """
        blocks = len(plan.blocks)
        for kind in (kind for kind in KINDS if self._is_there(kind)):
            for part in ("sums", "done"):
                array = self._array(f"{kind}/{part}")
                array.resize((blocks, *array.shape[1:]))
        self._arrays.clear()
        _write_counts(self.group, plan)
        self.group.attrs["coverage"] = dict(coverage)

    @cached_property
    def space(self) -> SearchSpace:
        """Layers and candidates that were measured; ties and blocks are the configuration's."""
        identity, layers, bits = self.identity, [], []
        for row in identity["layers"]:
            fields = {**row, "shape": tuple(row["shape"])}
            bits.append(tuple(fields.pop("bits")))
            layers.append(Layer(**fields))
        return SearchSpace(tuple(layers), tuple(bits)).with_activations(identity.get("activations", {}).get("bits", ()))

    def provenance_differences(self, provenance: Mapping[str, Any]) -> list[str]:
        """How code, libraries and device differ from those that began the store: a warning, not an error."""
        return differences(self._attribute("provenance"), provenance)

    def _attribute(self, name: str) -> dict[str, Any]:
        value = self.group.attrs.get(name)
        if not isinstance(value, dict):
            raise StoreError(f"the attributes of {self.path} are damaged: {name} is {value!r}; {RESTORE}")
        return dict(value)

    @property
    def identity(self) -> dict[str, Any]:
        """What changes the meaning of a number."""
        return self._attribute("identity")

    @property
    def coverage(self) -> dict[str, Any]:
        """Which images were measured, in which blocks."""
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

    def extend(self, plan: Plan) -> None:
        """Makes room for the plan's kinds: those that the store has not, or holds under other terms, begin empty."""
        for kind in plan.kinds:
            if not self._holds(plan, kind):
                _create_kind(self.group, plan, kind)
                self._arrays.clear()

    def _holds(self, plan: Plan, kind: Kind) -> bool:
        """Whether the arrays of a kind are there, under the plan's terms; StoreError where they have another shape."""
        if not self._is_there(kind) or self._opened(kind).attrs.get("terms", {}) != plan.terms(kind):
            return False
        own = replace(plan, blocks=plan.blocks[: len(self.counts)])  # the plan may be of a store that is yet to grow
        for part, (shape, chunks) in _geometry(own, kind).items():
            array = self._array(f"{kind}/{part}")
            # a growth that was cut short leaves more blocks than the coverage has
            found, expected = (array.shape[1:], array.chunks, array.dtype), (shape[1:], chunks, DTYPES[part])
            if found != expected or array.shape[0] < shape[0]:
                raise StoreError(
                    f"{self.path}/{kind}/{part} is damaged: it is {array.shape} in chunks of {array.chunks}, "
                    f"{array.dtype}, expected {shape} in chunks of {chunks}, {DTYPES[part]}; {self._remedy(kind)}"
                )
        return True

    def _is_there(self, kind: Kind) -> bool:
        """Whether a kind has its group and both arrays: `done` is made last."""
        return all(self._opened(name) is not None for name in (kind, f"{kind}/sums", f"{kind}/done"))

    def _opened(self, name: str) -> Any:
        """A group or an array of the kinds, None where there is none; StoreError where what describes it cannot be read."""
        try:
            return self.group[name]
        except KeyError:
            return None
        except Exception as error:  # whatever damaged metadata leads to
            raise StoreError(
                f"{self.path}/{name}/zarr.json is damaged ({type(error).__name__}: {error}); {self._remedy(name)}"
            ) from error

    def _remedy(self, name: str) -> str:
        return f"{RESTORE}, or delete {self.path}/{name.partition('/')[0]}: that kind of tiles is then measured again"

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            found = self._opened(name)
            if not isinstance(found, zarr.Array):
                raise StoreError(f"{self.path}/{name} is gone; run `clado run` again to measure what it held")
            # not kept in the store, and a tile of NaNs must be written
            self._arrays[name] = found.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _where(self, tile: Tile) -> tuple[Any, ...]:
        return (tile.block, slice(tile.first, tile.stop)) if tile.kind in OF_PAIRS else (tile.block,)

    def write(self, tile: Tile, sums: Array) -> None:
        """Writes one tile whole, then marks it done; StoreError where the disk takes neither."""
        try:
            self._array(f"{tile.kind}/sums")[self._where(tile)] = sums
            self._array(f"{tile.kind}/done")[tile.block, tile.number] = DONE
        except OSError as error:
            raise StoreError(
                f"{tile} could not be written to {self.path} ({error.strerror or error}); expected a disk with room that may be "
                "written to. What was measured is kept: make room, and the same command goes on from there"
            ) from error

    def read(self, tile: Tile) -> Array:
        """The sums of one tile; StoreError where its chunk fails its checksum or is gone."""
        array = self._array(f"{tile.kind}/sums")
        try:
            values = np.asarray(array[self._where(tile)], dtype=np.float64)
        except Exception as error:  # codecs raise ValueError, RuntimeError or their own kinds
            raise StoreError(f"the chunk of {tile} in {self.path} is damaged ({error})") from error
        if not sync(self.group.store.exists(self._chunk_key(tile))):
            raise StoreError(f"the chunk of {tile} in {self.path} is gone")
        return values

    def _chunk_key(self, tile: Tile) -> str:
        key = (
            [tile.block, tile.number, 0]
            if tile.kind in OF_PAIRS
            else [tile.block] + [0] * (self._array(f"{tile.kind}/sums").ndim - 1)
        )
        return "/".join([tile.kind, "sums", "c", *map(str, key)])

    def missing(self, plan: Plan) -> list[Tile]:
        """Tiles of the plan that are not done, in the plan's order: blocks that the store has no room for yet are not, and a mark
        that cannot be read is none."""
        marks = {kind: self._marks(kind) for kind in plan.kinds if self._holds(plan, kind)}
        done = {(kind, *where) for kind, held in marks.items() for where in zip(*np.nonzero(held == DONE), strict=True)}
        return [tile for tile in plan.tiles if (tile.kind, tile.block, tile.number) not in done]

    def _marks(self, kind: Kind) -> NDArray[np.uint8]:
        array = self._array(f"{kind}/done")
        try:
            return np.asarray(array[:], dtype=np.uint8)
        except Exception:  # one by one, to lose no more than the damaged ones
            marks = np.zeros(array.shape, dtype=np.uint8)
            for where in np.ndindex(array.shape):
                with suppress(Exception):
                    marks[where] = array[where]
            return marks

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
            shape = (len(plan.blocks), *self._array(f"{tile.kind}/sums").shape[1:])
            whole = gathered.setdefault(tile.kind, np.full(shape, np.nan))
            whole[self._where(tile)] = self.read(tile)
        return gathered

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images per sample block, by the coverage, which every run compares with its own. The array `counts` says the same to
        other readers of the store."""
        return np.array([stop - start for start, stop in self.coverage["blocks"]], dtype=np.int64)


def _geometry(plan: Plan, kind: Kind) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape and chunks of the arrays of one kind: one chunk a tile."""
    shape, blocks, rows = plan.shape(kind), len(plan.blocks), kind in OF_PAIRS
    chunks = (1, plan.rows_per_tile, *shape[1:]) if rows else (1, *shape)
    tiles = plan.num_row_tiles if rows else 1
    return {"sums": ((blocks, *shape), chunks), "done": ((blocks, tiles), (1, 1))}


def _create_kind(group: zarr.Group, plan: Plan, kind: Kind) -> None:
    """Empty arrays of one kind, in place of any that are there."""
    kept = group.create_group(kind, overwrite=True)
    geometry = _geometry(plan, kind)
    options: dict[str, Any] = {
        "compressors": [ZstdCodec(level=1), Crc32cCodec()],
        "serializer": BytesCodec(),
        "filters": None,
    }
    for part, names in (("sums", NAMES[kind]), ("done", ("tile",))):  # `done` is last
        shape, chunks = geometry[part]
        form: dict[str, Any] = {"shape": shape, "chunks": chunks, "dtype": DTYPES[part], "dimension_names": ("block", *names)}
        kept.create_array(part, fill_value=0 if part == "done" else np.nan, **form, **options)
    if plan.terms(kind):
        kept.attrs["terms"] = plan.terms(kind)


def _fill(
    group: zarr.Group, plan: Plan, identity: Mapping[str, Any], coverage: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """The arrays of a plan, empty, and then the attributes that make the group a store of ours."""
    for kind in KINDS:
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
    counts = np.array([plan.block_images(block) for block in range(len(plan.blocks))], dtype="i8")
    group.create_array("counts", data=counts, compressors=[ZstdCodec(level=1), Crc32cCodec()], overwrite=True)


def exists(path: Path | str) -> bool:
    """Whether something is there: a path, or a store of ours in a bucket; StoreError where the bucket does not answer."""
    if isinstance(path, Path):
        return path.exists()
    try:
        return bool(zarr.open_group(_bucket(path), mode="r", zarr_format=3).attrs.get("format") == FORMAT)
    except FileNotFoundError:  # and zarr's own kinds of it
        return False


def _bucket(url: str) -> Backend:
    """Zarr's store for a prefix of a bucket."""
    try:
        from obstore.store import S3Store
        from zarr.storage import ObjectStore
    except ImportError as error:
        raise ConfigurationError(f"a store at {url} needs obstore ({error}); expected: pip install 'clado[s3]'") from None
    # a server that does not answer is given up within a minute, not in obstore's three
    bucket = S3Store.from_url(url, retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=60)})
    try:
        next(iter(bucket.list(chunk_size=1)), None)
    except Exception as error:  # of obstore, by kind of server and fault
        told = redact(" ".join(str(error).split()))[:300]
        raise StoreError(
            f"{url} cannot be used ({told}); expected a bucket that exists, its keys and AWS_ENDPOINT_URL "
            "in the environment, and AWS_ALLOW_HTTP=true for a server without TLS"
        ) from None
    return ObjectStore(bucket)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """One line for each leaf in which two plain documents differ; rows that have names, such as layers, are compared by name."""
    if all(value is None or isinstance(value, Mapping) for value in (old, new)):
        before, after, lines = old or {}, new or {}, []
        for key in sorted({*before, *after}):
            lines += differences(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
        return lines
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return [] if list(old) == list(new) else _differences_of_lists(list(old), list(new), where)
    return [] if old == new else [f"{where}: the store has {old!r}, this run {new!r}"]


def _differences_of_lists(old: list[Any], new: list[Any], where: str) -> list[str]:
    if _have_names(old) and _have_names(new):
        return _differences_by_name(old, new, where)
    if all(isinstance(entry, int | str) for entry in (*old, *new)):
        return [f"{where}: the store has {old!r}, this run {new!r}"]
    if len(old) == len(new):
        first = next(k for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        return [f"{where}[{first}]: the store has {old[first]!r}, this run {new[first]!r}"]
    return [f"{where}: the store has {len(old)} entries, this run {len(new)}"]


def _have_names(rows: Sequence[Any]) -> bool:
    return all(isinstance(row, Mapping) and "name" in row for row in rows)


def _differences_by_name(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """A line for the rows that only one has, and a line for each difference with the names of all rows that have it."""
    before, after = ({row["name"]: row for row in rows} for rows in (old, new))
    lines = []
    if only := [name for name in before if name not in after]:
        lines.append(f"{where}: only the store has {_listed(only)}")
    if only := [name for name in after if name not in before]:
        lines.append(f"{where}: only this run has {_listed(only)}")
    alike: dict[str, list[str]] = {}
    for name in before:
        for line in differences(before[name], after[name]) if name in after else []:
            alike.setdefault(line, []).append(name)
    lines += [f"{line} ({where}: {_listed(names)})" for line, names in alike.items()]
    return lines or [f"{where}: the store has them in another order than this run"]


def _listed(names: Sequence[str]) -> str:
    """Up to three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
