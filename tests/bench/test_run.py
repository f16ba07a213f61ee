import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from more_hf_bench.machine import processes
from more_hf_bench.run import (
    BenchmarkConfig,
    BenchmarkError,
    held_settings,
    method_settings,
    read_config,
    refuse_unused_settings,
)


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    FIXED: ClassVar = ("generation", "seeds")

    benchmark: str = "small"
    more_hf: str = "1"
    generation: Any = None
    seeds: int = 1
    methods: Any = None
    forget: Any = None
    runs: Any = ()


def config(**changes):
    given = {
        "generation": {"steps": 3, "sizes": (1, 2)},
        "methods": {"a": {"lamb": 1.0}},
        "forget": {"x": ["y"]},
    }
    return Config(**{**given, "runs": [{"command": "first"}], **changes})


def test_a_further_run_joins_a_folder(tmp_path):
    assert Config.read(tmp_path) is None
    assert read_config(tmp_path) is None
    config().joined_with(tmp_path).write(tmp_path)
    later = config(methods={"b": {}}, forget={"x": ["y"], "z": ["y"]}, runs=[{"command": "second"}])
    joined = later.joined_with(tmp_path)
    assert list(joined.methods) == ["a", "b"]
    assert list(joined.forget) == ["x", "z"]
    assert joined.commands == ["first", "second"]
    joined.write(tmp_path)
    assert Config.read(tmp_path).to_dict() == joined.to_dict() == read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": {"steps": 4, "sizes": (1, 2)}}, r"generation: steps is 3 there, 4 here"),
        ({"seeds": 2}, r"seeds is 1 there, 2 here"),
        ({"methods": {"a": {"lamb": 2.0}}}, r"methods: a: lamb is 1.0 there, 2.0 here"),
        ({"forget": {"x": ["z"]}}, r"forget: x is \['y'\] there, \['z'\] here"),
        ({"benchmark": "other"}, "another kind"),
    ],
)
def test_a_contradicting_run_is_refused(tmp_path, change, message):
    config().write(tmp_path)
    with pytest.raises(BenchmarkError, match=message):
        config(**change).joined_with(tmp_path)


def test_a_folder_with_other_keys_is_of_another_kind(tmp_path):
    config().write(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "more": 1}))
    with pytest.raises(BenchmarkError, match="another kind"):
        Config.read(tmp_path)


def method(pipe, concept, *, lamb=0.5, seed=0, scale):
    """A method with a setting that has no default."""


def test_settings_of_a_method():
    assert method_settings(method, without=()) == {"lamb": 0.5, "seed": 0}
    assert method_settings(method, without=["seed"]) == {"lamb": 0.5}
    given = {"lamb": 1.0, "scale": 2.0, "pipe": 3, "other": 4}
    settings = method_settings(method, given, {"lamb": 5.0}, without=())
    assert settings == {"lamb": 5.0, "seed": 0, "scale": 2.0}


def test_a_setting_newer_than_a_folder_is_left_out_at_its_default(tmp_path):
    assert held_settings(tmp_path) == {}
    config(methods={"m": {"seed": 0, "scale": 2.0}}).write(tmp_path)
    held = held_settings(tmp_path)["m"]
    scale = {"scale": 2.0}
    assert method_settings(method, scale, without=(), held=held) == held
    # Another value is no default, so it is told, and refused when it joins the folder.
    other = method_settings(method, scale, {"lamb": 1.0}, without=(), held=held)
    assert other == {"lamb": 1.0, **held}
    with pytest.raises(BenchmarkError, match="m: lamb is None there, 1.0 here"):
        config(methods={"m": other}).joined_with(tmp_path)


def test_settings_that_nobody_takes_are_refused():
    tuned = {"m": {"scale": 2.0}, "absent": {"x": 1}}
    refuse_unused_settings({"m": method}, {"lamb": 1.0}, tuned, without=())
    with pytest.raises(BenchmarkError, match="No method among m takes `temperature`"):
        refuse_unused_settings({"m": method}, {"temperature": 1}, {}, without=())
    for name in ("pipe", "seed"):
        with pytest.raises(BenchmarkError, match=f"m takes no `{name}`. It takes lamb, scale"):
            refuse_unused_settings({"m": method}, {}, {"m": {name: 1}}, without=["seed"])


def test_a_device_of_ones_choice_holds_for_the_whole_process():
    own = processes().device
    try:
        assert processes(torch.device("meta")).device.type == "meta" != own.type
        assert processes().device.type == "meta"
    finally:
        processes(own)
