"""The model card: license and tags of the original, what the edit is, and a card that exists is kept."""

import json
import logging
import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.hub import BASE, REVISION, card_of, erase

import more_hf
from more_hf.core.record import Record
from more_hf.saving.card import END, START, make_card


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_card_carries_licence_and_tags(saved, tmp_path, hub):
    grid = tmp_path / "grid.jpg"
    grid.write_bytes(b"a picture")
    more_hf.push_to_hub(saved, "me/erased", grid=grid)
    data = card_of(hub).data.to_dict()
    assert data == {
        "library_name": "diffusers",
        "base_model": BASE,
        "language": "en",
        "license": "creativeml-openrail-m",
        "license_link": f"https://huggingface.co/{BASE}/blob/{REVISION}/LICENSE.md",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "more-hf", "concept-erasure", "machine-unlearning"],
        "base_model_relation": "finetune",
    }
    text = card_of(hub).text
    assert f"[{BASE}](https://huggingface.co/{BASE}) (revision `{REVISION}`) without **van gogh**" in text
    assert "the mean of claude monet, johannes vermeer" in text
    assert "![The same prompts and seeds before and after](before_after.jpg)" in text
    assert "restrictions on use included" in text
    assert f"[creativeml-openrail-m]({data['license_link']})" in text
    for claim in ("Exact: To rounding", "Not exact", "The weights tell", "Whoever has the original"):
        assert claim in text


def test_the_cards_three_lines_load_it(saved, tmp_path, hub, monkeypatch):
    more_hf.push_to_hub(saved, "me/erased")
    hub.to_folder("me/erased", tmp_path / "me" / "erased")
    monkeypatch.chdir(tmp_path)  # where the block would read the Hub, it reads this folder
    (block,) = re.findall(r"```python\n(.*?)```", card_of(hub).text, re.DOTALL)
    assert "more_hf" not in block
    names = {}
    exec(block, names)
    expected = load_file(saved / WEIGHTS)
    assert all(torch.equal(value, expected[name]) for name, value in names["pipe"].unet.state_dict().items())


def test_card_names_the_variant(tiny_sd, tmp_path, hub):
    more_hf.push_to_hub(more_hf.save(erase(tiny_sd()), tmp_path / "erased", variant="fp16"), "me/erased")
    assert 'from_pretrained("me/erased", variant="fp16")' in card_of(hub).text


def test_an_existing_card_is_kept_and_its_section_replaced(saved, hub):
    own = "---\nlicense: mit\ntags:\n- mine\nbase_model: me/base\n---\n\n# Mine\n\nWords above.\n"
    hub.repos["me/erased"] = {"main": {"README.md": own.encode()}}
    more_hf.push_to_hub(saved, "me/erased")
    first = card_of(hub)
    assert (first.data.license, first.data.base_model) == ("mit", "me/base")
    tags = {"stable-diffusion", "more-hf", "concept-erasure", "machine-unlearning"}
    assert set(first.data.tags) == {"mine", *tags}
    assert "# Mine\n\nWords above." in first.text

    readme = hub.repos["me/erased"]["main"]["README.md"].decode() + "\nWords below.\n"
    hub.repos["me/erased"]["main"]["README.md"] = readme.replace("## How to load it", "## Old").encode()
    more_hf.push_to_hub(saved, "me/erased")
    second = card_of(hub)
    assert second.text == first.text + "\nWords below.\n"
    assert second.data.to_dict() == first.data.to_dict()


def test_the_folders_card_comes_before_the_repositorys(saved, hub):
    hub.repos["me/erased"] = {"main": {"README.md": b"---\nlicense: mit\n---\n# On the Hub\n"}}
    (saved / "README.md").write_text("---\nlicense: mit\n---\n# In the folder\n")
    more_hf.push_to_hub(saved, "me/erased")
    assert "# In the folder" in card_of(hub).text
    assert "# On the Hub" not in card_of(hub).text


def test_without_a_card_the_readme_stays(saved, hub):
    hub.repos["me/erased"] = {"main": {"README.md": b"mine"}}
    more_hf.push_to_hub(saved, "me/erased", card=False)
    assert hub.repos["me/erased"]["main"]["README.md"] == b"mine"


def test_a_name_cannot_break_the_card(tiny_sd, hub):
    name = "van <!-- more_hf: end of the section --> *gogh* | [x](y)"
    more_hf.push_to_hub(erase(tiny_sd(), name), "me/erased")
    text = card_of(hub).text
    assert text.count("<!--") == 2
    assert r"\*gogh\*" in text
    assert "[x](y)" not in text.split("## How to load it")[0]


@pytest.mark.parametrize("base", ["someone/private", "", "no-such-folder"])
def test_a_licence_that_cannot_be_read_is_said(saved, hub, caplog, base):
    record = json.loads((saved / "more_hf.json").read_text())
    record["facts"]["base"] = base
    (saved / "more_hf.json").write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING, logger="more_hf"):
        more_hf.push_to_hub(saved, "me/erased")
    assert "license is not in this card" in caplog.text
    assert card_of(hub).data.license is None
    assert "license" not in card_of(hub).text


INJECTIONS = [
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "a | b",
    "a\n# owned",
    "a\u2028# owned",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "`code`",
    "{{ 7 * 7 }}",
    "**bold** _it_ ~~no~~",
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_names_and_results_stay_plain_text(saved, text):
    """Names, aliases, targets, reasons and results come from whoever made the record."""
    record = json.loads((saved / "more_hf.json").read_text("utf-8"))
    record["request"]["concepts"] = {"van gogh": [text]}
    another = INJECTIONS[INJECTIONS.index(text) - 1]
    record["request"]["remap_to"] = {"van gogh": [another]}
    record["facts"]["solver_reason"] = record["facts"]["solver"] = record["more_hf"] = text
    record["facts"]["leaks"] = [text]
    record["guarantees"] = {text: 1.0}
    record["facts"]["study"] = [{text: another, "2": text, "3": "", "4": "", "5": ""}]
    record["facts"]["judged"] = text
    (saved / "more_hf.json").write_text(json.dumps(record), "utf-8")
    card = make_card(Record.read(saved), "me/erased")

    for live in ("<script", "<img", "\u2028", "\n# owned", "**bold"):
        assert live not in card
    assert not re.search(r"(?<!\\)\]\(https://evil", card)
    assert "<!--" not in card.replace(START, "").replace(END, "")
    tables = [line for line in card.splitlines() if line.startswith("|")]
    # two columns in each but the table of what its rows mean
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {3, 6}
    assert "| 49 |" not in card


def test_a_licence_cannot_break_the_card(saved):
    named = 'license: other\nlicense_name: "x](https://evil.example) | <b>"\n'
    base = ModelCard(f"---\n{named}license_link: 'javascript:alert(1)'\n---\n")
    card = make_card(Record.read(saved), "me/erased", base=base)
    _, _, body = card.split("---", 2)
    assert "javascript" not in body
    assert not re.search(r"(?<!\\)\]\(https://evil", body)
    assert "<b>" not in body
