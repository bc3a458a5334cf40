"""Legends, colours and overlays of labels."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mixreorg_fast.errors import UserError
from mixreorg_fast.inference import fonts, overlay


def lab(colours):
    """CIELAB of sRGB colours 0..255, ``[..., 3]``."""
    linear = np.asarray(colours) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4125, 0.2127, 0.0193], [0.3576, 0.7152, 0.1192], [0.1804, 0.0722, 0.9503]])
    f = np.cbrt(np.maximum(xyz / (0.9505, 1, 1.0888), (6 / 29) ** 3))
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("photo", [0, 255])
def test_the_first_classes_are_told_apart_over_dark_and_bright_photos(background, photo):
    """CIE76 differences above 20 are plain to see; VOC's colours come as near as 6.6 over black."""
    colours = overlay.class_palette(background)[background : 20 + background].astype(float)
    seen = lab(colours * 0.55 + photo * 0.45)
    differences = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 1000 * np.eye(20)
    assert differences.min() > 20
    # Also from the photo itself.
    assert np.linalg.norm(seen - lab(np.full(3, photo)), axis=-1).min() > 10
    assert lab(colours)[:, 0].min() > 40


def test_masks_keep_voc_colours():
    palette = overlay.mask_palette(True)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {i: tuple(palette[i].tolist()) for i in known} == known
    assert tuple(overlay.mask_palette(False)[0].tolist()) == (128, 0, 0)


def test_segment_colours_differ():
    assert len(np.unique(overlay.segment_palette()[:16], axis=0)) == 16


def test_blend_leaves_the_background_and_works_in_strips(monkeypatch):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(256, size=(50, 40, 3), dtype=np.uint8))
    labels = rng.integers(3, size=(50, 40))
    palette = overlay.class_palette(True)
    whole = np.asarray(overlay.blend(photo, labels, palette, 0.5))
    assert (whole[labels == 0] == np.asarray(photo)[labels == 0]).all()
    expected = np.asarray(photo)[labels == 1] * 0.5 + palette[1] * 0.5
    assert np.abs(whole[labels == 1] - expected).max() <= 0.5
    monkeypatch.setattr(overlay, "STRIP", 120)
    assert (np.asarray(overlay.blend(photo, labels, palette, 0.5)) == whole).all()


def test_overlay_has_a_legend_of_what_occurs():
    labels = np.zeros((60, 80), dtype=np.uint8)
    labels[:, 40:] = 2
    palette = overlay.class_palette(True)
    out = np.asarray(overlay.overlay(Image.new("RGB", (80, 60)), labels, ["background", "cat", "dog"], palette))
    below = {tuple(p) for p in out[60:].reshape(-1, 3).tolist()}
    assert tuple(palette[2].tolist()) in below and tuple(palette[1].tolist()) not in below
    assert out.shape[1] >= 80


def test_a_long_legend_wraps():
    entries = [(f"class number {i}", (i, i, i)) for i in range(30)]
    assert overlay.legend(entries, 300).height > 5 * overlay.legend(entries[:1], 300).height


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        overlay.save_picture(tmp_path / "file" / "a.png", Image.new("RGB", (4, 4)))


def test_long_names_take_lines_and_the_legend_widens(monkeypatch):
    """Nothing that is drawn passes the right edge."""
    name = (
        "a very long name of a thing that nobody would think of naming so, and donaudampfschifffahrtsgesellschaft" * 2
    )
    ends, draw_text = [], overlay.draw_text

    def measured(draw, place, text, size, fill):
        ends.append((place[0] + fonts.length(text, size), text))
        draw_text(draw, place, text, size, fill)

    monkeypatch.setattr(overlay, "draw_text", measured)
    labels = np.zeros((40, 50), dtype=np.uint8)
    labels[20:] = 1
    out = overlay.overlay(Image.new("RGB", (50, 40)), labels, [name, "cat"], overlay.class_palette(False))
    assert out.width == overlay.LEGEND
    assert max(end for end, _ in ends) <= out.width
    shown = "".join(text for _, text in ends).replace(" ", "")
    assert shown == (name + "cat").replace(" ", "")
    assert (np.asarray(out)[:, -2:] == overlay.PAPER).all()


@pytest.fixture
def only(monkeypatch):
    """Lets a test say which fonts this machine has."""

    def set_faces(*faces):
        fonts._face_of.cache_clear()
        monkeypatch.setattr(fonts, "faces", lambda: list(faces))
        monkeypatch.setattr(fonts, "_ask_fontconfig", lambda character: None)

    yield set_faces
    fonts._face_of.cache_clear()


def boxes(text: str, size: int = 24) -> list[str]:
    """The characters of `text` that are drawn as their font's sign for a character that it lacks."""
    return [
        character
        for run in fonts.runs(text, size)
        for character in run.text
        if not character.isspace() and bytes(run.font.getmask(character)) == bytes(run.font.getmask("\uffff"))
    ]


@pytest.mark.parametrize("name", ["кошка", "γάτα", "café crème", "kočka", "猫", "кот and 猫 😀", "हिन्दी", "قطة"])
def test_no_name_is_drawn_as_boxes(name):
    """Whatever fonts there are here."""
    assert boxes(name) == []
    assert fonts.length(name, 20) > 0


def test_a_font_that_has_the_characters_is_taken(only):
    matplotlib = pytest.importorskip("matplotlib")
    dejavu = fonts.Face(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    assert dejavu in fonts.faces()
    only(fonts.OWN, dejavu)
    for name in ("кошка", "γάτα", "café"):
        assert [run.text for run in fonts.runs(name, 20)] == [name] and boxes(name) == []
    # A name of two scripts, one of them unknown, in the font that has the rest.
    assert [run.text for run in fonts.runs("кот 猫", 20)] == [r"кот \u732b"]


def test_without_a_font_names_become_ascii(only):
    only(fonts.OWN)
    assert fonts.drawable("café crème") == "cafe creme"
    assert fonts.drawable("ｃａｔ") == "cat"
    assert fonts.drawable("кот 猫😀") == r"\u043a\u043e\u0442 \u732b\U0001f600"
    assert boxes("café 猫") == []


def test_fontconfig_is_asked_for_what_the_others_lack(only, monkeypatch):
    """Its answer counts if the font has the character: it names some font for every character."""
    matplotlib = pytest.importorskip("matplotlib")
    dejavu = fonts.Face(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    only(fonts.OWN)
    known = [fonts.OWN]
    monkeypatch.setattr(fonts, "faces", lambda: known)
    monkeypatch.setattr(fonts, "_ask_fontconfig", lambda character: dejavu)
    assert fonts.drawable("к猫") == r"к\u732b" and known == [fonts.OWN, dejavu]


def test_wrapped_lines_fit():
    for text in ("short", "two words", "w" * 80, "many words that are written one after another", ""):
        lines = fonts.wrap(text, 15, 100)
        assert all(fonts.length(line, 15) <= 100 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_text_is_drawn_where_it_is_measured():
    picture = Image.new("L", (300, 60), 255)
    fonts.draw_text(ImageDraw.Draw(picture), (10, 40), "cat кошка", 20, 0)
    rows, columns = np.nonzero(np.asarray(picture) < 128)
    assert columns.min() >= 9 and columns.max() <= 11 + fonts.length("cat кошка", 20)
    assert rows.min() > 20 and rows.max() <= 46


def test_kinds_of_pictures():
    assert overlay.kind_of("a.JPG") == "JPEG" and overlay.kind_of("b/c.webp") == "WEBP"
    for path in ("a", "a.xyz", "a.txt"):
        with pytest.raises(UserError, match="no picture can be written with the suffix"):
            overlay.kind_of(path)
