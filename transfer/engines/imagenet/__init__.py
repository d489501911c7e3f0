"""ImageNet-style classification and clustering, in plain torch."""

from twist.transfer.engines import Engine

ENGINE = Engine("imagenet", target=None, packages=("torch", "torchvision"))
