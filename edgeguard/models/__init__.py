"""Float models: the ResNets for 32x32 images, torchvision's classifiers and the user's own. Needs the extra [train]."""

from edgeguard.errors import require

require("torch", "train")

from edgeguard.models.load import (  # noqa: E402
    IMAGENET_MEAN,
    IMAGENET_STD,
    MODELS,
    FloatModel,
    is_code,
    load_model,
)
from edgeguard.models.resnet import ResNet, resnet8, resnet20, resnet32, resnet44, resnet56  # noqa: E402
from edgeguard.models.weights import apply_weights, read_weights  # noqa: E402

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MODELS",
    "FloatModel",
    "ResNet",
    "apply_weights",
    "is_code",
    "load_model",
    "read_weights",
    "resnet8",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
]
