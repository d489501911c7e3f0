"""Detection and instance segmentation by real Detectron2."""

from twist.transfer.engines import Engine

ENGINE = Engine("detectron2", target="detectron2", packages=("detectron2", "pycocotools", "faster_coco_eval"))
