"""Checkpoints that are archives or begin with a header: torch's zip, safetensors, npz, and what stands beside them."""

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from cases import NO_FILES, TINY, Case, Content, broken_json, cut, flipped
from checkpoint_files import flat_tensors
from pickles import (
    INSPECT,
    Payload,
    bombs,
    integer,
    named,
    raw,
    shared_array,
    strange_names,
    table,
    text,
    tuple_of,
)

RESNET = flat_tensors()


def zipped(parts: list[tuple[str, bytes]], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in parts:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def torch_zip(pickled: bytes, *storages: bytes, **others: bytes) -> bytes:
    parts = [("x/data.pkl", pickled), ("x/byteorder", b"little"), ("x/version", b"3\n")]
    parts = [(name, others.get(name.partition("/")[2], data)) for name, data in parts]
    return zipped([*parts, *((f"x/data/{i}", data) for i, data in enumerate(storages))])


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensor(numbers: int, sides: tuple[int, ...], strides: tuple[int, ...], *, offset: int = 0) -> bytes:
    """A tensor of torch's own recipe on storage 0, that claims to hold `numbers` numbers."""
    identity = tuple_of(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), integer(numbers))
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + tuple_of(
            identity + b"Q",
            integer(offset),
            tuple_of(*map(integer, sides)),
            tuple_of(*map(integer, strides)),
            b"\x89",
            named("collections", "OrderedDict") + b")R",
        )
        + b"R"
    )


def torch_zips() -> Iterator[Case]:
    for name, pickled in bombs():
        yield Case(name, "x.pth", torch_zip(raw(pickled)), INSPECT)
    for name, names in strange_names():
        tensors = {key: torch.from_numpy(value) for key, value in names.items()}
        yield Case(f"names: {name}", "x.pth", saved({"state_dict": tensors}), INSPECT)
    yield Case("payload", "x.pth", saved({"state_dict": RESNET, "x": Payload()}), INSPECT)
    yield Case("a thousand names of one array", "x.pth", torch_zip(shared_array()), INSPECT)
    one = struct.pack("<f", 1.0)
    for name, recipe in {
        "2^40 numbers": tensor(2**40, (2**40,), (1,)),
        "-1 numbers": tensor(-1, (1,), (1,)),
        "offset beyond": tensor(1, (1,), (1,), offset=2**40),
        "negative offset": tensor(1, (1,), (1,), offset=-8),
        "negative side": tensor(1, (-1,), (1,)),
        "negative stride": tensor(1, (2,), (-1,)),
        "sides of 2^80": tensor(1, (2**40, 2**40), (0, 0)),
        "one number 2^40 times": tensor(1, (2**40,), (0,)),
        "40 sides": tensor(1, (1,) * 5000, (1,) * 5000),
    }.items():
        yield Case(name, "x.pth", torch_zip(raw(table(state_dict=table(a=recipe))), one), INSPECT)
        # The same under a name and, where it can be, of a shape that belongs to a network.
        yield Case(
            f"{name}, conv1", "x.pth", torch_zip(raw(b"}(" + text("conv1.weight") + recipe + b"u"), one), INSPECT
        )
    yield Case("one number as conv1", "x.pth", saved({"state_dict": RESNET | _of_one_number()}), INSPECT)
    good = torch_zip(raw(table(a=tensor(1, (1,), (1,)))), one)
    parts: list[tuple[str, bytes]] = [("x/data.pkl", raw(b"}")), ("x/version", b"3\n")]
    for name, data in {
        "no storage": torch_zip(raw(table(a=tensor(1, (1,), (1,))))),
        "byte order evil": torch_zip(raw(b"}"), byteorder=b"evil"),
        "byte order missing": zipped(parts),
        "version of 10^6": torch_zip(raw(b"}"), version=b"9" * 10**6),
        "version text": torch_zip(raw(b"}"), version=b"evil"),
        "two values": zipped([*parts, ("x/data.pkl", raw(b"]"))]),
        "two roots": zipped([*parts, ("y/data.pkl", raw(b"]"))]),
        "absolute": zipped([("/etc/data.pkl", raw(b"}"))]),
        "above": zipped([("../../data.pkl", raw(b"}"))]),
        "NUL in a name": zipped([("x\0y/data.pkl", raw(b"}"))]),
        "a long name": zipped([("x" * 60_000 + "/data.pkl", raw(b"}"))]),
        "compressed": zipped([("x/data.pkl", raw(b"}"))], compression=zipfile.ZIP_DEFLATED),
        "compressed with lzma": zipped([("x/data.pkl", raw(b"}"))], compression=zipfile.ZIP_LZMA),
        "bomb": zipped([*parts, ("x/data/0", bytes(300 * 2**20))], compression=zipfile.ZIP_DEFLATED),
        "bomb below the limit": zipped([("x/data.pkl", bytes(255 * 2**20))], compression=zipfile.ZIP_DEFLATED),
        "60,000 parts": zipped([*parts, *((f"x/data/{i}", b"") for i in range(60_000))]),
        "empty archive": zipped([]),
        "a folder": zipped([("x/", b""), *parts]),
        "TorchScript": zipped([*parts, ("x/code/a.py", b"print()")]),
        "encrypted": _flagged(good, 1),
        "unknown compression": good.replace(
            b"PK\x03\x04\x14\x00\x00\x00\x00\x00", b"PK\x03\x04\x14\x00\x00\x00\x63\x00"
        ),
        "sizes that lie": _sizes(good, 2**32 - 2),
        "wrong CRC": _wrong_crc(good),
        "only the end": good[-22:],
        "an end that points beyond": good[:-6] + struct.pack("<I", 2**31) + good[-2:],
        "an archive behind another": good + good,
        "no first bytes": b"PK\x03\x04" + bytes(1000),
    }.items():
        yield Case(name, "x.pth", data, INSPECT)
    real = saved({"state_dict": RESNET, "epoch": 3})
    for name, data in (*cut(real, 0.01, 0.5, 0.9, 0.999), *flipped(real, 25)):
        yield Case(name, "x.pth", data, INSPECT)
    for name, data in flipped(good, 25, seed=1):
        yield Case(f"small, {name}", "x.pth", data, INSPECT)
    for name, content in NO_FILES.items():
        yield Case(name, "x.pth", content, INSPECT)
    # Other doors to the same reader.
    bomb = torch_zip(raw(dict(bombs())["key of 200,000 tuples"]))
    yield Case("convert", "x.pth", bomb, ("convert", "x.pth", "--to", "torchvision", "--no-verify", "--output", "out"))
    weights = ("transfer", "sample-knn", "--weights", "x.pth", "--data", "tree", "--output", "out")
    yield Case("transfer", "x.pth", bomb, weights, tree="sample")


def _of_one_number() -> dict[str, torch.Tensor]:
    return {"conv1.weight": torch.ones(1).expand(2**20, 2**20, 7, 7)}


def _flagged(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := changed.find(mark, start + 1)) >= 0:
            changed[start + place] |= bit
    return bytes(changed)


def _sizes(data: bytes, size: int) -> bytes:
    changed = bytearray(data)
    start = -1
    while (start := changed.find(b"PK\x01\x02", start + 1)) >= 0:
        changed[start + 20 : start + 28] = struct.pack("<II", size, size)
    return bytes(changed)


def _wrong_crc(data: bytes) -> bytes:
    changed = bytearray(data)
    start = changed.find(b"PK\x01\x02")
    changed[start + 16] ^= 0xFF
    return bytes(changed)


# --- safetensors ------------------------------------------------------------------------------------------------------


def safetensors(header: str | bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    data = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(data) if length is None else length) + data + body


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors_files() -> Iterator[Case]:
    def case(name: str, data: bytes) -> Case:
        return Case(name, "x.safetensors", data, ("inspect", "x.safetensors"))

    body = struct.pack("<f", 1.0)
    for length in (2**64 - 1, 2**63, 2**40, 100 * 2**20, 1000, 0, 1):
        yield case(f"header of {length} bytes", safetensors('{"a": 1}', body, length=length))
    for name, values in {
        "offsets overlap": {"a": entry(), "b": entry()},
        "offsets backwards": {"a": entry(offsets=(4, 0))},
        "offsets negative": {"a": entry(offsets=(-4, 0))},
        "offsets beyond": {"a": entry(offsets=(0, 2**40), shape=(2**38,))},
        "offsets fractional": {"a": entry(offsets=(0.5, 4.5))},
        "offsets of three": {"a": entry(offsets=(0, 2, 4))},
        "a hole": {"a": entry(), "b": entry(offsets=(8, 12))},
        "sides of 2^80": {"a": entry(shape=(2**40, 2**40))},
        "sides of 2^64": {"a": entry(shape=(2**64,))},
        "negative sides": {"a": entry(shape=(-1, -1))},
        "5,000 sides": {"a": entry(shape=(1,) * 5000)},
        "unknown kind of number": {"a": entry(dtype="EVIL")},
        "four bits": {"a": entry(dtype="F4", shape=(8,))},
        "a table for the shape": {"a": entry(shape={})},
        "no entries": {},
        "metadata of numbers": {"__metadata__": {"a": 1}},
        "metadata of a list": {"__metadata__": []},
        "a NUL in a name": {"a\0b": entry()},
        "escape sequences": {"\x1b[2J\x1b]0;owned\x07": entry()},
        "a megabyte of name": {"a" * 2**20: entry()},
        "a network of one number": {"conv1.weight": entry()},
    }.items():
        yield case(name, safetensors(json.dumps(values), body))
    for name, header in {
        "a name twice": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        "a lone surrogate": '{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        "not JSON": "{evil",
        "100,000 lists": '{"a": ' + "[" * 100_000,
        "100,000 tables": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "5,000 digits": '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}',
        "10,000,000 spaces": " " * 10_000_000 + "{}",
    }.items():
        yield case(name, safetensors("{" + header[1:] if header[0] == "{" else "{" + header, body))
    yield case("no UTF-8", safetensors(b'{"\xff\xfe": 1}', body))
    for name, text_ in twist_headers():
        data = safetensors(json.dumps({"__metadata__": {"twist": text_}, "conv1.weight": entry()}), body)
        yield case(f"our header: {name}", data)
    good = safetensors(json.dumps({"__metadata__": {"twist": json.dumps(GOOD_HEADER)}, "a": entry()}), body)
    for name, data in (*cut(good, 0.02, 0.5, 0.99), *flipped(good, 20)):
        yield case(name, data)


GOOD_HEADER: dict[str, Any] = {"format_version": 1, "architecture": "resnet18", "method": "twist"}


def twist_headers() -> Iterator[tuple[str, str]]:
    """What the header of an artefact may say of it, as text."""
    for name, changes in {
        "a version of text": {"format_version": "1"},
        "a version of true": {"format_version": True},
        "another architecture": {"architecture": "../../etc/passwd"},
        "epochs of 10^400": {"epochs": 10**400},
        "epochs below 0": {"epochs": -1},
        "a ViT of 10^9 pixels": {"architecture": "vit_small_patch16", "stem": "patch16", "image_size": 10**9},
        "a ViT of -1 pixels": {"architecture": "vit_small_patch16", "stem": "patch16", "image_size": -1},
        "std 0": {"std": [0, 0, 0]},
        "mean of texts": {"mean": ["a", "b", "c"]},
        "mean of 10^5 numbers": {"mean": [0.5] * 10**5},
        "a method that clears the screen": {"method": "\x1b[2J\x1b]0;owned\x07"},
        "a method with a lone surrogate": {"method": "\ud800"},
        "a method of a megabyte": {"method": "x" * 2**20},
        "a seed of 10^30": {"seed": 10**30},
        "an unknown field": {"evil": 1},
        "a table for the method": {"method": {"a": 1}},
    }.items():
        yield name, json.dumps(GOOD_HEADER | changes)
    yield "NaN", '{"format_version": 1, "architecture": "resnet18", "method": "twist", "std": [NaN, NaN, NaN]}'
    for name, content in broken_json(json.dumps(GOOD_HEADER)):
        if isinstance(content, str) and len(content) < 2**21:
            yield name, content


# --- npz and hubs' folders --------------------------------------------------------------------------------------------


def npy(header: str, body: bytes = b"", *, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    data = header.encode("latin1")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(data) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + data + body


def npz_files() -> Iterator[Case]:
    def case(name: str, data: bytes) -> Case:
        return Case(name, "x.npz", data, ("inspect", "x.npz"))

    def of(header: str, body: bytes = bytes(8), **options: Any) -> bytes:
        return zipped([("a.npy", npy(header, body, **options))])

    form = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
    for name, header in {
        "2^40 numbers": form.format("'<f8'", (2**40,)),
        "2^31 numbers": form.format("'<f8'", (2**31,)),
        "2^80 numbers": form.format("'<f8'", (2**40, 2**40)),
        "-1 numbers": form.format("'<f8'", (-1,)),
        "objects": form.format("'|O'", (1,)),
        "texts of 2^30": form.format("'<U1073741823'", (1,)),
        "fields": form.format("[('a', '<f8'), ('b', '|O')]", (1,)),
        "5,000 sides": form.format("'<f8'", (1,) * 2000),
        "a shape of text": form.format("'<f8'", "'evil'"),
        "a call": "{'descr': __import__('os').system('touch ran.txt'), 'fortran_order': False, 'shape': (1,)}",
        "5,000 parentheses": "(" * 5000 + ")" * 5000,
        "5,000 signs": "-" * 5000 + "1",
        "a number of 9,000 digits": form.format("'<f8'", "(" + "9" * 9000 + ",)"),
        "not Python": "{evil",
        "empty": "",
    }.items():
        yield case(name, of(header))
    good = form.format("'<f8'", (1,))
    yield case("version 9", of(good, version=(9, 9)))
    yield case("a header of 2^32 bytes", of(good, version=(2, 0), length=2**32 - 1))
    yield case("a header of a megabyte", of(good + " " * 2**20, version=(2, 0)))
    yield case("a pickle for an array", zipped([("a.npy", raw(dict(bombs())["key of 200,000 tuples"]))]))
    yield case("no array", zipped([("a.npy", b"evil")]))
    yield case("a bomb", zipped([("a.npy", npy(good, bytes(250 * 2**20)))], compression=zipfile.ZIP_DEFLATED))
    yield case("40 bombs", zipped([(f"{i}.npy", _zeros(6)) for i in range(40)], compression=zipfile.ZIP_DEFLATED))
    yield case("above", zipped([("../../a.npy", npy(good, bytes(8)))]))
    yield case("one name twice", zipped([("a.npy", npy(good, bytes(8))), ("a.npy", npy(good, bytes(8)))]))
    yield case("wrong CRC", _wrong_crc(of(good)))
    buffer = io.BytesIO()
    np.savez(buffer, **{"conv1.weight": np.ones((64, 3, 7, 7), np.float32)})
    for name, data in (*cut(buffer.getvalue(), 0.5, 0.99), *flipped(buffer.getvalue(), 12)):
        yield case(name, data)


def _zeros(mebibytes: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(mebibytes * 2**18, np.float32))
    return buffer.getvalue()


def hub_folders() -> Iterator[Case]:
    """The config.json that timm and the model hubs put beside the weights."""
    from safetensors.torch import save

    weights = save({name: value.contiguous() for name, value in RESNET.items()})
    good = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}

    def case(name: str, content: Content) -> Case:
        command = ("inspect", "model.safetensors")
        return Case(name, "config.json", content, command, named=("model.safetensors",), others=(
            ("model.safetensors", weights),
        ))  # fmt: skip

    for name, content in broken_json(json.dumps(good)):
        yield case(name, content)
    for name, changes in {
        "architecture of a number": {"architecture": 1},
        "architecture of a list": {"architecture": [1]},
        "another architecture": {"architecture": "\x1b[2J\x1b]0;owned\x07"},
        "a lone surrogate": {"architecture": "\ud800"},
        "a megabyte of architecture": {"architecture": "a" * 2**20},
        "settings of a list": {"pretrained_cfg": [1, 2]},
        "settings of text": {"pretrained_cfg": "evil"},
        "mean of texts": {"pretrained_cfg": {"mean": "abc", "std": "abc"}},
        "mean of not a number": {"pretrained_cfg": {"mean": ["nan"] * 3, "std": ["inf"] * 3}},
        "std 0": {"pretrained_cfg": {"mean": [0] * 3, "std": [0] * 3}},
        "mean of 10^400": {"pretrained_cfg": {"mean": [10**400] * 3, "std": [1] * 3}},
        "mean of a million": {"pretrained_cfg": {"mean": [0.5] * 10**6, "std": [0.5] * 10**6}},
        "our header as a list": {"twist": []},
        "our header as text": {"twist": "evil"},
        "our header of another": {"twist": {**GOOD_HEADER, "architecture": "resnet50"}},
        "our header with a lone surrogate": {"twist": {**GOOD_HEADER, "method": "\ud800"}},
    }.items():
        yield case(name, json.dumps(good | changes))


# --- the same bombs where our own files are expected ------------------------------------------------------------------


def resumed_states() -> Iterator[Case]:
    """States that a run goes on from, of the right name in the right place, with bombs or nonsense in them."""
    chosen = {
        name: torch_zip(raw(pickled))
        for name, pickled in bombs()
        if name
        in ("key of 200,000 tuples", "memo of 2^27", "memo of 2^30", "2,000 tuples", "bytearray of 2^35", "eval")
        or name in ("2^60 leaves", "200,000 lists", "os.system", "reduce of a number")
    }
    chosen |= {
        "a list": saved([1, 2]),
        "an empty table": saved({}),
        "history of a number": saved({"identity": {}, "history": 1, "model": {}, "optimizer": {}}),
        "tables of numbers": saved({"identity": 1, "history": [], "model": 2, "optimizer": 3}),
        "empty": b"",
        "cut": saved({"identity": {}, "history": []})[:200],
        "a bare pickle": pickle.dumps({"identity": {}}, protocol=2),
        "compressed": zlib.compress(b"evil"),
    }
    linear = (
        "transfer",
        "sample-linear",
        "epochs=4",
        "--weights",
        "random",
        "--data",
        "tree/data",
        "--output",
        "tree/run",
    )
    for name, data in chosen.items():
        yield Case(
            f"linear: {name}",
            "tree/run/checkpoint.pth",
            data,
            (*linear, "--resume"),
            tree="linear",
            named=("tree/run",),
        )
        warm = ("pretrain", "tree/tiny.toml", "run.warm_start=warm.pt", "--output", "out")
        yield Case(f"warm start: {name}", "warm.pt", data, warm, tree="pretraining", setup=TINY)
        head = ("transfer", "sample-cluster", "by=head", "head=head.pt", "--weights", "random", "--data", "tree")
        yield Case(f"head: {name}", "head.pt", data, (*head, "--output", "out"), tree="sample")
    for name, content in NO_FILES.items():
        yield Case(
            f"linear: {name}",
            "tree/run/checkpoint.pth",
            content,
            (*linear, "--resume"),
            tree="linear",
            named=("tree/run",),
        )
