"""Entry points of ``torch.hub.load``."""

dependencies = ["torch", "numpy", "safetensors"]


def resnet(depth=20, **settings):
    """An untrained ``FastResNet(depth, **settings)``."""
    from cifar_resnet_fast import FastResNet

    return FastResNet(depth, **settings)


def pretrained(name, **settings):
    """``FastResNet.from_pretrained(name, **settings)``."""
    from cifar_resnet_fast import FastResNet

    return FastResNet.from_pretrained(name, **settings)
