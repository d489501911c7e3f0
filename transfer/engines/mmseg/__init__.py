"""Semantic segmentation by real MMSegmentation."""

from twist.transfer.engines import Engine

ENGINE = Engine(
    name="mmseg",
    module="twist.transfer.engines.mmseg.engine",
    predict="twist.transfer.engines.mmseg.predict",
    configs="mmseg",
    target="mmseg",
    packages=("mmseg", "mmcv", "mmengine"),
)
