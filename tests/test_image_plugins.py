"""HEIC and JPEG XL as the real plugins write and read them, where they are installed.

The extra ``dev`` does not install them: other tests are about what is said without them.
"""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from precompute.images.decode import image_size, open_image
from tests.image_files import scene

FORMS = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_comes_through_its_plugin(form: str) -> None:
    plugin: Any = pytest.importorskip(FORMS[form])
    if form == "HEIF":
        plugin.register_heif_opener()
    file = io.BytesIO()
    original = scene((96, 64))
    original.save(file, form, quality=95)
    data = file.getvalue()
    assert image_size(data) == (96, 64)
    opened = open_image(data)
    assert opened.size == (96, 64) and opened.mode == "RGB"
    difference = np.asarray(opened).astype(int) - np.asarray(original.convert("RGB"))
    assert np.abs(difference).mean() < 6
    with pytest.raises(Exception):  # noqa: B017 - whatever the plugin raises, the file is rejected
        open_image(data[: len(data) // 2])
    assert Image.open(io.BytesIO(data)).format == form
