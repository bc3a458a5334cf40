"""Scores of finished runs as rows of results files, and the page made from them: tables, curves and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import ledger
from ..errors import UserError, extra
from ..evaluation.datasets import open_dataset
from ..evaluation.metrics import FREQUENT, IGNORE
from ..evaluation.pictures import save_grid
from ..evaluation.zero_shot import segmenter_for
from ..files import saving
from ..inference.model import load
from ..inference.overlay import blend, class_palette, colourise, segments_picture
from ..ledger import Row
from ..training.plots import Curve, draw_panels
from ..training.reports import read_metrics
from ..training.summary import WAYS
from .plan import Run

PAGE = "results.md"
PICTURES = "images"  # beside the page
FIGURES = {  # column -> name in eval.json
    "miou": "mIoU",
    "frequent_miou": "frequent_mIoU",
    "all_background_miou": "all_background_mIoU",
    "whole_photo_miou": "whole_photo_mIoU",
    "oracle_miou": "oracle_mIoU",
    "groups_used": "groups_used",
}


def training_seconds(reports: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a run's steps without evaluations, from its reports.

    The later of two reports gives the time of the steps between them, since the run may have been interrupted.
    """
    pairs = zip([{"samples": 0}, *reports], reports, strict=False)
    return sum((later["samples"] - earlier["samples"]) / later["images_per_s"] for earlier, later in pairs)


def rows_of(run: Path, **about: Any) -> list[Row]:
    """One row per dataset of a finished run folder (else a UserError); `about` overrides or adds columns."""
    try:
        config, scores = (json.loads((run / name).read_text()) for name in ("config.json", "eval.json"))
        reports = [line for line in read_metrics(run) if "loss" in line]
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is not a finished run: {error}") from None
    described = {
        "suite": "study",
        "run": config["name"],
        "variant": config["model"]["method"],
        "seed": config["seed"],
        "budget": "steps",
        "seconds": round(training_seconds(reports), 1),
        "steps": reports[-1]["step"],
        "images_seen": reports[-1]["samples"],
        **about,
    }
    described |= {way: scores["retrieval"][way] for way in WAYS if way in scores.get("retrieval", {})}
    rows = []
    for dataset, score in scores.items():
        if "mIoU" in score:
            figures = {column: round(score[name], 2) if name in score else None for column, name in FIGURES.items()}
            rows.append({**described, "world": dataset, **figures, "images": score["images"]})
    return rows


def results_file(folder: Path) -> Path:
    """The results file of this device."""
    return folder / f"study_{ledger.file_stem(ledger.device_name())}.json"


def write_study_rows(
    rows: Sequence[Row], path: Path, command: str, runs: Mapping[str, Collection[tuple[str, str]]] | None = None
) -> None:
    """Put `rows` into the results file `path`. They replace the rows of the same runs; other rows stay.

    `runs`: for each study, the dataset and name of the runs that its file lists. Rows of its other runs are dropped.
    """
    replaced = {_run(row) for row in rows}

    def stays(row: Row) -> bool:
        listed = (runs or {}).get(str(row.get("study")))
        return _run(row) not in replaced and (listed is None or (row["trained_on"], row["run"]) in listed)

    ledger.write_rows(path, ledger.versions(command), rows, stays)


def _run(row: Row) -> tuple:
    return (row.get("study"), row.get("trained_on"), row["run"])


# ---------------------------------------------------------------------- the page


def write_page(results: Path, docs: Path, *, check: bool = False) -> bool:
    """Write the tables of ``docs/results.md`` from the results files in `results`; see :func:`ledger.write_page`."""
    return ledger.write_page(docs / PAGE, tables(results, docs), check=check)


def tables(results: Path, docs: Path) -> str:
    """One section per device that has study rows."""
    return "\n\n".join(section(file, docs) for file in ledger.results_files(results, ["study"]))


def section(file: Row, docs: Path) -> str:
    """A device: runs that belong to no study, then a table per study and training set, the longest table last."""
    rows = [row for row in file["rows"] if row["suite"] == "study"]
    lines = [f"### {file['device']}", "", f"{file['date'][:10]}, commit {file['commit']}, torch {file['torch']}."]
    if single := [row for row in rows if "study" not in row]:
        lines += ["", "**Single runs**", "", *run_table(single)]
    studies: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "study" in row:
            studies.setdefault((row["study"], row["trained_on"]), []).append(row)
    for (study, dataset), of_study in sorted(studies.items(), key=lambda item: len(item[1])):
        lines += ["", f"**{study}: trained on {dataset}**", "", *study_table(of_study)]
        for kind in ("curves", "pictures"):
            name = picture_name(file["device"], study, dataset, kind)
            if (docs / PICTURES / name).exists():
                lines += ["", f"![{study}, {dataset}: {kind}]({PICTURES}/{name})"]
    return "\n".join(lines)


def picture_name(device: str, study: str, dataset: str, kind: str) -> str:
    return f"study_{ledger.file_stem(device)}_{study}_{dataset}_{kind}.png"


def study_table(rows: Sequence[Row]) -> list[str]:
    """A line per variant and budget: means over seeds ± standard deviation, and the difference from the first line."""
    datasets = list(dict.fromkeys(row["world"] for row in rows))
    head = ["variant", "seeds", "steps", "seconds"]
    # IoU of rare classes is mostly noise, so the frequent classes have a column of their own where there are rare ones.
    with_frequent = {row["world"] for row in rows if row.get("frequent_miou") not in (None, row["miou"])}
    with_whole = {row["world"] for row in rows if row.get("whole_photo_miou") is not None}
    ways = [way for way in WAYS if any(way in row for row in rows)]
    for dataset in datasets:
        head += [f"{dataset} mIoU", "against the first"]
        head += [f"classes in {FREQUENT} photos"] if dataset in with_frequent else []
        head += ["whole photo by one name"] if dataset in with_whole else []
        head += ["oracle mIoU", *(["segments used"] if dataset == datasets[0] else [])]
    head += [f"R@1 {way.replace('_', ' ')}" for way in ways]
    body = []
    groups = list(dict.fromkeys((row["variant"], row["budget"]) for row in rows))
    for variant, budget in groups:
        of_variant = [row for row in rows if (row["variant"], row["budget"]) == (variant, budget)]
        about = of_variant[0].get("about", variant)
        cells = [f"{about}, equal time" if budget == "time" else about]
        cells += [len({row["seed"] for row in of_variant}), _spread(of_variant, "steps", 0)]
        first = [row for row in of_variant if row["world"] == datasets[0]]
        cells.append(_spread(first, "seconds", 0))
        for dataset in datasets:
            here = [row for row in of_variant if row["world"] == dataset]
            base = [row for row in rows if row["world"] == dataset and (row["variant"], row["budget"]) == groups[0]]
            cells += [_spread(here, "miou"), "" if here == base else _difference(here, base)]
            cells += [_spread(here, "frequent_miou")] if dataset in with_frequent else []
            cells += [_spread(here, "whole_photo_miou")] if dataset in with_whole else []
            cells += [_spread(here, "oracle_miou"), *([_spread(here, "groups_used")] if dataset == datasets[0] else [])]
        body.append([*cells, *(_spread(first, way) for way in ways)])
    lines = ledger.table(head, body)
    for dataset in datasets:
        if background := {row["all_background_miou"] for row in rows if row["world"] == dataset} - {None}:
            lines += ["", f"Calling every pixel of {dataset} background scores {max(background):.2f}."]
    return lines


def run_table(rows: Sequence[Row]) -> list[str]:
    """A line per run and dataset."""
    head = ["run", "method", "seed", "steps", "images seen", "seconds", "scored on", "images", "mIoU"]
    head += [f"classes in {FREQUENT} photos", "all background", "oracle mIoU", "segments used"]
    columns = ("run", "variant", "seed", "steps", "images_seen", "seconds", "world", "images", "miou")
    columns += ("frequent_miou", "all_background_miou", "oracle_miou", "groups_used")
    shown = ({**row, "seconds": f"{row['seconds']:.0f}"} for row in rows)
    return ledger.table(head, (["–" if row.get(name) is None else row[name] for name in columns] for row in shown))


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def _spread(rows: Sequence[Row], name: str, digits: int = 2) -> str:
    """Mean ± standard deviation of the seeds (of the sample: divided by n - 1)."""
    values = _values(rows, name)
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _difference(rows: Sequence[Row], base: Sequence[Row]) -> str:
    """Difference of the means, ± the root of the summed variances of the seeds."""
    ours, theirs = _values(rows, "miou"), _values(base, "miou")
    if not ours or not theirs:
        return "–"
    difference = f"{statistics.fmean(ours) - statistics.fmean(theirs):+.2f}"
    if len(ours) < 2 or len(theirs) < 2:
        return difference
    return f"{difference} ± {(statistics.variance(ours) + statistics.variance(theirs)) ** 0.5:.2f}"


# ---------------------------------------------------------------------- figures


def curves_figure(runs: Sequence[Run], labels: Mapping[str, str], path: Path) -> None:
    """Losses and scores against the steps as a PNG: the mean over seeds of each variant.

    `runs` are finished runs on one dataset; `labels` names variants in the legend.
    """
    panels = {
        "contrastive loss of the original images": "loss_original",
        "mixed patches whose image is found": "mixed_accuracy",
        "final segments in use": "groups_used",
        "zero-shot mIoU while training": "mIoU",
    }
    logs: dict[str, list[Sequence[Row]]] = {}
    for run in runs:
        label = labels[run.variant] + (", equal time" if run.budget == "time" else "")
        logs.setdefault(label, []).append(_log(run))
    drawn = {title: {label: _mean_curve(logs[label], name) for label in logs} for title, name in panels.items()}
    with saving(path):
        if draw_panels(path, drawn) is None:
            raise UserError(f"curves need matplotlib: {extra('train')}")


def _log(run: Run) -> Sequence[Row]:
    """The run's measures, and as "mIoU" those of the first dataset in its validations and final scores."""
    log = read_metrics(run.folder)
    scores = json.loads((run.folder / "eval.json").read_text())
    final = {name: score["mIoU"] for name, score in scores.items() if "mIoU" in score}
    scored = [*(line for line in log if line.get("validation")), {"step": log[-1]["step"], "validation": final}]
    return [*log, *({"step": line["step"], "mIoU": next(iter(line["validation"].values()))} for line in scored)]


def _mean_curve(logs: Sequence[Sequence[Row]], name: str) -> Curve:
    """The mean over logs of one measure, at the steps where every log has it."""
    curves = [{line["step"]: line[name] for line in log if name in line} for log in logs]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, statistics.fmean(curve[step] for curve in curves)) for step in steps]


def pictures_figure(runs: Sequence[Run], labels: Mapping[str, str], path: Path, count: int) -> None:
    """A PNG at `path`: photos with the labels of every variant, below them the segments.

    `runs`: a finished one per column, on one dataset. `count`: photos of the first dataset that scores them.
    """
    config = json.loads((runs[0].folder / "config.json").read_text())
    entry = config["eval"]["datasets"][0]
    dataset = open_dataset(entry["dataset"], entry["root"], entry["split"])
    palette = class_palette(dataset.has_background)
    samples = [dataset[number] for number in dataset.spread(count)]
    labelled = [[sample.image, colourise(sample.mask, palette)] for sample in samples]
    grey = [sample.image.convert("L").convert("RGB") for sample in samples]
    grouped = [[photo, blend(photo, sample.mask, palette)] for photo, sample in zip(grey, samples, strict=True)]
    seen = {int(label) for sample in samples for label in set(sample.mask.ravel().tolist())} - {IGNORE}
    for run in runs:
        model = load(run.folder)
        segmenter = segmenter_for(model, dataset, run.config.eval.with_options(), entry["background_threshold"])
        for number, sample in enumerate(samples):
            decoded = segmenter.segment(sample.image)
            labelled[number].append(colourise(decoded.labels.cpu().numpy(), palette))
            grouped[number].append(segments_picture(sample.image, decoded.segments.cpu().numpy()))
            seen |= set(decoded.labels.unique().tolist())
    titles = ["image", "truth", *(labels[run.variant] for run in runs)]
    cells = [row for pair in zip(labelled, grouped, strict=True) for row in pair]
    save_grid(titles, cells, path, [(dataset.classes[label], palette[label]) for label in sorted(seen)])
