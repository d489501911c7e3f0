"""Data of a user's own, a dozen pictures of coloured squares: COCO, VOC and YOLO boxes, masks in every form, cards."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("egg", "nest")
COLOURS = ((230, 60, 40), (40, 70, 220))
WIDTH, HEIGHT = 80, 64
Square = tuple[int, int, int, int, int]  # class, left, top, width, height


def draw_squares(folder: Path, count: int, *, seed: int) -> dict[str, list[Square]]:
    """`count` JPEGs of one to three squares each; by file name what is on them."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[Square]] = {}
    for number in range(count):
        pixels = generator.integers(90, 160, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        squares = []
        for _ in range(int(generator.integers(1, 4))):
            kind, side = int(generator.integers(2)), int(generator.integers(12, 28))
            left, top = int(generator.integers(0, WIDTH - side)), int(generator.integers(0, HEIGHT - side))
            pixels[top : top + side, left : left + side] = COLOURS[kind]
            squares.append((kind, left, top, side, side))
        name = f"{seed}_{number:03d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=95)
        drawn[name] = squares
    return drawn


def coco_file(
    drawn: dict[str, list[Square]], *, form: str = "polygon", ids: tuple[int, ...] = (0, 7)
) -> dict[str, Any]:
    """A COCO file with category ids that have a gap and begin with 0; masks as `polygon`, `rle` or `none`."""
    images, annotations = [], []
    for number, (name, squares) in enumerate(drawn.items()):
        images.append({"id": 10 * number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for kind, left, top, width, height in squares:
            one: dict[str, Any] = {
                "id": len(annotations) + 5, "image_id": 10 * number, "category_id": ids[kind], "iscrowd": 0,
                "bbox": [left, top, width, height], "area": width * height,
            }  # fmt: skip
            right, bottom = left + width, top + height
            if form == "polygon":
                one["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
            elif form == "rle":
                one["segmentation"] = run_lengths(left, top, width, height)
            annotations.append(one)
    annotations.reverse()  # out of order
    categories = [{"id": one, "name": name} for one, name in zip(ids, NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def run_lengths(left: int, top: int, width: int, height: int) -> dict[str, Any]:
    """COCO's uncompressed run lengths of a box, column by column."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [0, *counts] if flat[0] else counts}


def write_coco(folder: Path, *, form: str = "polygon", count: int = 6, **more: Any) -> Path:
    for role, seed in (("train", 1), ("val", 2)):
        drawn = draw_squares(folder / "images", count, seed=seed)
        (folder / f"{role}.json").write_text(json.dumps(coco_file(drawn, form=form, **more)))
    return write_card(
        folder,
        '[detection]\ntrain = { images = "images", annotations = "train.json" }\n'
        'val = { images = "images", annotations = "val.json" }\n',
    )


def write_voc(folder: Path, *, flags: str = "", count: int = 6) -> Path:
    for role, seed in (("train", 1), ("val", 2)):
        drawn = draw_squares(folder / "JPEGImages", count, seed=seed)
        (folder / "Annotations").mkdir(exist_ok=True)
        for name, squares in drawn.items():
            objects = "".join(
                f"<object><name>{NAMES[kind]}</name>{flags}<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for kind, x, y, w, h in squares
            )
            size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
            path = folder / "Annotations" / f"{Path(name).stem}.xml"
            path.write_text(f"<annotation>{size}{objects}</annotation>")
        lists = folder / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        # As editors of other systems write them.
        (lists / f"{role}.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(Path(n).stem for n in drawn).encode())
    split = 'images = "JPEGImages", annotations = "Annotations", list = "ImageSets/Main/{}.txt"'
    train, val = (split.format(role) for role in ("train", "val"))
    return write_card(folder, f'[detection]\nformat = "voc"\ntrain = {{ {train} }}\nval = {{ {val} }}\n')


def write_yolo(folder: Path, *, count: int = 6) -> Path:
    for role, seed in (("train", 1), ("val", 2)):
        drawn = draw_squares(folder / "images" / role, count, seed=seed)
        (folder / "labels" / role).mkdir(parents=True, exist_ok=True)
        for name, squares in drawn.items():
            lines = [
                f"{kind} {(x + w / 2) / WIDTH:.6f} {(y + h / 2) / HEIGHT:.6f} {w / WIDTH:.6f} {h / HEIGHT:.6f}"
                for kind, x, y, w, h in squares
            ]
            (folder / "labels" / role / f"{Path(name).stem}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: egg\n  1: nest\n")
    return write_card(
        folder, '[detection]\nformat = "yolo"\ntrain = { images = "images/train" }\nval = { images = "images/val" }\n'
    )


def write_masks(folder: Path, *, form: str = "index", count: int = 6) -> Path:
    """Earth, egg, nest: as `index`, `palette`, `rgb`, `gaps` (a table of values) or `zero` (value 0 is no class)."""
    for role, seed in (("train", 1), ("val", 2)):
        drawn = draw_squares(folder / "images" / role, count, seed=seed)
        (folder / "masks" / role).mkdir(parents=True, exist_ok=True)
        for name, squares in drawn.items():
            labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
            for kind, x, y, w, h in squares:
                labels[y : y + h, x : x + w] = kind + 1
            labels[0, :] = 255
            save_mask(labels, folder / "masks" / role / f"{Path(name).stem}_mask.png", form)
    classes = {
        "index": 'classes = ["earth", "egg", "nest"]',
        "palette": 'classes = ["earth", "egg", "nest"]',
        "rgb": 'classes = { "#000000" = "earth", "#e63c28" = "egg", "#2846dc" = "nest" }',
        "gaps": 'classes = { 0 = "earth", 10 = "egg", 20 = "nest" }',
        "zero": 'classes = ["egg", "nest"]\nreduce_zero_label = true',
    }[form]
    splits = "\n".join(f'{r} = {{ images = "images/{r}", masks = "masks/{r}" }}' for r in ("train", "val"))
    return write_card(folder, f'[segmentation]\n{splits}\n{classes}\nmask_suffix = "_mask"\n')


def save_mask(labels: np.ndarray, path: Path, form: str) -> None:
    image = Image.fromarray(labels)
    if form == "palette":
        image.putpalette([0, 0, 0, *COLOURS[0], *COLOURS[1]] + [0, 0, 0] * 253)
    elif form == "rgb":
        colours = np.zeros((256, 3), dtype=np.uint8)
        colours[1], colours[2], colours[255] = *COLOURS, (255, 255, 255)
        image = Image.fromarray(colours[labels])
    elif form == "gaps":
        image = Image.fromarray(np.where(labels == 255, 255, labels * 10).astype(np.uint8))
    image.save(path)


def write_classes(folder: Path, *, count: int = 12) -> Path:
    for role, seed in (("train", 1), ("val", 2)):
        for kind, name in enumerate(NAMES):
            (folder / role / name).mkdir(parents=True, exist_ok=True)
            generator = np.random.default_rng([seed, kind])
            for number in range(count):
                pixels = (np.array(COLOURS[kind]) + generator.integers(-30, 30, (40, 48, 3))).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / role / name / f"{number}.png")
    return write_card(folder, '[classification]\ntrain = "train"\nval = "val"\n')


def write_tables(
    folder: Path, *, form: str = "parquet", count: int = 12, columns: tuple[str, str] = ("image", "label")
) -> Path:
    """The images of `write_classes` as `parquet`, as `tar` shards, or as `arrow`: a data set that was saved to disk."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as Picture

    write_classes(folder / "as-folders", count=count)
    splits = {}
    for role in ("train", "val"):
        files = sorted((folder / "as-folders" / role).glob("*/*.png"))
        data, labels = [file.read_bytes() for file in files], [NAMES.index(file.parent.name) for file in files]
        image, label = columns
        features = Features({image: Picture(), label: ClassLabel(names=list(NAMES))})
        splits[role] = Dataset.from_dict({image: [{"bytes": one} for one in data], label: labels}, features)
        if form == "tar":
            write_shard(folder / f"{role}.tar", data, labels)
        elif form == "parquet":
            splits[role].to_parquet(folder / f"{role}.parquet")
    if form == "arrow":
        DatasetDict(splits).save_to_disk(folder / "saved")
    shutil.rmtree(folder / "as-folders")
    place = {"arrow": "saved/{}", "tar": "{}.tar", "parquet": "{}.parquet"}[form]
    columns = 'image_column = "png"\nlabel_column = "cls"\n' if form == "tar" else ""
    lines = "".join(f'{role} = "{place.format(role)}"\n' for role in splits)
    return write_card(folder, f"[classification]\n{lines}{columns}")


def write_shard(path: Path, data: list[bytes], labels: list[int]) -> None:
    """A tar shard as webdataset has them: `000.png` and `000.cls` of each image."""
    with tarfile.open(path, "w") as shard:
        for number, (png, label) in enumerate(zip(data, labels, strict=True)):
            for ending, content in (("png", png), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def write_card(folder: Path, text: str, *, name: str = "nests") -> Path:
    path = folder / "card.toml"
    path.write_text(f'name = "{name}"\n{text}')
    return path
