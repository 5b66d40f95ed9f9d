"""What the self-check found on this machine, kept for the next run (layer 1).

Verdicts are kept in the user's cache folder (platformdirs), one file for each card, driver, torch,
triton and build of the package. If platformdirs is not installed, or its folder cannot be written,
they are known to their process alone: a run's kernels are then checked whenever one starts.
"""

import hashlib
import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cifar_resnet_fast.checkpoint import write_atomically
from cifar_resnet_fast.verification.identity import identity

OK, FAILED, NOT_POSSIBLE = "ok", "failed", "not possible"
_known: dict[str, dict[str, "Verdict"]] = {}  # by digest, to this process
_KEY = ("card", "driver", "torch", "triton", "build")


@dataclass(frozen=True)
class Verdict:
    """What became of the check of some kernels, and when.

    verdict: ``ok``, ``failed`` or ``not possible``
    reason: one line; may be empty
    date: of the check
    """

    verdict: str
    reason: str
    date: str


class Verdicts:
    """The verdicts of one card, driver, torch, triton and build, by the names of the kernels.

    Attributes:
        path: of their file; None if they are not kept
        why_not_kept: one line, or None
    """

    def __init__(self, device: torch.device):
        found = identity(device)
        self._key = {name: found[name] for name in _KEY}
        self.path, self.why_not_kept = None, None
        digest = hashlib.sha256(json.dumps(self._key).encode()).hexdigest()[:16]
        self._verdicts = _known.setdefault(digest, {})
        if importlib.util.find_spec("platformdirs") is None:
            self.why_not_kept = "the package platformdirs is not installed"
            return
        import platformdirs

        self.path = Path(platformdirs.user_cache_dir("cifar_resnet_fast")) / f"{digest}.json"
        self._verdicts |= self._read(self.path)

    def of(self, kernels: str) -> Verdict | None:
        """The verdict on some kernels, or None."""
        return self._verdicts.get(kernels)

    def items(self) -> list[tuple[str, Verdict]]:
        return sorted(self._verdicts.items())

    def keep(self, found: Mapping[str, tuple[str, str]]) -> None:
        """Keep verdict and reason by the names of the kernels; what was not possible is none."""
        date = time.strftime("%Y-%m-%d %H:%M")
        for kernels, (verdict, reason) in found.items():
            if verdict in (OK, FAILED):
                self._verdicts[kernels] = Verdict(verdict, reason, date)
        if self.path is None:
            return
        content = {**self._key, "verdicts": {n: vars(v) for n, v in self._verdicts.items()}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            self.path, self.why_not_kept = None, f"{self.path} cannot be written: {error}"

    @staticmethod
    def _read(path: Path) -> dict[str, Verdict]:
        """Those in the file; none if there is no such file, or not a whole one."""
        try:
            content = json.loads(path.read_text())
            return {name: Verdict(**value) for name, value in content["verdicts"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
