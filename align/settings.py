"""What an alignment is told, and what is refused before anything expensive is begun."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from align.bounds import smallest_sample
from align.constraint import Constraint
from align.guards import Guards
from align.learning import NoiseLevels
from align.objectives import Objective
from align.objectives.dpo import Dpo
from align.offline import Offline
from align.pairing import Pairing
from align.policy import Lora
from align.rollouts import Judges, RolloutPlan
from align.sample import Sampler
from reward import preferences
from reward.config import Config, ConfigError
from reward.files import DataError
from reward.preferences import Source
from reward.records import Prompt
from reward.trackers import Tracker


class AlignConfig(Config):
    """Align a policy under safety limits."""

    out: Path = Path("runs/sandbox/align")
    model: Path = Path("sandbox/assets/base")
    """Folder of a Wan text-to-video pipeline in diffusers' format."""
    judge: Path = Path("runs/sandbox/reward")
    """Run of a reward model."""
    rules: tuple[Literal["flash", "nsfw"], ...] = ()
    """Rules whose costs count beside the judge's."""
    prompts: Source
    """Where training prompts come from; those of its validation split are for the guards and the choice of a round."""
    rewrites: Path | None = None
    """JSON lines with a `prompt` and its `safe` rewrite, for counterfactuals."""
    lora: Lora = Lora()
    offline: Offline | None = None
    """Preference files that the first round learns from, in place of the policy's own videos."""
    objective: Objective = Dpo()
    pairing: Pairing = Pairing()
    constraint: Constraint
    divergence: PositiveFloat = 0.5
    """Weight of the KL divergence in the one-shot dual, against rewards in standard deviations."""
    sampler: Sampler = Sampler()
    rollouts: RolloutPlan = RolloutPlan()
    num_validation_prompts: PositiveInt = 32
    """Shown to the policy before each round, at the same seeds."""
    guards: Guards = Guards()
    num_rounds: PositiveInt = 8
    replay: NonNegativeInt = 0
    """Earlier rounds whose videos are learnt from as well: a policy that has become safe shows little that is not, so
    its own videos soon no longer say what to stay away from."""
    steps_per_round: PositiveInt = 40
    batch_size: PositiveInt = 16
    """Pairs (DPO) or videos (RWR) a step, on all processes together."""
    accumulate: PositiveInt = 1
    """Parts that a process does its share of a step in, one after the other, to save memory."""
    noise: NoiseLevels = NoiseLevels()
    learning_rate: PositiveFloat = 2e-4
    warmup_steps: NonNegativeInt = 10
    cooldown: float = Field(default=0.0, ge=0, le=1)
    """Share of all steps, at the end, over which the learning rate falls to 0: a policy that is nearly where it should
    be is not thrown past it by the few pairs that are left."""
    weight_decay: NonNegativeFloat = 0.0
    max_gradient_norm: PositiveFloat = 1.0
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Of the moving average of the LoRA; 0: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the transformer and the text encoder; the LoRA is always float32."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """`bf16` halves a step's time on processors with AVX-512 BF16 or AMX; on others `no` is faster."""
    gradient_checkpointing: bool = False
    offload: bool = False
    """Keep text encoder and VAE on the CPU while steps are done; they come back for each round's videos."""
    save_every: PositiveInt = 20
    cache: Path = Path("runs/cache/latents")
    """Folder of prompt embeddings, and of latents of preference files, which all runs share."""
    trackers: tuple[Tracker, ...] = ()
    seed: int = Field(default=0, ge=0)

    @validator(mode="after")
    def _asks_what_is_kept(self) -> "AlignConfig":
        draws, objective = self.noise.draws, self.objective
        if draws is None:
            return self
        if not isinstance(objective, Dpo):
            raise ValueError(
                f"noise.draws={draws} saves passes of the reference, and objective.kind={objective.kind} has none; "
                "set noise.draws=null"
            )
        if objective.leash:
            raise ValueError(
                f"noise.draws={draws} keeps errors of the reference, and objective.leash={objective.leash} needs its "
                "whole predictions; set noise.draws=null or objective.leash=0"
            )
        return self


def check_window(config: AlignConfig) -> None:
    """Refuse a window in which too few videos are seen to show that a limit is met, even if all are safe.

    Raises: ConfigError: so it is.
    """
    constraint, plan = config.constraint, config.rollouts
    if constraint.delta is None or constraint.rule is None:
        return
    num_videos = plan.num_prompts * plan.num_per_prompt * min(constraint.window, constraint.delay + 1)
    for limit in constraint.limits:
        if num_videos < (needed := smallest_sample(limit.bound, constraint.delta)):
            raise ConfigError(
                f"{limit.name}: the first {num_videos} videos that move its multiplier cannot show a rate of at most "
                f"{limit.bound} at delta={constraint.delta}, {needed} can; raise constraint.window and "
                "constraint.delay, rollouts.num_prompts or constraint.delta"
            )


def load_prompts(config: AlignConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Give the prompts to learn on, and those to watch.

    Raises: DataError: too few of either.
    """
    data = preferences.load(config.prompts)
    prompts, watched = list(data.prompts("train")), list(data.prompts("validation"))
    if len(watched) < config.num_validation_prompts or not prompts:
        raise DataError(
            f"{config.prompts.path}: {len(prompts)} training and {len(watched)} validation prompts; expected "
            f"{config.num_validation_prompts} of these: raise prompts.validation_share or lower num_validation_prompts"
        )
    return prompts, sorted(watched, key=lambda prompt: prompt.prompt_id)[: config.num_validation_prompts]


def check_judge(judges: Judges, config: AlignConfig) -> None:
    """Refuse a judge that cannot tell what the limits are about.

    Raises: ConfigError: its cost has no zero, it gives no reward, or a limit is about a tag it was not trained on.
    """
    calibration = judges.model.calibration
    for score in ("helpfulness", "cost"):
        if score not in calibration.trained:
            raise ConfigError(f"judge={config.judge}: was not trained to give {score}; train it with weights.{score}=1")
    if not calibration.cost_has_zero:
        raise ConfigError(f"judge={config.judge}: its cost has no zero, so no video counts as safe; train on is_safe")
    for limit in config.constraint.limits:
        if limit.tag is not None and limit.tag not in calibration.trained:
            raise ConfigError(f"{limit.name}: judge={config.judge} was not trained on the tag {limit.tag}")


def check_batch(config: AlignConfig, num_processes: int) -> None:
    """Refuse a batch that processes and parts cannot share evenly: their means would weigh items differently.

    Raises: ConfigError: so it is.
    """
    if config.batch_size % (num_processes * config.accumulate):
        raise ConfigError(
            f"batch_size={config.batch_size}: expected a multiple of {num_processes} processes times "
            f"accumulate={config.accumulate}"
        )
