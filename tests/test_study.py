"""The small study's peers: they take a TWIST config's budget, go on exactly, and `twist convert` reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_images, tiny_config

from twist.contracts.errors import UserError
from twist.contracts.files import sha256_file
from twist.contracts.weights import read_header
from twist.converters.convert import convert
from twist.converters.read import load_source
from twist.pretrain.config import PretrainConfig
from twist.pretrain.data.source import open_images

pytestmark = pytest.mark.slow  # lightly brings Lightning along: seconds of imports


@pytest.fixture(scope="module")
def peers() -> Any:
    torch.set_num_threads(1)
    from benchmarks.study import peers

    return peers


def config(root: Path, **views: Any) -> PretrainConfig:
    return tiny_config(
        root, views={"kind": "barlow", "global_scale": [0.5, 1.0], "local_count": 0, "global_size": 32, **views}
    )


@pytest.mark.parametrize("method", ["moco-v2", "byol", "simsiam"])
def test_a_peer_goes_on_and_is_converted(peers: Any, method: str, tmp_path: Path, monkeypatch) -> None:
    images = make_images(tmp_path / "images", 12)
    run = config(images)
    artefact = peers.train(method, run, tmp_path / "whole", lr=0.1)
    whole = artefact.with_name("checkpoint.pth")

    save = peers._save
    monkeypatch.setattr(peers, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(peers, "_save", lambda *a, **k: (save(*a, **k), (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        peers.train(method, run, tmp_path / "parts", lr=0.1)
    monkeypatch.undo()
    parts = peers.train(method, run, tmp_path / "parts", lr=0.1).with_name("checkpoint.pth")
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UserError, match="another run"):
        peers.train(method, run, tmp_path / "parts", lr=0.2)

    header = read_header(artefact)
    assert (header.method, header.seed, header.epochs) == (method, run.run.seed, run.run.epochs)
    assert header.source_sha256 == sha256_file(whole)
    assert header.images_sha256 == open_images(run.data).fingerprint()
    other_seed = run.model_copy(update={"run": run.run.model_copy(update={"seed": 7})})
    repeat = read_header(peers.train(method, other_seed, tmp_path / "repeat", lr=0.1))
    assert (repeat.config_hash, repeat.seed) == (header.config_hash, 7), "seeds of one recipe are repeats"
    assert read_header(peers.train(method, run, tmp_path / "lr", lr=0.2)).config_hash != header.config_hash

    source = load_source(whole)
    assert (source.backbone.source_layout, source.backbone.method) == (f"lightly-{method.split('-')[0]}", method)
    assert source.backbone.source_branch in ("query", "online", "backbone")
    assert torch.equal(source.tensors["layer4.1.conv2.weight"], one["backbone.layer4.1.conv2.weight"])
    averaged = one.get("backbone_momentum.conv1.weight")
    assert averaged is None or not torch.equal(one["backbone.conv1.weight"], averaged), "it is not what is trained"
    assert convert(whole, to="torchvision", output=tmp_path / "out").proof


def test_views_do_not_depend_on_workers(peers: Any, tmp_path: Path) -> None:
    run = config(make_images(tmp_path / "images", 12))
    images = peers._Views(run, peers.transform_of("byol", run))
    seen = []
    for workers in (0, 2):
        config_of = run.model_copy(update={"data": run.data.model_copy(update={"workers": workers})})
        seen.append([torch.stack(views) for views in peers._loader(images, config_of, first_epoch=0)])
    assert len(seen[0]) == run.run.epochs * (12 // run.run.batch_size)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not torch.equal(seen[0][0], seen[0][-1])


def test_views_are_the_configs(peers: Any, tmp_path: Path) -> None:
    from PIL import Image

    run = config(tmp_path, global_size=24, grey_probability=1.0)
    picture = Image.open(sorted(make_images(tmp_path / "images", 1).iterdir())[0])
    for method in peers.METHODS:
        views = peers.transform_of(method, run)(picture)
        assert [tuple(view.shape) for view in views] == [(3, 24, 24)] * 2
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = [view * std[:, None, None] + mean[:, None, None] for view in views]
        assert all((view.amax(0) - view.amin(0)).max() < 0.01 for view in pixels), "all grey, as the config says"
    with pytest.raises(UserError, match="local_count = 0"):
        peers.transform_of("byol", tiny_config(tmp_path))


def test_moco_normalises_each_gpus_share_of_a_shuffled_batch_apart(peers: Any) -> None:
    torch.manual_seed(0)
    moco = peers.MoCoV2("resnet18").train()
    seen: list[int] = []
    moco.backbone_momentum.bn1.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    first, second = torch.randn(2, 8, 3, 32, 32)
    queries, keys = zip(*moco(first, second))
    assert seen == [4, 4, 4, 4]
    assert all(key.grad_fn is None for key in keys)
    assert all(query.grad_fn is not None for query in queries)
