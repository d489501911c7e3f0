"""The tiny sample of shapes, made once a process and shared by the tests that only read it."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from twist.catalog.sample.make import Sample, make_sample


@functools.cache
def tiny_sample() -> Sample:
    folder = Path(tempfile.mkdtemp(prefix="tiny-sample-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_sample(folder / "root", size="tiny", progress=False)
