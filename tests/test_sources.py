"""Images from folders, for audits: read as data sets are."""

import numpy as np
import pytest
from PIL import Image

from dainv.sources import ImageSource


def test_a_folder_is_read_as_a_data_set_is(tmp_path):
    """Turned upright, in any usual format, nested, and what is left out is noted."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a/0.png", "a/deep/1.jfif", "b/2.avif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = dict(format="JPEG", quality=100) if name.endswith("jfif") else {}
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **kind)
    (tmp_path / "b/notes.txt").write_text("?")
    source = ImageSource(tmp_path)
    ((ids, x, labels),) = list(source)
    x = x / 255
    assert labels[ids.argsort()].tolist() == [0, 0, 1]
    assert (x[:, :, :, -4:].mean((1, 2, 3)) > 0.95).all() and (x[:, :, :, :10].mean((1, 2, 3)) < 0.05).all()
    assert source.notes == ["1 files are left out, by their ending, such as notes.txt"]


def test_files_that_are_no_images_are_named(tmp_path):
    with pytest.raises(ValueError, match="no image in"):
        ImageSource(tmp_path)
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        list(ImageSource(tmp_path))
