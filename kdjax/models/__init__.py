"""Small reference vision networks in Flax Linen, without weights.

All take ``num_classes`` first, are called with ``(x, train=False)`` and return logits. Names of
submodules are the same in every family, so that taps are obvious:

- ``stem``: what comes before the first stage;
- ``stage1``, ``stage2``, ... with ``stage1/block0``, ``stage1/block1``, ... inside;
- ``pool``: the features that the classifier reads, [B, D];
- ``classifier``: the last linear layer.

Parameters are float32; mixed precision is the adapter's ``dtype`` argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import flax.linen as nn

from kdjax.models.bottleneck_resnet import BottleneckResNet, resnet34, resnet50
from kdjax.models.convnet import ConvNet
from kdjax.models.mlp import MLP
from kdjax.models.mobilenetv2 import MobileNetV2, mobilenetv2_half
from kdjax.models.pooled_convnet import PooledConvNet
from kdjax.models.resnet import (
    ResNet,
    cifar_resnet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet18,
    resnet20,
    resnet32,
    resnet32x4,
    resnet56,
    resnet110,
)
from kdjax.models.shufflenet import ShuffleNet, shufflenetv1, shufflenetv2
from kdjax.models.vgg import VGG, vgg8, vgg13
from kdjax.models.vit import ViT, deit_small, deit_tiny
from kdjax.models.wide_resnet import (
    PreActResNet,
    preact_resnet18,
    wrn,
    wrn_16_1,
    wrn_16_2,
    wrn_40_1,
    wrn_40_2,
)

# The names the command line accepts.
BY_NAME: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "mlp": MLP,
        "mlp_small": lambda num_classes: MLP(num_classes, features=(64,)),
        "convnet": ConvNet,
        "convnet_small": lambda num_classes: ConvNet(num_classes, widths=(8, 16)),
        "pooled_convnet": lambda num_classes: PooledConvNet(num_classes),
        "resnet8": resnet8,
        "resnet14": resnet14,
        "resnet20": resnet20,
        "resnet32": resnet32,
        "resnet56": resnet56,
        "resnet110": resnet110,
        "resnet8x4": resnet8x4,
        "resnet32x4": resnet32x4,
        "resnet18": resnet18,
        "resnet34": resnet34,
        "resnet50": resnet50,
        "preact_resnet18": preact_resnet18,
        "wrn_16_1": wrn_16_1,
        "wrn_16_2": wrn_16_2,
        "wrn_40_1": wrn_40_1,
        "wrn_40_2": wrn_40_2,
        "vgg8": vgg8,
        "vgg13": vgg13,
        "mobilenetv2": mobilenetv2_half,
        "shufflev1": shufflenetv1,
        "shufflev2": shufflenetv2,
        "vit": ViT,
    }
)

__all__ = [
    "BY_NAME",
    "MLP",
    "VGG",
    "BottleneckResNet",
    "ConvNet",
    "MobileNetV2",
    "PooledConvNet",
    "PreActResNet",
    "ResNet",
    "ShuffleNet",
    "ViT",
    "cifar_resnet",
    "deit_small",
    "deit_tiny",
    "mobilenetv2_half",
    "preact_resnet18",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet110",
    "shufflenetv1",
    "shufflenetv2",
    "vgg8",
    "vgg13",
    "wrn",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
