"""Report and charts from stored results, made up here: every number of theirs is in the report."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.image import imread

from bench import report
from bench.cases import CASES

HEADER = {
    "card": "Test Card 9000",
    "driver": "1.2",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "python": "3.12.1",
    "commit": "0123456789",
    "date": "2026-01-02",
    "quick": False,
}


def timing(us):
    return {"us": us, "us_20": 0.96 * us, "us_80": 1.09 * us, "samples": 100, "method": "graph"}


def made_up():
    """Rows as the suites write them, with a failure and with three seeds of a training."""
    rates = {"copy_gb_s": 3000.0, "fp16_tflop_s": 600.0, "fp32_tflop_s": 50.0}
    rows = [
        {"suite": "card", "measured_by": "kernels", **rates},
        {"suite": "card", "measured_by": "step", **rates, "copy_gb_s": 2990.0},
    ]
    names = ("cuda", "triton", "eager", "compile")
    for i, case in enumerate(CASES):
        for (j, phase), (k, name) in itertools.product(enumerate(case.phases), enumerate(names)):
            key = {"operation": case.operation, "place": case.place, "implementation": name}
            dtype, batch = ("fp16", 1024) if case.batched else ("fp32", None)
            key |= {"dtype": dtype, "batch": batch}
            if (i, name) == (0, "cuda"):
                reason = "wrong result: dx: norm of the error"
                rows.append({"suite": "kernels", **key, "phase": phase, "no_time": reason})
                continue
            floor = 20.0 + 3 * i + 11 * j
            us = floor * (1.2, 2.6, 5.3, 3.4)[k]
            row = {**key, "phase": phase, **timing(us), "floor_us": floor, "peak_mib": 64.0}
            rows.append({"suite": "kernels", **row})
    steps = {"eager fp32": 90.0, "eager": 30.0, "eager graph": 20.0, "compile graph": 17.0}
    steps |= {"compile max-autotune graph": 15.0, "auto": 4.25, "cuda": 4.125, "triton": 9.0}
    for depth, phase in itertools.product((20, 56), ("training", "inference")):
        for name, ms in steps.items():
            us = 1e3 * ms * depth / 56 * (1 if phase == "training" else 0.3)
            row = {"phase": phase, "depth": depth, "dtype": "fp16", "batch": 1024}
            row |= {"implementation": name, **timing(us), "floor_us": 52.0 * depth}
            row |= {"peak_mib": 4321.0, "images_per_second": 1024e6 / us}
            rows.append({"suite": "step", **row})
    for name, us in (("package", 21.5), ("torchvision", 98765.0)):
        row = {"dtype": "fp16", "batch": 1024, "implementation": name, **timing(us)}
        row |= {"images_per_second": 1024e6 / us, "floor_us": 4.5}
        rows.append({"suite": "loader", **row})
    for seed, accuracy in enumerate((0.93, 0.932, 0.934)):
        row = {"depth": 56, "implementation": "auto", "dataset": "cifar10", "dtype": "fp16"}
        row |= {"batch": 1024, "epochs": 160, "limit": None, "seed": seed, "accuracy": accuracy}
        row |= {"seconds": 35.0 + seed, "start_seconds": 9.0, "target": 0.93}
        row |= {"seconds_to_target": None if seed == 2 else 30.0, "epochs_to_target": 130}
        rows.append({"suite": "train", **row})
    return [{**HEADER, **row} for row in rows]


def write_results(folder):
    path = folder / "test-card-9000-2026-01-02.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made_up()))
    return path


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The folder of a whole report: charts take their time."""
    folder = tmp_path_factory.mktemp("report")
    assert report.main([str(write_results(folder)), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_report_has_the_numbers(rendered):
    text = (rendered / "report.md").read_text()
    assert "## Test Card 9000, 2026-01-02" in text
    assert "driver 1.2; torch 2.11.0; triton 3.6.0; python 3.12.1; commit 0123456789." in text
    assert "* kernels: copy 3000 GB/s, PyTorch's matrix product 600 TFLOP/s in float16" in text
    assert "* step: copy 2990 GB/s" in text
    # the second case of CASES forward, floor 23: cuda 1.2, triton 2.6, eager 5.3, compile 3.4
    case = f"| {CASES[1].operation} {CASES[1].place}, forward | 23.0 | "
    times = [f"{t:.1f} ({0.96 * t:.1f} - {1.09 * t:.1f})" for t in (27.6, 59.8, 121.9, 78.2)]
    line = next(line for line in text.splitlines() if line.startswith(case))
    assert {cell.strip() for cell in line.split("|")} == {"", *times, "23.0", "83%", case[2:-10]}
    # SGD has no batch, so a table of its own, and one phase
    i = next(i for i, case in enumerate(CASES) if case.operation == "sgd")
    _, own = text.split("#### fp32, no batch")
    assert f"| sgd {CASES[i].place}, call | {20 + 3 * i:.1f} | " in own
    assert "| conv_bn_relu" not in own
    # ResNet-56: 90 ms against 4.125, floor 2.912
    assert "| cuda | 4.125 (3.960 - 4.496) | 248,242 | 21.8x | 71% | 4,321 |" in text
    case = "conv_bn_relu, 32x32x3 to 16, fp16, 1024, forward/backward/both, cuda"
    assert text.count(f"* {case}: wrong result: dx: norm of the error\n") == 1
    assert "| package, fp16, batch 1024 | 21.5 (20.6 - 23.4) | 47,627,907 | 4.5 |" in text
    assert "| 3 | 93.20 ± 0.20 | 36.0 ± 1.0 | 93 %: 30.0 ± 0.0 s, 2 of 3 |" in text


def test_the_trunks_kernels(tmp_path):
    """A row a kernel, place and implementation; on an H100, batch 1024, bf16 beside prototypes."""

    def row(kernel, place, name, us, **others):
        row = {"suite": "trunk", "kernel": kernel, "place": place, "implementation": name}
        row |= {"dtype": "bf16", "batch": 1024, **timing(us), "floor_us": 22.5}
        return {**HEADER, **row, **others}

    rows = [
        row("F2", "32x32x16", "cuda", 30.0),
        row("F2", "32x32x16", "eager", 225.0),
        row("head", "8x8x64", "cuda", 40.0),
        row("weights", "ResNet-56", "cuda", 5.0, batch=None, floor_us=2.5),
    ]
    text = report.report(rows, tmp_path)
    head = "| kernel | place | implementation | us (20 % - 80 %) | floor us | floor / time |"
    assert text.count(head + "\n") == 2
    assert "| F2 | 32x32x16 | cuda | 30.0 (28.8 - 32.7) | 22.5 | 75% |\n" in text
    assert "| F2 | 32x32x16 | eager | 225.0 (216.0 - 245.3) | 22.5 | 10% |\n" in text
    assert "prototype, H100" not in text.split("## RTX 3080")[0]
    rows = [{**row, "card": "NVIDIA H100 80GB HBM3"} for row in rows]
    text = report.report([*rows, {**rows[0], "dtype": "fp16"}], tmp_path)
    assert text.count("| prototype, H100, batch 1024, bf16 |\n") == 1
    assert "| F2 | 32x32x16 | cuda | 30.0 (28.8 - 32.7) | 22.5 | 75% | 27.9 |\n" in text
    assert "| head | 8x8x64 | cuda | 40.0 (38.4 - 43.6) | 22.5 | 56% |  |\n" in text
    assert "| weights | ResNet-56 | cuda | 5.0 (4.8 - 5.5) | 2.5 | 50% |\n" in text


def test_kept_rows_of_the_trunk_make_a_report(tmp_path):
    """Those in bench/results have no floors where the card's limits were measured wrong."""
    (path,) = report.RESULTS.glob("2026-11-26-h200/trunk.jsonl")
    assert report.main([str(path), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## NVIDIA H200, 2026-11-26" in text
    assert "| F2 | 32x32x16 | cuda | 21.4 (21.3 - 21.5) |  |  |\n" in text
    assert text.count("| cuda |") == 48


def test_prediction_is_called_one(rendered):
    measured, predicted = (rendered / "report.md").read_text().split("## RTX 3080")
    assert predicted.startswith(": a prediction, not a measurement")
    figures = [line for line in predicted.splitlines() if line.startswith("* ResNet")]
    assert len(figures) == 3
    assert all("PREDICTION, not a measurement" in line for line in figures)
    assert predicted.count("* assumed: ") >= 5
    assert "RTX" not in measured


def test_charts_render(rendered):
    """Not blank, and with as much colour as there are implementations."""
    charts = sorted(rendered.glob("*.png"))
    assert [chart.name.split("-")[0] for chart in charts] == ["kernels", "step"]
    for chart, implementations in zip(charts, (4, 8), strict=True):
        pixels = imread(chart)[..., :3]
        assert pixels.shape[1] > 1000
        # bars are areas of one colour that is neither black nor white
        red, green, blue = np.round(255 * pixels).astype(np.int64).transpose(2, 0, 1)
        colours, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
        coloured = (colours != 0xFFFFFF) & (colours != 0)
        assert (coloured & (counts > red.size / 2000)).sum() >= implementations


@pytest.mark.parametrize(
    ("chosen", "charts"),
    [
        (lambda row: row["operation"] == "sgd", 0),
        (lambda row: row["operation"] == "shortcut_a" and row["phase"] == "backward", 1),
        (lambda row: (row["dtype"], row["batch"]) in (("fp16", 128), ("bf16", 1024)), 1),
    ],
    ids=["no batch", "one phase", "the largest batch in the second dtype"],
)
def test_a_part_of_the_suite_renders(chosen, charts, tmp_path):
    """What flags of the suite leave out must not be there."""
    rows = [row for row in made_up() if row["suite"] == "kernels"]
    others = (("fp16", 128), ("bf16", 1024))
    batched = [row for row in rows if row["batch"]]
    rows += [{**row, "dtype": dtype, "batch": n} for row in batched for dtype, n in others]
    rows = [row for row in rows if "us" in row and chosen(row)]
    text = report.report(rows, tmp_path)
    assert text.count("| share |") == len({(row["dtype"], row["batch"]) for row in rows})
    assert text.count("![Kernels]") == len(list(tmp_path.glob("kernels-*.png"))) == charts


def test_the_last_result_of_a_case_counts(results):
    first = report.read_results([results])
    again = next(row for row in first if row["suite"] == "step")
    with results.open("a") as file:
        file.write(json.dumps({**again, "us": 1.5}) + "\n")
        file.write(json.dumps({**again, "us": 2.5, "date": "2026-01-03"}) + "\n")
    rows = report.read_results([results])
    assert len(rows) == len(first) + 1
    assert [row["us"] for row in rows[-2:]] == [1.5, 2.5]


@pytest.mark.parametrize("line", ["{", "[]", '{"suite": "step"}', '{"suite": "cooking"}'])
def test_a_damaged_line_is_named(line, results, capsys):
    number = results.read_text().count("\n") + 1
    with results.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit) as stop:
        report.main([str(results), "--out", str(results.parent)])
    assert stop.value.code == 2
    assert f"{results}, line {number}: " in capsys.readouterr().err


def test_the_results_are_those_in_the_reports_folder(results, capsys):
    """So one --out serves suites and report; where there are none, one line says so."""
    assert report.main(["--out", str(results.parent)]) == 0
    assert f" results in {results.parent / 'report.md'}" in capsys.readouterr().out
    assert (results.parent / "report.md").exists()
    results.unlink()
    with pytest.raises(SystemExit) as stop:
        report.main(["--out", str(results.parent)])
    assert stop.value.code == 2
    assert f"no results in {results.parent}: " in capsys.readouterr().err
