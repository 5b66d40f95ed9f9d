"""A process that runs cases of cases.py on compiled code, one a line of its input.

It is apart from the tests' own because their Triton kernels are interpreted, which Triton decides
when it is imported; and because it gives the trunk's operations to CPU tensors.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

TESTS = Path(__file__).parents[1]


class Worker:
    """The process, from outside.

    Args:
        architecture: compute capability that the code is compiled for
    """

    def __init__(self, architecture: int):
        paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ptx.worker", str(architecture)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "0"},
        )

    def run(self, kind: str, case: str, *arguments: int) -> str | None:
        """What is wrong; None: nothing."""
        self.process.stdin.write(json.dumps([kind, case, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else f"the worker ended: {self.process.wait()}"

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    import torch

    from ptx import cases
    from ptx.triton_launch import Launches

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    answers, sys.stdout = sys.stdout, sys.stderr
    Launches(int(sys.argv[1]))
    for line in sys.stdin:
        kind, case, *arguments = json.loads(line)
        try:
            getattr(cases, kind)[case](*arguments)
            answer = None
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
