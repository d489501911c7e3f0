"""Published weights by name: what the rows say, and downloads from a server that breaks off, lies or is away."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import flat_tensors, random_tensors, renamed_back, saved, under
from typer.testing import CliRunner

from twist.cli import app
from twist.contracts.config import SHIPPED, validate
from twist.contracts.errors import UsageError, UserError
from twist.contracts.weights import ARCHITECTURES
from twist.converters import zoo
from twist.converters.convert import convert
from twist.converters.inspect import inspect
from twist.converters.read import load_artefact
from twist.converters.tables import TIMM_VIT
from twist.transfer.protocols import find_protocol
from twist.transfer.request import Controls
from twist.transfer.run import find_weights
from twist.transfer.suite.config import load_suite

BYTES = bytes(range(256)) * 12_000  # 3 MB: several blocks
SHA256 = hashlib.sha256(BYTES).hexdigest()


class Server:
    """A server on this machine; `breaks` says after how many bytes each answer ends, `seen` what was asked for."""

    def __init__(self) -> None:
        self.content, self.kind, self.ranges, self.status = BYTES, "application/octet-stream", True, 200
        self.breaks: list[int] = []
        self.seen: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers["Range"]
                outer.seen.append(asked)
                start = int(asked[6:-1]) if asked and outer.ranges else 0
                beyond = start >= len(outer.content)
                self.send_response(416 if beyond else 206 if start else outer.status)
                self.send_header("Content-Type", outer.kind)
                body = b"" if beyond else outer.content[start:]
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.breaks.pop(0) if outer.breaks else None])

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/moco.pth.tar"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def row(**values: Any) -> zoo.Weights:
    usual = {"name": "tiny-moco", "method": "moco-v2", "layout": "moco", "architecture": "resnet18", "epochs": 7}
    said = {"images": "none", "licence": "none", "source": "this test"}
    return zoo.Weights(**{**usual, **said, **values})


@pytest.mark.parametrize(
    ("breaks", "ranges", "asked"),
    [
        ([], True, [None]),
        ([1_500_000, 700_000], True, [None, "bytes=1500000-", "bytes=2200000-"]),
        ([1_500_000], False, [None, "bytes=1500000-"]),  # the server sends all of it again
    ],
)
def test_a_download_goes_on_where_it_broke_off(server: Server, breaks, ranges, asked) -> None:
    server.breaks, server.ranges = breaks, ranges
    wanted = row(url=server.url, sha256=SHA256[:8])
    assert zoo.fetch(wanted).read_bytes() == BYTES
    assert server.seen == asked
    assert zoo.fetch(wanted) == wanted.file  # from the cache
    assert wanted.file.name == "tiny-moco.pth.tar"
    assert server.seen == asked
    assert not list(wanted.file.parent.glob(".*.part"))


def test_what_an_earlier_process_left_is_used_or_replaced(server: Server) -> None:
    wanted = row(url=server.url, md5=hashlib.md5(BYTES).hexdigest())
    wanted.file.parent.mkdir(parents=True)
    for left in (BYTES[:1000], BYTES + b"more"):  # the second is no beginning of the file
        wanted.file.with_name(".tiny-moco.pth.tar.part").write_bytes(left)
        assert zoo.fetch(wanted).read_bytes() == BYTES
        wanted.file.unlink()
    assert server.seen == ["bytes=1000-", f"bytes={len(BYTES) + 4}-", None]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"content": b"PK other bytes"}, f"not the published file of tiny-moco.*{SHA256[:8]}"),
        ({"kind": "text/html; charset=utf-8"}, "a web page came"),
        ({"status": 404}, "Not Found"),
        ({"breaks": [0]}, f"ended after 0 of {len(BYTES)} bytes"),
    ],
)
def test_a_wrong_file_is_refused_and_not_kept(server: Server, change: dict[str, Any], says: str) -> None:
    vars(server).update(change)
    wanted = row(url=server.url, sha256=SHA256[:8])
    with pytest.raises(UserError, match=says):
        zoo.fetch(wanted)
    assert not wanted.file.exists()
    vars(server).update(content=BYTES, kind="application/octet-stream", status=200)
    assert zoo.fetch(wanted).read_bytes() == BYTES


def test_without_a_network_or_a_link_the_place_is_said(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    away, by_browser = row(url=server.url), row(page="https://example.org/view", sha256=SHA256)
    with pytest.raises(UserError) as refused:
        zoo.fetch(away)
    assert server.url in str(refused.value)
    assert str(away.file) in str(refused.value)
    with pytest.raises(UserError, match=f"open https://example.org/view and save it as {by_browser.file}"):
        zoo.fetch(by_browser)
    by_browser.file.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"Remove {by_browser.file}"):
        zoo.fetch(by_browser)
    by_browser.file.write_bytes(BYTES)  # put there by hand
    assert zoo.fetch(by_browser) == by_browser.file


@pytest.fixture
def moco(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.Weights:
    """A ResNet-18 in MoCo's layout on the server, as `zoo:tiny-moco`."""
    state = under("module.encoder_q.", random_tensors())
    state |= {"module.encoder_q.fc.0.weight": torch.ones(2, 2), "module.encoder_q.fc.2.weight": torch.ones(2, 2)}
    server.content = saved(tmp_path / "x", {"state_dict": state}).read_bytes()
    one = row(url=server.url)
    monkeypatch.setattr(zoo, "load_zoo", lambda: {one.name: one})
    return one


def test_a_name_stands_wherever_weights_are_named(moco: zoo.Weights, tmp_path: Path) -> None:
    where = Path("zoo:tiny-moco")
    assert inspect(where).to_json()["layout"] == "moco"
    assert load_artefact(where)[1].source_branch == "query"
    done = convert(where, to="torchvision", output=tmp_path / "out", verify=False)
    assert done.backbone.method == "moco-v2"
    given = find_weights("zoo:tiny-moco", find_protocol("sample-knn"), Controls())
    assert [given[key] for key in ("name", "method", "epochs")] == ["tiny-moco", "moco-v2", 7]
    assert given["reading"]["layout"] == "moco"
    assert given["checkpoint"] == moco.file
    # What the user says is taken before what the row says.
    given = find_weights("zoo:tiny-moco", find_protocol("sample-knn"), Controls(), layout="moco-v1", method="mine")
    assert (given["reading"]["layout"], given["method"]) == ("moco-v1", "mine")
    with pytest.raises(UsageError, match=r'no published weights "tiny-mocco"\. Did you mean "tiny-moco"'):
        inspect(Path("zoo:tiny-mocco"))


def test_suites_fetch_before_they_start(moco: zoo.Weights, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    text = 'protocols = ["sample-knn"]\n[[weights]]\nname = "a"\nfile = "zoo:tiny-moco"\n'
    file.write_text(text)
    (entry,) = load_suite(file, data=tmp_path).weights  # a plan downloads nothing
    assert (entry.file, server.seen) == ("zoo:tiny-moco", [])
    (entry,) = load_suite(file, data=tmp_path, download=True).weights
    assert (entry.file, entry.layout, entry.method, entry.epochs) == (str(moco.file), "moco", "moco-v2", 7)
    assert load_suite(file, data=tmp_path).weights == (entry,)  # it is there now
    file.write_text(text.replace("tiny-moco", "absent") + text[text.index("[[") :].replace('"a"', '"b"'))
    with pytest.raises(UsageError, match=f'{file}: There are no published weights "absent"'):
        load_suite(file, data=tmp_path, download=True)


@pytest.mark.slow
@pytest.mark.usefixtures("moco")
def test_verify_proves_and_says_the_row(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    said = zoo.verify("tiny-moco")
    assert f'sha256 = "{hashlib.sha256(server.content).hexdigest()}"' in said
    assert re.search(r"^verified = \d{4}-\d\d-\d\d$", said, re.MULTILINE)
    monkeypatch.setattr(zoo, "load_zoo", lambda: {"tiny-moco": row(url=server.url, architecture="resnet50")})
    with pytest.raises(UserError, match="architecture resnet18"):
        zoo.verify("tiny-moco")


# ── The rows ──


def test_every_row_names_a_network_and_where_it_was_read() -> None:
    rows = zoo.load_zoo()
    assert len(rows) == (SHIPPED.parent / "converters" / "zoo.toml").read_text().count("\nname = ")
    for one in rows.values():
        assert re.sub(r"(w[24]|_heads12|_reg4)$", "", one.architecture) in ARCHITECTURES
        assert re.search(r"@[0-9a-f]{7}\b|^(timm|torchvision) \d", one.source), one.source
        assert one.expected or one.source.startswith("timm")
    methods = {one.method for one in rows.values()}
    assert {"twist", "moco-v1", "moco-v2", "moco-v3", "byol", "swav", "dino", "dinov2", "ibot", "mae"} <= methods
    assert {"simsiam", "barlow-twins", "vicreg", "densecl", "pixpro", "slotcon", "supervised"} <= methods
    assert [one.name for one in zoo.select(["MAE", "base"])] == ["mae-vit-b16-1600ep"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit-t16", "ibot-vit-s16-800ep", "twist-vit-s16-300ep"])
def test_vits_are_read_as_their_rows_say(name: str, tmp_path: Path) -> None:
    one = zoo.find(name)
    state: dict[str, Any] = renamed_back(TIMM_VIT, flat_tensors(one.architecture))
    entry = {"model-entry": "model", "ibot-backbone": "state_dict"}.get(one.layout)
    file = saved(tmp_path / "x.pth", {entry: state} if entry else state)
    header = load_artefact(file, layout=one.layout, branch=one.branch, heads=one.heads)[1]
    assert (header.display_name, header.method) == (one.architecture, "unknown" if one.heads else one.method)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layout": "mocco"}, "no layout mocco"),
        ({"branch": "teacher"}, "moco has no branch teacher"),
        ({"page": "https://example.org"}, "either url or page"),
        ({"sha256": "xyz"}, "sha256"),
        ({"licence": ""}, "licence"),
    ],
)
def test_a_wrong_row_is_refused(change: dict[str, Any], says: str) -> None:
    values = {**row(url="https://example.org/x.pth").model_dump(exclude_none=True), **change}
    with pytest.raises(UsageError, match=says):
        validate(values, zoo.Weights, where="zoo.toml")


def test_the_list_as_text_and_json() -> None:
    run = CliRunner().invoke
    listed = json.loads(run(app, ["zoo", "--match", "moco", "--match", "800", "--json"]).stdout)
    assert [(one["name"], one["md5"], one["verified"]) for one in listed] == [("moco-v2-800ep", "a04e12f8", None)]
    text = run(app, ["zoo", "--match", "pixpro"]).stdout
    assert re.search(r"pixpro-400ep +resnet50 +400 +VOC07\+12 detection AP 60.2 +MIT +browser +-", text)
