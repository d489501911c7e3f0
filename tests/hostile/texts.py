"""Text files that a user or a stranger writes: records, what run folders say of themselves, annotations, configs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import NO_FILES, TINY, TOUCH, Case, Content, Edit, broken_json, broken_text, fifo, zeros_behind_a_link
from made_records import make_record

RECORD: dict[str, Any] = make_record().model_dump(mode="json")
COMPARE = ("compare", "records")
PAGE = (*COMPARE, "--format", "html", "--output", "page.html")
PRETRAIN = ("pretrain", "tree/tiny.toml", "--output", "tree/run", "--resume")


def changed(values: dict[str, Any], **changes: Any) -> str:
    """`values` as JSON with `changes`; `weights__name` is a field of a table, Infinity and NaN are written as such."""
    values = json.loads(json.dumps(values))
    for key, value in changes.items():
        place = values
        *tables, last = key.split("__")
        for name in tables:
            place = place[name]
        place[last] = value
    return json.dumps(values)


def records() -> Iterator[Case]:
    file = "records/sample-knn/x.json"
    for name, content in broken_json(json.dumps(RECORD)):
        yield Case(name, file, content, COMPARE, named=("x.json", "records"))
        yield Case(f"{name}, named", "x.json", content, ("compare", "x.json"))
    for name, changes in {
        "a seed of 10^30": {"seed": 10**30},
        "a seed of -1": {"seed": -1},
        "a seed of true": {"seed": True},
        "a seed of 1.5": {"seed": 1.5},
        "epochs of -5": {"weights__epochs": -5},
        "epochs of 10^30": {"weights__epochs": 10**30},
        "a wall time of 10^300": {"wall_s": 1e300},
        "150 percent": {"metrics": {"knn_top1_percent": 150.0}},
        "-1 percent": {"metrics": {"knn_top1_percent": -1.0}},
        "10^308 percent": {"metrics": {"knn_top1_percent": 1e308}},
        "infinite percent": {"metrics": {"knn_top1_percent": float("inf")}},
        "no number": {"metrics": {"knn_top1_percent": float("nan")}},
        "metrics of a list": {"metrics": []},
        "metrics of tables": {"metrics": {"knn_top1_percent": {}}},
        "metrics that nobody knows": {"metrics": {"\x1b[2Jevil": 1.0}},
        "no metrics": {"metrics": {}},
        "weights of null": {"weights": None},
        "weights of a list": {"weights": [1]},
        "a recipe of a list": {"recipe": [1]},
        "a recipe of another hash": {"recipe_hash": "0" * 64},
        "a protocol above": {"protocol": "../../../evil"},
        "a protocol of NUL": {"protocol": "a\0b"},
        "a version of 1.0": {"schema_version": 1.0},
        "a version of true": {"schema_version": True},
        "a version of a list": {"schema_version": []},
        "a method of escape sequences": {"method": "\x1b[2J\x1b]0;owned\x07"},
        "a method of a lone surrogate": {"method": "\ud800"},
        "a method of NUL": {"method": "a\0b"},
        "a method of nothing": {"method": ""},
        "a method of a megabyte": {"method": "x" * 2**20},
        "a method from right to left": {"method": "\u202e\u2066evil"},
        "a created of text": {"created": "evil"},
        "a created of escape sequences": {"created": "\x1b[2J"},
        "notes of numbers": {"notes": [1, 2]},
        "hardware of lists": {"hardware": {"gpu": []}},
        "an unknown field": {"evil\x1b[2J": 1},
    }.items():
        yield Case(name, file, changed(RECORD, **changes), COMPARE, refused=True, named=("x.json",))
    weird: dict[str, dict[str, Any]] = {
        "weights of escape sequences": {"weights__name": "\x1b[2J\x1b]0;owned\x07"},
        "weights of a lone surrogate": {"weights__name": "\ud800"},
        "data of escape sequences": {"data": "\x1b[2J"},
        "an architecture of escape sequences": {"weights__architecture": "\x1b[2J"},
        "an architecture of a lone surrogate": {"weights__architecture": "\ud800"},
        "a commit of a lone surrogate": {"git_commit": "\ud800"},
        "100,000 notes": {"notes": ["x"] * 100_000},
        "a recipe of 200,000 keys": {"recipe": {f"k{i}": i for i in range(200_000)}, "recipe_hash": ""},
        "a recipe of 900 tables": {"recipe": _deep(900), "recipe_hash": ""},
        "a wall time of 0": {"wall_s": 0},
    }
    other = changed(RECORD, method="moco-v2", weights__sha256="1" * 64)
    for name, changes in weird.items():
        record = changed(RECORD, **changes)
        for command in (COMPARE, PAGE, (*COMPARE, "--format", "json")):
            others = (("records/sample-knn/y.json", other), ("records/sample-knn/z.json", changed(RECORD, seed=1)))
            yield Case(f"{name}, {command[-1]}", file, record, command, named=("x.json", "records"), others=others)
    for name, changes in {
        "a picture above": {"media": ["../../../../etc/passwd"]},
        "a picture of the machine": {"media": ["/etc/passwd"]},
        "a picture that is a FIFO": {"media": ["fifo.png"]},
        "a picture that never ends": {"media": ["zero.png"]},
        "a picture that is not there": {"media": ["gone.png"]},
        "a picture of NUL": {"media": ["a\0b.png"]},
        "a picture of a lone surrogate": {"media": ["\ud800.png"]},
        "a picture of a long name": {"media": ["x" * 5000 + ".png"]},
        "curves above": {"curves": "../../../../etc/passwd"},
        "curves that are a FIFO": {"curves": "fifo.png"},
        "curves that never end": {"curves": "zero.png"},
        "curves of NUL": {"curves": "a\0b"},
        "curves that are a folder": {"curves": "."},
    }.items():
        others = (("records/sample-knn/fifo.png", fifo), ("records/sample-knn/zero.png", zeros_behind_a_link))
        named = ("x.json", "fifo.png", "zero.png", "gone.png", "png", "curves", "sample-knn")
        yield Case(name, file, changed(RECORD, **changes), PAGE, refused=True, named=named, others=others)


def _deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def pages_of_curves() -> Iterator[Case]:
    """metrics.jsonl of a pretraining run: for a page, and where the run goes on."""
    row = '{"step": 1, "epoch": 0, "stage": "mutual_information", "total": 1.5}\n'
    page = (*PAGE, "--pretrain-run", "run")
    others = (("records/sample-knn/x.json", json.dumps(RECORD)),)
    lines: dict[str, Content] = dict(broken_json(row))
    lines |= {
        "an unfinished line": row + row[:20],
        "a line of 64 MiB": row + '{"step": 2, "a": "' + "x" * 2**26 + '"}\n',
        "200,000 lines": row * 200_000,
        "a step of text": '{"step": "evil"}\n' + row,
        "a step of 10^400": '{"step": ' + "1" + "0" * 400 + "}\n" + row,
        "a step of not a number": '{"step": NaN, "total": NaN}\n' + row,
        "a step of infinity": '{"step": 1e999, "total": -1e999}\n' + row,
        "a step of true": '{"step": true, "total": true}\n' + row,
        "a step of a table": '{"step": {}}\n' + row,
        "no step": '{"epoch": 1}\n' + row,
        "a stage that ends the script": '{"step": 1, "stage": "</script><script>alert(1)</script>"}\n' + row * 2,
        "a stage of a table": '{"step": 1, "stage": {"a": 1}}\n' + row,
        "two values in a line": row.strip() + row,
        "a lone surrogate in a stage": '{"step": 1, "stage": "\\ud800"}\n' + row,
    }
    for name, content in lines.items():
        content = content + "\n" if isinstance(content, str) and not content.endswith("\n") else content
        yield Case(name, "run/metrics.jsonl", content, page, others=others)
        yield Case(f"{name}, resumed", "tree/run/metrics.jsonl", content, PRETRAIN, tree="pretraining", setup=TINY)
    evaluated = (*others, ("run/metrics.jsonl", row))
    for name, content in broken_json('{"epoch": 0, "knn_top1_percent": 5.0}\n'):
        yield Case(f"evaluations: {name}", "run/online_eval.jsonl", content, page, others=evaluated)


def run_accounts() -> Iterator[Case]:
    """run.json of a protocol's run, which decides whose folder it is."""
    knn = ("transfer", "sample-knn", "--weights", "random", "--data", "tree/data", "--output", "tree/run", "--resume")
    file = "tree/run/run.json"
    good = {
        "protocol": "sample-knn", "seed": 0, "state": "done", "data": "sample of shapes, tiny, seed 0, format 2",
        "weights": {"name": "random", "sha256": None, "architecture": "resnet18", "width": 1},
    }  # fmt: skip
    for name, content in broken_json(json.dumps(good)):
        yield Case(name, file, content, knn, tree="knn", named=("run.json", "tree/run"))
    for name, changes in {
        "a state of a list": {"state": []},
        "a state that nobody knows": {"state": "evil"},
        "a record above": {"record": "../../../../../../etc/passwd"},
        "a record of the machine": {"record": "/etc/passwd"},
        "a record of a number": {"record": 5},
        "a record that never ends": {"record": "/dev/zero"},
        "a record of NUL": {"record": "a\0b"},
        "weights of null": {"weights": None},
        "weights of text": {"weights": "random"},
        "weights of a list": {"weights": [1, 2]},
        "weights of 900 tables": {"weights": _deep(900)},
        "a recipe of 900 tables": {"recipe": _deep(900)},
        "a recipe of text": {"recipe": "evil"},
        "a recipe of lists": {"recipe": [[1], [2]]},
        "a seed of text": {"seed": "0"},
        "a seed of 10^400": {"seed": 10**400},
        "data of escape sequences": {"data": "\x1b[2J"},
        "data of a lone surrogate": {"data": "\ud800"},
        "a protocol of a table": {"protocol": {}},
    }.items():
        yield Case(name, file, changed(good, **changes), knn, tree="knn", named=("run.json", "tree/run"))


def manifests() -> Iterator[Case]:
    """What stands beside a pretraining's state, and the config of its folder."""
    last = "tree/run/checkpoints/step_00000020"
    named = ("step_00000020", "checkpoints")

    def case(name: str, content: Content, *, refused: bool = False) -> Case:
        return Case(name, f"{last}.json", content, PRETRAIN, tree="pretraining", setup=TINY, named=named,
                    refused=refused, others=((f"{last}.older", _without_older),))  # fmt: skip

    good = {
        "position": {"steps": 20, "epoch": 2, "samples": 0}, "images": 40, "world_size": 1, "bytes": 1000,
        "sha256": "0" * 64, "format_version": 1, "images_sha256": None, "names_sha256": None,
    }  # fmt: skip
    for name, content in broken_json(json.dumps(good)):
        yield case(name, content)
    for name, changes in {
        "a position of a list": {"position": []},
        "a position of text": {"position": "evil"},
        "steps of -1": {"position__steps": -1},
        "steps of 8.5": {"position__steps": 8.5},
        "steps of 10^400": {"position__steps": 10**400},
        "steps of text": {"position__steps": "10"},
        "steps of true": {"position__steps": True},
        "an epoch of -1": {"position__epoch": -1},
        "an epoch of 10^9": {"position__epoch": 10**9},
        "an epoch before": {"position__epoch": 1},
        "samples of 10^9": {"position__samples": 10**9},
        "samples of -4": {"position__samples": -4},
        "samples of not a number": {"position__samples": float("nan")},
        "more images": {"images": 41},
        "an unknown field": {"evil": 1},
        "bytes of true": {"bytes": True},
        "a digest of a number": {"sha256": 5},
        "a version of text": {"format_version": "1"},
        "a version of a table": {"format_version": {}},
    }.items():
        yield case(name, _edited(changes), refused=True)
    for name, content in broken_json('{"run": {"epochs": 2}}'):
        yield Case(f"config: {name}", "tree/run/config.json", content, PRETRAIN, tree="pretraining", setup=TINY,
                   named=("config.json", "tree/run"))  # fmt: skip


def _edited(changes: dict[str, Any]) -> Edit:
    return Edit(lambda data: changed(json.loads(data), **changes))


def _without_older(path: Path) -> None:
    """Only the newest state is left in the folder of `path`: none to fall back to."""
    for manifest in sorted(path.parent.glob("step_*.json"))[:-1]:
        manifest.unlink()
        manifest.with_suffix(".pt").unlink()


def samples() -> Iterator[Case]:
    """sample.json, which decides what a sample must hold."""
    good = {"classes": ["a"], "counts": {}, "format_version": 2, "seed": 0, "size": "tiny", "source": "shapes"}
    counts = {
        "counts of text": {"coco/train2017": "evil"},
        "counts of 10^400": {"coco/train2017": 10**400},
        "counts of -1": {"coco/train2017": -1},
        "counts of true": {"coco/train2017": True},
    }
    check = ("data", "check", "sample", "tree")
    knn = ("transfer", "sample-knn", "--weights", "random", "--data", "tree", "--output", "out")
    for name, content in broken_json(json.dumps(good)):
        yield Case(f"check: {name}", "tree/sample.json", content, check, tree="sample")
        yield Case(f"run: {name}", "tree/sample.json", content, knn, tree="sample", named=("sample.json", "tree"))
    for name, changes in {
        "classes of a number": {"classes": 5},
        "classes of text": {"classes": "abc"},
        "classes of lists": {"classes": [[1], {}]},
        "classes of escape sequences": {"classes": ["\x1b[2J"]},
        "a seed of 10^400": {"seed": 10**400},
        "a source of escape sequences": {"source": "\x1b[2J"},
        "a source of a lone surrogate": {"source": "\ud800"},
        "a size of a table": {"size": {}},
        **{name: {"counts": value} for name, value in counts.items()},
        "counts of a list": {"counts": []},
    }.items():
        text = changed(good, **changes)
        yield Case(f"check: {name}", "tree/sample.json", text, check, tree="sample", named=("sample.json", "tree/"))
        yield Case(f"run: {name}", "tree/sample.json", text, knn, tree="sample", named=("sample.json", "tree/"))


# --- annotations ------------------------------------------------------------------------------------------------------


def coco_files() -> Iterator[Case]:
    file = "tree/coco/annotations/instances_val2017.json"
    image = {"id": 1, "file_name": "000000000001.jpg", "width": 64, "height": 64}
    box = {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0,
        "segmentation": [[1, 1, 9, 1, 9, 9]],
    }  # fmt: skip
    good: dict[str, Any] = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    check = ("data", "check", "coco", "tree")

    def case(name: str, content: Content) -> Case:
        return Case(name, file, content, check, tree="sample", named=("instances_val2017.json", "val2017"))

    for name, content in broken_json(json.dumps(good)):
        yield case(name, content)
    for part, one in (("images", image), ("annotations", box), ("categories", {"id": 1, "name": "a"})):
        for name, value in {"null": None, "text": "evil", "a table": {}, "numbers": [1, 2], "lists": [[1], [2]],
                            "nothing": [], "empty tables": [{}, {}], "one twice": [one, one]}.items():  # fmt: skip
            yield case(f"{part}: {name}", json.dumps(good | {part: value}))
    for name, changes in {
        "a file above": {"file_name": "../../../../etc/passwd"},
        "a file of the machine": {"file_name": "/dev/zero"},
        "a file of NUL": {"file_name": "a\0b.jpg"},
        "a file of a lone surrogate": {"file_name": "\ud800.jpg"},
        "a file of escape sequences": {"file_name": "\x1b[2J\x1b]0;owned\x07.jpg"},
        "a file of a number": {"file_name": 5},
        "a file of a list": {"file_name": []},
        "a file of a megabyte": {"file_name": "x" * 2**20},
        "a width of 10^9": {"width": 10**9, "height": 10**9},
        "a width of -1": {"width": -1},
        "a width of text": {"width": "64"},
        "an id of true": {"id": True},
        "an id of 10^400": {"id": 10**400},
        "an id of text": {"id": "1"},
        "an id of a table": {"id": {}},
    }.items():
        yield case(name, json.dumps(good | {"images": [image | changes]}))
    huge = {"size": [10**6, 10**6], "counts": [0, 10**12]}
    for name, changes in {
        "a box of not a number": {"bbox": [float("nan")] * 4},
        "a box of infinity": {"bbox": [float("inf")] * 4},
        "a box of texts": {"bbox": ["1"] * 4},
        "a box of 10^400": {"bbox": [10**400] * 4},
        "an outline of text": {"segmentation": "evil"},
        "an outline of numbers": {"segmentation": [1, 2, 3]},
        "an outline of 2 million points": {"segmentation": [[1.0] * 4_000_000]},
        "a mask of 10^12 pixels": {"segmentation": huge, "iscrowd": 1},
        "a mask of text": {"segmentation": {"size": [9, 9], "counts": "\ud800evil"}, "iscrowd": 1},
        "an area of text": {"area": "evil"},
        "a category of a list": {"category_id": []},
        "an image of a table": {"image_id": {}},
    }.items():
        yield case(name, json.dumps(good | {"annotations": [box | changes]}))
    yield case("a name of escape sequences", json.dumps(good | {"categories": [{"id": 1, "name": "\x1b[2J"}]}))
    yield case("a name of a lone surrogate", json.dumps(good | {"categories": [{"id": 1, "name": "\ud800"}]}))


def voc_files() -> Iterator[Case]:
    file = "tree/VOC2007/Annotations/000001.xml"
    thing = (
        "<object><name>ring</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    )
    size = "<size><width>64</width><height>64</height><depth>3</depth></size>"
    good = f"<annotation><filename>000001.jpg</filename>{size}{thing}</annotation>"

    def of(text: str) -> str:
        return f"<annotation>{text}</annotation>"

    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    variants: dict[str, Content] = {
        **dict(broken_text(good)),
        "an evil encoding": '<?xml version="1.0" encoding="evil"?>' + good,
        "another evil encoding": '<?xml version="1.0" encoding="utf-7"?>' + good,
        "an encoding of many bytes": '<?xml version="1.0" encoding="shift_jis"?>' + good,
        "an encoding of a codec of bytes": '<?xml version="1.0" encoding="zlib_codec"?>' + good,
        "a long encoding": f'<?xml version="1.0" encoding="{"x" * 10_000}"?>' + good,
        "an encoding of NUL": b'<?xml version="1.0" encoding="a\0b"?>' + good.encode(),
        "a billion laughs": f'<!DOCTYPE a [<!ENTITY l0 "lol">{laughs}]>' + of("&l9;" + size + thing),
        "a long entity": f'<!DOCTYPE a [<!ENTITY l "{"x" * 100_000}">]>' + of("&l;" * 10_000),
        "a file of the machine": '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]>'
        + of(f"<name>&f;</name>{size}"),
        "a FIFO of the machine": '<!DOCTYPE a SYSTEM "file:///dev/zero">' + good,
        "100,000 levels": "<a>" * 100_000 + "</a>" * 100_000,
        "2 million objects": of(size + "<object/>" * 500_000),
        "a width of 5,000 digits": of(f"<size><width>{'9' * 5000}</width><height>1</height></size>" + thing),
        "a width of not a number": of("<size><width>nan</width><height>inf</height></size>" + thing),
        "a width of other digits": of("<size><width>६४</width><height>٦٤</height></size>" + thing),
        "a width of -1": of("<size><width>-1</width><height>-1</height></size>" + thing),
        "a corner of not a number": good.replace("<xmin>1<", "<xmin>nan<"),
        "a corner of infinity": good.replace("<xmax>9<", "<xmax>inf<"),
        "a corner of 10^400": good.replace("<xmax>9<", f"<xmax>{'9' * 400}<"),
        "a class of escape sequences": good.replace("ring", "&#x9b;2J"),
        "a class of a megabyte": good.replace("ring", "x" * 2**20),
        "10,000 attributes": "<annotation " + " ".join(f'a{i}="1"' for i in range(10_000)) + "/>",
        "no annotation": "<html><body>Sign in</body></html>",
        "two roots": good + good,
    }
    check = ("data", "check", "voc", "tree")
    for name, content in variants.items():
        yield Case(name, file, content, check, tree="sample", named=("000001", "Annotations"))


def lists_of_names() -> Iterator[Case]:
    """The lists of VOC and of ImageNet's labelled subsets, and Cityscapes' polygons."""
    voc, subset = "tree/VOC2012/ImageSets/Main/train.txt", "tree/imagenet/10percent.txt"
    semi = ("transfer", "sample-semi-10pct", "labels_from=list", "epochs=1", "--weights", "random", "--data", "tree")
    for name, content in {
        **dict(broken_text("300002\n300003\n")),
        "names above": "../../../../etc/passwd\n",
        "names of the machine": "/dev/zero\n/etc/passwd\n",
        "a million names": "300002\n" * 1_000_000,
        "a name of a megabyte": "x" * 2**20 + "\n",
        "escape sequences": "\x1b[2J\x1b]0;owned\x07\n",
        "a name with NUL": "a\0b\n",
        "line separators": "300002\u2028300003\x0b300004\x1c\n",
    }.items():
        yield Case(
            f"VOC: {name}", voc, content, ("data", "check", "voc", "tree"), tree="sample", named=("train.txt", "VOC")
        )
        run = (*semi, "--output", "out")
        yield Case(f"subset: {name}", subset, content, run, tree="sample", named=("10percent.txt",))
    folder = "tree/cityscapes/gtFine/train/aachen/aachen_000001_000019_gtFine_"
    thing = {"label": "car", "polygon": [[0, 0], [9, 0], [9, 9]]}
    good: dict[str, Any] = {"imgWidth": 64, "imgHeight": 32, "objects": [thing]}
    variants: dict[str, Content] = {
        **dict(broken_json(json.dumps(good))),
        "10^12 pixels": json.dumps(good | {"imgWidth": 10**6, "imgHeight": 10**6}),
        "10^9 pixels": json.dumps(good | {"imgWidth": 50_000, "imgHeight": 50_000}),
        "10^18 columns": json.dumps(good | {"imgWidth": 10**18}),
        "points of 10^400": json.dumps(good | {"objects": [thing | {"polygon": [[10**400, 0]] * 3}]}),
        "points of infinity": json.dumps(good | {"objects": [thing | {"polygon": [[float("inf"), 0]] * 3}]}),
        "a million points": json.dumps(good | {"objects": [thing | {"polygon": [[1, 2]] * 1_000_000}]}),
        "a label of escape sequences": json.dumps(good | {"objects": [thing | {"label": "\x1b[2J"}]}),
        "a label of a lone surrogate": json.dumps(good | {"objects": [thing | {"label": "\ud800"}]}),
        "deleted": json.dumps(good | {"objects": [thing | {"deleted": 1, "label": "evil"}]}),
    }
    for name, content in variants.items():
        for command in (("data", "check", "cityscapes", "tree"), ("data", "prepare", "cityscapes", "tree")):
            yield Case(
                f"polygons, {command[1]}: {name}", f"{folder}polygons.json", content, command, tree="unpainted",
                named=("aachen_000001", "gtFine"),
            )  # fmt: skip


# --- configs ----------------------------------------------------------------------------------------------------------


def configs() -> Iterator[Case]:
    good = '[data]\nroot = "nowhere"\n'
    run = ("pretrain", "x.toml", "--output", "out")
    variants: dict[str, Content] = {
        **dict(broken_text(good)),
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
        "byte order mark": b"\xef\xbb\xbf" + good.encode(),
    }
    for name, content in variants.items():
        yield Case(name, "x.toml", content, run, named=("x.toml", "data.root", "root"))
    for name, override in {
        "10,000 lists": "optim.lr=" + "[" * 10_000,
        "10,000 lists, closed": "optim.lr=" + "[" * 10_000 + "]" * 10_000,
        "10,000 parts": "a." * 10_000 + "a=1",
        "10,000 digits": "optim.lr=" + "9" * 10_000,
        "infinity": "optim.lr=inf",
        "not a number": "optim.lr=nan",
        "10^400": "optim.lr=1e400",
        "a line feed": 'optim.lr=1\n[run]\nevil = "yes"',
        "a lone surrogate": "data.root=\udcff\udcfe",
        "escape sequences": "optim.lr=\x1b[2J",
        "escape sequences in a key": "optim.\x1b[2J=1",
        "nothing": "=",
        "a section that is a value": "data.root.evil=1",
        "a table": "data={root='x', evil=1}",
    }.items():
        yield Case(f"override: {name}", "x.toml", good, (*run, override), named=("optim", "data", "=", "a."))
        transfer = ("transfer", "sample-knn", override.replace("optim.lr", "temperature"), "--weights", "random")
        paths = ("--data", "tree", "--output", "out")
        yield Case(
            f"override of a run: {name}", "x.txt", "", (*transfer, *paths), tree="sample",
            named=("temperature", "data", "=", "a.", "optim"),
        )  # fmt: skip
    yield from _suites()


def _suites() -> Iterator[Case]:
    random = '[[weights]]\nname = "a"\nfile = "random"\n'
    good = 'protocols = ["sample-knn"]\nseeds = [0]\n' + random
    command = ("suite", "x.toml", "--data", "tree", "--dry-run", "--output", "out", "--results", "results")
    axes = "\n".join(f"k{axis} = [{', '.join(map(str, range(10)))}]" for axis in range(9))
    variants: dict[str, Content] = {
        **dict(broken_text(good)),
        "10^9 runs": good + f"[grid.sample-knn]\n{axes}",
        "a seed of 10^30": good.replace("[0]", f"[{10**30}]"),
        "a seed of -1": good.replace("[0]", "[-1]"),
        "200,000 seeds": good.replace("[0]", str(list(range(200_000)))),
        "weights that never end": good.replace('"random"', '"zero"'),
        "weights that are a FIFO": good.replace('"random"', '"fifo"'),
        "weights of NUL": good.replace('"random"', '"a\\u0000b"'),
        "weights of the machine": good.replace('"random"', '"/dev/zero"'),
        "a name above": good.replace('"a"', '"../../a"'),
        "an override of nothing": good + 'overrides = ["="]\n',
        "a grid of a number": good + "[grid]\nsample-knn = 5",
        "a protocol of escape sequences": good.replace("sample-knn", "\\u001b[2J"),
        "10,000 lists": "seeds = " + "[" * 10_000 + "]" * 10_000,
    }
    for name, content in variants.items():
        others: tuple[tuple[str, Content], ...] = (("zero", zeros_behind_a_link), ("fifo", fifo))
        named = ("x.toml", "zero", "fifo", "overrides", "protocol", "=")
        yield Case(f"suite: {name}", "x.toml", content, command, tree="sample", named=named, others=others)


def detectron2_configs() -> Iterator[Case]:
    """A Detectron2 config that is checked against weights."""
    good = "MODEL:\n  RESNETS:\n    DEPTH: 18\n"
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    variants: dict[str, Content] = {
        **dict(broken_text(good)),
        "a billion laughs": laughs + "MODEL:\n  PIXEL_MEAN: *a11\n",
        "merged laughs": "a0: &a0 {x: 1}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))
        + good,
        "10,000 lists": "a: " + "[" * 10_000 + "]" * 10_000,
        "a list in itself": "MODEL: &a\n  PIXEL_MEAN: [*a]\n",
        "os.system": f'a: !!python/object/apply:os.system ["{TOUCH}"]\n' + good,
        "an object": f'a: !!python/object/new:subprocess.Popen [["{TOUCH}"]]\n' + good,
        "os.system, in full": f'a: !<tag:yaml.org,2002:python/object/apply:os.system> ["{TOUCH}"]\n' + good,
        "os.system, renamed": f'%TAG !e! tag:yaml.org,2002:python/\n---\na: !e!object/apply:os.system ["{TOUCH}"]\n'
        + good,
        "another tag": "a: !evil 1\n" + good,
        "5,000 digits": "MODEL:\n  RESNETS:\n    DEPTH: " + "9" * 5000,
        "base of itself": "_BASE_: x.yaml\n" + good,
        "base above": "_BASE_: ../../../../../etc/passwd\n" + good,
        "base that is a FIFO": "_BASE_: fifo\n" + good,
        "base that never ends": "_BASE_: zero\n" + good,
        "base of a number": "_BASE_: 5\n" + good,
        "2^16 bases": f"_BASE_: [{', '.join(['x.yaml'] * 2)}]\n" + good,
        "mean of 5,000 parentheses": f'MODEL:\n  PIXEL_MEAN: "{"(" * 5000}"\n',
        "mean of 200,000 signs": f'MODEL:\n  PIXEL_MEAN: "{"-" * 200_000}1"\n',
        "mean of a call": f"MODEL:\n  PIXEL_MEAN: \"__import__('os').system('{TOUCH}')\"\n",
        "mean of texts": 'MODEL:\n  PIXEL_MEAN: ["a", "b", "c"]\n',
        "mean of tables": "MODEL:\n  PIXEL_MEAN: [{}, {}, {}]\n",
        "mean of not a number": "MODEL:\n  PIXEL_MEAN: [.nan, .inf, -.inf]\n",
        "escape sequences": 'MODEL:\n  PIXEL_MEAN: "\\e[2J"\n',
        "a lone surrogate": 'MODEL:\n  PIXEL_MEAN: "\\ud800"\n',
        "a model of a number": "MODEL: 5\n",
    }
    command = ("convert", "--check-config", "x.yaml", "--weights", "tree/weights.safetensors")
    for name, content in variants.items():
        others: tuple[tuple[str, Content], ...] = (("zero", zeros_behind_a_link), ("fifo", fifo))
        # Status 1 is also the answer that config and weights do not fit, which names the keys.
        named = ("x.yaml", "MODEL.", "fifo", "zero", "passwd")
        yield Case(name, "x.yaml", content, command, tree="weights", named=named, others=others)


def readmes() -> Iterator[Case]:
    """A Markdown file whose tables are checked: its markers hold arguments."""
    record = ("records/sample-knn/x.json", json.dumps(RECORD))
    for name, content in {
        **dict(broken_text("<!-- twist compare records -->\n\n<!-- end -->\n")),
        "an open quote": "<!-- twist compare 'records -->\n<!-- end -->\n",
        "no end": "<!-- twist compare records -->\n",
        "two in one": "<!-- twist compare records -->\n<!-- twist compare records -->\n<!-- end -->\n",
        "an unknown argument": "<!-- twist compare --evil -->\n<!-- end -->\n",
        "help": "<!-- twist compare --help -->\n<!-- end -->\n",
        "an output": "<!-- twist compare records --output evil.txt -->\n<!-- end -->\n",
        "a folder of the machine": "<!-- twist compare /etc -->\n<!-- end -->\n",
        "a device": "<!-- twist compare /dev/zero -->\n<!-- end -->\n",
        "NUL": "<!-- twist compare a\0b -->\n<!-- end -->\n",
        "escape sequences": "<!-- twist compare records --metric \x1b[2J -->\n<!-- end -->\n",
        "100,000 tables": "<!-- twist compare --published-only --metric ap -->\n<!-- end -->\n" * 20,
        "a metric of text": "<!-- twist compare records --baseline ../../evil -->\n<!-- end -->\n",
    }.items():
        for option in ("--check", "--update"):
            named = ("x.md", "marker", "/etc", "/dev/zero", "evil", "metric")
            yield Case(
                f"{option[2:]}: {name}", "x.md", content, ("compare", option, "x.md"), named=named, others=(record,)
            )
    for name, content in NO_FILES.items():
        target = ("compare", "records", "--format", "html", "--output", "page.html", "--picture", "A=x.png")
        yield Case(f"picture: {name}", "x.png", content, target, others=(record,))
