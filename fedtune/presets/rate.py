"""Check whether the learning rate that a preset wrote into study.toml still fits the noise of the
plan. A person who edits ε there changes the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedtune.core.config import Study
from fedtune.core.dp.plan import plan_for_site
from fedtune.presets import _adapter, classify

OFF = 1.25  # factor by which a fitting rate may differ from the plan's before a warning


def weight_noise(study: Study, sizes: Sequence[int]) -> float:
    """Compute the standard deviation of the noise in each trained weight after the last round.

    The noise is that of the sites' mean update, weighted by their declared sizes `sizes`; the
    strategy's momentum is taken into account. If an adapter has a preconditioner, the noise is in
    the preconditioner's coordinates.

    Errors: ConfigError if the study is not private, or not even one round fits its budget."""
    of_site = plan_for_site(study, max(sizes))
    drawn = of_site.sampling_rate * of_site.records * sum(sizes)
    one = of_site.own_noise * of_site.max_grad_norm * math.sqrt(len(sizes)) / drawn
    momentum = study.strategy.options.get("momentum", 0.0)
    return study.training.learning_rate * one * math.sqrt(of_site.steps) / (1 - momentum)


def rate_note(study: Study, sizes: Sequence[int]) -> str:
    """Return a warning if the study's learning rate does not fit its noise; "" if it fits, if no
    preset wrote the study, or if `sizes` is empty.

    The rate that fits gives each weight the noise that the preset intends, but is at most the
    largest rate that the preset allows. The warning comes if the study's rate differs from it by
    more than the factor OFF. sizes: the sites' declared sizes."""
    recipe = _recipe(study)
    if recipe is None or not sizes:
        return ""
    noise, longest = recipe
    found, rate = weight_noise(study, sizes), study.training.learning_rate
    fitting = min(longest, rate * noise / found)
    if 1 / OFF <= fitting / rate <= OFF:
        return ""
    return (
        f"WARNING: training.learning_rate = {rate:g} leaves noise of {found:.2g} in each weight, "
        f"and the recipe's is {noise:g}: the rate was set for another ε or δ, or for other sites; "
        f"--set training.learning_rate={fitting:.2g} fits this plan and these sites"
    )


def _recipe(study: Study) -> tuple[float, float] | None:
    """Recognise by a study's settings which preset wrote it. Return two numbers: the noise in each
    weight that the preset intends, and the preset's largest learning rate. Return None if no preset
    wrote the study."""
    if not study.private or study.continuous or study.training.rounds is None or not study.start:
        return None
    bound = study.clipping.max_grad_norm if study.clipping else 1.0
    if study.lora is None and study.start.head != "zero" and study.training.rounds > 1:
        return classify.NOISE, classify.LONGEST / bound
    normalised = study.clipping is not None and study.clipping.mode == "normalised"
    if study.lora and study.lora.preconditioner and study.training.rounds == 1 and normalised:
        if study.lora.preconditioner.narrow:
            return _adapter.NARROW_NOISE, _adapter.NARROW_LONGEST
        return _adapter.NOISE, _adapter.LONGEST
    return None
