"""3x3 convolution, batch normalisation, optional shortcut and ReLU as one operation (layer 1).

Twin: ``reference.conv_bn_relu``, which has the symbol table.
"""

from torch import Tensor

from cifar_resnet_fast import reference
from cifar_resnet_fast.ops.checks import check_shape, check_stride, check_tensor
from cifar_resnet_fast.ops.choice import choose


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    stride: int = 1,
    shortcut: Tensor | None = None,
    relu: bool = True,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> Tensor:
    """``relu(batch_norm(conv3x3(x)) + shortcut)``; see ``reference.conv_bn_relu``.

    Differentiable in x, weight, bn_weight, bn_bias and shortcut. Updates running_mean and
    running_var in place when ``training``.

    Args:
        x: [N, C, H, W]
        weight: [K, C, 3, 3]
        bn_weight, bn_bias, running_mean, running_var: [K]
        stride: 1 or 2
        shortcut: [N, K, ceil(H / stride), ceil(W / stride)] or None
        relu, training, momentum, eps: as in the reference
        implementation: ``auto`` or one of ``ops.IMPLEMENTATIONS``

    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)]

    Raises:
        TypeError: an argument is not a floating tensor
        ValueError: a shape, a device or the stride breaks its rule; or, in training, one value
            a channel is all there is to normalise
        RuntimeError: the named implementation cannot run here
    """
    check_stride(stride)
    check_tensor("x", x, "N C H W")
    check_tensor("weight", weight, "K C 3 3", like=x)
    N, C, H, W = x.shape
    K = weight.shape[0]
    check_shape("weight", weight, (K, C, 3, 3))
    for name, vector in (
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        check_tensor(name, vector, "K", like=x)
        check_shape(name, vector, (K,))
    if shortcut is not None:
        check_tensor("shortcut", shortcut, "N K H W", like=x)
        check_shape("shortcut", shortcut, (N, K, -(-H // stride), -(-W // stride)))
    choose(implementation, x.device, "conv_bn_relu")
    return reference.conv_bn_relu(
        x,
        weight,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        stride=stride,
        shortcut=shortcut,
        relu=relu,
        training=training,
        momentum=momentum,
        eps=eps,
    )
