"""The four public data sets in their exact on-disk layouts, a few images each, drawn from a seed.

Not the sample of `twist data sample`: these have the real class lists (COCO's 80 ids, VOC's 20 names, Cityscapes'
labels), so that the full protocols read them as they read the originals.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# Category ids of COCO 2017: 80 of 1 … 90.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
COCO_NAMES = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
]  # fmt: skip
VOC_NAMES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
WIDTH, HEIGHT = 96, 72
Box = tuple[int, int, int, int]


def draw(seed: int, boxes: list[Box], size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Noise with a bright rectangle in every box."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=(255, 80 * number % 255, 40))
    return image


def boxes_of(seed: int, count: int = 2, size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[Box]:
    rng = np.random.default_rng(1000 + seed)
    found = []
    for _ in range(count):
        width, height = int(rng.integers(24, size[0] // 2)), int(rng.integers(24, size[1] // 2 + 12))
        x, y = int(rng.integers(0, size[0] - width)), int(rng.integers(0, size[1] - height))
        found.append((x, y, x + width, y + height))
    return found


def make_coco(root: Path, *, images: int = 3) -> Path:
    """`coco/{train,val}2017` and `annotations/instances_*.json` with polygons, one crowd RLE, 80 categories."""
    for split, start in (("train", 0), ("val", 50)):
        folder = root / "coco" / f"{split}2017"
        folder.mkdir(parents=True)
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(images):
            seed = start + number
            boxes = boxes_of(seed)
            name = f"{seed + 1:012d}.jpg"
            draw(seed, boxes).save(folder / name, quality=95)
            entries.append({"id": seed + 1, "file_name": name, "width": WIDTH, "height": HEIGHT})
            for index, (x0, y0, x1, y1) in enumerate(boxes):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": seed + 1,
                        "category_id": COCO_IDS[(seed + index) % 80],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                        "iscrowd": 0,
                    }
                )
        crowd = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * 4, HEIGHT * (WIDTH - 4)]}
        annotations.append(
            {
                "id": len(annotations) + 1, "image_id": start + 1, "category_id": 1, "bbox": [0, 0, 4, HEIGHT],
                "area": 4 * HEIGHT, "segmentation": crowd, "iscrowd": 1,
            }
        )  # fmt: skip
        categories = [{"id": i, "name": name, "supercategory": "thing"} for i, name in zip(COCO_IDS, COCO_NAMES)]
        target = root / "coco" / "annotations" / f"instances_{split}2017.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))
    return root


def make_voc_detection(root: Path, *, images: int = 3) -> Path:
    """`VOC2007` and `VOC2012` with Annotations, JPEGImages, ImageSets/Main; one object is marked difficult."""
    for year, splits in ((2007, ("trainval", "test")), (2012, ("trainval",))):
        folder = root / f"VOC{year}"
        for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for index, split in enumerate(splits):
            names = []
            for number in range(images):
                seed = year + 100 * index + number
                name = f"{seed:06d}" if year == 2007 else f"2008_{seed:06d}"
                boxes = boxes_of(seed)
                draw(seed, boxes).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
                (folder / "Annotations" / f"{name}.xml").write_text(voc_xml(name, boxes, seed))
                names.append(name)
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def voc_xml(name: str, boxes: list[Box], seed: int) -> str:
    """One Annotations file: 1-based inclusive corners, as VOC has them; the second object is difficult."""
    objects = "".join(
        f"<object><name>{VOC_NAMES[(seed + i) % 20]}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>{int(i == 1 and seed % 2)}</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for i, (x0, y0, x1, y1) in enumerate(boxes)
    )
    return (
        f"<annotation><filename>{name}.jpg</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height>"
        f"<depth>3</depth></size>{objects}</annotation>"
    )


def make_voc_segmentation(root: Path, *, images: int = 3) -> Path:
    """`VOC2012` with SegmentationClass, SegmentationClassAug (palette PNGs, 255 borders), lists trainaug and val."""
    folder = root / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for split, masks in (("trainaug", "SegmentationClassAug"), ("val", "SegmentationClass")):
        names = []
        for number in range(images):
            seed = len(split) * 10 + number
            name = f"2009_{seed:06d}"
            boxes = boxes_of(seed)
            draw(seed, boxes).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            voc_mask(boxes, seed).save(folder / masks / f"{name}.png")
            names.append(name)
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def voc_mask(boxes: list[Box], seed: int) -> Image.Image:
    mask = Image.new("P", (WIDTH, HEIGHT), 0)
    mask.putpalette([value for i in range(256) for value in (i, 255 - i, (i * 7) % 256)])
    pen = ImageDraw.Draw(mask)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=1 + (seed + i) % 20, outline=255)
    return mask


def make_ade20k(root: Path, *, images: int = 3) -> Path:
    """`ADEChallengeData2016/{images,annotations}/{training,validation}`: values 1 … 150, and 0 for other objects."""
    for split, short, start in (("training", "train", 0), ("validation", "val", 50)):
        pictures, masks = (root / "ADEChallengeData2016" / part / split for part in ("images", "annotations"))
        pictures.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(images):
            boxes, name = boxes_of(start + number), f"ADE_{short}_{number + 1:08d}"
            draw(start + number, boxes).save(pictures / f"{name}.jpg", quality=95)
            mask = Image.new("L", (WIDTH, HEIGHT), 0)
            for index, (x0, y0, x1, y1) in enumerate(boxes):
                ImageDraw.Draw(mask).rectangle((x0, y0, x1 - 1, y1 - 1), fill=(1, 150, 77)[(number + index) % 3])
            mask.save(masks / f"{name}.png")
    return root


def make_cityscapes(root: Path, *, images: int = 2, size: tuple[int, int] = (128, 64)) -> Path:
    """`cityscapes/leftImg8bit` and `gtFine` (polygons, instanceIds, labelIds, labelTrainIds): road, and cars on it."""
    from cityscapesscripts.helpers.labels import name2label

    road, car = name2label["road"], name2label["car"]
    for split, city, start in (("train", "aachen", 0), ("val", "frankfurt", 50)):
        left = root / "cityscapes" / "leftImg8bit" / split / city
        truth = root / "cityscapes" / "gtFine" / split / city
        left.mkdir(parents=True)
        truth.mkdir(parents=True)
        for number in range(images):
            stem = f"{city}_{number:06d}_000019"
            boxes = boxes_of(start + number, size=size)
            draw(start + number, boxes, size).save(left / f"{stem}_leftImg8bit.png")
            objects = [{"label": "road", "polygon": [[0, 0], [size[0], 0], [size[0], size[1]], [0, size[1]]]}]
            labels, instances = Image.new("L", size, road.id), Image.new("I;16", size, road.id)
            train_ids = Image.new("L", size, road.trainId)
            for i, (x0, y0, x1, y1) in enumerate(boxes):
                objects.append({"label": "car", "polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]})
                corners = (x0, y0, x1 - 1, y1 - 1)
                ImageDraw.Draw(labels).rectangle(corners, fill=car.id)
                ImageDraw.Draw(train_ids).rectangle(corners, fill=car.trainId)
                ImageDraw.Draw(instances).rectangle(corners, fill=car.id * 1000 + i)
            polygons = {"imgWidth": size[0], "imgHeight": size[1], "objects": objects}
            (truth / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
            labels.save(truth / f"{stem}_gtFine_labelIds.png")
            train_ids.save(truth / f"{stem}_gtFine_labelTrainIds.png")
            instances.save(truth / f"{stem}_gtFine_instanceIds.png")
    return root
