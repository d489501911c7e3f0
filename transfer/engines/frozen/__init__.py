"""Protocols that read a frozen backbone's features and train at most a linear layer: minutes, for ResNets and ViTs."""

from twist.transfer.engines import Engine

ENGINE = Engine("frozen", target=None, packages=("torch", "sklearn"))
