"""Checkpoints: a training that can be stopped and taken up again."""

import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

EVERY = 30  # seconds between two saves


class Checkpoint:
    """Save a training at the end of its steps, and only there.

    Inside `with`, Ctrl-C waits for the end of the step, because weights,
    running averages and random state change in the middle of it.

    Parameters
    ----------
    path : path or None
        Where to save; with None nothing is saved or caught.
    model : nn.Module
    optimizer : torch.optim.Optimizer
    plan : dict
        Numbers that must be the same when the training is taken up again.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: dict,
    ):
        self.path = None if path is None else os.fspath(path)
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self.stopped = False
        self.step, self.saved, self.time = 0, 0, time.monotonic()

    def __enter__(self) -> "Checkpoint":
        self.handler = None
        if self.path is not None:
            try:
                self.handler = signal.signal(signal.SIGINT, self.stop)
            except ValueError:  # only the main thread may; Ctrl-C goes there
                self.handler = None
        return self

    def __exit__(self, kind, *_) -> None:
        if self.handler is not None:
            signal.signal(signal.SIGINT, self.handler)
        if kind is None and self.step > self.saved:
            self.save()

    def stop(self, *_) -> None:
        """Remember that Ctrl-C was pressed; at the second time, give in."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def after(self, step: int) -> None:
        """End a step: save if it is time, and let a Ctrl-C through."""
        self.step = step
        late = time.monotonic() - self.time > EVERY
        if self.path is not None and (self.stopped or late):
            self.save()
        if self.stopped:
            raise KeyboardInterrupt(f"stopped and saved after step {step}")

    def save(self) -> None:
        """Write the file; a crash meanwhile leaves the former one whole."""
        if self.path is None:
            return
        cuda = torch.cuda.is_initialized()
        torch.save(
            {
                "plan": self.plan,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if cuda else [],
            },
            self.path + ".part",
        )
        os.replace(self.path + ".part", self.path)
        self.saved, self.time = self.step, time.monotonic()

    def resume(self, batches: Iterator) -> int:
        """Restore the training from the file, if there is one.

        Parameters
        ----------
        batches : iterator
            Those that were seen are taken off it.

        Returns
        -------
        int
            Steps that were already made.

        Raises
        ------
        ValueError
            If the file is damaged, or of another plan or model.
        """
        if self.path is None or not os.path.exists(self.path):
            return 0
        try:
            data = torch.load(self.path, "cpu", weights_only=True)
            if data["plan"] != self.plan:
                raise ValueError(f"made for {data['plan']}, not {self.plan}")
            self.model.load_state_dict(data["model"])
            self.optimizer.load_state_dict(data["optimizer"])
            # first this: drawing them may use the random state
            deque(islice(batches, data["step"]), maxlen=0)
            torch.set_rng_state(data["random"])
            if data["cuda"]:
                torch.cuda.set_rng_state_all(data["cuda"])
        except (
            OSError,
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(f"checkpoint {self.path}: {error}") from error
        self.step = self.saved = data["step"]
        return self.step
