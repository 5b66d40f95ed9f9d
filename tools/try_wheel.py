"""Whether an installed wheel does what it should: ``python tools/try_wheel.py``.

Both libraries are in it and, unless PyTorch has no CUDA or one of another major version, loaded;
their code for the CPU computes what the specification does; and a network trains a step.
"""

import torch

from cifar_resnet_fast import FastResNet, ops, reference


def main() -> None:
    assert ops.BUILD_INFO["built"] == ["_C", "_cuda"], ops.BUILD_INFO
    assert ops.WHY_NOT_LOADED["_C"] is None, ops.WHY_NOT_LOADED
    major = (torch.version.cuda or "without").split(".")[0]
    if major == ops.BUILD_INFO["cuda"].split(".")[0]:
        assert ops.WHY_NOT_LOADED["_cuda"] is None, ops.WHY_NOT_LOADED
    x = torch.randn(3, 16, 9, 8).to(memory_format=torch.channels_last)
    ours = ops.shortcut_a(x, 32, implementation="cuda")
    assert torch.equal(ours, reference.shortcut_a(x, 32))
    model = FastResNet(8)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    print(f"the wheel works with torch {torch.__version__}: {ops.WHY_NOT_LOADED}")


if __name__ == "__main__":
    main()
