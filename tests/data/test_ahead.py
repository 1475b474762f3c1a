"""Images that are decoded ahead are those that are decoded when they are read, each decoded once."""

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clado.data import decoding
from clado.data.decoding import Ahead, EncodedSlice, Preprocessing
from clado.data.sources.folder import ImageFile
from clado.errors import UnreadableImage

COUNT = 23


@pytest.fixture
def images(tmp_path: Path) -> EncodedSlice:
    """Images, of which the seventh cannot be read."""
    for k in range(COUNT):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k:02}.png")
    (tmp_path / "07.png").write_bytes(b"no image")
    files = [ImageFile(tmp_path, tmp_path / f"{k:02}.png") for k in range(COUNT)]
    return EncodedSlice(files, list(range(COUNT)), None, Preprocessing((3, 16, 16), 18, (0.5,) * 3, (0.2,) * 3))


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_ahead_is_what_is_read_without(images: EncodedSlice, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: Counter[str] = Counter()
    plain = Preprocessing.pixels

    def counted(self: Preprocessing, encoded: ImageFile) -> torch.Tensor:
        decoded[encoded.name] += 1
        return plain(self, encoded)

    expected = [images.load(k, k + 1)[0] for k in range(COUNT) if k != 7]
    monkeypatch.setattr(Preprocessing, "pixels", counted)
    monkeypatch.setattr(decoding, "AHEAD_BYTES", most * 3 * 16 * 16)
    images.decode_ahead()
    assert torch.equal(images.load(0, 7)[0], torch.cat(expected[:7]))
    with pytest.raises(UnreadableImage, match=r"07\.png cannot be read"):
        images.load(7, 9)
    assert torch.equal(images.load(8, COUNT)[0], torch.cat(expected[7:]))
    assert decoded == {f"{k:02}.png": 1 for k in range(COUNT)}
    assert torch.equal(images.load(3, 5)[0], torch.cat(expected[3:5]))  # again: decoded when it is read
    assert decoded["03.png"] == decoded["04.png"] == 2
    images.end_ahead()
    assert torch.equal(images.load(0, 2)[0], torch.cat(expected[:2]))


def test_no_more_wait_than_are_allowed_and_nothing_goes_on_behind_the_end() -> None:
    begun: list[int] = []

    def decode(number: int) -> torch.Tensor:
        begun.append(number)
        return torch.tensor(number)

    before = set(threading.enumerate())
    ahead = Ahead(1000, decode, 5)
    assert ahead.take(0) == 0
    assert ahead.take(10) == 10  # of any order
    ahead.stop()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert len(begun) <= 11 + 5 + decoding.DECODERS
    assert ahead.take(500) == 500
