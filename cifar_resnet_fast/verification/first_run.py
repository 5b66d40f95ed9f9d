"""The kernels that a run uses, checked before the first run on a card and a build (layer 3).

``train`` trusts what has a verdict. What has none is checked, a few seconds; what fails is left to
the next implementation, or is an error if it was asked for by name.
"""

import time
from collections.abc import Callable

import torch

from cifar_resnet_fast import ops
from cifar_resnet_fast.verification.checks import Check, quick_checks
from cifar_resnet_fast.verification.runner import CATALOGUE, run_checks
from cifar_resnet_fast.verification.verdicts import FAILED, NOT_POSSIBLE, OK, Verdicts

# whose kernels a training launches, beside those of the network itself
_BESIDE_NETWORK = ("load_batch", "linear_cross_entropy", "record_step", "sgd")
_JOBS = 3


def operations_of_run(network: str) -> tuple[str, ...]:
    """Whose kernels a training launches; ``network`` is ``trunk``, or ``conv_bn_relu`` if the
    layers run one by one."""
    return (network, *_BESIDE_NETWORK)


def kernels_of_run(
    implementation: str,
    dtype: str,
    device: torch.device,
    network: str = "trunk",
    width: int = 1,
) -> dict[str, str]:
    """The implementation of each of ``operations_of_run`` that a run takes; see ``verify_run``."""
    kernels = {name: ops.choose("auto", device, name) for name in operations_of_run(network)}
    if implementation != "auto":
        kernels[network] = implementation
    elif kernels.get("trunk") == "cuda" and (dtype == "fp32" or width != 1):
        # of which it has no kernels
        names = ops.OPERATIONS["trunk"][1:]
        kernels["trunk"] = next(n for n in names if ops.why_not(n, device, "trunk") is None)
    return kernels


def verify_run(
    implementation: str,
    dtype: str,
    device: torch.device,
    network: str = "trunk",
    width: int = 1,
    *,
    catalogue: str = CATALOGUE,
    say: Callable[[str], None] = print,
) -> list[tuple[str, str]]:
    """Check the kernels that a run uses, if nothing is known of them; distrust those that fail.

    ``auto`` takes the next implementation of an operation from then on.

    Args:
        implementation: ``auto`` or the one that the run names
        dtype: ``fp32``, ``bf16`` or ``fp16``, of the activations
        device: where it runs
        network: as ``operations_of_run`` has it
        width: of the network; kernels are checked with the channels of width 1
        catalogue: as ``run_checks`` has it
        say: shows a line

    Returns:
        the operation and the implementation of what has failed

    Raises:
        ValueError: the implementation that the run names has failed
    """
    verdicts = Verdicts(device)
    failed: list[tuple[str, str]] = []
    while True:
        kernels = kernels_of_run(implementation, dtype, device, network, width)
        wanted = quick_checks(device, kernels, dtype)
        unknown = [check for check in wanted if verdicts.of(check.kernel) is None]
        if unknown:
            _check(unknown, verdicts, device, catalogue, say)
        known = ((check, verdicts.of(check.kernel)) for check in wanted)
        bad = {check: v.reason for check, v in known if v is not None and v.verdict == FAILED}
        if not bad:
            return failed
        for check, why in bad.items():
            reason = f"check {check.kernel!r} failed: {why}"
            if check.operation == network and implementation != "auto":
                raise ValueError(
                    f"implementation must be one whose kernels are right here, "
                    f"got {implementation}: {reason}"
                )
            ops.distrust(check.implementation, check.operation, reason)
            failed.append((check.operation, check.implementation))
            kernels = kernels_of_run(implementation, dtype, device, network, width)
            instead = kernels[check.operation]
            say(f"{check.operation} runs on {instead}, not on {check.implementation}: {reason}")


def _check(
    checks: list[Check],
    verdicts: Verdicts,
    device: torch.device,
    catalogue: str,
    say: Callable[[str], None],
) -> None:
    """Check kernels of which nothing is known, and say so in one line."""
    began = time.monotonic()
    outcomes = run_checks(checks, device, jobs=_JOBS, catalogue=catalogue)
    pairs = zip(checks, outcomes, strict=True)
    verdicts.keep({c.kernel: (o.verdict, o.reason) for c, o in pairs})
    found = {verdict: [o for o in outcomes if o.verdict == verdict] for verdict in (OK, FAILED)}
    parts = [f"{len(group)} {verdict}" for verdict, group in found.items() if group]
    parts += [f"{o.name} not possible: {o.reason}" for o in outcomes if o.verdict == NOT_POSSIBLE]
    kept = "" if verdicts.why_not_kept is None else f"; not kept: {verdicts.why_not_kept}"
    names = ", ".join(f"{check.operation} on {check.implementation}" for check in checks)
    say(
        f"kernels checked, for the first time on this card and build: {names}: "
        f"{', '.join(parts)} in {time.monotonic() - began:.1f} s{kept}"
    )
