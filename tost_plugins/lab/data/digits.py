"""The handwritten digits of scikit-learn, which come with it."""

from __future__ import annotations

import torch

from tost_plugins.lab.data.decode import bad_path, vision
from tost_plugins.lab.data.images import Source, Split
from tost_plugins.recipe.recipe import DataSpec


def digits(spec: DataSpec) -> Source:
    """1797 images of 8x8 grey pixels, 360 of them to test on."""
    if spec.path is not None:
        raise bad_path("nothing for 'digits'", spec.path, "remove it")
    found = vision("sklearn.datasets").load_digits()
    images = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    whole = Split(images, torch.from_numpy(found.target).long())
    return *whole.cut(360), [str(name) for name in found.target_names]
