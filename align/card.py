"""The model card that goes with a LoRA: RUN/lora/README.md, in the form that the Hugging Face hub reads.

It says what the LoRA is for, what it was made from, what its own judge measured, and what is not known. Prompts are
data and are never quoted.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align import history
from align.constraint import Constraint, Limit, LimitRow
from align.folder import LORA_FILE, fingerprint, prompts_file, read_geometry
from align.history import History
from align.objectives.dpo import Dpo
from align.objectives.rwr import Rwr
from align.policy import MAX_TOKENS
from reward import plain_yaml
from reward.config import dump
from reward.files import DataError, replacing

VOID_IF = (
    "another base model is used, or this LoRA at another strength than 1, or merged with others",
    "videos are sampled otherwise: another scheduler, number of steps, guidance, size or length",
    "prompts are of another kind or language than those of training",
    "the judge is wrong: nothing here was measured by anything else, and training seeks out its mistakes",
    "a file that is named here has changed",
)
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "av", "numpy", "safelight")
_MEASURES = {
    "validation_reward": "mean reward, validation prompts (standard deviations of the reference's)",
    "validation_unsafe": "share of unsafe videos, validation prompts",
    "rollout_reward": "mean reward, training prompts (standard deviations of the reference's)",
    "rollout_unsafe": "share of unsafe videos, training prompts",
    "rollout_cost": "mean cost, training prompts (the judge's unit; above 0 is unsafe)",
}


def write(folder: Path, *, num_prompts: int) -> None:
    """Write the card of a run that has ended, beside its LoRA.

    Raises: DataError, ConfigError, PolicyError: a file of the run, or its base model, cannot be read.
    """
    with replacing(folder / "lora" / "README.md") as new:
        new.write_text(text_of(history.read(folder), num_prompts), encoding="utf-8")


def text_of(told: History, num_prompts: int) -> str:
    """Give the card's text; `num_prompts` is the number of training prompts.

    Raises: DataError: the run has not ended. PolicyError: its base model cannot be read.
    """
    if told.ending is None:
        raise DataError(f"{told.folder}: has not ended, and so has no best policy; resume it with the same command")
    provenance = json.loads((told.folder / "provenance.json").read_text(encoding="utf-8"))
    inputs = provenance[-1]["inputs"]
    sections = (
        _front_matter(told, inputs),
        _introduction(told),
        _objective(told),
        _feasibility(told),
        _data(told, num_prompts),
        _results(told),
        _use(told),
        _void(),
        _origin(told, inputs, provenance),
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _front_matter(told: History, inputs: Mapping[str, str]) -> Iterator[str]:
    found = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "base_model": str(told.config.model),
        "base_model_relation": "adapter",
        "base_model_sha256": inputs[str(told.config.model)],
        "tags": ["text-to-video", "lora", "wan", "preference-alignment", "safety", told.config.objective.kind],
    }
    yield from ("---", plain_yaml.write(found).rstrip(), "---")


def _introduction(told: History) -> Iterator[str]:
    bounded = "within the limits below" if told.config.constraint.limits else "without any limit on harm"
    yield f"# A LoRA for `{told.config.model}`"
    yield ""
    yield f"It moves a text-to-video model towards videos that its training judge prefers, {bounded}. The program that"
    yield "trained it wrote this card; all numbers are from the training run."
    yield ""
    yield "**License: none is stated.** It is for you to choose, within those of the base model and of the data. Add it"
    yield "to the lines on top, and put the base model's name on the hub in place of its folder."


# What it was trained for ------------------------------------------------------------------------------------


def _objective(told: History) -> Iterator[str]:
    settings, limits = told.config, told.config.constraint.limits
    yield from ("## What it was trained for", "")
    yield _words(settings.objective)
    yield "Utility is the judge's reward, in standard deviations of the reference's, less each limit's multiplier times"
    yield "what the limit counts. The multipliers rise while a limit is broken, and fall while it is slack."
    yield ""
    if limits:
        last = told.rounds[-1].measures
        rows = [(limit.name, _bounded(limit), limit.bound, last[f"multiplier_{limit.name}"]) for limit in limits]
        yield from _table(("limit", "what is bounded", "at most", "multiplier at the end"), rows)
    else:
        yield "There was no limit: nothing but the reward was trained for."
    yield ""
    yield (
        f"Rank {settings.lora.rank}, alpha {settings.lora.alpha}, {len(told.rounds) - 1} rounds of "
        f"{settings.steps_per_round} steps of {settings.batch_size}, learning rate {settings.learning_rate:g}, "
        f"seed {settings.seed}. The objective's settings:"
    )
    yield from ("", "```yaml", dump(settings.objective).rstrip(), "```")


def _words(objective: Dpo | Rwr) -> str:
    match objective:
        case Dpo():
            return (
                "Diffusion-DPO on pairs of the policy's own videos: of those of one prompt, one of higher utility is "
                "made likelier, and one of lower utility less likely, than the reference has them."
            )
        case Rwr():
            return (
                "Reward-weighted regression: the policy is fine-tuned on its own videos, each weighted by its utility "
                "beside the others of its prompt."
            )


def _bounded(limit: Limit) -> str:
    cost = "overall cost" if limit.tag is None else f"cost of {limit.tag}"
    return f"share of videos whose {cost} is above 0" if limit.kind == "unsafe_rate" else f"mean {cost}"


def _feasibility(told: History) -> Iterator[str]:
    found = told.feasibility
    yield from ("## Whether the limits could be met", "")
    if not found.rows:
        yield "There was no limit."
        return
    yield f"By {found.num_samples} videos of the reference, before training: what each limit counts on average"
    yield "where only the least harmful video of each prompt is kept (lowest), at the best trade-off without limits"
    yield "(unconstrained), for the reference as it is, and at the best trade-off within all limits (reached)."
    yield ""
    yield from _table(LimitRow._fields, found.rows)
    yield from ("", f"The weights of the last one leave {found.effective_samples:.1f} effective videos.")


def _data(told: History, num_prompts: int) -> Iterator[str]:
    settings, plan = told.config, told.config.rollouts
    num_items = sum(int(point.measures.get("num_items", 0)) for point in told.rounds)
    yield from ("## Data", "")
    yield f"{num_prompts} training prompts and {settings.num_validation_prompts} validation prompts of"
    yield f"`{settings.prompts.path}`. Each round, the policy as it then was made {plan.num_per_prompt} videos of"
    yield f"{plan.num_prompts} prompts, scored by {' and '.join([f'`{settings.judge}`', *settings.rules])}, which gave"
    yield f"{num_items} items to learn from in all."
    if settings.offline:
        words = {"people": "people preferred them", "judge": "the judge preferred them"}[settings.offline.prefer]
        yield f"The first round learnt from the pairs of `{settings.offline.data.path}` instead, as {words}."
    yield ""
    yield f"`{prompts_file(Path(LORA_FILE))}` holds a hash of each of these prompts and of their rewrites: an"
    yield "evaluation that asks one of them gets no certificate."


# Results ----------------------------------------------------------------------------------------------------


def _results(told: History) -> Iterator[str]:
    assert told.ending is not None
    best, settings, limits = told.ending.best, told.config, told.config.constraint.limits
    policies = [told.rounds[0].measures, told.rounds[told.ending.best_round].measures]
    labels = _MEASURES | {f"limited_{limit.name}": _limited(limit, settings.constraint) for limit in limits}
    yield from ("## Results, by the training judge", "")
    yield "**These are the measurements of the judge that this LoRA was trained to please. They are no certificate.**"
    yield "The best round was chosen by them, which flatters it, and samples are small. Evaluate with other prompts and"
    yield "another judge, or people, and prove a bound with `python -m align.certify`. A video that is blank or noise"
    yield "counts as unsafe, whatever the judge says of it; its cost and reward are still the judge's."
    yield ""
    rows = [(label, *(measures[key] for measures in policies)) for key, label in labels.items()]
    yield from _table(("measure", "reference", f"this LoRA, of round {told.ending.best_round}"), rows)
    yield ""
    if limits:
        units = "a share, or standard deviations of the reference's costs"
        broken = f"**A limit was broken, by {best.violation:.4g} ({units}).**"
        yield "By this, all limits were met." if best.violation == 0 else broken
    if best.step == 0:
        yield "**No round was better than the reference: this LoRA changes nothing.**"
    counts = Counter(f"{event.guard} ({event.level})" for event in told.events)
    found = ", ".join(f"{name} x {count}" for name, count in sorted(counts.items()))
    yield f"How training ended: {told.ending.reason}. Guards that were broken: {found or 'none'}."


def _limited(limit: Limit, constraint: Constraint) -> str:
    bound = "" if constraint.delta is None else f", upper bound of confidence {1 - constraint.delta:g}"
    return f"limit {limit.name}, at most {limit.bound:g}{bound}"


# How to use it ----------------------------------------------------------------------------------------------


def _use(told: History) -> Iterator[str]:
    lora, sampler = told.folder / "lora", told.config.sampler
    # Where a VAE does not compress time, WanPipeline makes one frame more than it is asked for.
    asked = sampler.num_frames - (read_geometry(told.config.model).frames_per_latent == 1)
    yield f"""## How to use it

With diffusers alone, as in training:

```python
import torch
from diffusers import WanPipeline

dtypes = {{"default": torch.{told.config.dtype}, "vae": torch.float32}}
pipeline = WanPipeline.from_pretrained({str(told.config.model)!r}, dtype=dtypes)
pipeline.load_lora_weights({str(lora)!r}, weight_name={LORA_FILE!r})
frames = pipeline(
    "a prompt of your own",
    negative_prompt={sampler.negative_prompt!r},
    num_frames={asked},
    height={sampler.height},
    width={sampler.width},
    num_inference_steps={sampler.steps},
    guidance_scale={sampler.guidance_scale},
    max_sequence_length=min({MAX_TOKENS}, pipeline.tokenizer.model_max_length),
    generator=torch.Generator().manual_seed(0),
).frames[0]
```

With and without it, side by side:

```
python scripts/sample.py model={told.config.model} lora={lora} compare=true prompt="a prompt of your own"
```

For ComfyUI: `python scripts/export_lora.py lora={lora} out=lora-comfy.safetensors`"""


def _void() -> Iterator[str]:
    yield from ("## What makes these numbers void", "")
    yield from (f"- {reason}" for reason in VOID_IF)


# Where it comes from ----------------------------------------------------------------------------------------


def _origin(told: History, inputs: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("## Where it comes from", "")
    settings, lora = told.config, told.folder / "lora" / LORA_FILE
    roles = {settings.model: "base model", settings.judge / "model": "judge", settings.prompts.path: "prompts"}
    roles |= {settings.rewrites: "safe rewrites"} if settings.rewrites else {}
    files = [(roles.get(Path(name), "data"), name, sha256) for name, sha256 in inputs.items()]
    yield from _table(("what", "file or folder", "SHA-256"), [("this LoRA", lora, fingerprint(lora)), *files])
    yield from ("", "A folder's is that of its list of files, with theirs.", "")
    latest = records[-1]
    rows = [("code", code) for code in dict.fromkeys(_code(record["git"]) for record in records)]
    rows += [("python", latest["python"]), ("platform", latest["platform"]), ("device", latest["device"])]
    rows += [(name, latest["packages"][name]) for name in _PACKAGES if name in latest["packages"]]
    yield from _table(("what", "version"), rows)


def _code(git: Mapping[str, Any] | None) -> str:
    if git is None:
        return "not in a repository"
    return f"{git['revision']}{', with changes that are not committed' if git['dirty'] else ''}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    yield from (f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", r"\|")
