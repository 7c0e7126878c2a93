"""The run's clock in the model, which every checkpoint carries: written in each step, and noticed when it was loaded."""

from __future__ import annotations

from torch import nn

from tost_plugins.session import buffers
from tost_plugins.training.clock import Clock


class SavedClock:
    """The clock buffer of an attached model. `stepped` says whether this very session has seen a step, `gone_back` whether
    the last that happened to its run was the loading of an older checkpoint, `has_lengths` whether a loaded one says how long the
    run is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stepped = self.gone_back = self.has_lengths = False
        self._written: tuple[int, int] | None = None  # identity and version of the buffer when last written

    @property
    def step(self) -> int:
        """The step that the buffer holds: that of a loaded checkpoint; -1 before the first start."""
        clock = buffers.read_clock(self.model)
        return -1 if clock is None else clock.step

    @property
    def was_written(self) -> bool:
        """Whether it has ever been written by this session."""
        return self._written is not None

    @property
    def was_loaded(self) -> bool:
        """Whether somebody else has written it since, as loading a checkpoint does."""
        return self._written != buffers.version(self.model)

    def write(self, clock: Clock, lengths: bool = False) -> None:
        """Put the step into the buffer, and at first, and with `lengths`, the run's lengths too."""
        self._written = buffers.write_clock(self.model, clock, lengths or self._written is None)

    def load(self, clock: Clock) -> Clock:
        """The clock to go on with: the saved step, and the run's length as it was at its start, or else that of `clock`."""
        saved = buffers.read_clock(self.model) or clock
        self.gone_back = self.stepped and saved.step < clock.step
        total, per_epoch = saved.total_steps, saved.steps_per_epoch
        self.has_lengths = total is not None or per_epoch is not None
        return Clock(
            saved.step,
            clock.total_steps if total is None else total,
            clock.steps_per_epoch if per_epoch is None else per_epoch,
        )
