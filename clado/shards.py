"""The store of measurements: a Zarr v3 group of shards. The only module that imports zarr.

One task writes one whole chunk: a tile is the unit of work, of storage and of retry, so repeating or killing one is harmless and
resume is the list of absent tiles. Every chunk carries a checksum (crc32c over zstd). An array `done` beside each array of sums
holds one cell per tile, written after the tile: a tile of NaNs is not a missing tile.

    store.zarr/                attributes: format, identity, coverage, provenance, rows_per_tile
      counts       (blocks,)            images per sample block
      singles/sums (blocks, 1 + K)      singles/done (blocks, 1)
      pairs/sums   (blocks, K, K)       pairs/done   (blocks, row tiles)
      gram/sums    (blocks, 2 + TK, 1 + K)              gram/changes (blocks, K, images, logits), float32: what products are of
      …                                 the other kinds of `probes.py`, each a group with its shape behind the blocks

A kind whose numbers depend on more than the identity keeps that as the attribute `terms` of its group; under other terms its
tiles count as missing.

More sample blocks lengthen the arrays. More options (a bit-width, a layer) make them wider, chunks and all: the kinds are written
anew below `wider-1/`, `wider-2/`, … with what is known in its place, and the attribute `at` says where they are now. A tile that
is known in part has 2 in `done`, and NaN where it is to be measured.

A store is a folder, or a prefix of a bucket named by URL (s3://BUCKET/PREFIX): Zarr's own store on obstore, which takes keys and
the endpoint from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP).
"""

import shutil
from collections.abc import Iterable, Mapping
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

from clado.config import fingerprint, redact
from clado.errors import ConfigurationError, IdentityMismatch, StoreError
from clado.probes import BY_ENTRY, KINDS, OF_PAIRS, TEMPERATURES, Kind, Plan, Tile
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
Changes = NDArray[np.float32]
DTYPES: dict[str, np.dtype[Any]] = {"sums": np.dtype("f8"), "done": np.dtype("u1"), "changes": np.dtype("f4")}
DONE, IN_PART = 1, 2
RESTORE = "restore the store from a copy"


class Store:
    """Measurements of one identity, tile by tile. Opened by path, by any number of processes; each tile has one writer."""

    def __init__(self, path: Path | str, group: zarr.Group) -> None:
        self.path = path
        self.group = group
        at = group.attrs.get("at", "")
        self._kinds = _subgroup(path, group, str(at)) if at else group  # where the kinds are
        self._compared: tuple[SearchSpace | None, tuple[int, ...] | None] = None, None  # with a plan's space, and found so
        self._arrays: dict[str, zarr.Array[Any]] = {}  # opened: to open one takes as long as to write a chunk

    @classmethod
    def create(
        cls,
        path: Path | str,
        plan: Plan,
        identity: Mapping[str, Any],
        coverage: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> "Store":
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
    def open(cls, path: Path | str) -> "Store":
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
            for part in ("sums", "done", "changes"):
                if part != "changes" or self._opened(f"{kind}/{part}") is not None:
                    array = self._array(f"{kind}/{part}")
                    array.resize((blocks, *array.shape[1:]))
        self._arrays.clear()
        _write_counts(self.group, plan)
        self.group.attrs["coverage"] = dict(coverage)

    def widen(self, plan: Plan, coverage: Mapping[str, Any]) -> None:
        """Makes room for the options that the plan has beside this store's, its sample blocks being those of the store. What is
        known of singles, pairs and Gram matrices is carried over, entry by entry; of other kinds a tile is measured anew.

        The attributes are written last and at once: a process that dies before leaves the store as it was, and widening again
        is harmless.
        """
        at = f"wider-{int(str(self.group.attrs.get('at', '')).rpartition('-')[2] or 0) + 1}"
        wider = Store(self.path, self.group)
        wider._kinds = self.group.create_group(at, overwrite=True)
        for kind in KINDS:
            _create_kind(wider._kinds, plan, kind)
        for tile in replace(plan, kinds=BY_ENTRY).tiles:
            if (known := self.known(plan, tile)) is not None:
                wider._put(tile, known, IN_PART if plan.lacking(tile, known).any() else DONE, self.changes(plan, tile, known))
        self.group.attrs.update(coverage=dict(coverage), rows_per_tile=plan.rows_per_tile, at=at)
        for name in {*self.group.keys()} - {"counts", at}:  # the narrow kinds, and what a process that died left
            del self.group[name]
        self._kinds, self._compared = wider._kinds, (None, None)
        self._arrays.clear()
        self.__dict__.pop("space")

    def known(self, plan: Plan, tile: Tile) -> Array | None:
        """What is held of a tile that is not done: NaN where it is not measured; None where there is nothing, or nothing that can
        be read. The plan may have more options than this store."""
        if tile.kind not in BY_ENTRY:
            return None
        if self._compared[0] is not plan.space:  # a run asks with one plan for every tile
            self._compared = plan.space, self.space.places_in(plan.space)
        places = self._compared[1]
        as_wide = places == tuple(range(plan.space.num_options))
        if places is None or (as_wide and not self._kinds.path) or not self._is_there(tile.kind):
            return None
        if tile.kind == "gram" and not self._has_changes(plan, tile):
            return None
        if as_wide:
            return self._read_marked(tile, {IN_PART})
        narrow = replace(plan, space=self.space, kinds=(tile.kind,), rows_per_tile=self.rows_per_tile)
        wide, columns = np.full(plan.shape(tile.kind), np.nan), np.array(places)
        for held in narrow.tiles:
            if held.block == tile.block and (sums := self._read_marked(held, {DONE, IN_PART})) is not None:
                if tile.kind in OF_PAIRS:
                    wide[np.ix_(columns[held.first : held.stop], columns)] = sums
                elif tile.kind == "gram":
                    below = 2 + np.add.outer(np.arange(len(TEMPERATURES)) * plan.space.num_options, columns).ravel()
                    wide[np.ix_([0, 1, *below], [0, *(1 + columns)])] = sums
                else:
                    wide[[0, *(1 + columns)]] = sums
        if tile.kind in OF_PAIRS:
            wide = wide[tile.first : tile.stop]
        return None if np.isnan(wide).all() else wide

    def changes(self, plan: Plan, tile: Tile, known: Array | None) -> Changes | None:
        """The changes of the logits of a Gram tile, NaN where nothing is `known` of an option; None where none are kept. The plan
        may have more options than this store. StoreError where they cannot be read."""
        if tile.kind != "gram" or not plan.num_logits:
            return None
        found = np.full(plan.changes_shape, np.nan, dtype=np.float32)
        if known is not None:
            places = self.space.places_in(plan.space)
            held = self._array("gram/changes")
            try:
                values = np.asarray(held[tile.block])
            except Exception as error:  # as in `read`
                raise StoreError(f"the changes of {tile} in {self.path} are damaged ({error}); {self._remedy('gram')}") from error
            number = min(values.shape[1], found.shape[1])
            found[list(places or ()), :number] = values[:, :number]
        return found

    def _has_changes(self, plan: Plan, tile: Tile) -> bool:
        """Whether the changes of a Gram tile are there, for the plan's terms and images, and can be read."""
        with suppress(Exception):  # whatever is wrong: they can be measured again
            held = self._array("gram/changes")
            whole = held.shape[2] >= plan.block_images(tile.block) and held.shape[3] == plan.num_logits
            whole = whole and self._opened("gram").attrs.get("terms") == plan.terms("gram")
            key = "/".join([*filter(None, [self._kinds.path]), "gram/changes/c", str(tile.block), "0/0/0"])
            return whole and bool(sync(self.group.store.exists(key))) and held[tile.block] is not None
        return False

    def _read_marked(self, tile: Tile, marks: set[int]) -> Array | None:
        """The sums of a tile with one of these marks in `done`, None where it has another or cannot be read."""
        with suppress(Exception):  # as `_marks` does: a mark that cannot be read is none
            if int(np.asarray(self._array(f"{tile.kind}/done")[tile.block, tile.number])) in marks:
                return self.read(tile)
        return None

    @cached_property
    def space(self) -> SearchSpace:
        """Layers and candidates that were measured; ties and blocks are the configuration's."""
        coverage = self.coverage
        layers = tuple(Layer(**{**row, "shape": tuple(row["shape"])}) for row in coverage["layers"])
        found = SearchSpace(layers, tuple(tuple(bits) for bits in coverage["bits"]))
        return found.with_activations(coverage.get("activation_bits", ()))

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
        """What was measured: layers, bits, images."""
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
                _create_kind(self._kinds, plan, kind)
                self._arrays.clear()

    def _holds(self, plan: Plan, kind: Kind) -> bool:
        """Whether the arrays of a kind are there, under the plan's terms; StoreError where they have another shape."""
        if not self._is_there(kind) or self._opened(kind).attrs.get("terms", {}) != plan.terms(kind):
            return False
        own = replace(plan, blocks=plan.blocks[: len(self.counts)])  # the plan may be of a store that is yet to grow
        for part, (shape, chunks) in _geometry(replace(own, num_logits=0), kind).items():
            array = self._array(f"{kind}/{part}")
            # a growth that was cut short leaves more blocks than the coverage has
            found, expected = (array.shape[1:], array.chunks, array.dtype), (shape[1:], chunks, DTYPES[part])
            if found != expected or array.shape[0] < shape[0]:
                raise StoreError(
                    f"{self._where_kinds(f'{kind}/{part}')} is damaged: it is {array.shape} in chunks of {array.chunks}, "
                    f"{array.dtype}, expected {shape} in chunks of {chunks}, {DTYPES[part]}; {self._remedy(kind)}"
                )
        return True

    def _is_there(self, kind: Kind) -> bool:
        """Whether a kind has its group and both arrays: `done` is made last."""
        return all(self._opened(name) is not None for name in (kind, f"{kind}/sums", f"{kind}/done"))

    def _opened(self, name: str) -> Any:
        """A group or an array of the kinds, None where there is none; StoreError where what describes it cannot be read."""
        try:
            return self._kinds[name]
        except KeyError:
            return None
        except Exception as error:  # whatever damaged metadata leads to
            where = self._where_kinds(name)
            raise StoreError(f"{where}/zarr.json is damaged ({type(error).__name__}: {error}); {self._remedy(name)}") from error

    def _where_kinds(self, name: str) -> str:
        """Path of a group or an array of the kinds, for messages."""
        return "/".join(filter(None, (str(self.path), self._kinds.path, name)))

    def _remedy(self, name: str) -> str:
        kind = self._where_kinds(name.partition("/")[0])
        return f"{RESTORE}, or delete {kind}: that kind of tiles is then measured again"

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            found = self._opened(name)
            if not isinstance(found, zarr.Array):
                raise StoreError(f"{self._where_kinds(name)} is gone; run `clado run` again to measure what it held")
            # not kept in the store, and a tile of NaNs must be written
            self._arrays[name] = found.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _where(self, tile: Tile) -> tuple[Any, ...]:
        return (tile.block, slice(tile.first, tile.stop)) if tile.kind in OF_PAIRS else (tile.block,)

    def write(self, tile: Tile, sums: Array, changes: Changes | None = None) -> None:
        """Writes one tile whole, then marks it done; StoreError where the disk takes neither."""
        self._put(tile, sums, DONE, changes)

    def _put(self, tile: Tile, sums: Array, mark: int, changes: Changes | None = None) -> None:
        try:
            if changes is not None and self._opened("gram/changes") is not None:
                kept = self._array("gram/changes")
                kept[tile.block] = _padded(changes, kept.shape[2])
            self._array(f"{tile.kind}/sums")[self._where(tile)] = sums
            self._array(f"{tile.kind}/done")[tile.block, tile.number] = mark
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
        return "/".join([*filter(None, [self._kinds.path]), tile.kind, "sums", "c", *map(str, key)])

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


def _padded(changes: Changes, num_images: int) -> Changes:
    """The same for `num_images`: NaN for those that a block has not; of one that was cut larger than the first, what fits."""
    found = np.full((len(changes), num_images, changes.shape[2]), np.nan, dtype=np.float32)
    found[:, : changes.shape[1]] = changes[:, :num_images]
    return found


def _geometry(plan: Plan, kind: Kind) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape and chunks of the arrays of one kind: one chunk a tile."""
    shape, blocks, rows = plan.shape(kind), len(plan.blocks), kind in OF_PAIRS
    chunks = (1, plan.rows_per_tile, *shape[1:]) if rows else (1, *shape)
    tiles = plan.num_row_tiles if rows else 1
    kept = {"changes": ((blocks, *plan.changes_shape), (1, *plan.changes_shape))} if kind == "gram" and plan.num_logits else {}
    return {"sums": ((blocks, *shape), chunks), "done": ((blocks, tiles), (1, 1)), **kept}


def _create_kind(group: zarr.Group, plan: Plan, kind: Kind) -> None:
    """Empty arrays of one kind, in place of any that are there."""
    kept = group.create_group(kind, overwrite=True)
    geometry = _geometry(plan, kind)
    options: dict[str, Any] = {
        "compressors": [ZstdCodec(level=1), Crc32cCodec()],
        "serializer": BytesCodec(),
        "filters": None,
    }
    for part, names in (("sums", NAMES[kind]), ("changes", ("option", "image", "logit")), ("done", ("tile",))):  # `done` is last
        if part in geometry:
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


def _subgroup(path: Path | str, group: zarr.Group, at: str) -> zarr.Group:
    """The group below which the kinds are; StoreError where it is gone."""
    try:
        found = group[at]
    except Exception as error:  # whatever damaged metadata leads to
        raise StoreError(f"{path}/{at} is gone or damaged ({type(error).__name__}: {error}); {RESTORE}") from error
    if not isinstance(found, zarr.Group):
        raise StoreError(f"{path}/{at} is no group; {RESTORE}")
    return found


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
