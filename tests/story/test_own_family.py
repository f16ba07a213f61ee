"""Somebody has a pipeline of a class of their own, in a module of their own."""

import sys

import pytest
from support.pipelines import build_tiny_sd

from more_hf.cli.main import main


MODULE = """
from diffusers import StableDiffusionPipeline

class PipelineInAStory(StableDiffusionPipeline):
    pass
"""


@pytest.mark.slow
def test_a_pipeline_of_ones_own_class(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pipeline_in_a_story.py").write_text(MODULE)
    import pipeline_in_a_story

    parts = build_tiny_sd().components
    pipeline_in_a_story.PipelineInAStory(**parts, requires_safety_checker=False).save_pretrained("base")
    sys.modules.pop("pipeline_in_a_story")

    argv = ["erase", "base", "--concept", "van gogh", "--remap_to", "claude monet", "--output", "erased"]
    assert main(argv) == 2
    assert "--import MODULE" in capsys.readouterr().err
    with_import = ["--import", "pipeline_in_a_story"]
    assert main([*argv, *with_import]) == 0
    assert main(["verify", "erased", *with_import]) == 0
    assert main(["push", "erased", "me/own", "--dry_run", "to_push", *with_import]) == 0
    draw = ["--original", "base", "--steps", "2", "--output", "picture.png"]
    assert main(["compare", "erased", "--prompts", "van gogh", *draw, *with_import]) == 0
