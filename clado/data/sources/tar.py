"""Images in uncompressed tar shards, as webdataset names them: KEY.jpg (or another image) and KEY.cls, its class.

There are two layouts. With `FOLDER/train/*.tar` and `FOLDER/val/*.tar` validation comes from val, the other slices from train.
The other layout is `FOLDER/*.tar`. A .cls file holds a class number, or an ImageNet synset such as n01440764. Shards without any
are unlabelled. Headers are read once. Images are read from the shard when they are loaded, so they can be read in any order. The
package webdataset streams shards in order, which does not work for sets that are drawn by seed.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

from clado.data.decoding import SUFFIXES, Listing, cut, folder_error, imagenet_numbers
from clado.data.images import DataSlices, ImageShape
from clado.errors import DataError
from clado.settings.schema import DataSettings


@dataclass(frozen=True)
class TarMember:
    """An image in a tar shard."""

    top: Path
    """The folder `data.path`."""
    shard: Path
    """The shard, which lies below `top`."""
    member: str
    """The image's name in the shard."""
    offset: int
    """Where the image begins in the shard, in bytes."""
    size: int
    """Bytes of the image."""

    def __str__(self) -> str:
        return f"{self.member} in {self.shard}"

    @property
    def name(self) -> str:
        """The shard's path below `top`, and the member's name in it."""
        return f"{self.shard.relative_to(self.top).as_posix()}/{self.member}"

    def read(self) -> bytes:
        """Its content."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def load_data(settings: DataSettings, image_shape: ImageShape) -> DataSlices:
    """The slices of the shards below `settings.path`. Headers and labels are read now, images when they are loaded."""
    root = settings.path
    if root is None or not root.is_dir():
        raise folder_error(root, "one of tar shards, or with train/ and val/ of such")
    train_and_val = (root / "train").is_dir() and (root / "val").is_dir()
    training = _list(root, root / "train" if train_and_val else root)
    return cut(settings, image_shape, training, _list(root, root / "val") if train_and_val else None)


def _list(top: Path, folder: Path) -> Listing:
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} holds no tar shards; expected files *.tar of KEY.jpg and KEY.cls, or train/ and val/ of such")
    images: list[TarMember] = []
    classes: list[str | None] = []
    for shard in shards:
        shard_images, shard_classes = _members(top, shard)
        for key in sorted(shard_images):
            images.append(shard_images[key])
            classes.append(shard_classes.get(key))
    if not images:
        raise DataError(f"the shards of {folder} hold no images; expected members such as KEY.jpg and KEY.cls")
    names = [name for name in classes if name is not None]
    if not names:
        return Listing(folder, tuple(images))
    if len(names) < len(images):
        unlabelled = images[classes.index(None)]
        raise DataError(
            f"{unlabelled} has no .cls file and {len(names)} other images have one; expected labels for all images or for none"
        )
    synset_numbers = imagenet_numbers()
    if all(name in synset_numbers for name in names):
        synsets = tuple(sorted(set(names)))
        class_numbers = {synset: k for k, synset in enumerate(synsets)}
        return Listing(folder, tuple(images), tuple(class_numbers[name] for name in names), synsets)
    for image, name in zip(images, names, strict=True):
        if not name.isdecimal():
            raise DataError(
                f"the .cls of {image} says {name!r}; expected a class number such as 7, or a synset such as n01440764"
            )
    return Listing(folder, tuple(images), tuple(map(int, names)))


def _members(top: Path, shard: Path) -> tuple[dict[str, TarMember], dict[str, str]]:
    """Images and classes of a shard by key: the member's name up to the first dot of its last part."""
    images: dict[str, TarMember] = {}
    classes: dict[str, str] = {}
    dotted_images: dict[str, str] = {}  # key -> an image with another dot in its name, such as a mask
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, slash, file_name = member.name.rpartition("/")
                stem, _, extension = file_name.partition(".")
                key, suffix = f"{folder}{slash}{stem}", f".{extension.lower()}"
                if member.isdir():
                    continue
                if not member.isfile():
                    if suffix in SUFFIXES or extension == "cls":
                        raise DataError(
                            f"{member.name} in {shard} is a link; expected files themselves (tar -h --hard-dereference)"
                        )
                elif suffix in SUFFIXES:
                    if key in images:
                        raise DataError(
                            f"{shard} holds both {images[key].member} and {member.name}; expected one image for each key"
                        )
                    images[key] = TarMember(top, shard, member.name, member.offset_data, member.size)
                elif suffix.endswith(SUFFIXES):
                    dotted_images[key] = member.name
                elif extension == "cls" and (file := archive.extractfile(member)) is not None:
                    classes[key] = file.read().decode("ascii", "replace").strip()
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} is not a readable tar file ({error}); expected one without compression") from None
    if lone_images := [name for key, name in dotted_images.items() if key not in images]:
        raise DataError(
            f"{lone_images[0]} in {shard} has a dot in its key, which webdataset ends at the first one; "
            "expected names such as KEY.jpg"
        )
    return images, classes
