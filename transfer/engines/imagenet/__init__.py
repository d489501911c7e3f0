"""ImageNet-style classification and clustering, in plain torch."""

from twist.transfer.engines import Engine

ENGINE = Engine(
    name="imagenet",
    module="twist.transfer.engines.imagenet.engine",
    predict="twist.transfer.engines.imagenet.predict",
    configs="imagenet",
    target=None,
    packages=("torch", "torchvision"),
)
