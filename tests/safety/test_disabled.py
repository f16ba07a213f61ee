"""`disabled` shows the original to one context and never writes it into a parameter."""

import copy
import pickle
import threading
from contextlib import ExitStack

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from support.compare import same, state
from support.processes import in_threads

import more_hf


pytestmark = pytest.mark.usefixtures("one_thread")


def erase(pipe, **options):
    options = {"remap_to": "claude monet", "solver": "pinv", **options}
    return more_hf.erase_concept(pipe, "van gogh", **options)


def run(pipe, **options):
    """One call of the denoiser on a prompt that was forgotten."""
    generator = torch.Generator().manual_seed(0)
    unet = pipe.unet
    text = torch.randn(2, 8, unet.config.cross_attention_dim, generator=generator).to(unet.dtype)
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(unet.dtype)
    with torch.no_grad():
        return unet(sample, torch.tensor(500), encoder_hidden_states=text).sample


def hooks_of(module):
    counts = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    return sum(counts)


def stance():
    return torch._dynamo.eval_frame._stance.stance


@pytest.fixture
def pair(tiny_sd):
    """An erased pipeline, what its denoiser gives, and what the original's gives."""
    pipe = tiny_sd()
    original = run(pipe)
    erase(pipe)
    erased = run(pipe)
    assert (original - erased).abs().max() > 1e-4
    return pipe, erased, original


def test_it_gives_the_pipeline_that_it_was_given(pair):
    pipe, _, original = pair
    with more_hf.disabled(pipe) as inside:
        assert inside is pipe
        assert torch.equal(run(inside), original)
    more_hf.restore(pipe)
    with pytest.raises(more_hf.MoreError, match="nothing to disable"), more_hf.disabled(pipe):
        pass


def test_blocks_that_overlap_in_one_context(pair):
    pipe, erased, original = pair
    before, hooks = state(pipe.unet), hooks_of(pipe.unet)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(more_hf.disabled(pipe))
        second.enter_context(more_hf.disabled(pipe))
        first.close()
        assert torch.equal(run(pipe), original)
        second.close()
    assert torch.equal(run(pipe), erased)
    assert same(pipe.unet, before)
    assert hooks_of(pipe.unet) == hooks
    more_hf.restore(pipe)  # which is refused while a block is open
    assert torch.equal(run(pipe), original)


def test_blocks_that_overlap_in_two_threads(pair):
    pipe, erased, original = pair
    hooks, barrier, seen = hooks_of(pipe.unet), threading.Barrier(2, timeout=60), {}

    def first():
        with more_hf.disabled(pipe):
            barrier.wait()  # both are in
            barrier.wait()
            seen["A inside"] = run(pipe)
        seen["A outside"] = run(pipe)
        barrier.wait()  # A is out

    def second():
        barrier.wait()
        with more_hf.disabled(pipe):
            barrier.wait()
            barrier.wait()
            seen["B inside"] = run(pipe)
        seen["B outside"] = run(pipe)

    # the barrier's second round lets B enter before A leaves
    in_threads(first, second)
    for name, output in seen.items():
        assert torch.equal(output, original if "inside" in name else erased), name
    assert len(seen) == 4
    assert hooks_of(pipe.unet) == hooks


@pytest.mark.parametrize("router", [None, "hash"])
def test_no_thread_sees_a_mixture(tiny_sd, router):
    pipe = tiny_sd()
    original = run(pipe)
    erase(pipe, router=router, remap_to=["claude monet", "johannes vermeer"])
    erased, before = run(pipe), state(pipe.unet)
    seen, shown = [], []

    def generate():
        for _ in range(10):
            seen.append(run(pipe))

    def look():
        for _ in range(6):
            with more_hf.disabled(pipe):
                shown.append(run(pipe))
            seen.append(run(pipe))

    in_threads(generate, generate, look, look)
    assert all(torch.equal(output, erased) for output in seen)
    assert all(torch.equal(output, original) for output in shown)
    assert same(pipe.unet, before)


def test_a_context_that_outlives_the_block_sees_the_erased_model(pair):
    """A task of asyncio starts with a copy of the context, and goes on after the block."""
    import contextvars

    pipe, erased, original = pair
    with more_hf.disabled(pipe):
        copied = contextvars.copy_context()
        assert torch.equal(copied.run(run, pipe), original)
    other = threading.Event(), threading.Event()

    def hold():
        with more_hf.disabled(pipe):
            other[0].set()
            other[1].wait(60)

    def outlive():
        other[0].wait(60)
        try:
            assert torch.equal(copied.run(run, pipe), erased)
        finally:
            other[1].set()

    in_threads(hold, outlive)


@pytest.mark.parametrize("name", ["state_dict", "deepcopy", "pickle", "save"])
def test_what_is_copied_inside_the_block_is_erased(pair, tmp_path, name):
    pipe, erased, _ = pair
    expected = state(pipe.unet)
    with more_hf.disabled(pipe):
        if name == "state_dict":
            copied = state(pipe.unet)
        elif name == "deepcopy":
            twin = copy.deepcopy(pipe)
            copied = twin.unet.state_dict()
            assert torch.equal(run(twin), erased)
        elif name == "pickle":
            copied = pickle.loads(pickle.dumps(pipe.unet)).state_dict()
        else:
            pipe.unet.save_pretrained(tmp_path)
            copied = type(pipe.unet).from_pretrained(tmp_path).state_dict()
    assert copied.keys() == expected.keys()
    assert all(torch.equal(copied[key], value) for key, value in expected.items())
    if name == "deepcopy":
        with more_hf.disabled(pipe):
            assert torch.equal(run(twin), erased)


def test_projections_fused_inside_the_block(pair, tmp_path):
    pipe, erased, _ = pair
    with pytest.raises(more_hf.MoreError, match="fused|replaced"), more_hf.disabled(pipe):
        pipe.fuse_qkv_projections()
    assert torch.allclose(run(pipe), erased, atol=1e-5)  # what was fused is the erased weights
    verbs = (more_hf.restore, lambda pipe: more_hf.save(pipe, tmp_path / "saved"))
    for verb in (lambda pipe: more_hf.disabled(pipe).__enter__(), *verbs):
        with pytest.raises(more_hf.SiteNotFoundError, match="fused|replaced"):
            verb(pipe)
    assert more_hf.get_erasure(pipe) is not None
    pipe.unfuse_qkv_projections()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "module"])
def test_compiled(tiny_sd, how):
    pipe = tiny_sd()
    original = run(pipe)
    erase(pipe)
    erased = run(pipe)
    if how == "whole":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    try:
        before = stance()
        for _ in range(2):
            torch.testing.assert_close(run(pipe), erased)
            with more_hf.disabled(pipe):
                assert torch.equal(run(pipe), original)
            torch.testing.assert_close(run(pipe), erased)
        assert stance() == before
    finally:
        torch.compiler.reset()


@pytest.mark.slow
def test_compiled_inside_the_block(pair):
    pipe, erased, original = pair
    try:
        with more_hf.disabled(pipe):
            pipe.unet.compile(backend="eager")
            assert torch.equal(run(pipe), original)
        torch.testing.assert_close(run(pipe), erased)
    finally:
        torch.compiler.reset()


def test_the_stance_of_overlapping_blocks(pair):
    """Neither block may put the compiler back while the other is open, nor the second one afterwards."""
    pipe, _, _ = pair
    before = stance()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(more_hf.disabled(pipe))
        second.enter_context(more_hf.disabled(pipe))
        first.close()
        assert stance() == "force_eager"
    assert stance() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_dtypes(tiny_sd, dtype, when):
    reference = tiny_sd().to(dtype)
    original = run(reference)
    pipe = tiny_sd()
    if when == "before":
        pipe.to(dtype)
    erase(pipe)
    pipe.to(dtype)
    erased = run(pipe)
    assert not torch.equal(erased, original)
    with more_hf.disabled(pipe):
        assert torch.equal(run(pipe), original)
    assert torch.equal(run(pipe), erased)


def test_autocast(pair):
    pipe, _, _ = pair
    with torch.autocast("cpu", torch.bfloat16):
        erased = run(pipe)
        with more_hf.disabled(pipe):
            shown = run(pipe)
        assert torch.equal(run(pipe), erased)
    more_hf.restore(pipe)
    with torch.autocast("cpu", torch.bfloat16):  # another block: autocast keeps what it has cast
        assert torch.equal(run(pipe), shown)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_stored_in_another_precision(tiny_sd, storage):
    """Layerwise casting keeps weights in fewer bits between calls; the original is not rounded to them."""
    plain, pipe = tiny_sd(), tiny_sd()
    erase(pipe)
    for unet in (plain.unet, pipe.unet):
        unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    call = {"encoder_hidden_states": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))}

    def output(unet):
        with torch.no_grad():
            return unet(torch.zeros(2, 4, 8, 8), torch.tensor(500), **call).sample

    original, erased = output(plain.unet), output(pipe.unet)
    with more_hf.disabled(pipe):
        shown = output(pipe.unet)
    assert (shown - original).norm() < 0.1 * (erased - original).norm()


@pytest.mark.slow
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_offloaded_to_disk_afterwards_is_refused_by_name(tiny_sd, tmp_path, offload_type):
    """The weights are emptied placeholders then; nothing may be read from them."""
    pipe = erase(tiny_sd())
    erased = run(pipe)
    cpu = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    apply_group_offloading(pipe.unet, cpu, cpu, offload_type, offload_to_disk_path=str(tmp_path), **options)
    assert torch.equal(run(pipe), erased)
    with pytest.raises(more_hf.SiteNotFoundError, match="offloaded to disk"), more_hf.disabled(pipe):
        pass
    for verb in (more_hf.restore, lambda pipe: more_hf.save(pipe, tmp_path / "saved")):
        with pytest.raises(more_hf.SiteNotFoundError, match="offloaded to disk"):
            verb(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="offloaded to disk"):
        more_hf.compare(pipe, "a cat")
    assert torch.equal(run(pipe), erased)


@pytest.mark.slow
def test_offloaded_to_the_originals_folder_it_is_the_original(tiny_sd, tmp_path):
    """diffusers takes the files that are there: a weakness, which the message and the examples tell."""

    def offloaded(pipe, folder):
        cpu = torch.device("cpu")
        apply_group_offloading(pipe.unet, cpu, cpu, "leaf_level", offload_to_disk_path=str(tmp_path / folder))
        return run(pipe)

    original, erased = offloaded(tiny_sd(), "original"), run(erase(tiny_sd()))
    assert torch.equal(offloaded(erase(tiny_sd()), "empty"), erased)
    assert torch.equal(offloaded(erase(tiny_sd()), "original"), original)
    assert not torch.equal(original, erased)


def test_lora_on_top(tiny_sd):
    from peft import LoraConfig

    pipe = tiny_sd()
    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(config)
    original = run(pipe)
    erase(pipe)
    erased = run(pipe)
    assert not torch.equal(erased, original)
    with more_hf.disabled(pipe):
        assert torch.equal(run(pipe), original)
    assert torch.equal(run(pipe), erased)


def with_gradients(pipe):
    pipe.unet.train()
    text = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return text, pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor(500), encoder_hidden_states=text).sample.sum()


def test_gradients_are_the_shown_models(tiny_sd):
    text, loss = with_gradients(tiny_sd())
    loss.backward()
    pipe = erase(tiny_sd())
    with more_hf.disabled(pipe):
        shown, loss = with_gradients(pipe)
    loss.backward()
    assert torch.equal(shown.grad, text.grad)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_what_is_raised_inside_leaves_nothing(pair, error):
    pipe, erased, _ = pair
    before, hooks, compiler = state(pipe.unet), hooks_of(pipe.unet), stance()
    with pytest.raises(error), more_hf.disabled(pipe):
        raise error
    assert torch.equal(run(pipe), erased)
    assert same(pipe.unet, before)
    assert (hooks_of(pipe.unet), stance()) == (hooks, compiler)


def test_the_users_own_hook_sees_the_original(pair):
    """Hooks that the user put on an edited layer act on what it shows, inside the block and outside."""
    pipe, _, _ = pair
    (name, site), *_ = more_hf.get_erasure(pipe).sites.items()
    handle = site.module.register_forward_hook(lambda module, args, output: output * 0)
    try:
        with more_hf.disabled(pipe):
            assert not site.module(torch.ones(1, 32)).any(), name
    finally:
        handle.remove()


def test_erase_and_restore_are_refused_while_a_block_is_open_elsewhere(pair):
    pipe, _, original = pair
    ready, done, outputs = threading.Event(), threading.Event(), []

    def look():
        with more_hf.disabled(pipe):
            ready.set()
            done.wait(60)
            outputs.append(run(pipe))

    def edit():
        ready.wait(60)
        try:
            with pytest.raises(more_hf.MoreError, match="Leave the block"):
                more_hf.restore(pipe)
            with pytest.raises(more_hf.MoreError, match="Leave the block"):
                erase(pipe, router="hash", retain=["cat"])
        finally:
            done.set()

    in_threads(look, edit)
    assert torch.equal(outputs[0], original)
