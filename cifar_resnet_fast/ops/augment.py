"""Augmentation and normalisation of a batch of bytes (layer 1).

Twins: ``reference.augment`` and ``reference.normalize``, which are all there is so far.
"""

from cifar_resnet_fast.reference import augment, normalize

__all__ = ["augment", "normalize"]
