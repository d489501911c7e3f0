"""Checkpoints that are archives or begin with a header: torch's zip, safetensors, npz, and what stands beside them."""

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from functools import partial
from itertools import chain, starmap
from typing import Any

import numpy as np
import torch
from cases import ESCAPES, NO_FILES, Case, broken_json, damaged, edited
from checkpoint_files import flat_tensors
from pickles import Payload, bombs, in_torch, inspected, raw, rebuilt, saved, shared_array, strange_names, table, text
from texts import transfer

RESNET = flat_tensors()
ONE = struct.pack("<f", 1.0)


def zipped(parts: list[tuple[str, bytes]], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in parts:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def torch_zip(pickled: bytes, *storages: bytes, **others: bytes) -> bytes:
    parts = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **others}
    parts |= {f"data/{index}": data for index, data in enumerate(storages)}
    return zipped([(f"x/{name}", data) for name, data in parts.items()])


def patched(data: bytes, mark: bytes, place: int, new: bytes) -> bytes:
    """`data` with `new` at `place` after every `mark`."""
    changed = bytearray(data)
    start = -1
    while (start := changed.find(mark, start + 1)) >= 0:
        changed[start + place : start + place + len(new)] = new
    return bytes(changed)


def wrong_crc(data: bytes) -> bytes:
    return patched(data, b"PK\x01\x02", 16, b"evil")


def torch_zips() -> Iterator[Case]:
    files = {name: torch_zip(raw(pickled)) for name, pickled in in_torch().items()}
    for name, names in strange_names().items():
        tensors = {key: torch.from_numpy(value.copy()) for key, value in names.items()}
        files[name] = saved({"state_dict": tensors})
    files["payload"] = saved({"state_dict": RESNET, "x": Payload()})
    files["a thousand names of one array"] = torch_zip(shared_array())
    for name, recipe in {
        "2^40 numbers": rebuilt((2**40,), (1,), 2**40),
        "-1 numbers": rebuilt((1,), (1,), -1),
        **{f"offset {offset}": rebuilt((1,), (1,), 1, offset=offset) for offset in (2**40, -8)},
        "negative side": rebuilt((-1,), (1,), 1),
        "negative stride": rebuilt((2,), (-1,), 1),
        "sides of 2^80": rebuilt((2**40, 2**40), (0, 0), 1),
        "one number 2^40 times": rebuilt((2**40,), (0,), 1),
        "5,000 sides": rebuilt((1,) * 5000, (1,) * 5000, 1),
    }.items():
        files[name] = torch_zip(raw(table(state_dict=table(a=recipe))), ONE)
        # The same under a name and, where it can be, of a shape that belongs to a network.
        files[f"{name}, conv1"] = torch_zip(raw(b"}(" + text("conv1.weight") + recipe + b"u"), ONE)
    one_number = {"conv1.weight": torch.ones(1).expand(2**20, 2**20, 7, 7)}
    files["one number as conv1"] = saved({"state_dict": RESNET | one_number})
    good, real = torch_zip(raw(table(a=rebuilt((1,), (1,), 1))), ONE), saved({"state_dict": RESNET, "epoch": 3})
    yield from starmap(inspected, (files | archives(good) | damaged(real, 25, 0.01, 0.5, 0.9, 0.999)).items())
    yield from starmap(inspected, chain(damaged(good, 25, seed=1).items(), NO_FILES.items()))
    # Other doors to the same reader.
    bomb, convert = torch_zip(raw(bombs()["2,000 tuples"])), ("convert", "x.pth", "--to", "torchvision", "--no-verify")
    yield inspected("convert", bomb, command=(*convert, "--output", "out"))
    weights = tuple("x.pth" if part == "random" else part for part in transfer("sample-knn"))
    yield inspected("transfer", bomb, command=weights, tree="sample")


def archives(good: bytes) -> dict[str, bytes]:
    """Zip files that are wrong as such."""
    empty = raw(b"}")
    value, version = ("x/data.pkl", empty), ("x/version", b"3\n")
    parts = [value, version]
    names = ("/etc/data.pkl", "../../data.pkl", "x\0y/data.pkl", "x" * 60_000 + "/data.pkl")
    deflated = partial(zipped, compression=zipfile.ZIP_DEFLATED)
    return {
        **{f"named {name[:9]!r}": zipped([(name, empty)]) for name in names},
        **{f"another {part[0][:7]}": zipped([*parts, part])
           for part in (("x/data.pkl", raw(b"]")), ("y/data.pkl", raw(b"]")), ("x/code/a.py", b"print()"))},
        "no storage": torch_zip(raw(table(a=rebuilt((1,), (1,), 1)))),
        "byte order evil": torch_zip(empty, byteorder=b"evil"),
        "byte order missing": zipped(parts),
        "version of 10^6": torch_zip(empty, version=b"9" * 10**6),
        "version text": torch_zip(empty, version=b"evil"),
        "compressed": deflated([value]),
        "compressed with lzma": zipped([value], compression=zipfile.ZIP_LZMA),
        "bomb": deflated([*parts, ("x/data/0", bytes(300 * 2**20))]),
        "bomb below the limit": deflated([("x/data.pkl", bytes(255 * 2**20))]),
        "60,000 parts": zipped([*parts, *((f"x/data/{i}", b"") for i in range(60_000))]),
        "empty archive": zipped([]),
        "a folder": zipped([("x/", b""), *parts]),
        "encrypted": patched(patched(good, b"PK\x03\x04", 6, b"\1"), b"PK\x01\x02", 8, b"\1"),
        "unknown compression": patched(patched(good, b"PK\x03\x04", 8, b"\x63"), b"PK\x01\x02", 10, b"\x63"),
        "sizes that lie": patched(good, b"PK\x01\x02", 20, struct.pack("<II", 2**32 - 2, 2**32 - 2)),
        "wrong CRC": wrong_crc(good),
        "only the end": good[-22:],
        "an end that points beyond": good[:-6] + struct.pack("<I", 2**31) + good[-2:],
        "an archive behind another": good + good,
        "no first bytes": b"PK\x03\x04" + bytes(1000),
    }  # fmt: skip


# --- safetensors ------------------------------------------------------------------------------------------------------


def safetensors(header: Any, body: bytes = ONE, *, length: int | None = None) -> bytes:
    """A file with `header`, which is one as text, or as values."""
    data = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GOOD_HEADER: dict[str, Any] = {"format_version": 1, "architecture": "resnet18", "method": "twist"}


def safetensors_files() -> Iterator[Case]:
    case = partial(Case, file="x.safetensors", command=("inspect", "x.safetensors"))
    lengths = (2**64 - 1, 2**63, 2**40, 100 * 2**20, 1000, 0, 1)
    files: dict[str, bytes] = {f"{length}": safetensors('{"a": 1}', length=length) for length in lengths}
    offsets = ((4, 0), (-4, 0), (0, 2**40), (0.5, 4.5), (0, 2, 4))
    shapes: tuple[Any, ...] = ((2**40, 2**40), (2**64,), (-1, -1), (1,) * 5000, {})
    one = {f"offsets {value}": ENTRY | {"data_offsets": value} for value in offsets}
    one |= {f"shape {str(value)[:20]}": ENTRY | {"shape": value} for value in shapes}
    one |= {f"kind {value}": ENTRY | {"dtype": value} for value in ("EVIL", "F4", 5)}
    headers: dict[str, Any] = {
        **{name: {"a": entry} for name, entry in one.items()},
        "offsets overlap": {"a": ENTRY, "b": ENTRY},
        "a hole": {"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 12]}},
        "no entries": {},
        "metadata of numbers": {"__metadata__": {"a": 1}},
        "metadata of a list": {"__metadata__": []},
        **{
            f"the name {name[:9]!r}": {name: ENTRY} for name in ("a\0b", ESCAPES, "a" * 2**20, "conv1.weight", "\ud800")
        },
        "a name twice": f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}',
        "not JSON": "{evil",
        "100,000 lists": '{"a": ' + "[" * 100_000,
        "100,000 tables": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "5,000 digits": '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}',
        "10,000,000 spaces": "{" + " " * 10_000_000 + "}",
        "no UTF-8": b'{"\xff\xfe": 1}',
    }
    for name, content in twist_headers():
        headers[f"our header: {name}"] = {"__metadata__": {"twist": content}, "conv1.weight": ENTRY}
    good = {"__metadata__": {"twist": json.dumps(GOOD_HEADER)}, "a": ENTRY}
    files |= {name: safetensors(header) for name, header in headers.items()} | damaged(
        safetensors(good), 20, 0.02, 0.5, 0.99
    )
    yield from starmap(case, files.items())


def twist_headers() -> Iterator[tuple[str, str]]:
    """What the header of an artefact may say of it, as text."""
    vit = {"architecture": "vit_small_patch16", "stem": "patch16"}
    found = edited(
        GOOD_HEADER, "format_version", "architecture", "method", "epochs", "mean", {"std": [0, 0, 0]},
        {"mean": [0.5] * 10**5}, {"std": [float("nan")] * 3}, *({**vit, "image_size": size} for size in (10**9, -1)),
        {"seed": 10**30}, {"evil": 1},
    )  # fmt: skip
    for name, content in (found | broken_json(json.dumps(GOOD_HEADER))).items():
        if isinstance(content, str) and len(content) < 2**21:
            yield name, content


# --- npz and hubs' folders --------------------------------------------------------------------------------------------


def npy(header: str, body: bytes = bytes(8), *, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    data = header.encode("latin1")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(data) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + data + body


def npz_files() -> Iterator[Case]:
    def form(kind: str, shape: Any) -> str:
        return f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}"

    shapes: tuple[Any, ...] = ((2**40,), (2**31,), (2**40, 2**40), (-1,), (1,) * 2000, "'evil'", f"({'9' * 9000},)")
    kinds = ("'|O'", "'<U1073741823'", "[('a', '<f8'), ('b', '|O')]", "__import__('os').system('touch ran.txt')")
    texts = ("(" * 5000 + ")" * 5000, "-" * 5000 + "1", "{evil", "")
    headers = [form("'<f8'", shape) for shape in shapes] + [form(kind, (1,)) for kind in kinds] + [*texts]
    good = form("'<f8'", (1,))
    zeros, sound = io.BytesIO(), io.BytesIO()
    np.save(zeros, np.zeros(6 * 2**18, np.float32))
    np.savez(sound, **{"conv1.weight": np.ones((64, 3, 7, 7), np.float32)})
    arrays = {
        **{f"{header[:60]} of {len(header)}": npy(header) for header in headers},
        "version 9": npy(good, version=(9, 9)),
        "a header of 2^32 bytes": npy(good, version=(2, 0), length=2**32 - 1),
        "a header of a megabyte": npy(good + " " * 2**20, version=(2, 0)),
        "a pickle for an array": raw(bombs()["key of 200,000 tuples"]),
        "no array": b"evil",
    }
    sparse = partial(zipped, compression=zipfile.ZIP_DEFLATED)
    files = {
        **{name: zipped([("a.npy", data)]) for name, data in arrays.items()},
        "a bomb": sparse([("a.npy", npy(good, bytes(250 * 2**20)))]),
        "40 bombs": sparse([(f"{i}.npy", zeros.getvalue()) for i in range(40)]),
        "above": zipped([("../../a.npy", npy(good))]),
        "one name twice": zipped([("a.npy", npy(good))] * 2),
        "wrong CRC": wrong_crc(zipped([("a.npy", npy(good))])),
        **damaged(sound.getvalue(), 12, 0.5, 0.99),
    }
    yield from starmap(partial(Case, file="x.npz", command=("inspect", "x.npz")), files.items())
