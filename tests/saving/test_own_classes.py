"""A pipeline and a denoiser of one's own classes: whoever imports their module opens what was saved."""

import importlib
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.hub import card_of
from support.pipelines import build_tiny_sd

import more_hf
from more_hf.cli.main import main
from more_hf.diffusion import families


MODULE = """
import more_hf
from diffusers import ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from more_hf.diffusion.families import FAMILIES

class OwnPipeline(StableDiffusionPipeline):
    pass

class OwnUNet(UNet2DConditionModel):
    pass

more_hf.register_family("OwnUNet", FAMILIES["UNet2DConditionModel", None])
"""
NAME = "module_with_own_classes"


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / f"{NAME}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(families, "_REGISTERED", set())
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def own_pipeline(module):
    parts = build_tiny_sd().components
    unet = module.OwnUNet.from_config(parts["unet"].config)
    unet.load_state_dict(parts["unet"].state_dict())
    return module.OwnPipeline(**{**parts, "unet": unet.eval()}, requires_safety_checker=False)


def test_saved_loaded_verified_and_published(module, tmp_path, hub):
    pipe = more_hf.erase_concept(own_pipeline(module), "van gogh", remap_to="claude monet")
    folder = more_hf.save(pipe, tmp_path / "erased")
    loaded = more_hf.load(folder)
    assert (type(loaded), type(loaded.unet)) == (module.OwnPipeline, module.OwnUNet)
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert more_hf.verify(folder, run=True)
    more_hf.push_to_hub(folder, "me/own")
    assert "OwnPipeline.from_pretrained(" in card_of(hub, "me/own").text


@pytest.mark.slow
def test_the_command_line_imports_the_module(module, tmp_path, capsys):
    own_pipeline(module).save_pretrained("base")
    sys.modules.pop(NAME)
    with_import = ["--import", NAME]
    argv = ["erase", "base", "--concept", "van gogh", "--remap_to", "claude monet", "--output", "erased"]
    assert main(argv) == 2
    assert "--import MODULE" in capsys.readouterr().err
    assert main([*argv, *with_import]) == 0
    assert main(["verify", "erased", *with_import]) == 0
    assert main(["push", "erased", "me/own", "--dry_run", "to_push", *with_import]) == 0
    draw = ["--prompts", "van gogh", "--original", "base", "--steps", "1"]
    assert main(["compare", "erased", *draw, *with_import]) == 0
    assert main(["verify", "erased", "--import", "no_such_module"]) == 2
    assert "`--import no_such_module` failed" in capsys.readouterr().err

    sys.modules.pop(NAME)
    assert main(["verify", "erased"]) == 1
    assert "--import MODULE" in capsys.readouterr().out


def test_a_class_in_no_module_is_refused_before_it_is_saved(tmp_path):
    class Local(StableDiffusionPipeline):
        pass

    pipe = Local(**build_tiny_sd().components, requires_safety_checker=False)
    more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet")
    with pytest.raises(more_hf.ExportError, match="Local is not found in .*Define it at the top of a module"):
        more_hf.save(pipe, tmp_path / "erased")
    assert not (tmp_path / "erased").exists()


def test_a_module_from_which_diffusers_loads_no_model_is_refused(module, tmp_path, monkeypatch):
    pipe = more_hf.erase_concept(own_pipeline(module), "van gogh", remap_to="claude monet")
    monkeypatch.delattr(module, "ModelMixin")
    with pytest.raises(more_hf.ExportError, match=f"OwnUNet only if {NAME} also has the name ModelMixin"):
        more_hf.save(pipe, tmp_path / "erased")
