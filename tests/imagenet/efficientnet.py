"""How EfficientNet-Lite0 reads images, and foolbox's twenty labelled photos: from packages, without a network."""

from importlib.util import find_spec
from pathlib import Path

from clado.data.decoding import imagenet_numbers
from clado.data.factories import EFFICIENTNET_SHAPE

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # (x − 127) / 128 of pixels in 0..255
SHAPE = EFFICIENTNET_SHAPE


def photos(folder: Path) -> Path:
    """Links to the twenty photos, sorted into sub-folders that their classes' synsets name; importing foolbox needs more."""
    package = find_spec("foolbox")
    if package is None or package.origin is None:
        raise FileNotFoundError("foolbox is not installed; make imagenet-check installs it")
    synsets = list(imagenet_numbers())
    files = sorted((Path(package.origin).parent / "data").glob("imagenet_*.jpg"))
    for file in files:
        place = folder / synsets[int(file.stem.rpartition("_")[2])] / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    return folder
