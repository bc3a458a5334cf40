import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mixreorg_fast import images
from mixreorg_fast.errors import UserError
from mixreorg_fast.images import find_images, load_image, network_size, to_pixels, to_tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def gradient() -> np.ndarray:
    return np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def test_grey_palette_and_bilevel(tmp_path):
    grey = Image.fromarray(gradient())
    for mode in ("L", "P", "1", "LA", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        grey.convert(mode).save(path)
        assert pixels(load_image(path)).shape == (8, 8, 3)
    assert (pixels(load_image(grey))[:, :, 1] == gradient()).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_keeps_the_upper_byte(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(gradient().astype(np.uint16) << 8 | 77).save(path)
    assert (pixels(load_image(path))[:, :, 0] == gradient()).all()


def test_transparency_lies_over_white(tmp_path):
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    loaded = pixels(load_image(tmp_path / "a.png"))
    assert loaded[0, 0].tolist() == [10, 20, 30] and (loaded[1] == 255).all()


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 30)
    assert load_image(tmp_path / "a.jpg", upright=False).size == (30, 20)


def test_arrays():
    grey = gradient()
    assert (pixels(load_image(grey))[:, :, 2] == grey).all()
    assert (pixels(load_image(grey[:, :, None]))[:, :, 2] == grey).all()
    assert (pixels(load_image(grey / 255))[:, :, 2] == grey).all()
    assert (pixels(load_image(grey.astype(np.uint16) << 8))[:, :, 2] == grey).all()
    colour = np.stack([grey, grey // 2, grey // 4], axis=2)
    assert (pixels(load_image(colour)) == colour).all()
    assert (pixels(load_image(torch.from_numpy(colour))) == colour).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"got \[3, 8, 9\]: channels come last, as transpose\(1, 2, 0\) puts them"),
        (torch.zeros(3, 8, 9), r"got \[3, 8, 9\]: channels come last, as permute\(1, 2, 0\) puts them"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"got \[2, 8, 9, 3\]: one image at a time, or a list of them"),
        (np.zeros(8, np.uint8), r"must be \[H, W\], \[H, W, 3\] or \[H, W, 4\], got \[8\]$"),
        (np.zeros((8, 9, 5), np.uint8), r"got \[8, 9, 5\]$"),
        (torch.zeros(8, 9, dtype=torch.bfloat16), "got a tensor of torch.bfloat16"),
        (object(), "expected a path, bytes, a file, a Pillow image or an array, got object"),
        (None, "got NoneType"),
        (7, "got int"),
        (np.zeros((0, 8), np.uint8), r"got \[0, 8\]"),
        (np.full((8, 8), 200.0), "floats must hold values in 0..1"),
        (np.full((8, 8), np.nan), "floats must hold values in 0..1"),
        (np.zeros((8, 8), np.int32), "got int32"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(UserError, match=message):
        load_image(array)


def test_tensors_that_carry_gradients():
    colour = torch.rand(8, 9, 3, requires_grad=True)
    assert pixels(load_image(colour)).shape == (8, 9, 3)


def test_bytes_and_open_files(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(gradient()).save(path)
    expected = pixels(load_image(path))
    for source in (path.read_bytes(), bytearray(path.read_bytes()), io.BytesIO(path.read_bytes())):
        assert (pixels(load_image(source)) == expected).all()
    with path.open("rb") as file:
        assert (pixels(load_image(file)) == expected).all()
    with path.open(encoding="latin-1") as file, pytest.raises(UserError, match="a.png: opened as text"):
        load_image(file)
    with pytest.raises(UserError, match="^3 bytes: not a picture"):
        load_image(b"abc")
    with pytest.raises(UserError, match="^BytesIO: damaged picture"):
        load_image(io.BytesIO(path.read_bytes()[:-30]))


def test_broken_files(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:4000])
    with pytest.raises(UserError, match="cut.png: damaged picture"):
        load_image(cut)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match="text.jpg: not a picture"):
        load_image(tmp_path / "text.jpg")
    with pytest.raises(UserError, match="cut.png: damaged picture"):
        load_image(Image.open(cut))
    Image.fromarray(np.full((4, 4), 200, dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float.tiff: an image array of floats must hold values in 0\.\.1"):
        load_image(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"no picture .*whole.jpg .did you mean 'whole.png'"):
        load_image(tmp_path / "whole.jpg")


def test_decompression_bombs_are_refused_by_their_header(tmp_path):
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(UserError, match="bomb.png: too large to decode .at most 179 million pixels"):
        load_image(tmp_path / "bomb.png")


def test_the_bound_is_ours_too(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 9999)
    with pytest.raises(UserError, match="too large"):
        load_image(tmp_path / "a.png")


def test_folders_of_pictures(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images(tmp_path)] == ["a.PNG", "b.jpg"]
    assert find_images(tmp_path / "x.jpg") == [tmp_path / "x.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures .* in folder"):
        find_images(tmp_path / "empty")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (448, 592)),  # 597.3 rounds down
        ((375, 500), (448, 592)),
        ((500, 375), (592, 448)),
        ((448, 448), (448, 448)),
        ((64, 64), (448, 448)),
        ((100, 5000), (48, 2048)),  # the long side is bounded
        ((1, 4000), (16, 2048)),  # never less than a patch
    ],
)
def test_network_size(size, expected):
    assert network_size(size, 448, 16) == expected


def test_to_tensor_and_back():
    colour = np.random.default_rng(0).integers(256, size=(32, 48, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(colour), 32, 16, MEAN, STD)
    assert tensor.shape == (3, 32, 48) and tensor.dtype == torch.float32
    assert tensor[1, 3, 4].item() == pytest.approx((colour[3, 4, 1] / 255 - 0.456) / 0.224, abs=1e-5)
    assert (to_pixels(tensor[None], MEAN, STD)[0] == colour).all()
