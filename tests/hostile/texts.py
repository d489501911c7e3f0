"""Text files that a user or a stranger writes: records, what run folders say of themselves, annotations, configs."""

import json
from collections.abc import Iterator
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

from cases import (
    DEEP,
    ESCAPES,
    NO_FILES,
    TINY,
    TOUCH,
    Case,
    Content,
    broken_json,
    broken_text,
    changed,
    edited,
    edits,
)
from made_records import make_record

RECORD: dict[str, Any] = make_record().model_dump(mode="json")
RECORD_FILE = "records/sample-knn/x.json"
COMPARE = ("compare", "records")
PAGE = (*COMPARE, "--format", "html", "--output", "page.html")
# A pretraining that goes on in the prepared folder.
resumed = partial(
    Case, tree="pretraining", setup=TINY, command=("pretrain", "tree/tiny.toml", "--output", "tree/run", "--resume")
)


def transfer(protocol: str, *overrides: str, data: str = "tree", output: str = "out") -> tuple[str, ...]:
    return ("transfer", protocol, *overrides, "--weights", "random", "--data", data, "--output", output)


def around(name: str) -> tuple[tuple[str, Content], ...]:
    """A FIFO and what never ends, beside the file: `fifo` and `zero`, with the ending of `name`."""
    return (f"{name}fifo.png", NO_FILES["fifo"]), (f"{name}zero.png", NO_FILES["zeros behind a link"])


def records() -> Iterator[Case]:
    case = partial(Case, file=RECORD_FILE, command=COMPARE, named=("records",))
    broken, alone = broken_json(json.dumps(RECORD)), partial(Case, file="x.json", command=("compare", "x.json"))
    yield from chain(starmap(case, broken.items()), starmap(alone, broken.items()))
    fields = ("method", "protocol", "metrics", "weights", "weights.epochs", "recipe", "notes", "hardware", "created")
    yield from starmap(case, edited(RECORD, "schema_version", "seed", *fields).items())
    impossible = edited(
        RECORD, {"seed": 10**30}, {"seed": -1}, {"seed": True}, {"seed": 1.5}, {"weights.epochs": -5},
        {"weights.epochs": 10**30}, {"wall_s": 1e300}, *({"metrics.knn_top1_percent": value} for value in
        (150.0, -1.0, 1e308, float("inf"), float("nan"))), {"metrics": {f"{ESCAPES}evil": 1.0}}, {"metrics": {}},
        {"recipe_hash": "0" * 64}, {"protocol": "../../../evil"}, {"schema_version": 1.0}, {"schema_version": True},
        {"method": "\u202e\u2066evil"}, {"method": ""}, {f"evil{ESCAPES}": 1},
    )  # fmt: skip
    yield from starmap(partial(case, refused=True), impossible.items())
    other = changed(RECORD, {"method": "moco-v2", "weights.sha256": "1" * 64})
    others = ("records/sample-knn/y.json", other), ("records/sample-knn/z.json", changed(RECORD, {"seed": 1}))
    rare = edited(
        RECORD, {"notes": ["x"] * 100_000}, {"recipe": {f"k{i}": i for i in range(200_000)}, "recipe_hash": ""},
        {"recipe": DEEP, "recipe_hash": ""}, {"wall_s": 0}, {"weights.name": ESCAPES},
        {"weights.architecture": ESCAPES}, {"weights.architecture": "\ud800"}, {"git_commit": "\ud800"},
        {"data": ESCAPES},
    )  # fmt: skip
    for command in (COMPARE, PAGE, (*COMPARE, "--format", "json")):
        yield from starmap(partial(case, command=command, others=others), rare.items())
    pictures = ("../../../../etc/passwd", "/etc/passwd", "fifo.png", "zero.png", "gone.png", "a\0b.png", "\ud800.png",
                "x" * 5000 + ".png")  # fmt: skip
    curves = ("../../etc/passwd", "fifo.png", "zero.png", "a\0b", ".")
    beside = edited(RECORD, *({"media": [name]} for name in pictures), *({"curves": name} for name in curves))
    page = partial(case, command=PAGE, refused=True, named=("png", "curves", "records"))
    yield from starmap(partial(page, others=around("records/sample-knn/")), beside.items())


def pages_of_curves() -> Iterator[Case]:
    """metrics.jsonl of a pretraining run: for a page, and where the run goes on."""
    row = '{"step": 1, "epoch": 0, "stage": "mutual_information", "total": 1.5}\n'
    page = partial(Case, command=(*PAGE, "--pretrain-run", "run"))
    others: tuple[tuple[str, Content], ...] = ((RECORD_FILE, json.dumps(RECORD)),)
    lines: dict[str, Content] = {
        **broken_json(row),
        "an unfinished line": row + row[:20],
        "a line of 64 MiB": row + '{"step": 2, "a": "' + "x" * 2**26 + '"}\n',
        "200,000 lines": row * 200_000,
        "no step": '{"epoch": 1}\n' + row,
        "infinite": '{"step": 1e999, "total": -1e999}\n' + row,
        "a stage that ends the script": '{"step": 1, "stage": "</script><script>alert(1)</script>"}\n' + row * 2,
        "two values in a line": row.strip() + row,
    }
    first = edited(json.loads(row), "step")
    staged = edited(json.loads(row), {"stage": {"a": 1}}, {"stage": "\ud800"}, {"total": True})
    lines |= {name: f"{content}\n{row}" for name, content in (first | staged).items()}
    for name, content in lines.items():
        content = content + "\n" if isinstance(content, str) and not content.endswith("\n") else content
        yield page(name, content, "run/metrics.jsonl", others=others)
        yield resumed(name, content, "tree/run/metrics.jsonl")
    evaluated = (*others, ("run/metrics.jsonl", row))
    evaluation = partial(page, file="run/online_eval.jsonl", others=evaluated)
    yield from starmap(evaluation, broken_json('{"epoch": 0, "knn_top1_percent": 5.0}\n').items())


def run_accounts() -> Iterator[Case]:
    """run.json of a protocol's run, which decides whose folder it is."""
    good = {
        "protocol": "sample-knn", "seed": 0, "state": "done", "data": "sample of shapes, tiny, seed 0, format 2",
        "weights": {"name": "random", "sha256": None, "architecture": "resnet18", "width": 1},
    }  # fmt: skip
    command = (*transfer("sample-knn", data="tree/data", output="tree/run"), "--resume")
    case = partial(Case, file="tree/run/run.json", command=command, tree="knn", named=("tree/run",))
    changes = edited(good, "state", "record", "weights", "recipe", "seed", "data", "protocol", {"recipe": [[1], [2]]})
    yield from starmap(case, (broken_json(json.dumps(good)) | changes).items())


def manifests() -> Iterator[Case]:
    """What stands beside a pretraining's state, and the config of its folder."""

    def without_older(path: Path, _: bytes) -> None:
        for manifest in sorted(path.parent.glob("step_*.json"))[:-1]:  # no state is left to fall back to
            manifest.unlink()
            manifest.with_suffix(".pt").unlink()

    def with_changes(changes: dict[str, Any]) -> Content:
        return lambda path, before: path.write_text(changed(json.loads(before), changes))

    last = "tree/run/checkpoints/step_00000020"
    case = partial(resumed, file=f"{last}.json", named=("checkpoints",), others=((f"{last}.older", without_older),))
    yield from starmap(case, broken_json('{"position": {"steps": 20, "epoch": 2}, "format_version": 1}').items())
    for name, changes in edits(
        "position", "position.steps", "format_version", {"position.epoch": 1}, {"position.epoch": 10**9},
        {"position.samples": 10**9}, {"position.samples": -4}, {"images": 41}, {"evil": 1}, {"bytes": True},
        {"sha256": 5},
    ):  # fmt: skip
        yield case(name, with_changes(changes), refused=True)
    config = partial(resumed, file="tree/run/config.json", named=("tree/run",))
    yield from starmap(config, broken_json('{"run": {"epochs": 2}}').items())


# --- annotations ------------------------------------------------------------------------------------------------------


def coco_files() -> Iterator[Case]:
    image = {"id": 1, "file_name": "000000000001.jpg", "width": 64, "height": 64}
    box: dict[str, Any] = {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0,
        "segmentation": [[1, 1, 9, 1, 9, 9]],
    }  # fmt: skip
    good: dict[str, Any] = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    masks = ({"size": [10**6, 10**6], "counts": [0, 10**12]}, {"size": [9, 9], "counts": "\ud800evil"})
    boxes = [[value] * 4 for value in (float("nan"), float("inf"), "1", 10**400)]
    changes = edited(
        good, "images", "annotations", "categories", "images.0.file_name", "images.0.width", "images.0.id",
        "annotations.0.segmentation", "annotations.0.category_id", "annotations.0.area", "categories.0.name",
        *({part: [one, one]} for part, (one,) in good.items()), *({"annotations.0.bbox": value} for value in boxes),
        {"images.0.width": 10**9, "images.0.height": 10**9}, {"annotations.0.segmentation": [[1.0] * 4_000_000]},
        *({"annotations.0.segmentation": mask, "annotations.0.iscrowd": 1} for mask in masks),
        *({"annotations.0.image_id": value} for value in ({}, "1")),
    )  # fmt: skip
    file, check = "tree/coco/annotations/instances_val2017.json", ("data", "check", "coco", "tree")
    case = partial(Case, file=file, command=check, tree="sample", named=("val2017",))
    yield from starmap(case, (broken_json(json.dumps(good)) | changes).items())


def voc_files() -> Iterator[Case]:
    corners = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    thing = f"<object><name>ring</name>{corners}</object>"
    size = "<size><width>64</width><height>64</height><depth>3</depth></size>"

    def of(text: str, head: str = "") -> str:
        return f"{head}<annotation><filename>000001.jpg</filename>{text}</annotation>"

    good = of(size + thing)
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    contents: dict[str, Content] = {
        **broken_text(good),
        **{f"the encoding {name[:9]}": f'<?xml version="1.0" encoding="{name}"?>{good}'
           for name in ("evil", "utf-7", "shift_jis", "zlib_codec", "x" * 10_000, "a\0b")},
        **{f"a width of {number[:9]}": of(f"<size><width>{number}</width><height>1</height></size>{thing}")
           for number in ("9" * 5000, "nan", "inf", "६४", "-1")},
        **{f"a corner of {number[:9]}": good.replace("<xmax>9<", f"<xmax>{number}<")
           for number in ("nan", "inf", "9" * 400)},
        "a billion laughs": of("&l9;", f'<!DOCTYPE a [<!ENTITY l0 "lol">{laughs}]>'),
        "a long entity": of("&l;" * 10_000, f'<!DOCTYPE a [<!ENTITY l "{"x" * 100_000}">]>'),
        "a file of the machine": of("<name>&f;</name>", '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]>'),
        "a device of the machine": '<!DOCTYPE a SYSTEM "file:///dev/zero">' + good,
        "100,000 levels": "<a>" * 100_000 + "</a>" * 100_000,
        "500,000 objects": of(size + "<object/>" * 500_000),
        "a class of escape sequences": good.replace("ring", "&#x9b;2J"),
        "a class of a megabyte": good.replace("ring", "x" * 2**20),
        "10,000 attributes": "<annotation " + " ".join(f'a{i}="1"' for i in range(10_000)) + "/>",
        "no annotation": "<html><body>Sign in</body></html>",
        "two roots": good + good,
    }  # fmt: skip
    file, check = "tree/VOC2007/Annotations/000001.xml", ("data", "check", "voc", "tree")
    yield from starmap(
        partial(Case, file=file, command=check, tree="sample", named=("000001", "Annotations")), contents.items()
    )


def lists_of_names() -> Iterator[Case]:
    """The lists of VOC and of ImageNet's labelled subsets, and Cityscapes' polygons."""
    names: dict[str, Content] = {
        **broken_text("300002\n300003\n"),
        "names above": "../../../../etc/passwd\n",
        "names of the machine": "/dev/zero\n/etc/passwd\n",
        "a million names": "300002\n" * 1_000_000,
        "a name of a megabyte": "x" * 2**20 + "\n",
        "escape sequences": ESCAPES + "\n",
        "a name with NUL": "a\0b\n",
        "line separators": "300002\u2028300003\x0b300004\x1c\n",
    }
    semi = transfer("sample-semi-10pct", "labels_from=list", "epochs=1")
    for file, command, named in (
        ("VOC2012/ImageSets/Main/train.txt", ("data", "check", "voc", "tree"), ("VOC",)),
        ("imagenet/10percent.txt", semi, ()),
    ):
        yield from starmap(
            partial(Case, file=f"tree/{file}", command=command, tree="sample", named=named), names.items()
        )
    good: dict[str, Any] = {
        "imgWidth": 64, "imgHeight": 32, "objects": [{"label": "car", "polygon": [[0, 0], [9, 0], [9, 9]]}]
    }  # fmt: skip
    broken, polygons = broken_json(json.dumps(good)), edited(
        good, "imgWidth", "objects", "objects.0.polygon", "objects.0.label",
        *({"imgWidth": side, "imgHeight": side} for side in (50_000, 10**6, 10**18)),
        *({"objects.0.polygon": points} for points in ([[10**400, 0]] * 3, [[float("inf"), 0]] * 3, [[1, 2]] * 10**6)),
        {"objects.0.deleted": 1, "objects.0.label": "evil"},
    )  # fmt: skip
    file = "tree/cityscapes/gtFine/train/aachen/aachen_000001_000019_gtFine_polygons.json"
    for verb, contents in {"check": broken, "prepare": broken | polygons}.items():
        command = ("data", verb, "cityscapes", "tree")
        case = partial(Case, file=file, command=command, tree="unpainted", named=("aachen_000001", "gtFine"))
        yield from starmap(case, contents.items())


def cards() -> Iterator[Case]:
    """A data card, and what YOLO's files say beside it."""
    rows = (f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    laughs = "a0: &a0 [x, x]\n" + "".join(rows)
    card = '[detection]\nformat = "yolo"\ntrain = { images = "images/train" }\nval = { images = "images/val" }\n'
    names, line = "names:\n  0: egg\n  1: nest\n", "0 0.5 0.5 0.2 0.2\n"
    paths = ("/dev/zero", "../../../../etc", "a\\u0000b", "\\u001b[2J", "card.toml", "")
    lines = ("inf 0.5 0.5 0.2 0.2", "nan 0 0 1 1", "0 nan nan nan nan", "0 1e400 0 1 1", "9" * 5000 + " 0 0 1 1",
             "0 0.5", "x" * 2**20, ESCAPES, "-1 0 0 1 1", "0.5 0 0 1 1")  # fmt: skip
    values = ("5", "&a [*a]", "[" * 10_000, "{a: 1, 2: b}", "[[], {}]", '["\\e[2J"]',
              f'!!python/object/apply:os.system ["{TOUCH}"]')  # fmt: skip
    contents: dict[str, dict[str, Content]] = {
        "card.toml": {
            **broken_text(card),
            **{f"images {path}": card.replace("images/train", path) for path in paths},
            **{f"a format of {value}": card.replace('"yolo"', value) for value in ('"evil"', "5", '"\\u001b[2J"')},
            "classes of tables": card + "classes = [{}]\n",
            "10,000 lists": card + "classes = " + "[" * 10_000 + "]" * 10_000,
        },
        "data.yaml": {
            **broken_text(names),
            **{f"names {value[:9]}": f"names: {value}\n" for value in values},
            "a billion laughs": laughs + "names: [*a11]\n",
        },
        "labels/train/1_000.txt": {**broken_text(line), **{f"the line {text[:20]!r}": text for text in lines}},
    }  # fmt: skip
    for file, of in contents.items():
        case = partial(Case, file=f"tree/{file}", command=("data", "check", "tree"), tree="card", named=("tree",))
        yield from starmap(case, of.items())


# --- configs ----------------------------------------------------------------------------------------------------------


def configs() -> Iterator[Case]:
    good = '[data]\nroot = "nowhere"\n'
    run = ("pretrain", "x.toml", "--output", "out")
    contents: dict[str, Content] = {
        **broken_text(good),
        "10,000 lists": "a = " + "[" * 10_000 + "]" * 10_000,
        "10,000 tables": "a = " + "{a=" * 10_000 + "1" + "}" * 10_000,
        "a key of 10,000 parts": "a." * 10_000 + "a = 1",
        "a section of 10,000 parts": "[" + "a." * 10_000 + "a]",
        "10,000 digits": good + "workers = " + "9" * 10_000,
        "hexadecimal of 100,000 digits": good + "workers = 0x" + "f" * 100_000,
        "infinity": good + "bad_image_share = inf",
        "not a number": good + "bad_image_share = nan",
        "a date": "[data]\nroot = 1979-05-27",
        "data of a number": "data = 5",
        "data of tables": "[[data]]\nroot = 'a'\n[[data]]\n",
        "a root of NUL": '[data]\nroot = "a\\u0000b"',
        "a root of escape sequences": '[data]\nroot = "\\u001b[2J"',
        "a key of escape sequences": '["\\u001b[2J\\u001b]0;owned\\u0007"]\na = 1',
        "200,000 keys": "".join(f"k{i} = 1\n" for i in range(200_000)),
        "a key twice": "[data]\nroot = 'a'\nroot = 'b'",
    }
    yield from starmap(partial(Case, file="x.toml", command=run, named=("root",)), contents.items())
    values = (
        "[" * 10_000,
        "[" * 10_000 + "]" * 10_000,
        "9" * 10_000,
        "inf",
        "nan",
        "1e400",
        "1\n[run]\nevil = 1",
        ESCAPES,
    )
    keys = ("a." * 10_000 + "a=1", "data.root=\udcff\udcfe", "optim.\x1b[2J=1", "=", "data.root.evil=1",
            "data={root='x', evil=1}")  # fmt: skip
    for override in (*(f"optim.lr={value}" for value in values), *keys):
        case = partial(Case, f"override {override[:20]!r}", good, "x.toml")
        yield case(command=(*run, override), named=("optim", "data", "=", "a."))
        knn = transfer("sample-knn", override.replace("optim.lr", "temperature"))
        yield case(command=knn, tree="sample", named=("temperature", "data", "=", "a.", "optim"))
