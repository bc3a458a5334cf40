"""Write the tables and figures of docs/ from the results files: ``python -m benchmarks.report``.

docs/performance.md gets a summary, docs/performance/ a page per results file, docs/results.md the scores of runs. Only
the text between a page's two markers is replaced. ``--check`` changes nothing and fails if a page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mixreorg_fast import ledger
from mixreorg_fast.ledger import Row, file_stem
from mixreorg_fast.study import report as study_report

from . import figures

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PROFILE, CURVES, COUNTED = "profile", "curves", "counted"
SUITES = ("op", "inference", "step", "loader", PROFILE, CURVES)  # that have a table here
LARGEST_BATCH, WAITING = "largest batch", "waiting for data"

# The rows of the summary: what is timed, its op in the ledger, dtype, and the baseline. Of an op: forward and backward
# in a CUDA graph, so the time of the device.
SUMMARY = (
    ("MixReorg training step", "mixreorg step", "float32", "eager"),
    ("MixReorg training step", "mixreorg step", "bfloat16", "eager"),
    ("MixReorg training step", "mixreorg step", "bfloat16", "compiled"),
    ("GroupViT training step", "groupvit step", "float32", "huggingface"),
    ("GroupViT training step", "groupvit step", "bfloat16", "huggingface"),
    ("GroupViT training step", "groupvit step", "bfloat16", "compiled"),
    ("zero-shot segmentation", "segment_labels", "float32", "huggingface"),
    ("zero-shot segmentation", "segment_labels", "bfloat16", "huggingface"),
    ("decoding of sliding windows", "decode_windows", "float32", "eager"),
    ("patch mixing", "patch_mix", "bfloat16", "eager"),
    ("grouping attention", "grouping_attention", "bfloat16", "eager"),
    ("mixed segmentation loss", "mixed_segmentation_loss", "bfloat16", "eager"),
    ("contrastive loss", "contrastive_loss", "bfloat16", "eager"),
)
BASELINES = {"eager": "plain PyTorch", "compiled": "torch.compile", "huggingface": "transformers"}
# Targets on a GPU: op, shape, baseline, and the least ratio of the baseline's time to ours. "limit": the share of the
# speed that this GPU's copy rate allows; "images/s": a rate; "memory": the largest share of eager's memory.
TARGETS = (
    ("patch_mix", "1024x196x384 K=4", "limit", 0.85),
    ("patch_mix", "1024x196x384 K=4", "compiled", 1.3),
    ("patch_blend", "1024x196x384 K=4", "limit", 0.85),
    ("patch_blend", "1024x196x384 K=4", "compiled", 1.3),
    ("grouping_attention", "1024x64x196x384", "eager", 3.0),
    ("grouping_attention", "1024x64x196x384", "compiled", 1.3),
    ("mixed_segmentation_loss", "1024x64x196 G2=8 K=4", "eager", 5.0),
    ("mixed_segmentation_loss", "1024x64x196 G2=8 K=4", "compiled", 1.5),
    ("contrastive_loss", "32768x256", "eager", 1.5),
    ("contrastive_loss", "32768x256", "memory", 0.02),
    ("decode_segments", "64x8x28x37 to 512x683 T=150", "eager", 3.0),
    ("mixreorg step", "512x3x224² K=4 captions 10-22", "eager", 1.8),
    ("mixreorg step", "512x3x224² K=4 captions 10-22", "compiled", 1.2),
    ("mixreorg step", "512x3x224² K=4 captions 10-22", "images/s", 3500),
    ("groupvit step", "512x3x224² captions 10-22", "images/s", 6500),
    ("segment_labels", "32x3x448x448 to 512x683 T=150", "huggingface", 2.0),
)


def pages(folder: Path = HERE / "results") -> dict[str, tuple[str, str]]:
    """Title and content of each page by its path in docs/: a summary of every device, GPUs first; a page per file."""
    files = sorted(ledger.results_files(folder, SUITES), key=lambda file: file["cuda"] is None)
    counted = ledger.results_files(folder, [COUNTED])
    found = {f"performance/{file_stem(file['device'])}.md": (file["device"], device_section(file)) for file in files}
    for file in counted:
        found["performance/counted.md"] = (f"Counted for an {file['counted_for']['gpu']}", counted_section(file))
    summaries = "\n\n".join(summary_section(file) for file in files)
    return {"performance.md": ("Performance", summaries), **found} if files else found


def implementations(file: Row, op: str, dtype: str) -> dict[str, dict[str, Row]]:
    """By shape and implementation, the rows that the summary and the targets speak of."""
    by_shape: dict[str, dict[str, Row]] = {}
    for row in file["rows"]:
        told = row["suite"] != "op" or (
            row["graph"] and row["mode"] == ("fwd" if op == "decode_segments" else "fwd+bwd")
        )
        if (row["op"], row.get("dtype")) == (op, dtype) and row["suite"] in SUITES and told:
            by_shape.setdefault(row["shape"], {})[row["implementation"]] = row
    return by_shape


def ours(by_name: Mapping[str, Row]) -> Row | None:
    """The row of the default; if it was not measured, of all CUDA graphs. For an op, the kernel's."""
    return by_name.get("ours") or by_name.get("ours in CUDA graphs") or by_name.get("triton")


def summary(file: Row) -> list[tuple[str, Row, Row]]:
    """The rows of SUMMARY that the file holds: name, the baseline's row and ours, at the largest shape of a step and at
    the model's shape of an op."""
    found = []
    for name, op, dtype, baseline in SUMMARY:
        pairs = [
            (of[baseline], mine)
            for of in implementations(file, op, dtype).values()
            if baseline in of and (mine := ours(of)) is not None
        ]
        if pairs:
            found.append((f"{name}, {dtype}", *pairs[0 if pairs[0][1]["suite"] == "op" else -1]))
    return found


def summary_section(file: Row) -> str:
    """The chart, its rows as a table, and on a GPU the targets."""
    head = ["what", "shape", "baseline", "baseline, ms", "ours, ms", "speed-up"]
    body = [
        [name, mine["shape"], BASELINES[theirs["implementation"]]]
        + [f"{ms:.0f}" if (ms := row["median_ms"]) >= 100 else f"{ms:.3g}" for row in (theirs, mine)]
        + [ratio(theirs, mine)]
        for name, theirs, mine in summary(file)
    ]
    picture = f"![times as fast as the baseline, measured on {file['device']}](images/{speed_name(file)})"
    measured = f"*Measured on {file['device']}, {file['date'][:10]}, torch {file['torch']}; medians.*"
    lines = [picture, "", measured, "", *ledger.table(head, body)]
    return "\n".join([*lines, "", *targets_table(file)] if file["cuda"] else lines)


def targets_table(file: Row) -> list[str]:
    """A line per target: what was measured, and whether it is met."""
    body = []
    for op, shape, baseline, least in TARGETS:
        by_name = implementations(file, op, "bfloat16").get(shape, {})
        mine, theirs = ours(by_name), by_name.get(baseline)
        if baseline == "limit":
            found, text = (mine["limit_fraction"] if mine else None), "{:.0%} of the copy rate"
        elif baseline == "images/s":
            found, text = (mine["images_per_s"] if mine else None), "{:,.0f} images/s"
        elif baseline == "memory":
            eager = by_name.get("eager")
            found = mine["peak_mb"] / eager["peak_mb"] if mine and eager else None
            text = "{:.1%} of plain PyTorch's memory"
        else:
            found = theirs["median_ms"] / mine["median_ms"] if mine and theirs else None
            text = f"{{:.2f}}× {BASELINES[baseline]}"
        if found is None:
            outcome, measured = "not measured", "–"
        else:
            share = least / found if baseline == "memory" else found / least
            outcome, measured = "met" if share >= 1 else f"missed by {1 - share:.0%}", text.format(found)
        body.append([op, shape, ("at most " if baseline == "memory" else "") + text.format(least), measured, outcome])
    return titled("**Targets**", ["what", "shape", "target", "measured", "outcome"], body)


def device_section(file: Row) -> str:
    """The device, its ceilings, and a table per op."""
    rows = [row for row in file["rows"] if row["suite"] in SUITES]
    commits = sorted({row["commit"] for row in rows})
    lines = [
        f"{file['date'][:10]}, commit {', '.join(commits)}, torch {file['torch']}, triton {file['triton']}. Measured "
        f"ceilings: copy {file['copy_gb_per_s']:.0f} GB/s, write {file['write_gb_per_s']:.0f} GB/s, matmuls "
        f"{file['matmul_bf16_tflop_per_s']:.3g} TFLOP/s in bf16, {file['matmul_fp32_tflop_per_s']:.3g} in fp32.",
    ]
    losses = [row for row in rows if row["suite"] == CURVES]
    for op in dict.fromkeys(row["op"] for row in rows if row["suite"] != CURVES):
        of_op = [row for row in rows if row["op"] == op]
        if op == LARGEST_BATCH:
            table = largest_batches(of_op)
        elif op == WAITING:
            table = waiting_table(of_op, rows)
        elif of_op[0]["suite"] == PROFILE:
            table = profile_table(op, of_op)
        else:
            table = (throughput_table if of_op[0]["mode"] == "step" else op_table)(op, of_op)
        lines += ["", *table]
        if "axis" in of_op[0]:
            lines += ["", f"![{figures.GROWTH[of_op[0]['axis']]}](../images/{figure_name(file, of_op[0]['axis'])})"]
    if losses:
        lines += ["", *gap_table(losses), "", f"![loss curves](../images/{figure_name(file, 'losses')})"]
    return "\n".join(lines)


def counted_section(file: Row) -> str:
    """What was counted without a GPU, of each state of the code: per op, on the host, and of a whole micro-step."""
    gpu = file["counted_for"]
    lines = [
        f"{file['date'][:10]}, torch {file['torch']}, triton {file['triton']}. Nothing here was measured on a GPU. A "
        f"time is the least that {gpu['gb_per_s']:.0f} GB/s, {gpu['multiprocessors']} multiprocessors at "
        f"{gpu['ghz']:.3f} GHz and their matrix units allow, with the deciding limit in parentheses. Both sides of a "
        "branch are counted, also the rare one of the contrastive loss's log-sum-exp.",
    ]
    states = list(dict.fromkeys(row["state"] for row in file["rows"]))

    def of(part: str, *names: str) -> dict[tuple[str, ...], dict[str, Row]]:
        """The rows of a part by what they are of, then by state."""
        found: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in file["rows"]:
            if row["part"] == part:
                found.setdefault(tuple(row[name] for name in names), {})[row["state"]] = row
        return found

    def steps(rows: Mapping[str, Row], text: Callable[[Row], str]) -> str:
        return " → ".join(text(rows[state]) if state in rows else "–" for state in states)

    head = ["op", "shape", "launches", "MB", "M warp instructions", "at least, µs", "eager at least, µs", "ratio"]
    body = []
    ops = of("ops", "op", "shape", "implementation")
    for (op, shape, name), rows in ops.items():
        if name != "ours":
            continue
        eager = ops[op, shape, "eager"]
        least = list(eager.values())[-1]["predicted_us"]
        cells = [op, shape, steps(rows, lambda row: f"{row['launches']}"), steps(rows, lambda row: f"{row['mb']:.0f}")]
        cells += [steps(rows, lambda row: f"{row['warp_minstructions']:.0f}")]
        cells += [steps(rows, lambda row: f"{row['predicted_us']:.0f} ({row['bound']})"), f"{least:.0f}"]
        cells += [steps(rows, lambda row, least=least: f"{least / row['predicted_us']:.1f}×")]
        body.append([*cells, list(rows.values())[-1]["target"]])
    lines += ["", *titled(f"**ops, forward and backward** ({' → '.join(states)})", [*head, "target"], body)]

    body = [
        [
            op,
            *(
                steps(rows, lambda row, name=name: f"{row[f'{name}_forward_us'] + row[f'{name}_backward_us']:.0f}")
                for name in ("ours", "eager")
            ),
        ]
        for (op,), rows in of("host_time", "op").items()
    ]
    lines += ["", *titled("**host time of an op**, forward and backward, µs", ["op", "ours", "eager"], body)]

    body = [
        [what, *(steps(rows, lambda row, kind=kind: f"{row[kind]}") for kind in ("eager", "compiled", "triton"))]
        for (what,), rows in of("launches", "what").items()
    ]
    lines += ["", *titled("**launches of a micro-step**", ["part", "eager", "compiled calls", "kernels"], body)]

    body = [
        [what, steps(rows, lambda row: f"{row['mb_per_image']:.1f}")]
        for (what,), rows in of("activations", "what").items()
    ]
    return "\n".join([*lines, "", *titled("**activations**", ["of", "MB an image"], body)])


def speed_name(file: Row) -> str:
    return f"speed_{file_stem(file['device'])}.png"


def figure_name(file: Row, what: str) -> str:
    return f"step_{what.replace(' ', '_')}_{file_stem(file['device'])}.png"


def draw(results: Path, images: Path) -> None:
    """Every figure that the pages show."""
    for file in ledger.results_files(results, SUITES):
        rows = file["rows"]
        if bars := summary(file):
            baselines = [BASELINES[theirs["implementation"]] for _, theirs, _ in bars]
            names = [f"{name}\nagainst {of}" for (name, _, _), of in zip(bars, baselines, strict=True)]
            speeds = [theirs["median_ms"] / ours["median_ms"] for _, theirs, ours in bars]
            figures.speed(names, speeds, f"{file['device']}, torch {file['torch']}", images / speed_name(file))
        for axis in dict.fromkeys(row["axis"] for row in rows if "axis" in row):
            figures.growth([row for row in rows if row.get("axis") == axis], images / figure_name(file, axis))
        if losses := [row for row in rows if row["suite"] == CURVES]:
            figures.losses(losses, images / figure_name(file, "losses"))


def titled(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [title, "", *ledger.table(head, rows)]


def op_table(op: str, rows: Sequence[Row]) -> list[str]:
    """A line per shape, mode and launch; a column per implementation; the kernel's gain where the kernel ran."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    with_kernel = "triton" in names
    head = ["shape", "dtype", "mode", *(f"{name} ms" for name in names)]
    if with_kernel:
        head += ["vs eager", "vs compiled", "of the limit", "peak MB", "eager's"]
    by_case: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        case = (row["shape"], row["dtype"], row["mode"], row["graph"])
        by_case.setdefault(case, {})[row["implementation"]] = row
    body = []
    for (shape, dtype, mode, graph), by_name in by_case.items():
        cells = [shape, dtype, f"{mode}, graph" if graph else mode]
        cells += [milliseconds(by_name.get(name)) for name in names]
        if with_kernel:
            kernel, eager = by_name.get("triton"), by_name.get("eager")
            cells += [ratio(eager, kernel), ratio(by_name.get("compiled"), kernel), share(kernel)]
            cells += [megabytes(kernel), megabytes(eager)]
        body.append(cells)
    return titled(f"**{op}**", head, body)


def throughput_table(op: str, rows: Sequence[Row]) -> list[str]:
    """A line per shape and implementation; the gain of ours over each other implementation at the same shape."""
    head = ["shape", "dtype", "implementation", "images/s", "ms", "ours against it", "peak MB", "of the limit"]
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault((row["shape"], row["dtype"]), {})[row["implementation"]] = row
    body = []
    for row in rows:
        mine = ours(by_case[row["shape"], row["dtype"]])
        cells = [row["shape"], row["dtype"], row["implementation"], f"{row['images_per_s']:.4g}", milliseconds(row)]
        cells += [ratio(row, mine) if row is not mine else "", megabytes(row)]
        body.append([*cells, share(row) if row["limit_fraction"] else "–"])
    return titled(f"**{op}**", head, body)


def largest_batches(rows: Sequence[Row]) -> list[str]:
    body = ([row["shape"], row["dtype"], row["images"], megabytes(row)] for row in rows)
    return titled(f"**{LARGEST_BATCH}** of one device", ["model", "dtype", "images", "peak MB"], body)


def waiting_table(rows: Sequence[Row], others: Sequence[Row]) -> list[str]:
    """Share of a training that waits for data, and the loader's rate against the fastest step's."""
    head = ["training", "dtype", "images/s", "waiting", "loader alone", "step alone", "ratio"]
    alone = max((row["images_per_s"] for row in others if row["op"] == "loader"), default=None)
    body = []
    for row in rows:
        steps = [r for r in others if r["op"] == "mixreorg step" and r["dtype"] == row["dtype"]]
        step = max((r["images_per_s"] for r in steps if r["implementation"] == "ours"), default=None)
        cells = [row["shape"], row["dtype"], f"{row['images_per_s']:.4g}", f"{row['waiting']:.1%}"]
        cells += [f"{rate:.4g}" if rate else "–" for rate in (alone, step)]
        body.append([*cells, f"{alone / step:.1f}×" if alone and step else "–"])
    return titled(f"**{WAITING}**", head, body)


def profile_table(op: str, rows: Sequence[Row]) -> list[str]:
    """A line per implementation and family of operations; `floor` is the least time for its bytes or operations."""
    head = ["implementation", "family", "ms", "share", "GFLOP", "GB", "floor ms", "of the limit"]
    shapes = ", ".join(dict.fromkeys(f"{row['shape']} {row['dtype']}" for row in rows))

    def line(name: str, family: str, ms: float, part: float, *counted: float | None) -> list[str]:
        numbers = ("–" if value is None else f"{value:.3g}" for value in counted)
        floor = counted[-1]
        return [name, family, f"{ms:.3g}", f"{part:.1%}", *numbers, "–" if floor is None else f"{floor / ms:.0%}"]

    counts = ("gflop", "gbyte", "floor_ms")
    body = []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        mine = [row for row in rows if row["implementation"] == name]
        body += [line(name, row["family"], row["ms"], row["share"], *(row[count] for count in counts)) for row in mine]
        counted = [None if mine[0][count] is None else sum(row[count] for row in mine) for count in counts]
        body.append(line(name, "the step, by the clock", mine[0]["step_ms"], 1.0, *counted))
    return titled(f"**{op}** ({shapes})", head, body)


def gap(first: Sequence[float], second: Sequence[float]) -> float:
    """Root mean square of the difference of two loss curves."""
    return (sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first)) ** 0.5


def gap_table(rows: Sequence[Row]) -> list[str]:
    """The gap between the losses of ours and of the baseline, beside the gap between the baseline in bf16 and fp32."""
    body = []
    for op in dict.fromkeys(row["op"] for row in rows):
        curves = {(row["implementation"], row["dtype"]): row for row in rows if row["op"] == op}
        (name,) = {of for of, _ in curves} - {"ours"}
        pairs = [(("ours", dtype), (name, dtype)) for dtype in ("float32", "bfloat16")]
        pairs.append(((name, "bfloat16"), (name, "float32")))
        for pair in pairs:
            if all(key in curves for key in pair):
                a, b = (curves[key] for key in pair)
                between = " and ".join(f"{of} in {dtype}" for of, dtype in pair)
                body.append([op, a["shape"], len(a["losses"]), between, f"{gap(a['losses'], b['losses']):.2g}"])
    return titled("**loss curves**", ["losses", "shape", "steps", "between", "gap"], body)


def milliseconds(row: Row | None) -> str:
    """Median with the 20th and 80th percentile."""
    return f"{row['median_ms']:.3g} ({row['p20_ms']:.3g}–{row['p80_ms']:.3g})" if row else "–"


def ratio(baseline: Row | None, kernel: Row | None) -> str:
    return f"{baseline['median_ms'] / kernel['median_ms']:.2f}×" if baseline and kernel else "–"


def share(row: Row | None) -> str:
    return f"{row['limit_fraction']:.0%}" if row else "–"


def megabytes(row: Row | None) -> str:
    return f"{row['peak_mb']:.0f}" if row and row["peak_mb"] is not None else "–"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a page differs from the results")
    check = parser.parse_args(argv).check
    results = HERE / "results"
    found = pages().items()
    changed = [name for name, (title, text) in found if ledger.write_page(DOCS / name, text, title=title, check=check)]
    changed += [study_report.PAGE] * study_report.write_page(results, DOCS, check=check)
    if not check:
        draw(results, DOCS / "images")
    elif changed:
        print(f"docs: {', '.join(changed)}: not what benchmarks/results/ says; run python -m benchmarks.report")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
