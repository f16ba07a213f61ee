"""What all benchmarks have in common: a folder's configuration and cells, a run, the settings of methods."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from more_hf.core.files import write_json

from .errors import BenchmarkError, MethodError


SOURCE = "source"  # the setting of a method of the user's own: a hash of its module and those beside it

logger = logging.getLogger(__name__)

Work = TypeVar("Work")


@dataclass(frozen=True)
class Cell:
    """
    One result of a benchmark, which is measured once: it is done when its file exists.

    Attributes:
        method, forget, seed, model, attack:
            What was measured; `model` and `attack` are empty where a benchmark has one model or no attack.
        path (`Path`):
            Its file, named by a hash of everything that determines the content.
    """

    method: str
    forget: str
    path: Path
    seed: int = 0
    model: str = ""
    attack: str = ""

    @property
    def is_done(self) -> bool:
        return self.path.is_file()

    def write(self, measured: Any) -> None:
        """Write the file, atomically; from then on the cell is done."""
        write_json(self.path, measured)

    def read(self) -> Any:
        return json.loads(self.path.read_text("utf-8"))


class BenchmarkConfig:
    """Base of the dataclasses of a benchmark's `config.json`; their fields are its keys."""

    FIXED: ClassVar[tuple[str, ...]]  # fields that must be the same for everything in one folder
    # fields that are mappings, to which each run adds its entries
    JOINED: ClassVar[tuple[str, ...]] = ("methods", "forget")

    more_hf: str  # the version that made the first run
    benchmark: str  # the kind of benchmark
    methods: Mapping[str, Mapping[str, Any]]  # method -> its settings
    forget: Mapping[str, Any]  # everything that is forgotten in turn -> its definition
    seeds: int  # the number of runs of each method; the largest of all runs, unless it is `FIXED`
    # the time, command and machine of each run, from [`~more_hf_bench.machine.this_run`]
    runs: list[dict[str, Any]]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The configuration in JSON's types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: str | Path) -> Self | None:
        """
        Read the configuration of a folder; `None` if it has none yet.

        Raises:
            BenchmarkError: it is the configuration of another kind of benchmark.
        """
        data = read_config(folder)
        if data is None:
            return None
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if not required <= data.keys() <= {field.name for field in fields(cls)}:
            raise BenchmarkError(f"{folder} holds another kind of benchmark. Choose another `--output`.")
        return cls.from_dict(data)

    def write(self, folder: str | Path) -> None:
        """Write `config.json`, atomically."""
        write_json(Path(folder) / "config.json", self.to_dict())

    def joined_with(self, folder: str | Path) -> Self:
        """
        Join this run's configuration with the one in `folder`: all fields in `JOINED`, and the runs.

        Raises:
            BenchmarkError: the two contradict each other. The message says where.
        """
        old = type(self).read(folder)
        if old is None:
            return self
        if old.benchmark != self.benchmark:
            raise BenchmarkError(f"{folder} holds another kind of benchmark. Choose another `--output`.")
        there, here = old.to_dict(), self.to_dict()
        for name in there["methods"].keys() & here["methods"].keys():
            then, now = there["methods"][name], here["methods"][name]
            if then.get(SOURCE) != now.get(SOURCE):
                logger.warning("%s has changed since it was measured: its earlier rows are replaced.", name)
                then[SOURCE] = now[SOURCE]
        differences = [text for key in self.FIXED for text in _differences(key, there[key], here[key])]
        for key in self.JOINED:
            for name in there[key]:
                if name in here[key]:
                    differences += _differences(f"{key}: {name}", there[key][name], here[key][name])
        if differences:
            raise BenchmarkError(
                f"{folder} holds results of another configuration ({'; '.join(differences)}). "
                "Choose another `--output`."
            )
        joined = {key: {**getattr(old, key), **getattr(self, key)} for key in self.JOINED}
        return replace(old, **joined, seeds=max(old.seeds, self.seeds), runs=[*old.runs, *self.runs])

    @property
    def commands(self) -> list[str]:
        """The commands of all runs, each once."""
        return list(dict.fromkeys(run["command"] for run in self.runs))


class Run:
    """
    A benchmark's folder, which may already hold a part of the same benchmark, and the processes that
    `accelerate launch` or `torchrun` started to work on it. Its `config` is what this call runs, joined with
    what the folder holds.

    It can be killed at any point: the same call continues with what is missing.

    Raises:
        BenchmarkError: before anything is written, if the folder holds another benchmark.
    """

    def __init__(self, config: BenchmarkConfig, output: str | Path):
        from .machine import processes  # imports torch, which reading a configuration does not need

        self.state = processes()
        self.output = Path(output)
        self.failed: list[str] = []  # what is left out, because a method of the user's own failed
        self.config = config.joined_with(self.output)
        self.state.wait_for_everyone()  # no process writes before all have read
        if self.state.is_main_process:
            self.config.write(self.output)
        self.state.wait_for_everyone()

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells to do, the same in every process: none writes while another is still looking."""
        self.state.wait_for_everyone()
        missing = [cell for cell in cells if not cell.is_done]
        self.state.wait_for_everyone()
        return missing

    def share(self, work: Sequence[Work]) -> Sequence[Work]:
        """This process's part of the work."""
        # `split_between_processes` would give the last item to every process without one.
        return work[self.state.process_index :: self.state.num_processes]

    @contextmanager
    def going_on(self, method: str, what: str) -> Iterator[None]:
        """Inside the block, an error of a method of the user's own is reported with its traceback."""
        try:
            yield
        except Exception as error:  # the user's code may raise anything
            if SOURCE not in self.config.methods[method]:
                raise
            logger.error("%s is left out: %s: %s", what, type(error).__name__, error, exc_info=error)
            self.failed.append(what)

    def finish(self, write_outputs: Callable[[Path, Any], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """
        Write the tables when all processes are done; their summary, which only the first process has.

        Raises:
            MethodError: afterwards, if a method of the user's own failed.
        """
        self.state.wait_for_everyone()
        summary = write_outputs(self.output, self.config) if self.state.is_main_process else []
        self.state.wait_for_everyone()
        if self.failed:
            raise MethodError(
                f"{', '.join(self.failed)} failed, as said above; everything else is measured and in "
                f"{self.output / 'table.md'}. Mend it and run the same command again."
            )
        return summary


def read_config(folder: str | Path) -> dict[str, Any] | None:
    """Read `config.json` of a benchmark of any kind; `None` if the folder has none."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def held_settings(folder: str | Path) -> Mapping[str, Mapping[str, Any]]:
    """Read the settings of each method that a folder has results of; empty if it has none."""
    return (read_config(folder) or {}).get("methods", {})


def short_hash(value: object) -> str:
    """The name of a cell's folder or file: a hash of the JSON of everything that determines its content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def method_settings(
    function: Callable,
    *given: Mapping[str, Any],
    without: Collection[str],
    held: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Collect a method's settings with the values that it will be called with, for every setting that is given
    or has a default. Its first two parameters are the model and what to forget; those in `without` are no
    settings either.

    The values `given` replace defaults; later mappings take precedence, and names that the method does not
    take are ignored. `held` are the settings with which the folder has results of this method. One that it
    lacks is newer than these results and is left out at its default, at which the method does what it did
    before.
    """
    values = {name: value for mapping in given for name, value in mapping.items()}
    settings = {}
    for name, parameter in _parameters(function, without).items():
        # the source is what it is now, whatever an earlier configuration says
        value = parameter.default if name == SOURCE else values.get(name, parameter.default)
        newer = held is not None and name not in held and value == parameter.default and name != SOURCE
        if value is not inspect.Parameter.empty and not newer:
            settings[name] = value
    return settings


def refuse_unused_settings(
    functions: Mapping[str, Callable],
    settings: Mapping[str, Any],
    tuned: Mapping[str, Mapping[str, Any]],
    *,
    without: Collection[str],
) -> None:
    """
    Check that each of `settings` is taken by some method, and that each method takes its own in `tuned`.

    Raises:
        BenchmarkError: a setting is not taken. The message names the first one.
    """
    taken = {name: _parameters(function, without) for name, function in functions.items()}
    for key in settings:
        if not any(key in names for names in taken.values()):
            raise BenchmarkError(f"No method among {', '.join(functions)} takes `{key}`.")
    for name, names in taken.items():
        for key in tuned.get(name, {}):
            if key not in names:
                raise BenchmarkError(
                    f"{name} takes no `{key}`. It takes {', '.join(names) or 'no settings'}."
                )


def _parameters(function: Callable, without: Collection[str]) -> dict[str, inspect.Parameter]:
    """The parameters of a method that are settings."""
    _, _, *others = inspect.signature(function).parameters.values()
    return {parameter.name: parameter for parameter in others if parameter.name not in without}


def _differences(what: str, there: Any, here: Any) -> list[str]:
    """Describe how two values differ, key by key if both are mappings; empty if they are equal."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        return [f"{what}: {key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in keys]
    return [] if there == here else [f"{what} is {there!r} there, {here!r} here"]
