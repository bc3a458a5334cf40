import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixreorg_fast.config import InferenceConfig
from mixreorg_fast.errors import UserError
from mixreorg_fast.evaluation.datasets import KINDS, LAYOUTS, open_dataset
from mixreorg_fast.evaluation.zero_shot import evaluate, segmenter_for

from .fakes import draw_mask, draw_photo

SIZE = (40, 24)
ROOT = Path(__file__).parents[2]
COPIES = ROOT.parent / "shared" / "data"  # where docs/data.md keeps copies of real sets


def build(root: Path, photo: str, mask: str, ids: list[int], listing: str | None = None) -> np.ndarray:
    """One photo and its mask at these paths, with a split file where the layout has one."""
    draw_photo(root / photo, SIZE, seed=1)
    if listing:
        (root / listing).parent.mkdir(parents=True, exist_ok=True)
        (root / listing).write_text(Path(photo).stem + "\n")
    return draw_mask(root / mask, SIZE, ids, seed=2)


def test_plain_layout(plain):
    dataset = open_dataset("plain", plain)
    assert (len(dataset), dataset.classes) == (7, ("background", "cat", "dog", "red car"))
    assert dataset.has_background and dataset.prompts == ("cat", "dog", "red car")
    sample = dataset[1]
    assert sample.name == "photo1" and sample.image.mode == "RGB" and sample.image.size == (50, 61)
    assert sample.mask.shape == (61, 50) and sample.mask.dtype == np.uint8
    assert set(np.unique(sample.mask)) == {0, 1, 2, 3, 255}
    assert len(list(dataset)) == 7


def test_names_with_spaces_and_files_with_a_byte_order_mark(plain):
    for folder in ("images", "masks"):
        for path in (plain / folder).glob("photo0.*"):
            path.rename(path.with_stem("beach house"))
    (plain / "splits" / "val.txt").write_text("beach house\nphoto1.jpg\nphoto2 1\n", encoding="utf-8-sig")
    (plain / "classes.txt").write_text("background\ncat\ndog\nred car\n", encoding="utf-8-sig")
    dataset = open_dataset("plain", plain)
    assert [sample.name for sample in dataset] == ["beach house", "photo1", "photo2"]
    assert dataset.has_background


def test_plain_layout_without_background(plain):
    (plain / "classes.txt").write_text("sky\ncat\ndog\nred car\n")
    dataset = open_dataset("plain", plain)
    assert not dataset.has_background and len(dataset.prompts) == 4 and dataset.background_threshold is None


@pytest.mark.parametrize("home", ["", "VOCdevkit/VOC2012/"])
def test_voc(tmp_path, home):
    mask = build(
        tmp_path,
        f"{home}JPEGImages/2007_000033.jpg",
        f"{home}SegmentationClass/2007_000033.png",
        [0, 1, 20, 255],
        f"{home}ImageSets/Segmentation/val.txt",
    )
    dataset = open_dataset("voc2012", tmp_path)
    assert len(dataset.classes) == 21 and dataset.background_threshold == 0.95
    assert (dataset[0].mask == mask).all()


def test_context_with_and_without_background(tmp_path):
    files = ("JPEGImages/a.jpg", "SegmentationClassContext/a.png")
    mask = build(tmp_path, *files, [0, 1, 59, 255], "ImageSets/SegmentationContext/val.txt")
    with_background, without = open_dataset("context", tmp_path), open_dataset("context59", tmp_path)
    assert (len(with_background.classes), with_background.background_threshold) == (60, 0.35)
    assert (len(without.classes), without.background_threshold) == (59, None)
    assert (with_background[0].mask == mask).all()
    expected = np.where((mask == 0) | (mask == 255), 255, mask.astype(int) - 1)
    assert (without[0].mask == expected).all()


def test_voc_without_background(tmp_path):
    files = ("JPEGImages/a.jpg", "SegmentationClass/a.png")
    mask = build(tmp_path, *files, [0, 1, 20, 255], "ImageSets/Segmentation/val.txt")
    dataset = open_dataset("voc20", tmp_path)
    assert len(dataset.classes) == 20 and dataset.classes[0] == "aeroplane" and dataset.background_threshold is None
    assert (dataset[0].mask == np.where((mask == 0) | (mask == 255), 255, mask.astype(int) - 1)).all()


def build_16_bit(root: Path, photo: str, mask: str) -> np.ndarray:
    """As :func:`build`, with ids above 255."""
    ids = draw_mask(root / "m.png", SIZE, [0, 1, 2, 255], seed=2).astype(int)
    ids = np.select([ids == 2, ids == 255], [458, 65535], ids).astype(np.uint16)
    draw_photo(root / photo, SIZE, seed=1)
    (root / mask).parent.mkdir(parents=True)
    Image.fromarray(ids).save(root / mask)
    return ids


def test_context459_reads_its_names_from_the_datasets_file(model, tmp_path):
    mask = build_16_bit(tmp_path, "JPEGImages/a.jpg", "annotations_detectron2/pc459_val/a.tif")
    (tmp_path / "ImageSets" / "SegmentationContext").mkdir(parents=True)
    (tmp_path / "ImageSets" / "SegmentationContext" / "val.txt").write_text("a\n")
    with pytest.raises(UserError, match="no file .*labels.txt .the names of its 459 classes in the order of their ids"):
        open_dataset("context459", tmp_path)
    lines = [f"{number}: thing {number}" for number in range(1, 460)]
    (tmp_path / "labels.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match="labels.txt: 458 names .the names of its 459"):
        open_dataset("context459", tmp_path)
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    dataset = open_dataset("context459", tmp_path)
    assert (dataset.classes[0], dataset.classes[458]) == ("thing 1", "thing 459") and not dataset.has_background
    assert dataset[0].mask.dtype == np.int32 and (dataset[0].mask == mask).all()
    segmenter = segmenter_for(model, dataset, InferenceConfig(short_side=64))
    scores = evaluate(segmenter, dataset, progress=False, predictions=tmp_path / "p")
    assert sum(scores["per_class_images"].values()) == len(np.unique(mask)) - 1 and scores["images"] == 1
    labels = np.asarray(Image.open(tmp_path / "p" / "a.png"))
    assert (labels == segmenter.segment(dataset[0].image).labels.numpy()).all()
    # A value that is neither a class nor ignored.
    Image.fromarray(np.full(SIZE[::-1], 459, np.uint16)).save(tmp_path / "annotations_detectron2/pc459_val/a.tif")
    assert "id 459 has no class; expected 0 to 458 ('thing 459') or 65535" in fail("context459", tmp_path)


def test_ade847(tmp_path):
    home = tmp_path / "ADE20K_2021_17_01"
    mask = build_16_bit(home, "images_detectron2/validation/a.jpg", "annotations_detectron2/validation/a.tif")
    (home / "classes.txt").write_text("\n".join(f"thing {number}, object" for number in range(847)))
    dataset = open_dataset("ade847", tmp_path)
    assert len(dataset.classes) == 847 and (dataset[0].mask == mask).all()
    (home / "classes.txt").write_text("\n".join(["wall"] * 847))
    with pytest.raises(UserError, match="classes.txt: class 'wall' is named twice"):
        open_dataset("ade847", tmp_path)


def test_coco_object_from_its_masks_and_from_those_of_coco_stuff(tmp_path):
    mask = build(tmp_path, "images/val2017/01.jpg", "annotations/val2017/01_instanceTrainIds.png", [0, 1, 80, 255])
    dataset = open_dataset("coco_object", tmp_path)
    assert len(dataset.classes) == 81 and dataset.classes[80] == "toothbrush"
    assert (dataset[0].mask == mask).all()
    (tmp_path / "annotations/val2017/01_instanceTrainIds.png").unlink()
    # Raw ids: person 0, stop sign 12, toothbrush 89; banner 91 and wood 181 are stuff, 255 is unlabelled.
    raw = draw_mask(tmp_path / "annotations/val2017/01.png", SIZE, [0, 12, 89, 91, 181, 255], seed=2)
    names = {0: "person", 12: "stop sign", 89: "toothbrush"}
    for value in np.unique(raw):
        name = names.get(int(value), "background")
        assert (dataset[0].mask[raw == value] == dataset.classes.index(name)).all()


def test_coco_stuff_from_train_ids_and_from_the_original_maps(tmp_path):
    mask = build(tmp_path, "images/val2017/01.jpg", "annotations/val2017/01_labelTrainIds.png", [0, 79, 170, 255])
    assert (open_dataset("coco_stuff", tmp_path)[0].mask == mask).all()
    (tmp_path / "annotations/val2017/01_labelTrainIds.png").unlink()
    # Raw ids: person 0, toothbrush 89, banner 91, wood 181; 11 ("street sign") never became a class.
    raw = draw_mask(tmp_path / "annotations/val2017/01.png", SIZE, [0, 89, 91, 181, 11, 255], seed=2)
    dataset = open_dataset("coco_stuff", tmp_path)
    for value, name in ((0, "person"), (89, "toothbrush"), (91, "banner"), (181, "wood")):
        assert (dataset[0].mask[raw == value] == dataset.classes.index(name)).all()
    assert (dataset[0].mask[(raw == 11) | (raw == 255)] == 255).all()


def test_ade20k(tmp_path):
    mask = build(tmp_path, "images/validation/ADE_val_1.jpg", "annotations/validation/ADE_val_1.png", [0, 1, 150])
    dataset = open_dataset("ade20k", tmp_path)
    assert len(dataset.classes) == 150 and not dataset.has_background
    assert (dataset[0].mask == np.where(mask == 0, 255, mask.astype(int) - 1)).all()


def test_cityscapes_from_train_ids_and_from_label_ids(tmp_path):
    photo, mask = "leftImg8bit/val/ulm/ulm_0_leftImg8bit.png", "gtFine/val/ulm/ulm_0_gtFine"
    truth = build(tmp_path, photo, f"{mask}_labelTrainIds.png", [0, 18, 255])
    dataset = open_dataset("cityscapes", tmp_path)
    assert dataset.names == ["ulm/ulm_0"] and (dataset[0].mask == truth).all()
    (tmp_path / f"{mask}_labelTrainIds.png").unlink()
    raw = draw_mask(tmp_path / f"{mask}_labelIds.png", SIZE, [0, 7, 26, 33], seed=2)
    for value, name in ((7, "road"), (26, "car"), (33, "bicycle")):
        assert (dataset[0].mask[raw == value] == dataset.classes.index(name)).all()
    assert (dataset[0].mask[raw == 0] == 255).all()


def test_class_lists_are_of_the_right_length_and_name_nothing_twice():
    counts = {"voc2012": 21, "context": 60, "context59": 59, "coco_object": 81, "coco_stuff": 171, "ade20k": 150}
    counts |= {"cityscapes": 19, "voc20": 20, "context459": 0, "ade847": 0}  # 0: the dataset's file names them
    for kind, layout in LAYOUTS.items():
        assert len(layout.classes) == len(set(layout.classes)) == counts[kind]


def test_mask_drawn_on_the_stored_photo_or_on_the_upright_one(plain):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo = Image.open(plain / "images" / "photo0.jpg")
    photo.save(plain / "images" / "photo0.jpg", exif=exif)
    dataset = open_dataset("plain", plain)
    assert dataset[0].image.size == (64, 48)
    draw_mask(plain / "masks" / "photo0.png", (48, 64), [0, 1], seed=0)
    assert dataset[0].image.size == (48, 64)


def fail(kind: str, root: Path, split: str = "val", index: int = 0) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(kind, root, split)[index]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_errors_of_the_plain_layout(plain):
    assert "unknown dataset layout 'voc'" in fail("voc", plain)
    assert "did you mean 'ade20k'" in fail("ade20", plain)
    assert "(did you mean 'shapes'?); docs/evaluate.md lists" in fail("plain", plain.parent / "shape")
    assert fail("plain", plain / "data" / "camvid").endswith("data/camvid; docs/evaluate.md lists the layouts")
    message = fail("plain", plain, "vall")
    assert "splits/vall.txt is missing" in message and "did you mean 'val'" in message

    draw_mask(plain / "masks" / "photo0.png", (64, 47), [0], seed=0)
    message = fail("plain", plain)
    assert "photo0.png: mask of 64 x 47 for a photo of 64 x 48" in message

    draw_mask(plain / "masks" / "photo0.png", (64, 48), [7], seed=0)
    assert "id 7 has no class; expected 0 to 3 ('red car') or 255" in fail("plain", plain)

    Image.new("RGB", (64, 48)).save(plain / "masks" / "photo0.png")
    assert "a mask holds class ids" in fail("plain", plain)

    (plain / "masks" / "photo0.png").write_bytes(b"\x89PNG no")
    assert "photo0.png: damaged mask" in fail("plain", plain)

    (plain / "masks" / "photo0.png").unlink()
    assert "no mask" in fail("plain", plain)

    (plain / "images" / "photo1.jpg").write_bytes((plain / "images" / "photo1.jpg").read_bytes()[:300])
    assert "photo1.jpg: damaged picture" in fail("plain", plain, index=1)

    (plain / "images" / "photo2.jpg").unlink()
    assert "no photo" in fail("plain", plain, index=2)

    (plain / "splits" / "empty.txt").write_text("\n")
    assert "empty.txt is empty" in fail("plain", plain, "empty")
    (plain / "classes.txt").write_text("cat\ndog\ncat\n")
    assert "class 'cat' is named twice" in fail("plain", plain)
    (plain / "classes.txt").write_text("cat\n\ndog\n")
    assert "line 2 is empty" in fail("plain", plain)
    (plain / "classes.txt").unlink()
    assert "no file" in fail("plain", plain)
    shutil.rmtree(plain / "masks")
    assert "the plain layout has images/, masks/" in fail("plain", plain)


def test_errors_of_the_standard_layouts(tmp_path):
    assert "JPEGImages, where voc2012 keeps its photos" in fail("voc2012", tmp_path)
    build(tmp_path, "images/validation/a.jpg", "annotations/validation/a.png", [1])
    message = fail("ade20k", tmp_path, "vall")
    assert "for split 'vall'" in message and "did you mean 'val'" in message
    (tmp_path / "annotations/validation/a.png").unlink()
    assert "no mask a.png in" in fail("ade20k", tmp_path)
    shutil.rmtree(tmp_path / "annotations")
    assert "annotations/validation, where ade20k keeps its masks" in fail("ade20k", tmp_path)
    build(tmp_path, "JPEGImages/a.jpg", "elsewhere/a.png", [1], "ImageSets/SegmentationContext/val.txt")
    assert "pascal_context.py makes them" in fail("context", tmp_path)


def test_every_kind_is_documented():
    page = (ROOT / "docs" / "evaluate.md").read_text()
    assert all(f"`{kind}`" in page for kind in KINDS)


@pytest.mark.parametrize(("name", "classes"), [("voc2012_subset", 21), ("camvid", 11)])
def test_real_sets_evaluate_in_the_plain_layout_and_in_vocs(model, tmp_path, name, classes):
    copy = COPIES / name
    if not copy.is_dir():
        pytest.skip(f"no copy at {copy}")

    def score(kind: str, root: Path) -> dict:
        dataset = open_dataset(kind, root)
        segmenter = segmenter_for(model, dataset, InferenceConfig(short_side=64))
        return evaluate(segmenter, dataset, limit=3, progress=False)

    plain = score("plain", copy)
    assert plain["images"] == 3 and 0 <= plain["mIoU"] <= plain["oracle_mIoU"] <= 100
    assert len(plain["per_class"]) == classes
    if name == "voc2012_subset":
        home = tmp_path / "VOC2012"
        (home / "ImageSets").mkdir(parents=True)
        for link, folder in (("JPEGImages", "images"), ("SegmentationClass", "masks")):
            (home / link).symlink_to(copy / folder)
        (home / "ImageSets" / "Segmentation").symlink_to(copy / "splits")
        # The names differ here and there, and so may the labels, but not the photos, truths and segments.
        assert score("voc2012", tmp_path)["oracle_mIoU"] == plain["oracle_mIoU"]
