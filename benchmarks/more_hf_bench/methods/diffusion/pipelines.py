"""What methods do with a whole pipeline: act on its calls, read its progress bar, refuse another class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline
from torch import Tensor, nn

from more_hf.core.errors import MoreError, SiteNotFoundError
from more_hf.core.interrupts import unwound


def progress_bar_config(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The last arguments of `set_progress_bar_config`; empty if it was not called."""
    return dict(vars(pipe).get("_progress_bar_config", {}))


def is_quiet(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's user disabled its progress bar; then nothing that works on the pipeline shows
    one."""
    return progress_bar_config(pipe).get("disable", False)


def require_stable_diffusion(pipe: DiffusionPipeline) -> None:
    """Raise `SiteNotFoundError` for another class of pipeline: the method makes this one's calls itself."""
    if not isinstance(pipe, StableDiffusionPipeline):
        raise SiteNotFoundError(
            "This method runs inside StableDiffusionPipeline (Stable Diffusion 1.x and 2.x), and "
            f"{type(pipe).__name__} makes other calls. Take such a pipeline (of a sister pipeline, "
            "`StableDiffusionPipeline.from_pipe(pipe)`), or `erase_concept`, which knows the other families."
        )


PUBLISHED_STEPS = 50
"""Published settings in steps are for runs of this length; here they are shares of a run, the same numbers
at 50 steps."""


class AtInference(StableDiffusionPipeline):
    """A Stable Diffusion pipeline that acts on its own calls, and shares every component with the one that
    it was made from.

    Nothing is erased at rest: what `save_pretrained` writes from it is the original model.
    """

    forget: Sequence[str]  # the names to act on
    settings: Mapping[str, Any]  # of the method

    @classmethod
    def around(
        cls, pipe: DiffusionPipeline, *, forget: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> AtInference:
        """A pipeline of this class over the components of `pipe`, which is not modified.

        Raises `SiteNotFoundError` for another class of pipeline.
        """
        require_stable_diffusion(pipe)
        made = cls(**pipe.components, requires_safety_checker=pipe.config.requires_safety_checker)
        made.register_to_config(_name_or_path=pipe.config.get("_name_or_path"))
        made.set_progress_bar_config(**progress_bar_config(pipe))
        made.forget, made.settings = forget, settings or {}
        return made

    def share_of_run(self, call: int) -> float:
        """The index of a denoiser call, in steps of a run of `PUBLISHED_STEPS`."""
        return call * PUBLISHED_STEPS / (self.scheduler.num_inference_steps or self.num_timesteps)


@contextmanager
def intercepted(denoiser: nn.Module, before: Callable, after: Callable) -> Iterator[None]:
    """Call `before(args, kwargs) -> (args, kwargs)` and `after(args, kwargs, output) -> output` around every
    call of the denoiser inside the block."""

    with unwound() as hooks:
        first = denoiser.register_forward_pre_hook(lambda module, *call: before(*call), with_kwargs=True)
        hooks.callback(first.remove)
        last = denoiser.register_forward_hook(lambda module, *call: after(*call), with_kwargs=True)
        hooks.callback(last.remove)
        yield


def alpha_bar(scheduler: SchedulerMixin, timestep: float | Tensor) -> float:
    """ᾱ_t of the noise schedule, linear between two entries where a sampler asks for a timestep in
    between."""
    at, last = float(timestep), len(scheduler.alphas_cumprod) - 1
    low = min(int(at), last)
    high = min(low + 1, last)
    a, b = float(scheduler.alphas_cumprod[low]), float(scheduler.alphas_cumprod[high])
    return a + (at - low) * (b - a)


def noise_per_output(scheduler: SchedulerMixin, timestep: float | Tensor) -> float:
    """How much a difference of two predicted noises is, per difference of two denoiser outputs at the same
    x_t.

    1 for noise prediction; for v = √ᾱ ε − √(1−ᾱ) x₀, ε = √ᾱ v + √(1−ᾱ) x_t, so √ᾱ. Raises `MoreError` for
    other predictions."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return 1.0
    if kind == "v_prediction":
        return alpha_bar(scheduler, timestep) ** 0.5
    raise MoreError(
        f"This method needs a pipeline that predicts noise or v; this scheduler predicts {kind!r}."
    )
