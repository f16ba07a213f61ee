"""The Space, driven through its API as a visitor's browser does."""

import runpy
from pathlib import Path

import gradio_client
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file


SPACE = Path(__file__).parents[2] / "examples" / "space"


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), float)


@pytest.mark.slow
def test_space(monkeypatch, emoji_sd):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    app = runpy.run_path(str(SPACE / "app.py"))
    demo = app["demo"]
    _, address, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(address, verbose=False)
        text = app["example"]("High Contrast")
        before, after, report, lora = client.predict("High Contrast", ["Fluent"], text, 0, api_name="/erase")
        odd = client.predict("Noto", [], "a crab", 3, api_name="/erase")
        with pytest.raises(gradio_client.exceptions.AppError, match="both erased and in `remap_to`"):
            client.predict("Noto", ["Noto"], "a crab", 0, api_name="/erase")
        with pytest.raises(gradio_client.exceptions.AppError, match="one to eight prompts"):
            client.predict("Noto", ["Fluent"], " \n", 0, api_name="/erase")
    finally:
        demo.close()

    expected = np.asarray(app["draw"](emoji_sd, text.splitlines(), 0), float)
    assert np.array_equal(pixels(before), expected)
    changed = np.abs(pixels(after) - expected).mean(2)
    rocket, house = changed[:192, 192:], changed[192:, 192:]
    assert rocket.mean() > 10
    assert house.mean() < rocket.mean() / 4
    assert "| forgotten | High Contrast |" in report
    assert len(load_file(lora)) == 28
    assert pixels(odd[0]).shape == (192, 384, 3)


@pytest.mark.slow
def test_it_opens_with_a_filled_example():
    app = runpy.run_path(str(SPACE / "app.py"))
    values = [app[name].value for name in ("concept", "targets", "seed")]
    assert values == ["High Contrast", ["Fluent"], 0]
    assert app["prompts"].value == app["example"]("High Contrast")
    assert any(event.targets[0][1] == "load" for event in app["demo"].fns.values())  # and draws it at once


def test_the_spaces_metadata():
    data = ModelCard.load(SPACE / "README.md").data.to_dict()
    assert (data["sdk"], data["app_file"]) == ("gradio", "app.py")
    assert (SPACE / data["app_file"]).is_file()
    assert "more_hf" in (SPACE / "requirements.txt").read_text().split()
