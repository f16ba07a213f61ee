"""A pass over a data set that goes on where it was killed: its sums, and how far it was, in a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from ..core.errors import PrototypeError
from ..core.files import replacing
from ..core.prototypes import PrototypeFitter, Totals
from ..core.site import fingerprint


SAVED_EVERY = 30.0  # seconds between two writes of the file


@dataclass
class SavedPass:
    """The file of one pass over a `DataLoader`, which gives the same batches each time."""

    # Where the sums are. It stays when the pass has ended, and is a pass of no batch from then on.
    file: Path
    about: dict[str, Any]  # Of which data and model, in JSON's types. Another one is refused.
    done: int = 0  # batches that the sums have
    written: float = field(default_factory=time.monotonic)

    @classmethod
    def of(
        cls, file: str | os.PathLike, loader: Any, heads: Mapping[str, nn.Module], about: Any
    ) -> SavedPass:
        """
        The file of a pass that reads these heads' features.

        Raises:
            `PrototypeError`: the loader does not give the same batches each time, or several processes share
            them.
        """
        if PartialState().num_processes > 1:
            raise PrototypeError("`resume` is for one process, and there are several. Leave it out.")
        # any other sampler, and a batch sampler of the user's own, may draw an order anew
        in_order = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
        if not in_order or (loader.batch_size is None and loader.batch_sampler is not None):
            raise PrototypeError(
                "`resume` needs the same batches each time, and this loader may shuffle. Pass a "
                "DataLoader that does not."
            )
        weights = fingerprint({name: head.weight for name, head in heads.items()})
        sizes = {"batches": len(loader), "batch_size": loader.batch_size}
        return cls(Path(file), {**about, **sizes, "heads": weights})

    def restore(self, fitter: PrototypeFitter) -> None:
        """
        Give a fitter the sums in the file, if there is one, and note how many batches they have.

        Raises:
            `PrototypeError`: the file is no such file, or of other data or another model.
        """
        if not self.file.exists():
            return
        device = fitter.totals.sums.device
        try:
            with safe_open(self.file, "pt", device=str(device)) as file:
                facts = json.loads(file.metadata()["pass"])
                totals = Totals(**{name: file.get_tensor(name) for name in Totals._fields})
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise PrototypeError(
                f"{self.file} does not hold the sums of a pass: {error}. Name another file for `resume`."
            ) from error
        if other := [key for key in self.about if facts["about"].get(key) != self.about[key]]:
            raise PrototypeError(
                f"{self.file} holds a pass over other data or of another model: `{other[0]}` was "
                f"{facts['about'].get(other[0])!r} and is {self.about[other[0]]!r}. Name another file for "
                "`resume`, or delete it."
            )
        fitter.totals, self.done = totals, facts["done"]

    def add_batch(self, fitter: PrototypeFitter) -> None:
        """Count one batch more, and write the file where the last time is long ago."""
        self.done += 1
        if time.monotonic() - self.written >= SAVED_EVERY:
            self.write(fitter)

    def write(self, fitter: PrototypeFitter) -> None:
        """Write the sums so far, atomically."""
        facts = json.dumps({"about": self.about, "done": self.done})
        with replacing(self.file) as draft:
            save_file(fitter.totals._asdict(), draft, metadata={"pass": facts})
        self.written = time.monotonic()
