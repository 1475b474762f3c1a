"""How EfficientNet-Lite0 reads images, and labelled photographs: your own folder, or foolbox's twenty."""

import os
from importlib.util import find_spec
from pathlib import Path

from clado.data.decoding import imagenet_numbers
from clado.data.factories import EFFICIENTNET_SHAPE

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # (x − 127) / 128 of pixels in 0..255
SHAPE = EFFICIENTNET_SHAPE
FOLDER = os.environ.get("PHOTOS")
"""Photographs, FOLDER/SYNSET/*: `make imagenet-check PHOTOS=FOLDER`."""
CALIBRATION, SENSITIVITY, VALIDATION = (64, 32, 100) if FOLDER else (8, 6, 6)


def photos(folder: Path) -> Path:
    """`PHOTOS`, or links to foolbox's, sorted into sub-folders that their classes' synsets name; importing foolbox needs more."""
    if FOLDER:
        return Path(FOLDER).resolve()
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
