"""A concept that is given by pictures: a folder in place of a name."""

import copy
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, AutoPipelineForImage2Image, DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from support.compare import state
from support.families import TINY, build, copied
from support.pipelines import FORGET, TARGETS, build_tiny_sd

import more_hf
from more_hf import Pictures
from more_hf.cli.main import main
from more_hf.core.facts import is_text
from more_hf.core.record import RECORD
from more_hf.core.request import ConceptRequest
from more_hf.diffusion import activations
from more_hf.diffusion.draw import draw
from more_hf.diffusion.encoder import column
from more_hf.diffusion.given import drawn_sentences, encode_pictures, read_picture, shown_sentences
from more_hf.diffusion.sites import find_denoiser


TARGET = TARGETS[0]
SAMPLING = {"num_inference_steps": 4, "guidance_scale": 3.0}
INSIDE = {"reach": "denoiser", "pictures": 3, "sampling": SAMPLING, "everyday": ("a red house", "two dogs")}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def write_pictures(folder, number=3, seed=0, captions=(), size=(32, 32)):
    folder.mkdir()
    noise = np.random.default_rng(seed)
    for i in range(number):
        coarse = Image.fromarray(noise.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(size, Image.Resampling.NEAREST).save(folder / f"{i}.png")
    for i, caption in enumerate(captions):
        (folder / f"{i}.txt").write_text(caption, "utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "looks")


@pytest.fixture(scope="module")
def original():
    pipe = build_tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def changed(pipe, original):
    before = state(original.unet)
    return {name for name, value in state(pipe.unet).items() if not torch.equal(value, before[name])}


def recorded(pipe, concept, **options):
    request = ConceptRequest.of(concept, remap_to=TARGET, **{**INSIDE, **options})
    (name,) = request.concepts
    return activations.record_activations(pipe, find_denoiser(pipe), request, {name: [TARGET]})


@pytest.mark.parametrize("family", ["sd-1", "sd3", "flux"])
def test_latents_are_those_of_the_family_s_image_to_image_pipeline(family, tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "looks", size=(48, 48))
    pipe = build(family)
    if family != "sd-1":
        pipe.vae.register_to_config(shift_factor=0.3)
    found = encode_pictures(pipe, Pictures(folder), (32, 32))
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    name = "scale_noise" if hasattr(other.scheduler, "scale_noise") else "add_noise"
    noised, seen = getattr(other.scheduler, name), []
    monkeypatch.setattr(other.scheduler, name, lambda z, *args: (seen.append(z), noised(z, *args))[1])
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    options = {**TINY[family].call, "height": 32, "width": 32, "num_inference_steps": 2, "strength": 1.0}
    if family == "sd-1":
        options = {"num_inference_steps": 2, "strength": 1.0}
    pictures = [Image.open(folder / f"{i}.png").resize((32, 32), Image.Resampling.LANCZOS) for i in range(3)]
    other(["a cat"] * 3, image=pictures, output_type="latent", **options)
    expected = seen[0] if family != "flux" else pipe._pack_latents(seen[0], *seen[0].shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).norm() > 1e-2 * found[0].norm()


def test_a_half_precision_vae_encodes_in_float32_and_stays_as_it_is(original, folder):
    pipe = copied(original)
    pipe.register_modules(vae=copy.deepcopy(original.vae).half())
    expected = encode_pictures(original, Pictures(folder), (32, 32))
    found = encode_pictures(pipe, Pictures(folder), (32, 32))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert pipe.vae.dtype is torch.float16


def test_pictures_are_cut_to_size_on_white(tmp_path):
    wide = Image.new("RGBA", (90, 30), (0, 0, 0, 0))
    wide.paste((255, 0, 0, 255), (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    assert read_picture(tmp_path / "wide.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_picture(tmp_path / "wide.png").getpixel((45, 15)) == (255, 0, 0)


def test_shown_as_drawn_pictures_are(original, tmp_path, monkeypatch):
    """From the same latents and sentences, given pictures give what drawn ones do, bit for bit."""
    sentences = ["a picture by {}", "a house", "{} style"]
    sentences[1] = "a {} house"
    folder = write_pictures(tmp_path / "looks", captions=[line.format(FORGET) for line in sentences])
    monkeypatch.setattr(activations, "TEMPLATES", tuple(sentences))
    drawn = recorded(original, FORGET)

    finished = []
    for seed, line in enumerate(sentences):
        options = {**SAMPLING, "generator": torch.Generator().manual_seed(seed), "output_type": "latent"}
        finished.append(original(line.format(FORGET), **options).images)
    monkeypatch.setattr(activations, "encode_pictures", lambda pipe, given, size: torch.cat(finished))
    given = recorded(original, Pictures(folder, FORGET))
    assert given.spaces == drawn.spaces
    for space, prototypes in drawn.prototypes.items():
        torch.testing.assert_close(given.prototypes[space].matrix, prototypes.matrix, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(given.own[space].dense, drawn.own[space].dense, rtol=1e-4, atol=1e-6)
    monkeypatch.undo()
    other = recorded(original, Pictures(folder, FORGET)).prototypes[LAYER]
    name = column(FORGET, activations.PART_NAMES[-1])
    assert (other[name] - drawn.prototypes[LAYER][name]).norm() > 1e-2 * other[name].norm()


@pytest.mark.slow
def test_a_style_s_own_pictures_give_nearly_its_own_edit(tmp_path):
    """On the embedded pipeline, whose VAE is trained: the style in a folder, and drawn by its name."""
    pipe, number = more_hf.load_emoji_sd(), 4
    options = {**INSIDE, "pictures": number, "everyday": None, "sampling": {"num_inference_steps": 8}}
    request = ConceptRequest.of("Blobmoji", remap_to="Fluent", **options)
    everyday = activations.everyday_prompts(pipe.tokenizer)
    captions = activations.picture_prompts(request, {"Blobmoji": ["Fluent"]}, everyday)["Blobmoji"]
    found = {"drawn": prototypes_of(pipe, "Blobmoji", options)}
    for style in ("Blobmoji", "Monotone"):
        folder = tmp_path / style
        folder.mkdir()
        prompts = [caption.replace("Blobmoji", style) for caption in captions]
        for i, picture in enumerate(draw(pipe, prompts, range(number), options["sampling"])):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(captions[i], "utf-8")
        found[style] = prototypes_of(pipe, Pictures(folder, "Blobmoji"), options)
    own, other = (torch.stack(distances(found[style], found["drawn"])) for style in ("Blobmoji", "Monotone"))
    assert own.mean() < 0.2
    assert other.mean() > 3 * own.mean()


def prototypes_of(pipe, concept, options):
    request = ConceptRequest.of(concept, remap_to="Fluent", **options)
    found = activations.record_activations(pipe, find_denoiser(pipe), request, {"Blobmoji": ["Fluent"]})
    return found.prototypes


def distances(prototypes, others):
    """How far each prototype of the concept is from that of another edit, as a share of its way."""
    found = []
    for space, own in others.items():
        for name in {column("Blobmoji", part) for part in activations.PART_NAMES} & set(own.names):
            way = (own[activations.target_of(name)] - own[name]).norm()
            found.append((prototypes[space][name] - own[name]).norm() / way)
    return found


def test_without_a_name_only_layers_inside_are_edited(original, folder, tmp_path):
    pipe = more_hf.erase_concept(copied(original), Pictures(folder), remap_to=TARGET, **INSIDE)
    erasure = more_hf.get_erasure(pipe)
    assert erasure.concepts == ["looks"]
    assert not any(is_text(site.space) for site in erasure.sites.values())
    assert changed(pipe, original) == {f"{name}.weight" for name in erasure.sites}
    assert erasure.proof["layer_changed"] > 100
    assert "The layers that read the prompt were left as they are" in " ".join(str(erasure).split())
    assert "without a name, by 3 pictures" in str(erasure)

    saved = more_hf.save(pipe, tmp_path / "erased")
    assert more_hf.verify(saved, run=True)
    loaded = more_hf.load(saved)
    assert more_hf.get_erasure(loaded).request == erasure.request
    record = (saved / RECORD).read_text("utf-8")
    assert str(folder) not in record
    assert json.loads(record)["request"]["given"] == {
        "looks": {"name": None, "number": 3, "sha256": Pictures(folder).sha256}
    }
    loaded.unet.get_submodule(LAYER).weight.data.mul_(1.01)
    loaded.unet.save_pretrained(saved / "unet")
    assert not more_hf.verify(saved)

    assert not changed(more_hf.restore(pipe), original)


def test_another_folder_gives_another_edit_and_the_same_one_the_same(original, folder, tmp_path):
    others = write_pictures(tmp_path / "other", seed=1)
    edits = []
    for one in (folder, folder, others):
        pipe = more_hf.erase_concept(copied(original), Pictures(one), remap_to=TARGET, **INSIDE)
        edits.append(pipe.unet.get_submodule(LAYER).weight - original.unet.get_submodule(LAYER).weight)
    assert torch.equal(edits[0], edits[1])
    assert (edits[2] - edits[0]).norm() > 5e-3 * edits[0].norm() > 0


def test_with_a_name_the_name_s_layers_are_edited_too(original, folder):
    pipe = more_hf.erase_concept(copied(original), Pictures(folder, "cat"), remap_to=TARGET, **INSIDE)
    by_name = more_hf.erase_concept(copied(original), "cat", remap_to=TARGET, everyday=INSIDE["everyday"])
    sites = more_hf.get_erasure(pipe).sites
    text = {name for name, site in sites.items() if is_text(site.space)}
    assert text == set(more_hf.get_erasure(by_name).sites)
    for name in text:
        edited, expected = (one.unet.get_submodule(name).weight for one in (pipe, by_name))
        torch.testing.assert_close(edited, expected)
    assert len(sites) > len(text)


@pytest.mark.slow
def test_beside_a_concept_with_a_name_each_can_be_given_back(original, folder):
    pipe = more_hf.erase_concept(copied(original), "cat", remap_to=TARGET, everyday=INSIDE["everyday"])
    alone = changed(pipe, original)
    more_hf.erase_concept(
        pipe, Pictures(folder), remap_to=TARGET, **{**INSIDE, "reach": {"looks": "denoiser"}}
    )
    both = changed(pipe, original)
    assert both > alone
    more_hf.restore(pipe, "looks")
    assert changed(pipe, original) == alone
    more_hf.erase_concept(
        pipe, Pictures(folder), remap_to=TARGET, **{**INSIDE, "reach": {"looks": "denoiser"}}
    )
    more_hf.restore(pipe, "cat")
    assert changed(pipe, original) == both - alone
    (folder / "3.png").write_bytes((folder / "2.png").read_bytes())
    with pytest.raises(more_hf.PrototypeError, match="4 pictures or captions .* are not the 3"):
        more_hf.erase_concept(pipe, "dog", remap_to=TARGET)
    assert changed(pipe, original) == both - alone


def inside(family):
    sampling = {**TINY[family].call, "num_inference_steps": 2, "height": 32, "width": 32}
    return {**INSIDE, "sampling": sampling}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart", "z-image", "sana"])
def test_other_families(family, folder):
    pipe = build(family)
    before = {name: value.clone() for name, value in state(find_denoiser(pipe).module).items()}
    more_hf.erase_concept(pipe, Pictures(folder), remap_to=TARGET, **inside(family))
    proof = more_hf.get_erasure(pipe).proof
    assert proof["layer_error"] < 4 < proof["layer_changed"]
    more_hf.restore(pipe)
    assert all(torch.equal(v, before[k]) for k, v in state(find_denoiser(pipe).module).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "message"), [("kandinsky-5", "draws no pictures"), ("qwen-image", "how to"), ("wan", "how to")]
)
def test_families_whose_vae_is_not_known_are_refused(family, message, folder):
    pipe = build(family)
    pipe.resolutions = [(32, 32)]  # of Kandinsky 5, which draws no others
    with pytest.raises(more_hf.SiteNotFoundError, match=message):
        more_hf.erase_concept(pipe, Pictures(folder), remap_to=TARGET, **inside(family))
    assert more_hf.get_erasure(pipe) is None


@pytest.mark.slow
def test_written_as_a_lora(original, folder, tmp_path):
    pipe = more_hf.erase_concept(copied(original), Pictures(folder), remap_to=TARGET, **INSIDE)
    file = more_hf.save_lora(pipe, tmp_path / "lora.safetensors", dtype=torch.float32)
    plain = copied(original)
    plain.load_lora_weights(file.parent, weight_name=file.name)
    drawn = [draw(one, ["a cat"], [0], SAMPLING).float() for one in (pipe, plain, original)]
    assert (drawn[0] - drawn[1]).abs().max() <= 1 < (drawn[0] - drawn[2]).abs().max()


def test_captions_beside_the_pictures_or_in_a_list(tmp_path):
    folder = write_pictures(tmp_path / "looks", number=4, captions=["a cat by goya\n"])
    rows = [{"file_name": "1.png", "text": "a {} dog"}, {"file_name": "2.png", "text": "a boat"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    given = Pictures(folder, "Goya")
    assert list(given.captions().values()) == ["a cat by goya", "a {} dog", "a boat", ""]
    assert shown_sentences(given, 5) == ["a cat by {}", "a {} dog", "a boat", "", "a cat by {}"]
    ordinary = [f"{i} {{}}" for i in range(4)]
    assert drawn_sentences(given, ordinary) == ["a cat by {}", "a {} dog", "a boat, {}", "3 {}"]
    request = ConceptRequest.of(given, remap_to=TARGET, **INSIDE)
    assert request.pictures == 4  # all of them
    beside = activations._prompts_beside(request, {"Goya": [TARGET]})
    assert beside["Goya"] == ["a cat by Goya", "a Goya dog", "a boat", ""]
    assert beside[activations.in_place_of("Goya", TARGET)] == [
        f"a cat by {TARGET}", f"a {TARGET} dog", "a boat", "",
    ]  # fmt: skip


def test_the_hash_is_over_files_and_captions(folder):
    given, digest = Pictures(folder), hashlib.sha256()
    for i in range(3):
        digest.update(hashlib.sha256((folder / f"{i}.png").read_bytes()).digest())
    assert (given.number, given.sha256) == (3, digest.hexdigest())
    assert given == Pictures(str(folder)) != Pictures(folder, "goya")
    (folder / "0.txt").write_text("a cat", "utf-8")
    assert Pictures(folder) != given


def broken(folder):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:90])


def too_few(folder):
    (folder / "1.png").rename(folder / "1.dat")


def without_text(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png"}', "utf-8")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (too_few, {}, "has 2 picture"),
        (without_text, {}, "`file_name` and `text`"),
        (broken, {}, "1.png cannot be read as a picture"),
        (None, {"reach": "name"}, "only the layers inside the denoiser read"),
        (None, {"router": "hash"}, "'looks' has no name"),
    ],
)
def test_bad_input_is_refused_before_anything_is_changed(original, folder, change, options, message):
    if change is not None:
        change(folder)
    pipe = copied(original)
    with pytest.raises(more_hf.PrototypeError, match=message):
        more_hf.erase_concept(pipe, Pictures(folder), remap_to=TARGET, **{**INSIDE, **options})
    assert not changed(pipe, original)
    assert more_hf.get_erasure(pipe) is None


def test_other_wrong_requests(folder, tmp_path):
    with pytest.raises(more_hf.PrototypeError, match="is no folder"):
        Pictures(tmp_path / "nowhere")
    with pytest.raises(more_hf.PrototypeError, match="no name"):
        ConceptRequest.of({Pictures(folder): ["goya"]}, remap_to=TARGET, **INSIDE)
    twin = tmp_path / "twin"
    twin.mkdir()
    same = [Pictures(folder), Pictures(write_pictures(twin / "looks"))]
    with pytest.raises(more_hf.PrototypeError, match="Two concepts are called 'looks'"):
        ConceptRequest.of(same, remap_to=TARGET, **INSIDE)
    data = ConceptRequest.of(same[0], remap_to=TARGET, **INSIDE).to_dict()
    for wrong in (3, {"name": None, "number": 3, "sha256": "../x"}, {"name": None, "number": True}):
        with pytest.raises(more_hf.PrototypeError, match="name, number and sha256"):
            ConceptRequest.from_dict({**data, "given": {"looks": wrong}})


@pytest.mark.parametrize("vae", [None, "tiny", "scaled by mean"])
def test_a_pipeline_that_cannot_encode_pictures_is_refused(original, folder, vae):
    pipe = copied(original)
    if vae == "tiny":
        channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        pipe.register_modules(vae=AutoencoderTiny(**channels))
    elif vae is None:
        pipe.vae = None
    else:
        pipe.register_modules(vae=copy.deepcopy(original.vae))
        pipe.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(more_hf.SiteNotFoundError, match="how to encode pictures"):
        more_hf.erase_concept(pipe, Pictures(folder), remap_to=TARGET, **INSIDE)
    assert not changed(pipe, original)


def test_latents_of_another_form_are_refused(original, folder):
    pipe = copied(original)
    pipe._pack_latents = lambda z, *shape: z.flatten(2)
    with pytest.raises(
        more_hf.SiteNotFoundError, match=r"of the form \(4, 16, 16\), and its VAE .* \(4, 256\)"
    ):
        more_hf.erase_concept(pipe, Pictures(folder), remap_to=TARGET, **INSIDE)
    assert not changed(pipe, original)


def test_a_record_has_no_pictures_to_erase_again_from(original, folder):
    request = ConceptRequest.of(Pictures(folder), remap_to=TARGET, **INSIDE)
    read = ConceptRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert read == request
    with pytest.raises(more_hf.PrototypeError, match="a record does not hold"):
        activations.record_activations(original, find_denoiser(original), read, {"looks": [TARGET]})
    later = ConceptRequest.of("looks", remap_to=TARGET)
    assert not replace(request).joined(later).given  # now a name
    assert not request.joined(ConceptRequest.of("cat", remap_to=TARGET)).without(["looks"]).given


def test_the_command_takes_a_folder(folder, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(more_hf, "load_emoji_sd", lambda **options: seen.append(1) or 1 / 0, raising=False)
    argv = [
        "erase",
        "emoji-sd",
        "--pictures",
        str(folder),
        "--remap_to",
        "Fluent",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 2
    assert "reach='denoiser'" in capsys.readouterr().err
    assert not seen
    with pytest.raises(ZeroDivisionError):
        main([*argv, "--reach", "denoiser"])
    assert main([*argv, "--reach", "denoiser", "--concept", "Noto", "Blobmoji"]) == 2
    assert "of one concept, and 2 are named" in capsys.readouterr().err
