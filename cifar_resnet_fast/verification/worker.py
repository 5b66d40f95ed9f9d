"""The process that checks run in: ``python -m cifar_resnet_fast.verification.worker`` (layer 4).

Started by ``runner.py`` alone. Names of checks come in on stdin, a line each; a line of JSON for
each goes out on a pipe, after a first one that says that the process is ready.
"""

import importlib
import json
import os
import sys
import traceback

import torch

from cifar_resnet_fast.errors import first_line, is_out_of_memory
from cifar_resnet_fast.verification.budget import Unavailable, WrongResult
from cifar_resnet_fast.verification.checks import Check
from cifar_resnet_fast.verification.verdicts import FAILED, NOT_POSSIBLE, OK


def outcome_of(check: Check, device: torch.device) -> dict:
    """Run a check: verdict, reason, data, and whether the process is to end after it.

    After an error of CUDA nothing more can be done in the same process, and which error is one of
    CUDA's cannot be told for certain: every unexpected error is the process's last.
    """
    verdict, reason, data, last = OK, "", {}, False
    try:
        found = check.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if isinstance(found, dict):
            data = found
        elif found:
            reason = found
    except Unavailable as error:
        verdict, reason = NOT_POSSIBLE, first_line(error)
    except WrongResult as error:
        verdict, reason = FAILED, f"wrong result: {first_line(error)}"
    except Exception as error:
        last = True
        if is_out_of_memory(error):
            verdict, reason = NOT_POSSIBLE, "out of memory"
        else:
            verdict, data = FAILED, {"traceback": traceback.format_exc()}
            reason = f"error: {type(error).__name__}: {first_line(error)}"
    return {"verdict": verdict, "reason": reason, "data": data, "last": last}


def main(catalogue: str, device_name: str, pipe: str) -> None:
    device = torch.device(device_name)
    with os.fdopen(int(pipe), "w", buffering=1) as answers:
        checks = {c.name: c for c in importlib.import_module(catalogue).catalogue(device)}
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # which takes no device without an index
            torch.cuda.synchronize(device)
        answers.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            outcome = outcome_of(checks[line.rstrip("\n")], device)
            answers.write(json.dumps(outcome) + "\n")
            if outcome["last"]:
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
