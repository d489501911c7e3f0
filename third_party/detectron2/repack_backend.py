"""A PEP 517 backend that builds `detectron2-0.7.2-py3-none-any.whl` from one published wheel.

Detectron2 has no release on the package registry for current Python. The registry holds
`sal-detectron2==0.7.2`, whose Python files are those of the official repository at commit a59f0563
(2024-04-17) but for a version string, a `list(...)` around a `random.sample` argument and a test skip.
Its one compiled file, `_C`, is tied to Python 3.10 and torch 2.3; R-CNN models do without it
(ROIAlign and NMS come from torchvision).

The backend downloads exactly that wheel, checks its SHA-256, drops `_C*.so`, puts our dependency list
(`pyproject.toml` beside this file) in the metadata and writes a wheel for any Python. Same input, same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

SOURCE = "sal-detectron2==0.7.2"
SOURCE_FILE = "sal_detectron2-0.7.2-cp310-none-any.whl"
SOURCE_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
SOURCE_DIST_INFO = "sal_detectron2-0.7.2.dist-info"
DIST_INFO = "detectron2-0.7.2.dist-info"
WHEEL = "detectron2-0.7.2-py3-none-any.whl"
WHEEL_TEXT = "Wheel-Version: 1.0\nGenerator: repack_backend\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def metadata_text() -> str:
    """The METADATA file: name, version and dependencies of the `pyproject.toml` beside this file."""
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        f"License: {project['license']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {need}" for need in project["dependencies"]),
    ]
    return "\n".join(lines) + "\n"


def download(folder: Path) -> Path:
    """Fetch the source wheel into `folder` and return its path; `RuntimeError` when its bytes are not those known."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp", "--abi", "none"]
    command += ["--platform", "any", "--dest", str(folder), SOURCE]
    subprocess.run(command, check=True)
    wheel = folder / SOURCE_FILE
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SOURCE_SHA256:
        raise RuntimeError(
            f"{SOURCE_FILE} has SHA-256 {found}, expected {SOURCE_SHA256}: the registry served another file, "
            "and nothing was installed. Clear the pip cache and try again, or install Detectron2 from its repository."
        )
    return wheel


def repack(source: Path, target: Path) -> None:
    """Write `target`: the files of `source` without compiled code, under our name and metadata."""
    with zipfile.ZipFile(source) as old:
        files = {
            name: old.read(name)
            for name in old.namelist()
            if name.startswith("detectron2/") and not name.endswith((".so", "/"))
        }
        files[f"{DIST_INFO}/licenses/LICENSE"] = old.read(f"{SOURCE_DIST_INFO}/LICENSE")
    files[f"{DIST_INFO}/METADATA"] = metadata_text().encode()
    files[f"{DIST_INFO}/WHEEL"] = WHEEL_TEXT.encode()
    record = [f"{name},{_record_hash(data)},{len(data)}" for name, data in sorted(files.items())]
    files[f"{DIST_INFO}/RECORD"] = "\n".join([*record, f"{DIST_INFO}/RECORD,,"]).encode() + b"\n"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, date_time=(2024, 4, 17, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            new.writestr(entry, data)


def _record_hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"sha256={digest}"


# The PEP 517 hooks.


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with tempfile.TemporaryDirectory() as folder:
        repack(download(Path(folder)), Path(wheel_directory) / WHEEL)
    return WHEEL


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory) / DIST_INFO
    os.makedirs(folder, exist_ok=True)
    (folder / "METADATA").write_text(metadata_text())
    (folder / "WHEEL").write_text(WHEEL_TEXT)
    return DIST_INFO


def build_sdist(sdist_directory, config_settings=None):
    raise RuntimeError("no source distribution is made here: build the wheel, or take Detectron2 from its repository")
