"""Fine-tune a trained network on other classes: python examples/fine_tuning.py [WEIGHTS]

All but the last stage and the last layer are frozen, with their normalisations in evaluation, and
a hook watches an inner activation. WEIGHTS is anything that ``FastResNet.from_pretrained`` takes,
such as a run's folder; without it the network starts from random weights, which only shows how.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from cifar_resnet_fast import FastResNet
from cifar_resnet_fast.data.datasets import load_dataset

TRAINED = ("layer3", "linear")  # the other parts stay as they are


def freeze(model: FastResNet) -> None:
    """Train mode for the trained parts alone; the others keep weights and statistics."""
    model.train()
    for name, part in model.named_children():
        if name not in TRAINED:
            part.requires_grad_(False).eval()


def main(weights: str | None = None, images: int = 200, steps: int = 20) -> dict:
    """The model, the first and the last loss, and the mean activation that the hook saw."""
    torch.manual_seed(0)
    data = load_dataset("shapes", "data", limit=images)
    mean, std = data.channel_statistics()
    x = ((data.x_train / 255 - mean) / std).permute(0, 3, 1, 2)

    model = FastResNet(8) if weights is None else FastResNet.from_pretrained(weights)
    model.linear = nn.Linear(model.linear.in_features, len(data.classes))  # new classes
    freeze(model)

    # modules with hooks are called as the modules that they are, in plain PyTorch
    seen = []
    handle = model.layer2.register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach().mean().item())
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    losses = []
    for step in range(steps):
        rows = torch.arange(20 * step, 20 * step + 20) % len(x)
        loss = F.cross_entropy(model(x[rows]), data.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    handle.remove()
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; activations of layer2 {seen[-1]:.3f}")
    return {"model": model, "losses": losses, "seen": seen}


if __name__ == "__main__":
    main(*sys.argv[1:])
