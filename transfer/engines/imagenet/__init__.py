"""ImageNet-style classification and clustering, in plain torch: the engine's row, and how a request reaches it."""

from __future__ import annotations

from typing import Any

from twist.contracts.errors import UserError
from twist.transfer.engines import Engine
from twist.transfer.request import Request, Result, Weights

ENGINE = Engine(
    name="imagenet",
    module="twist.transfer.engines.imagenet",
    configs="imagenet",
    target=None,
    packages=("torch", "torchvision"),
)


def resolve(request: Request, weights: Weights) -> Any:
    """Recipe, images and plan of `request`; nothing is built and nothing is written."""
    from twist.transfer.engines.imagenet import engine

    if request.controls.iterations or request.controls.nodes > 1:
        name = request.protocol.name
        raise UserError(f"{name} is counted in epochs on one machine: iterations and nodes are no keys of it.")
    return engine.resolve(
        request.protocol,
        weights.header,
        data=request.data,
        overrides=request.overrides,
        gpus=request.gpus,
        eval_only=request.eval_only,
    )


def run(request: Request, weights: Weights, resolved: Any) -> Result:
    """Measure `weights` by `resolved`; files go to `request.output`."""
    from twist.transfer.engines.imagenet import engine

    assert weights.tensors is not None
    return engine.run(resolved, weights.tensors, seed=request.seed, output=request.output, resume=request.resume)
