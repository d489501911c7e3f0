"""Detection and instance segmentation by real Detectron2."""

from twist.transfer.engines import Engine

ENGINE = Engine(
    name="detectron2",
    module="twist.transfer.engines.detectron2.engine",
    predict="twist.transfer.engines.detectron2.predict",
    configs="detectron2",
    target="detectron2",
    packages=("detectron2", "pycocotools", "faster_coco_eval"),
)
