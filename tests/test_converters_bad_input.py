"""What bad input gets: one sentence, exit status 1, nothing written, and no code of the file ever run."""

import argparse
import collections
import functools
import io
import json
import os
import pickle
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import flat_tensors, saved, under
from safetensors.torch import save, save_file

from twist.contracts.errors import UsageError, UserError
from twist.contracts.weights import Backbone, write_backbone
from twist.converters.check_config import check_config
from twist.converters.convert import convert
from twist.converters.inspect import inspect, inspection_text
from twist.converters.open import read_contents
from twist.converters.read import load_artefact, load_source

RESNET = flat_tensors()
ONE = torch.ones(1)
PROOF_OF_RUN = Path("ran.txt")


class Payload:
    """Makes a careless reader call a function when it unpickles this."""

    def __init__(self, function: Callable[..., Any] = os.system, argument: str = f"touch {PROOF_OF_RUN}") -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


EVAL = Payload(eval, f"__import__('pathlib').Path('{PROOF_OF_RUN}').touch()")


def changed(name: str, tensor: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The state dict with one tensor replaced or added, or taken away."""
    rest = {other: value for other, value in RESNET.items() if other != name}
    return rest if tensor is None else {**rest, name: tensor}


def torch_bytes(value: Any, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def zip_of(name: str, mebibytes: int = 0) -> bytes:
    """An archive with a small member of that name, and one of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(mebibytes * 2**20))
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return buffer.getvalue()


def lying_array() -> bytes:
    """An array whose shape claims more than its bytes hold."""
    good = pickle.dumps({"conv1.weight": np.ones((4,), np.float32)}, protocol=2)
    return good.replace(b"K\x04\x85", b"K\x40\x85")


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def npz_of_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{}], dtype=object))
    return buffer.getvalue()


def vit(*, positions: int = 197, patch: int = 16) -> dict[str, torch.Tensor]:
    tensors = flat_tensors("vit_small_patch16", image_size=224)
    tensors["pos_embed"] = torch.ones(1, positions, 384)
    tensors["patch_embed.proj.weight"] = torch.ones(384, 3, patch, patch)
    return tensors


# Bytes that are no checkpoint, or a broken one, and what is said about them.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "html": (lambda: b"\n<!DOCTYPE html><html>Sign in</html>", "is an HTML page"),
    "git-lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    "noise": (lambda: bytes(range(256)) * 4, "first bytes are of no format"),
    "tar": (tar, "is a tar archive"),
    "truncated zip": (lambda: torch_bytes(RESNET)[:-4000], "truncated or damaged"),
    "truncated stream": (lambda: torch_bytes(RESNET, zipped=False)[:-4000], "truncated or damaged"),
    "truncated pickle": (lambda: pickle.dumps({"a": np.ones(9)}, protocol=2)[:-20], "truncated or damaged"),
    "truncated safetensors": (lambda: save({"a": ONE})[:-4], "damaged"),
    "zip of something": (lambda: zip_of("readme.txt"), "without PyTorch's or numpy's parts"),
    "zip bomb": (lambda: zip_of("archive/data.pkl", 300), "do not compress like that"),
    "TorchScript": (script, "TorchScript program"),
    "reduce payload, stream": (lambda: torch_bytes({"x": Payload()}, zipped=False), "asks for posix.system"),
    "pickle with a payload": (lambda: pickle.dumps({"model": Payload()}, protocol=2), "asks for posix.system"),
    "array that lies": (lying_array, "an array of shape"),
    "npz with objects": (npz_of_objects, "pickled objects"),
}


CLIP = {name: tensor for name, tensor in vit().items() if name != "patch_embed.proj.bias"}
CLIP |= {"norm_pre.weight": torch.ones(384), "norm_pre.bias": torch.ones(384)}
# What torch.save was given.
VALUES: dict[str, tuple[Any, str]] = {
    "nested too deeply": (functools.reduce(lambda inner, _: {"a": inner}, range(200), {}), "too deeply"),
    "reduce payload": ({"state_dict": RESNET, "x": Payload()}, "asks for posix.system"),
    "eval payload": ({"x": EVAL}, "nothing was run"),
    "whole network": (torch.nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
    "a list": ([torch.ones(2)], "holds a list"),
    "no tensors": ({"epoch": 3}, "holds no tensors"),
    "only an optimiser": ({"state": {0: {"exp_avg": ONE}}, "param_groups": [{"lr": 0.1}]}, "only an optimiser's state"),
    "CMC": ({"model": {"encoder1.conv1.weight": ONE}, "contrast": {"m": ONE}}, "half-width networks"),
    "CIFAR stem": (changed("conv1.weight", torch.ones(64, 3, 3, 3)), "no 3×3 stem for small images"),
    "transposed": (changed("layer2.0.conv1.weight", torch.ones(64, 128, 3, 3)), "1 of another shape"),
    "a block too few": ({name: t for name, t in RESNET.items() if not name.startswith("layer4.1.")}, "is none of"),
    "missing tensor": (changed("layer3.1.bn2.bias"), "1 tensors missing"),
    "extra tensor": (changed("layer3.1.bn9.bias", torch.ones(3)), "no single place"),
    "8 bits": (changed("bn1.weight", torch.ones(64).to(torch.float8_e4m3fn)), "float32 and float8_e4m3fn"),
    "NaN": (changed("bn1.weight", torch.full((64,), float("nan"))), "NaN or infinite"),
    "negative variance": (changed("bn1.running_var", torch.full((64,), -1.0)), "negative variances"),
    "sparse": (changed("bn1.bias", torch.ones(64).to_sparse()), "float32 and sparse"),
    "without values": (changed("bn1.bias", torch.ones(64, device="meta")), "float32 and sparse"),
    "C4 detector": ({"model": {"backbone.stem.conv1.weight": ONE, "roi_heads.res5.0.conv1.weight": ONE}}, "trained C4"),
    "same name twice": ({**RESNET, "module.conv1.weight": torch.ones(64, 3, 7, 7)}, "the same name"),
    "ViT with any number of heads": (vit(), "--heads 6"),
    "oblong ViT": (vit(positions=1 + 14 * 15), "and a square grid"),
    "ViT-S/10": (vit(patch=10), "patches of 10 pixels"),
    "layer scale in one block": (vit() | {"blocks.0.ls1.gamma": torch.ones(384)}, "tensors missing"),
    "DINOv3": (vit() | {"rope_embed.periods": ONE}, "rotary positions"),
    "CLIP": (CLIP, "quick GELU"),
}


@pytest.mark.parametrize("name", [*FILES, *VALUES])
def test_bad_input_gets_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bad.pth"
    if name in FILES:
        make, says = FILES[name]
        file.write_bytes(make())
    else:
        value, says = VALUES[name]
        torch.save(value, file)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        convert(file, to="torchvision", verify=False)
    message = str(caught.value)
    assert says in message
    assert caught.value.exit_status == 1
    assert "\n" not in message
    assert message.endswith(".")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not PROOF_OF_RUN.exists()


def test_a_run_folder_stands_for_its_result(tmp_path: Path) -> None:
    header = Backbone(architecture="resnet18", method="twist")
    student = write_backbone(tmp_path / "run" / "backbone.safetensors", RESNET, header)
    assert inspect(tmp_path / "run").contents.path == student
    assert convert(tmp_path / "run", to="torchvision", output=tmp_path / "a", verify=False).weights.is_file()
    teacher = write_backbone(tmp_path / "run" / "teacher_backbone.safetensors", RESNET, header)
    assert inspect(tmp_path / "run").contents.path == teacher


@pytest.mark.parametrize(("name", "says"), [("none", "cannot be read"), ("", "a folder"), ("pipe", "no regular file")])
def test_what_is_no_file_is_refused(name: str, says: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=says):
        load_source(tmp_path / name)


def test_damaged_archives_are_one_sentence(tmp_path: Path) -> None:
    """Every third byte of a small npz changed in turn, as a failing disk would."""
    np.savez(tmp_path / "x.npz", **{"conv1.weight": np.ones((2, 2), np.float32)})
    good = (tmp_path / "x.npz").read_bytes()
    sentences = []
    for position in range(0, len(good), 3):
        (tmp_path / "y.npz").write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        try:
            read_contents(tmp_path / "y.npz")
        except UserError as error:
            sentences.append(str(error))
    assert 0 < len(sentences) < len(good) // 3
    assert not any("\n" in sentence for sentence in sentences)


def test_nan_can_be_allowed(tmp_path: Path) -> None:
    file = saved(tmp_path / "nan.pth", changed("bn1.weight", torch.full((64,), float("nan"))))
    assert load_source(file, allow_nan=True).tensors["bn1.weight"].isnan().all()
    assert convert(file, to="timm", output=tmp_path / "x", allow_nan=True, verify=False).weights


def test_harmless_company_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of training programs; whether their library is there when the file is read makes no difference."""
    from omegaconf import OmegaConf

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    history = module.HistoryBuffer()
    history._log_history = np.arange(4.0)
    value = {
        "state_dict": under("module.encoder_q.", RESNET),
        "args": argparse.Namespace(arch="resnet18", lr=np.float64(0.03), path=Path("x")),
        "config": OmegaConf.create({"a": {"b": [1, 2.5, "c", True, None]}}),
        "message_hub": history, "best_acc1": torch.tensor(70.1), "rng": np.random.RandomState(0).get_state()[1],
        "random": {"values": collections.deque([1, 2], maxlen=4), "ordered": collections.OrderedDict(a=1)},
        "scheduler": collections.defaultdict(dict, {"k": {"v": np.int64(3)}}),
    }  # fmt: skip
    files = {True: tmp_path / "a.pth", False: tmp_path / "b.pth"}
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        for zipped, file in files.items():
            torch.save(value, file, _use_new_zipfile_serialization=zipped)
    for file in files.values():
        read = read_contents(file).value
        assert (read["random"]["values"], read["args"].state["arch"]) == ([1, 2], "resnet18")
        assert read["rng"].tolist() == value["rng"].tolist()
        assert load_source(file).backbone.source_layout == "moco-v1"


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_pickles_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "half": np.ones(3, np.float16),
        "number": np.float64(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "objects": np.array([{}, 3], dtype=object),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=protocol))
    read = read_contents(tmp_path / "x.pkl").value["model"]
    assert (read["number"], read["objects"]) == (2.5, None)
    for name in ("c", "fortran", "big", "half", "empty"):
        assert np.array_equal(read[name], arrays[name].astype(arrays[name].dtype.newbyteorder("="))), name


def test_the_first_bytes_decide_what_a_file_is(tmp_path: Path) -> None:
    plain = {name: tensor.contiguous() for name, tensor in RESNET.items()}
    save_file(plain, tmp_path / "x.bin")
    # Its length makes a header begin as JSON or as a pickle does.
    for length in (0x7B20, 640):
        note = {"note": "n" * (length - len(json.dumps({"__metadata__": {"note": ""}})))}
        save_file({}, tmp_path / f"{length}.pth", metadata=note)
        assert (tmp_path / f"{length}.pth").read_bytes().lstrip(b"\0 ")[:1] in b"{\x80"
        assert read_contents(tmp_path / f"{length}.pth").container == "safetensors"
    with (tmp_path / "y.pth").open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in plain.items()})
    for name, container in (("x.bin", "safetensors"), ("y.pth", "npz")):
        assert read_contents(tmp_path / name).container == container
        assert torch.equal(load_source(tmp_path / name).tensors["conv1.weight"], plain["conv1.weight"])


def test_inspect_names_what_is_there_and_what_is_wrong(tmp_path: Path) -> None:
    state = {f"module.encoder_{branch}.{name}": tensor for branch in "qk" for name, tensor in RESNET.items()}
    heads = dict.fromkeys(("module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.weight", "module.queue"), ONE)
    value = {"epoch": 200, "state_dict": state | heads, "optimizer": {"state": {0: {"m": ONE}}}}
    found = inspect(saved(tmp_path / "m.pth", value))
    seen = json.loads(json.dumps(found.to_json()))
    assert [seen[key] for key in ("layout", "method", "architecture", "epochs")] == ["moco", "moco-v2", "resnet18", 200]
    assert (seen["branches"], seen["entries"]) == (["query", "key"], {"state_dict": 243, "optimizer": 1})
    assert seen["problems"] == []
    assert {name.split(".")[0] for name in seen["dropped"]} == {"encoder_k", "encoder_q", "queue"}
    assert "encoder_k (120), encoder_q.fc (2), queue" in inspection_text(found)
    found = inspect(saved(tmp_path / "m.pth", {"features.1.conv.0.0.weight": torch.ones(3)}))
    assert found.source is None
    assert "MobileNet" in found.problems[0]
    assert "problem" in inspection_text(found)


def test_what_has_to_be_named_is_inspected_and_checked_by_that_name(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    file = saved(tmp_path / "weights.pth", {"state_dict": {**RESNET, "fc.weight": torch.ones(2, 512)}})
    config.write_text("MODEL:\n  RESNETS:\n    DEPTH: 18\n")
    assert "say --from simclr-torch" in inspect(file).problems[0]
    with pytest.raises(UserError, match="say --from simclr-torch"):
        check_config(config, file)
    found = inspect(file, layout="simclr-torch")
    assert found.source is not None
    assert (found.source.backbone.source_layout, found.problems) == ("simclr-torch", ())
    wanted = {mismatch.key: mismatch.wanted for mismatch in check_config(config, file, layout="simclr-torch")}
    assert wanted["MODEL.PIXEL_STD"] == [255.0, 255.0, 255.0]


def test_an_artefact_passes_through_and_is_checked(tmp_path: Path) -> None:
    header = Backbone(architecture="resnet18", method="twist", seed=3, epochs=7)
    file = write_backbone(tmp_path / "backbone.safetensors", RESNET, header)
    assert load_source(file).backbone == header
    assert load_artefact(file, layout="twist")[1].method == "twist"  # what its header says itself
    for layout, says in (("moko", 'There is no layout "moko"'), ("moco", "was made from twist: leave --from away")):
        with pytest.raises((UsageError, UserError), match=says):
            load_artefact(file, layout=layout)
    write_backbone(file, RESNET, header.model_copy(update={"architecture": "resnet34"}))
    with pytest.raises(UserError, match="the header says resnet34"):
        load_source(file)


def test_a_header_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    for text in ("hello", "[1]"):
        save_file({"conv1.weight": ONE}, tmp_path / "x.safetensors", metadata={"twist": text})
        with pytest.raises(UserError, match="the header is not valid"):
            load_source(tmp_path / "x.safetensors")
    header = Backbone(architecture="resnet34", method="twist").model_dump_json()
    for text, says in (("{}", "is not valid"), ("no json", "is not valid"), (header, "the header says resnet34")):
        with pytest.raises(UserError, match=says):
            load_source(saved(tmp_path / "w.pth", {"state_dict": under("backbone.", RESNET), "twist": text}))
