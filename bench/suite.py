"""What the suites share: flags, the header of every result, and the file they go to.

A result is one line of JSON in ``bench/results/<card>-<date>.jsonl`` with the header's fields in
it: ``suite``, ``card``, ``driver``, ``torch``, ``triton``, ``python``, ``commit``, ``date``,
``quick``. Lines are appended, and only by these suites: a later one replaces an earlier one of the
same suite and the same case (``bench/report.py``).
"""

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from bench.cards import Card
from cifar_resnet_fast.errors import first_line, is_out_of_memory
from cifar_resnet_fast.verification.budget import Unavailable, WrongResult
from cifar_resnet_fast.verification.identity import identity, output_of
from cifar_resnet_fast.verification.measure import (
    Call,
    Timing,
    copy_bandwidth,
    matmul_rate,
    time_calls,
)

try:
    from triton.errors import TritonError
except ImportError:  # without Triton nothing raises it

    class TritonError(Exception):
        """The error of a kernel that does not compile or does not fit the card."""


# errors that end one case and not the others; CUDA, its graphs, torch.compile and a lack of memory
# raise RuntimeError
FAILURES = (WrongResult, RuntimeError, TritonError)
RESULTS = Path(__file__).parent / "results"


def flags(suite: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all suites have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{suite}", description=description.replace("``", "")
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="device to measure; cpu measures the reference with tiny sizes (default: cuda)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter samples")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="folder of the results (default: bench/results)",
    )
    return parser


class Suite:
    """One run of a suite: where it runs, and where its results go.

    Exits with status 2 and one line on stderr if there is no such device.

    Args:
        name: of the suite, the module's
        options: parsed from ``flags``
    """

    def __init__(self, name: str, options: argparse.Namespace):
        if options.device == "cuda" and not torch.cuda.is_available():
            print(
                f"python -m bench.{name} needs a CUDA GPU and PyTorch finds none; "
                "--device cpu measures the reference with tiny sizes",
                file=sys.stderr,
            )
            raise SystemExit(2)
        self.device = torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.quick = options.quick
        self.seconds = 0.05 if options.quick or not self.on_gpu else 0.3
        self.header = {"suite": name, **header(self.device), "quick": options.quick}
        slug = re.sub(r"[^a-z0-9]+", "-", self.header["card"].lower()).strip("-")
        self.path = options.out / f"{slug}-{self.header['date']}.jsonl"
        self.console = Console(stderr=True)
        self.names_implementations = getattr(options, "implementation", None) is not None
        self.wrong = self.failed = 0
        if self.on_gpu:
            torch.backends.cudnn.benchmark = True  # what anyone who wants speed sets
        options.out.mkdir(parents=True, exist_ok=True)
        print("  ".join(f"{key} {value}" for key, value in self.header.items() if value))

    def measured_card(self) -> Card:
        """What this card reaches: a large copy, and PyTorch's own matrix product. Kept, too."""
        side = 8192 if self.on_gpu else 256
        bandwidth = copy_bandwidth(self.device, self.seconds)
        tensor, fp32 = (
            matmul_rate(self.device, dtype, side, self.seconds)
            for dtype in (torch.float16, torch.float32)
        )
        limits = {"copy_gb_s": bandwidth / 1e9, "fp16_tflop_s": tensor / 1e12}
        limits["fp32_tflop_s"] = fp32 / 1e12
        limits = {name: float(f"{value:.4g}") for name, value in limits.items()}
        row = {"suite": "card", "measured_by": self.header["suite"], **limits}
        self.add(row, f"measured: {describe_limits(row)}")
        return Card(self.header["card"], bandwidth, tensor, fp32, None, "measured")

    def progress(self, cases: list) -> Iterable:
        """``cases`` under a bar where stderr is a terminal."""
        return track(
            cases,
            self.header["suite"],
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def time(
        self,
        case: dict,
        title: str,
        prepare: Callable[[int], Call],
        card: Card,
        moved: int,
        flops: int,
    ) -> None:
        """Time the calls that ``prepare`` makes, as ``time_calls`` has it; keep the result.

        Args:
            case: fields of the result that tell it from others, ``dtype`` among them
            title: the case for people
            card, moved, flops: as ``rates`` has them
        """
        timing = time_calls(prepare, self.device, input_bytes=moved, seconds=self.seconds)
        row = {**case, **timed(timing), **rates(timing, card, case["dtype"], moved, flops)}
        self.add(
            row,
            f"{title} {row['us']:9.1f} us ({row['us_20']:.1f} - {row['us_80']:.1f})  "
            f"{row['gb_s']:7.1f} GB/s, {row['bandwidth_share']:.0%} of a copy  "
            f"{row['tflop_s']:7.2f} TFLOP/s, {row['arithmetic_share']:.0%} of a matrix product  "
            f"floor {row['floor_us']:.1f} us",
        )

    def add(self, row: dict, line: str) -> None:
        """Keep a result and print its line."""
        self._keep(row)
        print(line, flush=True)

    def _keep(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**self.header, **row}) + "\n")

    @contextlib.contextmanager
    def attempt(self, cases: list[dict]) -> Iterator[None]:
        """Measure ``cases`` of one implementation within; if that fails, the others go on.

        Args:
            cases: those without a result so far, which the caller takes out one by one; what is
                left in a failure is kept with its reason in place of a time

        Raises:
            SystemExit: the failure took the GPU with it, and nothing can be measured after it
        """
        stream = torch.cuda.current_stream(self.device) if self.on_gpu else None
        try:
            yield
        except Unavailable as error:
            if self.names_implementations:  # who names one wants to know
                self._add_failure(cases, str(error))
        except FAILURES as error:
            reason = reason_of(error)
            self.wrong += isinstance(error, WrongResult)
            self.failed += reason.startswith("failed")
            self._add_failure(cases, reason)
            if self.on_gpu:
                self._go_on(stream)

    def _go_on(self, stream: torch.cuda.Stream) -> None:
        """On ``stream``, for a capture that fails leaves its own in place."""
        torch.cuda.set_stream(stream)
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            print(
                f"the GPU cannot be used any more after that ({first_line(error)}): what is "
                f"missing needs another run; results so far in {self.path}",
                file=sys.stderr,
            )
            raise SystemExit(1) from None

    def _add_failure(self, cases: list[dict], reason: str) -> None:
        for case in cases:
            self._keep({**case, "no_time": reason})
        print(f"{describe(cases)}  NO TIME: {reason}", flush=True)

    def finish(self) -> int:
        """The exit status: 1 if a result was wrong or something failed, but for want of memory."""
        counts = [f"; {self.wrong} wrong"] if self.wrong else []
        counts += [f"; {self.failed} failed"] if self.failed else []
        print(f"results in {self.path}{''.join(counts)}")
        return 1 if counts else 0


def reason_of(error: Exception) -> str:
    """Why there is no time: ``wrong result: ...``, ``out of memory`` or ``failed: ...``, one line.

    Of what went wrong in a CUDA graph's capture, not of the error that ends the capture then.
    """
    while isinstance(error.__context__, FAILURES) and not error.__suppress_context__:
        error = error.__context__
    if is_out_of_memory(error):
        return "out of memory"
    kind = "wrong result" if isinstance(error, WrongResult) else "failed"
    return f"{kind}: {first_line(error)}"


def describe(cases: list[dict]) -> str:
    """The values of cases in one line, those that differ with a / between."""
    fields = [field for field in cases[0] if cases[0][field] is not None]
    return ", ".join("/".join(dict.fromkeys(str(c[field]) for c in cases)) for field in fields)


def describe_limits(row: dict) -> str:
    """What a card reaches, in one line."""
    return (
        f"copy {row['copy_gb_s']:g} GB/s, PyTorch's matrix product {row['fp16_tflop_s']:g} "
        f"TFLOP/s in float16, {row['fp32_tflop_s']:g} in float32"
    )


def timed(timing: Timing) -> dict:
    """A timing as fields of a result: microseconds, and MiB at the peak of a call."""
    return {
        "us": round(timing.median * 1e6, 3),
        "us_20": round(timing.low * 1e6, 3),
        "us_80": round(timing.high * 1e6, 3),
        "samples": timing.samples,
        "method": timing.method,
        "peak_mib": timing.peak_mib,
    }


def rates(timing: Timing, card: Card, dtype: str, moved: int, flops: int) -> dict:
    """What a time comes to, as fields of a result.

    Args:
        card: measured, of which the shares are
        moved, flops: bytes and operations of the call, at least (``bench/traffic.py``)
    """
    seconds, arithmetic = timing.median, card.arithmetic(dtype)
    return {
        "bytes": moved,
        "flops": flops,
        "gb_s": round(moved / seconds / 1e9, 1),
        "tflop_s": round(flops / seconds / 1e12, 3),
        "bandwidth_share": round(moved / seconds / card.bandwidth, 4),
        "arithmetic_share": round(flops / seconds / arithmetic, 4),
        "floor_us": round(max(moved / card.bandwidth, flops / arithmetic) * 1e6, 3),
    }


def header(device: torch.device) -> dict[str, str | None]:
    """What a time depends on besides the input: card, versions, build, commit, date."""
    return {**identity(device), "commit": _commit(), "date": time.strftime("%Y-%m-%d")}


def _commit() -> str | None:
    """Short hash of the checkout, with a + where tracked files differ from it; None outside."""
    root = str(Path(__file__).parents[1])
    commit = output_of("git", "-C", root, "rev-parse", "--short=10", "HEAD")
    if commit is None:
        return None
    changed = output_of("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "")
