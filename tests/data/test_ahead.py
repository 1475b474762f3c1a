"""Images that are checked ahead are refused as those that are read, and each is checked once."""

import io
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clado.data import decoding
from clado.data.decoding import Ahead, EncodedSlice, Preprocessing
from clado.data.images import check_slice
from clado.data.sources.folder import ImageFile
from clado.errors import DataError, UnreadableImage

COUNT = 23
PREPROCESSING = Preprocessing((3, 16, 16), 18, (0.5,) * 3, (0.2,) * 3)


@dataclass(frozen=True)
class Encoded:
    """An image file in memory."""

    content: bytes
    name: str = "photo"

    def read(self) -> bytes:
        return self.content


def pixels(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(form: str, mode: str = "RGB", **options) -> bytes:
    """A file of this form and mode."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, 67, 90)).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> EncodedSlice:
    """Images, of which the seventh cannot be read."""
    for k in range(COUNT):
        Image.fromarray(pixels(k)).save(tmp_path / f"{k:02}.png")
    (tmp_path / "07.png").write_bytes(b"no image")
    files = [ImageFile(tmp_path, tmp_path / f"{k:02}.png") for k in range(COUNT)]
    return EncodedSlice(files, list(range(COUNT)), None, PREPROCESSING)


def refusal(function, content: bytes) -> type[Exception] | None:
    try:
        function(Encoded(content))
    except DataError as error:
        return type(error)
    return None


FILES = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "grey": encoded("JPEG", "L"),
    "cmyk": encoded("JPEG", "CMYK"),
    "png": encoded("PNG"),
    "palette": encoded("PNG", "P"),
    "webp": encoded("WEBP"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_check_refuses_what_reading_refuses_wherever_the_file_is_cut(name: str) -> None:
    content = FILES[name]
    cuts = [0, 1, 10, *(len(content) * k // 40 for k in range(1, 40)), len(content) - 2, len(content) - 1, len(content)]
    expected = [refusal(PREPROCESSING, content[:cut]) for cut in cuts]
    assert [refusal(PREPROCESSING.check, content[:cut]) for cut in cuts] == expected
    assert expected[0] is UnreadableImage
    assert expected[-1] is None


def test_a_check_refuses_values_of_32_bits_as_reading_does() -> None:
    content = encoded("TIFF", "F")
    assert refusal(PREPROCESSING.check, content) is refusal(PREPROCESSING, content) is DataError


def test_each_is_checked_once_ahead_of_its_reader(images: EncodedSlice, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: Counter[str] = Counter()
    plain = Preprocessing.check

    def counted(self: Preprocessing, image: ImageFile) -> None:
        checked[image.name] += 1
        plain(self, image)

    monkeypatch.setattr(Preprocessing, "check", counted)
    images.check_ahead()
    assert images.check(0, 7).tolist() == list(range(7))
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=r"07\.png cannot be read"):
            images.check(7, 9)
    assert images.check(8, COUNT).tolist() == list(range(8, COUNT))
    assert checked == {f"{k:02}.png": 1 for k in range(COUNT)}
    images.end_ahead()
    images.check(0, 2)
    assert checked["00.png"] == checked["01.png"] == 2
    unreadable: dict[int, str] = {}
    check_slice(images, (3, 16, 16), unreadable=unreadable)
    assert unreadable == {7: "07.png"}


def test_labels_of_checked_images_are_checked(images: EncodedSlice) -> None:
    with pytest.raises(DataError, match=r"images 0 to 14 has labels from 8 to 22; expected labels within 0\.\.9"):
        check_slice(images.part(8, COUNT), (3, 16, 16), 10)


def test_nothing_goes_on_behind_the_end() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def check(number: int) -> None:
        begun.append(number)
        gate.wait(60)

    before = set(threading.enumerate())
    ahead = Ahead(1000, check)
    ahead.stop()
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert len(begun) <= decoding.DECODERS
    ahead.wait(500)
    assert begun[-1] == 500
