"""What a run is made of: typed sections with their defaults, which are the job of `srft train` without arguments.

Every field carries its own help, which `srft train --help` and the run's config.toml print. A section is checked where
it is made, so a `Config` that exists is a valid one. settings.py reads and writes them.
"""

import copy
import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from srft.errors import UserError, nearest

Tables = list[str | dict[str, Any]]  # each a table, or a name for one


def option(
    default: Any,
    help: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
) -> Any:
    """A dataclass field: default, help that users read, and bounds: low ≤ value ≤ high, above < value < below."""
    metadata = {"help": help, "low": low, "above": above, "high": high, "below": below}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """A part of the configuration. Making one checks numbers against bounds and words against choices."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        section = type(self).__name__.removesuffix("Config").lower()
        for each in dataclasses.fields(self):
            key, value = f"{section}.{each.name}", getattr(self, each.name)
            low, above, high, below = (each.metadata[bound] for bound in ("low", "above", "high", "below"))
            for number in value if isinstance(value, list) else [value]:
                if not isinstance(number, (int, float)):
                    continue
                if not (low <= number <= high and above < number < below and math.isfinite(number)):
                    bounds = [f"at least {low}"] * (low > -math.inf) + [f"more than {above}"] * (above > -math.inf)
                    bounds += [f"at most {high}"] * (high < math.inf) + [f"less than {below}"] * (below < math.inf)
                    raise UserError(f"{key}: expected {' and '.join(bounds) or 'a finite number'}, found {number}")
            choices = typing.get_args(hints[each.name])
            if value is None and type(None) not in choices:
                raise UserError(f"{key}: a value is needed")
            if typing.get_origin(hints[each.name]) is Literal and value not in choices:
                raise UserError(
                    f"{key}: expected one of {', '.join(choices)}, found {value!r}{nearest(value, choices)}"
                )


@dataclass
class ModelConfig(Section):
    path: str = option("smollm2", "embedded SmolLM2-135M-Instruct, or a directory, a .gguf file, or a hub name")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto: float32 on CPU, bfloat16 on CUDA; float16 would need loss scaling, which srft does not do"
    )
    device: str = option("auto", "auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1, …")
    attention: str = option(
        "auto", "auto, sdpa: packed rows where the model allows; or eager, flash_attention_2, … of transformers"
    )
    reference: str = option(
        "", "model that loss.options.kl_coef keeps near; not given: model.path as it was before training"
    )
    lora_rank: int = option(
        0,
        "LoRA: train matrices of this rank beside those of the model, which stay as they are; 0: train the model",
        low=0,
    )
    lora_alpha: float = option(32.0, "LoRA: what is learned is added times lora_alpha / lora_rank", above=0)
    lora_dropout: float = option(0.0, "LoRA: dropout of its input in training", low=0, below=1)
    lora_targets: list[str] = option(  # noqa: RUF009
        ["all-linear"], "LoRA: names of layers that have it: q_proj v_proj …; all-linear: every one but the head"
    )
    dropout: bool = option(False, "keep the model's dropout in training; rollouts are sampled without it")
    trust_remote_code: bool = option(False, "run the Python code that comes with a model which transformers lacks")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward: less memory, more time")


@dataclass
class DataConfig(Section):
    tasks: list[str] = option(  # noqa: RUF009
        ["chain_sum"], "reasoning-gym tasks, mixed evenly; not used with train_file"
    )
    task_args: dict[str, Any] = option(  # noqa: RUF009
        {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}},
        "per task, the arguments of its generator",
    )
    train_file: str | list[str] | None = option(  # noqa: RUF009
        None, "a file, several, a directory, a glob, or a dataset of a hub: owner/name:configuration@split"
    )
    eval_file: str | list[str] | None = option(  # noqa: RUF009
        None, "the same for evaluation; without it an eighth of train_file is held out"
    )
    columns: dict[str, Any] = option(  # noqa: RUF009
        {}, 'which column is the prompt, messages, demonstration, answer, system, tools: {demonstration = "solution"}'
    )
    turns: Literal["last", "all"] = option(
        "last", "of a chat with several assistant turns, the last is learned from, or all"
    )
    choice_seed: int = option(
        17,
        "seed of the order that the options of a multiple-choice question are shown in; -1: that of the file",
        low=-1,
    )
    broken: Literal["error", "drop"] = option("error", "a row that cannot be used: error, or drop with a warning")
    size: int = option(0, "train prompts to draw; 0: the whole file, or 4096 from tasks", low=0)
    demonstrations: int = option(
        -1, "train prompts that keep their demonstration, the first so many in the order of data.seed; -1: all", low=-1
    )
    seed: int = option(0, "seed of the train prompts", low=0)
    eval_seed: int = option(17, "seed of the held-out prompts", low=0)
    system_prompt: str | None = option(None, "not set: tasks ask for the answer after ####, files add nothing")
    template: Literal["auto", "none"] = option("auto", "auto: the tokenizer's chat template; none: plain text")
    template_args: dict[str, Any] = option({}, "arguments of the chat template: {enable_thinking = false}")  # noqa: RUF009
    max_prompt_tokens: int = option(512, "a longer prompt is too long", low=1)
    overlong: Literal["error", "drop", "cut"] = option(
        "error", "a row that is too long: error; drop; or cut: a prompt keeps its end, a demonstration its beginning"
    )


@dataclass
class RolloutConfig(Section):
    engine: Literal["transformers"] = option("transformers", "what generates")
    per_prompt: int = option(4, "rollouts of each prompt (G)", low=1)
    max_new_tokens: int = option(20, "tokens after which a rollout is cut", low=1)
    temperature: float = option(1.0, "sampling temperature, also of the log-probs in the loss", above=0)
    top_p: float = option(1.0, "nucleus sampling", above=0, high=1)
    batch_size: int = option(64, "sequences per call of generate", low=1)
    resample: int = option(
        0,
        "replace prompts whose rollouts all got the same reward by others, so many times a step, and leave out what "
        "remains (dynamic sampling); 0: learn from them too",
        low=0,
    )


@dataclass
class RewardConfig(Section):
    name: str | list[str] = option(  # noqa: RUF009
        "auto",
        "auto (a task's own, math_verify for files), exact, math_verify, reasoning_gym, package.module:function, "
        "file.py:function, or several of them",
    )
    weights: list[float] = option([], "of several functions, in their order; none given: 1 each")  # noqa: RUF009
    mark: Literal["auto", "required", "any"] = option(
        "auto",
        "what exact, math_verify and reasoning_gym read: auto: behind #### or \\boxed{} where the prompt asks for "
        "it; required: always; any: the last number of a finished completion counts too",
    )
    conversational: bool = option(False, "functions get prompts and completions as chats, as TRL's for chats want them")
    timeout: float = option(
        30.0, "seconds that scoring one completion may take; one that is late is not scored", above=0
    )
    workers: int = option(2, "processes that call rewards; 0: the training process itself, without a timeout", low=0)


@dataclass
class LossConfig(Section):
    preset: str = option("srft_paper", "objective: srft_paper, srft_official, srft_hpt, sft, grpo, … of srft_kernels")
    options: dict[str, Any] = option({}, "fields of the objective to change")  # noqa: RUF009
    advantage_std: bool = option(True, "divide advantages by the standard deviation of their group")
    advantage_eps: float = option(1e-6, "added to that standard deviation", low=0)
    mask_truncated: bool = option(
        False, "no loss on rollouts that were cut at rollout.max_new_tokens; they count in their group's mean"
    )
    hpt_threshold: float = option(
        0.0,
        "preset hpt: a prompt learns from its rollouts where more than this share of them is rewarded",
        low=0,
        high=1,
    )
    average: Literal["token", "sequence", "constant"] = option("token", "how tokens are averaged over the whole step")


@dataclass
class TrainConfig(Section):
    steps: int = option(16, "optimizer steps are steps × updates_per_rollout; 0: only evaluate", low=0)
    epochs: float = option(
        0.0, "instead of train.steps: so many times over the training prompts; 0: train.steps", low=0
    )
    stages: Tables = option(  # noqa: RUF009
        [],
        "parts of the run, one after the other, that share its steps: names of recipes, or tables of loss, rollout and "
        "train settings",
    )
    stage_moments: Literal["fresh", "kept"] = option(
        "fresh", "AdamW's moments when a later stage begins: fresh, or kept from the one before"
    )
    prompts_per_step: int = option(8, "prompts sampled in each step", low=1)
    demo_share: float = option(
        0.0,
        "share of a step's prompts that are drawn from those with a demonstration, where not all have one; 0: as they "
        "come. rollout.resample replaces them from all prompts",
        low=0,
        high=1,
    )
    updates_per_rollout: int = option(1, "optimizer steps on the same rollouts", low=1)
    lr: float = option(5e-5, "learning rate after warm-up", low=0)
    warmup_steps: int = option(2, "steps of linear warm-up", low=0)
    schedule: Literal["constant", "cosine", "linear"] = option("linear", "after the warm-up: constant, or down to 0")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", low=0)
    beta1: float = option(0.9, "AdamW: decay of the mean of gradients", low=0, below=1)
    beta2: float = option(0.999, "AdamW: decay of the mean of squared gradients", low=0, below=1)
    eps: float = option(1e-8, "AdamW: added to the root of that mean", above=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    token_budget: int = option(2048, "tokens per microbatch, padding included where there is any", low=1)
    share_prompts: bool = option(
        True, "a prompt's tokens are computed once for all of its completions, where the model allows"
    )
    optimizer: Literal["adamw"] = option("adamw", "optimizer")
    seed: int = option(0, "seed of everything random in training", low=0)


@dataclass
class EvalConfig(Section):
    prompts: int = option(64, "held-out prompts; 0: no evaluation", low=0)
    samples: int = option(4, "completions of each (k)", low=1)
    temperature: float = option(1.0, "sampling temperature; 0: greedy", low=0)
    top_p: float = option(1.0, "nucleus sampling", above=0, high=1)
    seed: int = option(17, "seed of sampling", low=0)
    every: int = option(0, "evaluate every so many steps too; 0: only before and after", low=0)
    batch_size: int = option(64, "sequences per call of generate", low=1)
    sets: Tables = option(  # noqa: RUF009
        [], "benchmarks for srft eval, a row of its table each: files, or tables with file, name, group, samples, …"
    )
    set_prompts: int = option(0, "at most so many prompts of each set; 0: all", low=0)
    dir: str = option("evals/{time}", "where srft eval writes; {time} becomes its start")


@dataclass
class AnalyzeConfig(Section):
    prompts: int = option(32, "held-out prompts that srft analyze looks at, and prompts of each other task", low=1)
    samples: int = option(2, "completions of each, for rewards and gradients; the first is read token by token", low=1)
    tokens: int = option(1024, "of each text at most so many tokens are read", low=1)
    others: Tables = option(  # noqa: RUF009
        [
            {"task": "basic_arithmetic", "task_args": {"min_terms": 2, "max_terms": 2, "allow_parentheses": False}},
            {"task": "products", "task_args": {"min_digits": 1, "max_digits": 1}},
        ],
        "other tasks, to see what is forgotten: tables or files as in eval.sets; those in data.tasks are left out",
    )
    shares: list[float] = option(  # noqa: RUF009
        [0.02, 0.05, 0.2], "shares of the tokens to swap with the base; []: none", above=0, below=1
    )
    checkpoints: int = option(8, "at most so many checkpoints of each run on the map", low=0)
    dir: str = option("analyses/{time}", "where srft analyze writes; {time} becomes its start")


@dataclass
class RunConfig(Section):
    dir: str = option("runs/{time}", "where the run writes; {time} becomes the start of the run, ~ your home")
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = option("none", "where metrics go besides the files")
    tensorboard: bool = option(False, "write TensorBoard events too, beside another tracker")
    checkpoint_every: int = option(
        0, "keep a checkpoint every so many steps, for --resume to go on from; 0: only the final one", low=0
    )
    keep_checkpoints: int = option(
        0, "keep the newest N checkpoints, and the best by held-out reward; 0: all of them", low=0
    )
    samples_per_step: int = option(2, "generations kept in samples.jsonl at each step", low=0)
    overwrite: bool = option(False, "write into a run directory that is not empty; what is in it moves to previous-N")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    analyze: AnalyzeConfig = field(default_factory=AnalyzeConfig)
    run: RunConfig = field(default_factory=RunConfig)
