"""Semantic segmentation by real MMSegmentation."""

from twist.transfer.engines import Engine

ENGINE = Engine(
    name="mmseg",
    title="MMSegmentation",
    module="twist.transfer.engines.mmseg.engine",
    configs="mmseg",
    target="mmseg",
    packages=("mmseg",),
    install='pip install "twist-suite[transfer]"',
)
