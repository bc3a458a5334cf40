"""What a finished run scored, as rows of a results file and of the page."""

import json

import pytest

from benchmarks import record, report
from mixreorg_fast.errors import UserError
from mixreorg_fast.study.report import rows_of, tables
from tests import markdown


def finished_run(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"name": "toy", "seed": 3, "model": {"method": "groupvit"}}))
    lines = [{"step": 10, "samples": 640, "loss": 1.0, "images_per_s": 64.0}, {"step": 10, "validation": {}}]
    lines.append({"step": 20, "samples": 1280, "loss": 0.5, "images_per_s": 32.0})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    score = {"mIoU": 12.345, "oracle_mIoU": 40.0, "groups_used": 2.5, "images": 7, "all_background_mIoU": 3.0}
    (folder / "eval.json").write_text(json.dumps({"scenes": score, "retrieval": {"pairs": 7, "image_to_text": 50.0}}))
    return folder


def test_rows_and_table(tmp_path):
    run = finished_run(tmp_path / "toy")
    (row,) = rows_of(run)
    assert (row["world"], row["variant"], row["steps"], row["miou"]) == ("scenes", "groupvit", 20, 12.35)
    assert row["image_to_text"] == 50.0
    assert row["seconds"] == 30.0  # 640 images at 64 a second, 640 at 32
    path = record.record([run], tmp_path)
    record.record([run], tmp_path)  # takes the place of its own rows
    file = json.loads(path.read_text())
    assert len(file["rows"]) == 1 and file["device"] and file["commit"]
    table = tables(tmp_path, tmp_path)
    cells = markdown.row(table, run="toy", method="groupvit", scored_on="scenes")
    assert (cells["steps"], cells["images seen"], cells["seconds"], cells["images"]) == ("20", "1280", "30", "7")
    assert (cells["mIoU"], cells["all background"], cells["oracle mIoU"]) == ("12.35", "3.0", "40.0")
    assert report.pages(tmp_path) == {}


def test_unfinished_run(tmp_path):
    run = finished_run(tmp_path / "toy")
    (run / "eval.json").unlink()
    with pytest.raises(UserError, match="is not a finished run"):
        rows_of(run)
