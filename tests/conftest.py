"""What every test gets: one thread, fixed seeds, torch's switches put back; and no skip goes unnoticed."""

import os

# Before torch is imported; the ranks and commands that tests start inherit both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import contextlib
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from skips import NO_CIFAR10, NO_GPU, pytest_configure  # noqa: F401 (pytest finds the hook here)

with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("tost", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("tost")

# A job in a shell's background has Ctrl-C ignored, and with it all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """The folder that holds CIFAR-10's train.parquet and test.parquet."""
    data = Path(os.environ.get("TOST_DATA") or ROOT.parent / "shared" / "data")
    folder = data / "cifar10"
    if not all((folder / name).is_file() for name in ("train.parquet", "test.parquet")):
        pytest.skip(f"{NO_CIFAR10}: set TOST_DATA to a folder that holds cifar10/{{train,test}}.parquet")
    return folder


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _torch_switches() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "grad enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch function modes": torch._C._len_torch_function_stack(),
    }


@pytest.fixture(autouse=True)
def _torch_switches_stay() -> Iterator[None]:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    before = _torch_switches()
    yield
    after = _torch_switches()
    # Put back what can be, so that the next test does not fail for this one's sake.
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad enabled"])
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    if after["default device"] != before["default device"]:
        torch.set_default_device(None)
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test left torch changed (before, after): {changed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))
