"""Protocols that read a frozen backbone's features and train at most a linear layer: minutes, for ResNets and ViTs."""

from twist.transfer.engines import Engine

ENGINE = Engine(
    name="frozen",
    module="twist.transfer.engines.frozen.engine",
    configs="frozen",
    target=None,
    packages=("torch", "sklearn"),
)
