"""The GPU's kernels of the photometric part, as far as a CPU can show it.

In Triton's interpreter they compute what `photometric.apply` computes, its compiler makes machine code of them, and a
run takes them only where they are right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import photograph
from torch import Tensor

from pretrain import photometric
from pretrain.config import ViewsConfig
from pretrain.photometric_choice import fastest
from pretrain.views import NO_OPERATION, VIEW, ViewSampler, plan_views

SIDE = 36  # more than one block of pixels, and the last one is not full
ROOT = Path(__file__).parent.parent

INTERPRETED = """
import sys
import numpy as np, torch
from pretrain import photometric, photometric_gpu
data = np.load(sys.argv[1])
crops = torch.from_numpy(data["crops"])
parameters = photometric.prepare(data["views"])
right, ours = photometric.apply(crops, parameters), photometric_gpu.apply(crops, parameters)
print((ours - right).abs().max().item())
assert torch.equal(ours, photometric_gpu.apply(crops.contiguous(memory_format=torch.channels_last), parameters))
wrong = data["views"].copy()
wrong["factors"] *= 1.1
assert (photometric_gpu.apply(crops, photometric.prepare(wrong)) - right).abs().max() > 0.01
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pretrain import photometric_gpu as kernels
TYPES = dict(crops="*u8", numbers="*fp32", flags="*i32", sums="*fp32", out="*fp32", between="*fp32", blurred="*i64")
for kernel, constants in (
    (kernels._sum_luma, {}), (kernels._colour, {"SUMS": 64}),
    (kernels._blur_columns, {"TAPS": 13}), (kernels._blur_rows, {"TAPS": 13}),
):
    constants["BLOCK"] = kernels.BLOCK
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "st.global" in made.asm["ptx"] and "ld.local" not in made.asm["ptx"], kernel
    print(kernel.__name__, len(made.asm["cubin"]))
"""


def drawn() -> np.ndarray:
    """Ten views: what is drawn for two images, one without anything, and one with everything and a wide blur."""
    sampler = ViewSampler(plan_views(ViewsConfig(global_size=SIDE)))
    records = sampler.draw(3, epoch=0, indices=np.arange(2)).records[:, :4].reshape(-1)
    nothing, everything = np.zeros(1, VIEW), records[:1].copy()
    nothing["order"] = NO_OPERATION
    everything["order"], everything["factors"] = [3, 1, 2, 0], [1.3, 0.7, 1.2, -0.08]
    for name in ("flip", "grey", "solarise"):
        everything[name] = name != "grey"
    everything["sigma"] = 2.6
    return np.concatenate([records, nothing, everything])


def crops(count: int) -> Tensor:
    pixels = np.stack([photograph(seed, height=SIDE, width=SIDE) for seed in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def run(program: str, *arguments: str, **environment: str) -> str:
    pytest.importorskip("triton")
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_kernels_compute_what_torchs_operations_do(tmp_path: Path) -> None:
    views = drawn()
    assert views["sigma"].any()
    assert not views["sigma"].all()
    np.savez(tmp_path / "views.npz", views=views, crops=crops(len(views)).numpy())
    assert float(run(INTERPRETED, str(tmp_path / "views.npz"), TRITON_INTERPRET="1")) < 1e-5


@pytest.mark.slow
def test_the_kernels_are_machine_code_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    assert len(run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)).splitlines()) == 4


def right(views: Tensor, parameters: photometric.Photometric) -> Tensor:
    return photometric.apply(views, parameters)


asked: list[int] = []


def wrong(views: Tensor, parameters: photometric.Photometric) -> Tensor:
    """Wrong for the second resolution alone."""
    asked.append(len(views))
    return photometric.apply(views, parameters).flip(0 if len(asked) == 2 else ())


def out_of_memory(_: Tensor, __: photometric.Photometric) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def broken(_: Tensor, __: photometric.Photometric) -> Tensor:
    raise RuntimeError("Failed to find C compiler.\nAnd a page of more.")


@pytest.mark.parametrize(
    ("kernels", "said"), [(right, ""), (wrong, "of the pixels came out otherwise"), (broken, "C compiler.)")]
)
def test_a_run_takes_the_kernels_only_where_they_are_right(
    kernels: object, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("pretrain.photometric_gpu")
    module.apply = kernels  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pretrain.photometric_gpu", module)
    monkeypatch.setattr(sys.modules["pretrain"], "photometric_gpu", module, raising=False)
    views = drawn()
    groups, parameters = [crops(len(views))] * 2, [photometric.prepare(views)] * 2
    chosen = fastest(groups, parameters)
    assert chosen is (right if kernels is right else photometric.apply)
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == (kernels is not right)


def test_a_gpu_without_room_is_not_taken_for_one_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pretrain.photometric_gpu")
    module.apply = out_of_memory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pretrain.photometric_gpu", module)
    monkeypatch.setattr(sys.modules["pretrain"], "photometric_gpu", module, raising=False)
    views = drawn()
    with pytest.raises(torch.OutOfMemoryError):
        fastest([crops(len(views))], [photometric.prepare(views)])
