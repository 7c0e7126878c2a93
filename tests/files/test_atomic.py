"""Files are whole, or what they were."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tost_plugins import Mask
from tost_plugins.files.atomic import replacing


def test_a_mask_is_the_same_file_each_time(tmp_path: Path) -> None:
    mask = Mask({'ein"ä': torch.eye(5), "b": torch.ones(3, 7)})
    written = set()
    for _ in range(16):
        mask.save(tmp_path / "m.safetensors")
        written.add((tmp_path / "m.safetensors").read_bytes())
    assert len(written) == 1 and Mask.load(tmp_path / "m.safetensors") == mask
    assert load_file(tmp_path / "m.safetensors").keys() == {'ein"ä', "b"}


def test_what_fails_while_it_is_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, b"old")]
