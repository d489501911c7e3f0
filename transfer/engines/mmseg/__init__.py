"""Semantic segmentation by real MMSegmentation."""

from twist.transfer.engines import Engine

ENGINE = Engine("mmseg", target="mmseg", packages=("mmseg", "mmcv", "mmengine"))
