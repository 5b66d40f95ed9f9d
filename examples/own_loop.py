"""A training loop of your own around FastResNet: python examples/own_loop.py

Any optimiser, schedule, loss and augmentation will do, because the network is an ordinary
``nn.Module``. The data here are the drawn shapes, which need no download; load_dataset("cifar10",
"data") downloads CIFAR-10.
"""

import torch
import torch.nn.functional as F

from cifar_resnet_fast import FastResNet
from cifar_resnet_fast.data.datasets import load_dataset


def main(depth: int = 8, images: int = 2000, epochs: int = 3, batch_size: int = 50) -> list[float]:
    """The mean training loss of each epoch."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # on a GPU the fastest kernels take images of 16 bits; the weights stay in float32
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    data = load_dataset("shapes", "data", limit=images)
    mean, std = (values.to(device) for values in data.channel_statistics())
    x, y = data.x_train.to(device), data.y_train.to(device)

    model = FastResNet(depth, num_classes=len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=epochs * (len(x) // batch_size)
    )
    losses = []
    for epoch in range(epochs):
        model.train()
        total = torch.zeros((), device=device)
        order = torch.randperm(len(x), device=device)
        batches = order[: len(x) // batch_size * batch_size].split(batch_size)
        for rows in batches:
            # bytes [N, 32, 32, 3] to normalised images [N, 3, 32, 32], channels-last
            batch = ((x[rows] / 255 - mean) / std).to(dtype).permute(0, 3, 1, 2)
            loss = F.cross_entropy(model(batch), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()  # no .item() here: the host need not wait for the GPU
        losses.append(total.item() / len(batches))
        print(f"epoch {epoch + 1}/{epochs}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
