"""Class names and templates as people write them."""

import numpy as np
import pytest

from mixreorg_fast.errors import UserError
from mixreorg_fast.names import TEMPLATES, parse_classes, parse_templates, read_classes


@pytest.mark.parametrize(
    "classes",
    [
        "cat, dog,red  car",
        "cat; dog ;red car",
        "cat\ndog\r\nred car\n",
        "cat,\ndog;\n\nred car",
        ["cat", "dog", "red car"],
        ("cat", " dog", "red\tcar"),
        np.array(["cat", "dog", "red car"]),
        (name for name in ["cat", "dog", "red car"]),
    ],
)
def test_class_names(classes):
    assert parse_classes(classes) == ["cat", "dog", "red car"]


def test_one_name_is_one_class():
    assert parse_classes("cat") == parse_classes(["cat"]) == ["cat"]
    assert parse_classes(["chest, drawers"]) == ["chest, drawers"]  # in a list a comma separates nothing


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "names '': an empty name"),
        ("cat,,dog", "names 'cat,,dog': an empty name; expected names separated by commas"),
        ("cat, ", "an empty name"),
        ([], "names: no names"),
        (["cat", " "], "an empty name"),
        ("cat, dog, cat", "'cat' is named twice$"),
        ("cat, Cat", r"'Cat' is named twice \(also as 'cat'\)"),
        (["straße", "STRASSE"], "named twice"),
        (["cat", 1], "names: expected a string such as .* or a list of names, got int at place 1"),
        (np.array([[1.0]]), "got list at place 0"),
        (b"cat", "got bytes"),
        ({"cat", "dog"}, "got set"),
        ({"cat": 1}, "got dict"),
        (None, "got NoneType"),
        (7, "got int"),
        ([f"c{i}" for i in range(5)], "5 classes, at most 4"),
    ],
)
def test_class_names_that_are_refused(classes, message):
    with pytest.raises(UserError, match=message) as error:
        parse_classes(classes, "names", most=4)
    assert "\n" not in str(error.value)


def test_files_of_class_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeff# pets\ncat\n\n  dog \r\n# and\nchest, drawers\n".encode())
    assert read_classes(path) == ["cat", "dog", "chest, drawers"]
    for content, message in (
        (b"# nothing\n\n", "no class names; one per line"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"cat\nCAT\n", "'CAT' is named twice"),
        ("\n".join(f"c{i}" for i in range(255)).encode(), "255 classes, at most 254"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"names.txt: .*{message}"):
            read_classes(path)
    with pytest.raises(UserError, match="nothing.txt: cannot be read .No such file"):
        read_classes(tmp_path / "nothing.txt")


def test_templates():
    assert parse_templates("a {}.") == ("a {}.",)
    assert parse_templates("imagenet7") == TEMPLATES["imagenet7"]
    assert parse_templates(np.array(["a {}.", "the {}"])) == parse_templates(["a {}.", "the {}"]) == ("a {}.", "the {}")
    for templates, message in (
        ("imagenet", "did you mean 'imagenet7'"),
        (["a photo"], "'a photo' has no {} for the class name"),
        ([], "no templates; the usual one is 'a photo of a {}.'"),
        (5, "expected a template or a list of templates, got int"),
    ):
        with pytest.raises(UserError, match=message):
            parse_templates(templates)
