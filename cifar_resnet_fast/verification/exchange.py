"""Processes that sum a tensor, on GPUs captured in a CUDA graph (layer 4).

``torchrun --nproc-per-node 2 -m cifar_resnet_fast.verification.exchange cuda`` ends with status 0
if every process got the sum each of ten times, else with a line on stderr.
"""

import sys

import torch

from cifar_resnet_fast.processes import Processes
from cifar_resnet_fast.training.capture import capture_for

TIMES = 10


def main(device: str) -> int:
    processes = Processes(device, timeout=60.0)
    own = torch.full((1000,), float(processes.rank + 1), device=processes.device)
    summed = torch.zeros_like(own)

    def exchange() -> None:
        summed.copy_(own)
        processes.all_reduce(summed)

    capture = capture_for(processes.device)
    replay = exchange if capture is None else capture(exchange, exchange)
    wrong = 0
    for _ in range(TIMES):
        summed.zero_()
        replay()
        processes.wait()  # with a limit, unlike reading the sum
        wrong += not bool((summed == processes.count * (processes.count + 1) / 2).all())
    del replay, capture  # the group must outlive no graph that holds its all-reduce
    processes.leave()
    if wrong:
        print(f"{wrong} of {TIMES} sums are wrong", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
