"""What anybody may have written, read within bounds: texts, JSON, TOML, names, pickles, pictures, curves."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

from twist.contracts import files
from twist.contracts.config import parse_toml
from twist.contracts.curves import read_rows
from twist.contracts.errors import UserError, printable
from twist.contracts.images import TooManyPixels, UnreadableImage, open_picture, read_image
from twist.contracts.pickles import check_file, check_pickle, read_state
from twist.converters.open import as_torch, read_contents


@pytest.mark.parametrize("read", [files.read_bytes, files.read_json, read_image])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        (lambda path: path.symlink_to(path.name), "symbolic link"),
        (Path.mkdir, "a folder"),
        (lambda _: None, "No such file"),
    ],
)
def test_only_regular_files_are_opened(read: object, make: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    make(path)
    with pytest.raises(UserError, match=rf"x\.json.*{says}"):
        read(path)
    with pytest.raises(UserError, match="null byte"):
        read("a\0b")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "EOF"),
        (b"[" * 1000, "recursion limit"),
        (b"9" * 5000, "out of range"),
        (b'{"\\ud800": 1}', "hex escape"),
        (b"[1]", "no JSON object"),
        ("{}".encode("utf-16"), "column 1"),
        (b" " * 100, "more than"),
    ],
)
def test_json_that_is_refused_names_file_place_and_remedy(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.json.*{says}.*: write it anew\.$"):
        files.read_json(path, remedy="write it anew", most=50 if says == "more than" else files.MOST_TEXT)


def test_texts_come_without_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'\xef\xbb\xbf{"a":\r\n 1e3}')
    assert files.read_text(path) == '{"a":\n 1e3}'
    assert files.read_json(path) == {"a": 1000.0}
    for data, says in ((b"a\0", "NUL at byte 1"), (b"abc\xff", "byte 3")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=says):
            files.read_text(path)


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000 + "]" * 5000, "a." * 100 + "a = 1", "a = " + "9" * 5000, "a = 0x" + "f" * 5000]
)
def test_toml_has_bounds(text: str) -> None:
    with pytest.raises(ValueError, match=r"deeply|digits"):
        parse_toml(text)


def test_what_a_stranger_calls_something_is_printed_as_text() -> None:
    assert str(UserError("a\x1b[2J\u202e\ud800\tb\nc")) == "a\\x1b[2J\\u202e\\ud800\tb\nc"
    assert printable("é – 猫 …") == "é – 猫 …"
    assert 200 < len(printable("x" * 10**6)) < 300
    line = printable("first " + "word " * 10**5 + "last")
    assert len(line) < 1600
    assert line.startswith("first")
    assert line.endswith("last")


# --- pickles ----------------------------------------------------------------------------------------------------------

TUPLES = b"\x80\x02)" + b"\x85" * 2000 + b"."
TENSORS = {"a": torch.ones(3, 4), "b": [torch.ones(2)] * 3, "c": (1, "two", None, 2.5, {"d": 10**12})}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (TUPLES, "nests more than"),
        (b"\x80\x02" + b"(" * 1000, "nests more than"),
        (b"\x80\x02}r" + struct.pack("<I", 2**27) + b".", "memo"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.", "too early"),
        (b"\x80\x02I" + b"9" * 4000 + b"\n.", "endless number"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R.", "memory by a number"),
        (b"\x80\x02(X\x07\0\0\0storage\x8a\x05\0\0\0\0\x01tQ.", "storage of 4,294,967,296"),
        (b"\x80\x02a.", "more than there is"),
        (b"\x80\x02}u.", "lacks a mark"),
        (b"\x80\x02}", "too early"),
        (b"\x80\x02\xff.", "no opcode"),
    ],
)
def test_a_pickle_is_refused_before_it_is_read(data: bytes, says: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=rf"{says}.*(at|after) byte \d+"):
        check_pickle(data)


def test_bytes_that_are_shared_are_counted() -> None:
    """A megabyte in the memo, given to two hundred calls."""
    text = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20
    calls = b"](" + b"c_codecs\nencode\nh\x00X\x06\0\0\0latin1\x86R" * 200 + b"e"
    with pytest.raises(pickle.UnpicklingError, match="again and again"):
        check_pickle(b"\x80\x02" + text + b"q\x000" + calls + b".")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_honest_pickle_passes(protocol: int) -> None:
    value = {"model": {f"layer{i}.weight": np.ones((30, 30), np.float32) for i in range(50)}, "seed": 2**100, "n": -5}
    data = pickle.dumps(value | {"deep": [[[[("a", b"b", True)]]]], "set": {1, 2}}, protocol=protocol)
    assert check_pickle(data + b"rest") == len(data)


@pytest.mark.parametrize("zipped", [True, False])
def test_honest_torch_files_pass_and_bombs_in_them_do_not(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_state(path, "a", "c", remedy="-")["a"], TENSORS["a"])
    with pytest.raises(UserError, match=r"x\.pth holds no checkpoint with d: name another"):
        read_state(path, "d", remedy="name another")
    if zipped:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("x/DATA.PKL", TUPLES)  # torch would find it by that name as well
    else:
        ends = [0]
        for _ in range(3):
            ends.append(check_pickle(path.read_bytes(), ends[-1]))
        path.write_bytes(path.read_bytes()[: ends[-1]] + TUPLES)
    with pytest.raises(pickle.UnpicklingError, match="nests more than"):
        check_file(path)
    with pytest.raises(UserError, match=r"x\.pth cannot be read safely.*: name another"):
        read_state(path, remedy="name another")


def equal(ours: object, theirs: object) -> bool:
    """Whether our reading is torch's: tensors by shape, type and bits, and all that is around them."""
    if isinstance(theirs, torch.Tensor):
        (found,) = as_torch({"": ours}).values()
        same = theirs.float() if theirs.dtype is torch.bfloat16 else theirs
        return found.dtype == same.dtype and found.shape == same.shape and torch.equal(found, same)
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(equal(ours[key], item) for key, item in theirs.items())
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("zipped", [True, False])
def test_our_reading_of_torchs_files_is_torchs(zipped: bool, tmp_path: Path) -> None:
    table = torch.randn(6, 5, 4)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool)
    value = {
        "network": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict(),
        "kinds": [table.to(kind) for kind in kinds],
        "views": (table[2:4, 1], table.transpose(0, 2), table[..., ::2], torch.ones(1).expand(3, 4), table[:0]),
        "parameter": torch.nn.Parameter(table), "number": torch.tensor(3), "plain": [1, 2.5, "x", None, True, (1, 2)],
        "shared": [table, table], "size": torch.Size([2, 3]),
    }  # fmt: skip
    path = tmp_path / "x.pth"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    before = path.read_bytes()
    found = read_contents(path).value
    assert equal(found, torch.load(path, weights_only=True))
    found["shared"][0][:] = 0  # what is written there stays in memory
    assert path.read_bytes() == before


def test_our_reading_of_safetensors_is_theirs(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind): torch.randn(3, 4).to(kind) for kind in kinds}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_contents(tmp_path / "x.safetensors").value
    assert all(equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_look_into_a_checkpoint_imports_no_torch(tmp_path: Path) -> None:
    torch.save({"state_dict": resnet18().state_dict(), "arch": "resnet18", "optimizer": {}}, tmp_path / "x.pth")
    program = (
        "import sys; from twist.converters.inspect import inspect, inspection_text; "
        f"text = inspection_text(inspect({str(tmp_path / 'x.pth')!r})); "
        "assert 'torch' not in sys.modules; print(text)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resnet18" in done.stdout


def test_an_npz_is_believed_to_the_size_of_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for count, says in ((99, "an array of shape"), (8, "")):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (count,)})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", header.getvalue() + bytes(64))
        if says:
            with pytest.raises(UserError, match=says):
                read_contents(path)
    assert read_contents(path).value["a"].shape == (8,)


# --- pictures and curves ----------------------------------------------------------------------------------------------


def test_pictures_are_counted_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (40, 30)).save(path)
    with open_picture(path, max_pixels=1200) as image:
        assert image.size == (40, 30)
    with pytest.raises(UserError, match=r"^inside$"), open_picture(path):
        raise UserError("inside")
    with pytest.raises(TooManyPixels, match=r"x\.png.* 1,200 pixels"), open_picture(path, max_pixels=1199):
        pass
    data = path.read_bytes()
    for change, error in ((b"IHDR\0\0\x30\0\0\0\x30\0", TooManyPixels), (b"IDAT", UnreadableImage)):
        header = change + data[16 + len(change) - 4 : 29]
        path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
        with pytest.raises(error, match=r"x\.png"), open_picture(path):
            pass


def test_damaged_rows_are_left_out_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "loss": null, "stage": "a"}']
    bad = b'\xff|[]|{"loss": 1}|{"step": -1}|{"step": true}|{"step": 1e400}|{"step": 1, "a": {}}'.split(b"|")
    path.write_bytes(b"\n".join([good[0], *bad, b"", good[1], b'{"step": 3, "lo']))
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert capsys.readouterr().err == f"{path}: {len(bad)} damaged lines are left out.\n"
    assert read_rows(tmp_path / "absent.jsonl") == []
