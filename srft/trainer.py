"""The trainer. `Trainer.step` is one step of it:

1. draw prompts
2. roll out: G completions of each, from the model as it is now
3. score them, and the demonstrations in the same way
4. credit: advantages over the augmented group, a prompt's rollouts and its demonstration
5. pack rollouts and demonstrations into microbatches under a token budget
6. per microbatch: hidden states of the backbone, ONE fused loss over both kinds of tokens, backward
7. clip and update; the engine is told of the new weights when it is to generate again

L = L_demo + L_roll: each part is averaged over its own tokens across the whole step (`loss.average`).
Which tokens there is a loss for, the objective says: SRFT has one for both kinds, PolicyGradient for rollouts,
CrossEntropy for demonstrations (and then nothing is generated).

What is not in the SRFT paper (arXiv 2506.19767), with the default objective and settings:

1. It leaves open over what the entropy in a weight is averaged. Here: not at all, each token has its own
   (`loss.options.level`).
2. It leaves open how tokens are averaged. Here: over all tokens of a kind in the step (`loss.average`).
3. Its rewards are 1 and −1 in Eq 11, 1 and 0 in the appendix. Here a scorer may give any number; what is more than 0
   counts as positive.
4. To the deviation that advantages are divided by 1e-6 is added (`loss.advantage_eps`). In a group of equal rewards
   every advantage is exactly 0, and a completion without a reward is in no group.
5. A prompt may have no demonstration. It then learns from its rollouts, in a group of them alone.
6. An update whose gradient is not finite is left out.
"""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import srft_kernels as sk
from srft.data import Problem, Prompter
from srft.learn.credit import Group, advantages_of, informative, reward_metrics, scored, sequences_of, switched
from srft.learn.objective import refers
from srft.learn.order import drawn
from srft.learn.packing import Microbatch, Sequence, pack, predictors
from srft.learn.stages import Stage, stage_at
from srft.metrics import add_squares, mean, peak_memory_mb
from srft.model import LoadedModel, head_of
from srft.model.adapters import without_adapters
from srft.optim import Optimizer
from srft.ranks import Ranks
from srft.rewards import Scorer
from srft.rollout import Engine, Rollout, build_engine


class Trainer:
    """Model and optimizer of a run, and its stages. `loss_function` has the signature of `srft_kernels.linear_loss`.

    reference: what a loss with kl_coef keeps near; `loaded` itself is asked without its adapters.
    done: steps that the run has done, where it goes on; what they have left is loaded into the optimizer's state.
    """

    def __init__(
        self,
        stages: list[Stage],
        loaded: LoadedModel,
        prompter: Prompter,
        scorer: Scorer,
        *,
        done: int = 0,
        engine: Engine | None = None,
        loss_function: Callable[..., sk.LossOutput] = sk.linear_loss,
        ranks: Ranks | None = None,
        reference: LoadedModel | None = None,
    ):
        self.stages, self.loaded, self.prompter, self.scorer = stages, loaded, prompter, scorer
        self.ranks = ranks or Ranks()
        self._enter(stage_at(stages, done))
        self.engine = self.ranks.engine(engine or build_engine(self.config.rollout.engine, loaded), loaded)
        self.stale = False  # whether the model has weights that the engine was not told of
        self.loss_function = loss_function
        self.rows = replace(loaded.rows, shared=loaded.rows.shared and self.config.train.share_prompts)
        self.reference = reference
        if reference is not None and reference is not loaded:
            self.rows = self.rows.common(reference.rows)
            self.ranks.shard(reference)
        self.ranks.shard(loaded)
        self.optimizer = Optimizer(loaded.model, self.config.train)

    def _enter(self, stage: Stage) -> None:
        self.stage, self.config, self.objective, self.pool = stage, stage.config, stage.objective, stage.problems
        self.learns_from_rollouts = "rollouts" in stage.objective.learns_from

    def step(self, number: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Step `number`, from 1. Returns the line for metrics.jsonl and some generations."""
        started = time.perf_counter()
        if (stage := stage_at(self.stages, number)) is not self.stage:
            self._enter(stage)
            self.optimizer.begin(self.config.train)
        # Dropout follows from the step and the rank alone, so that a resumed run goes on as if it had not stopped.
        torch.manual_seed(random.Random(f"{self.config.train.seed}/{number}/{self.ranks.rank}").getrandbits(63))
        problems = drawn(self.stage, number)
        groups = self._score(problems, self._roll_out(problems, number))
        groups, rolled_out = self._resampled(groups, number)
        advantages = [advantages_of(group, self.config.loss) for group in groups]
        sequences = self._credit(groups, advantages)
        generated = time.perf_counter()
        microbatches = self._pack(sequences)
        metrics = reward_metrics(rolled_out) | self._learn(microbatches, number)
        if self.config.rollout.resample:
            metrics["resampled"] = float(len(rolled_out) - len(problems))
        if len(self.stages) > 1:
            metrics["stage"] = stage.number
        ended = time.perf_counter()
        lengths = {kind: sum(len(s.completion) for s in sequences if s.is_demo == kind) for kind in (True, False)}
        padded = sum(m.input_ids.numel() for m in microbatches)
        of_ranks = self.ranks.gather((padded, len(microbatches), peak_memory_mb(self.loaded.device)))
        padded, count, peak = zip(*of_ranks)
        metrics |= {
            "demo_tokens": lengths[True],
            "rollout_tokens": lengths[False],
            "padded_tokens": sum(padded),
            "microbatches": sum(count),
            "seconds_rollout": generated - started,
            "seconds_train": ended - generated,
            "tokens_per_second": sum(lengths.values()) / (ended - started),
            "peak_memory_mb": max(peak),
        }
        return {"step": number, **metrics}, self._samples(groups, advantages, number)

    def _resampled(self, groups: list[Group], number: int) -> tuple[list[Group], list[Group]]:
        """Groups that there is something to learn from, others drawn in place of those that have no advantage, as
        rollout.resample says; and all groups that were rolled out. (Dynamic sampling, arXiv 2503.14476.)"""
        turns = self.config.rollout.resample if self.learns_from_rollouts else 0
        if not turns:
            return groups, groups
        teaches = partial(informative, config=self.config.loss)
        kept, rolled_out = list(filter(teaches, groups)), list(groups)
        for turn in range(turns):
            seen = {id(group.problem) for group in rolled_out}
            others = [problem for problem in self.pool if id(problem) not in seen]
            missing = min(len(groups) - len(kept), len(others))
            if not missing:
                break
            anew = random.Random(f"{self.config.train.seed}/{number}/{turn}").sample(others, missing)
            more = self._score(anew, self._roll_out(anew, number, turn + 1))
            rolled_out += more
            kept += filter(teaches, more)
        return kept, rolled_out

    def _roll_out(self, problems: list[Problem], number: int, turn: int = 0) -> list[list[Rollout]]:
        """Of each prompt; none where the objective learns from none. Other completions at each turn of a step."""
        if not self.learns_from_rollouts:
            return [[] for _ in problems]
        self.refresh_engine()
        rollout = self.config.rollout
        rollouts = self.engine.generate(
            [problem.prompt for problem in problems],
            rollout.per_prompt,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            seed=self.config.train.seed * 1_000_003 + number + turn * 1_000_000_007,
            batch_size=rollout.batch_size,
        )
        self.engine.release()
        return rollouts

    def refresh_engine(self) -> None:
        """To be called before anything is generated."""
        if self.stale:
            self.engine.refresh(self.ranks.weights(self.loaded))
        self.stale = False

    def _score(self, problems: list[Problem], rollouts: list[list[Rollout]]) -> list[Group]:
        if not self.learns_from_rollouts:  # a demonstration is imitated whatever its reward
            return [Group(problem, [], [], None) for problem in problems]
        return scored(self.scorer, self.prompter, problems, rollouts)

    def _credit(self, groups: list[Group], advantages: list[list[float]]) -> list[Sequence]:
        """What to learn from."""
        of_groups = [sequences_of(*each) for each in zip(groups, advantages)]
        if self.objective.switches:
            of_groups = [switched(sequences, self.config.loss.hpt_threshold) for sequences in of_groups]
        masked = self.config.loss.mask_truncated
        return [s for sequences in of_groups for s in sequences if s.is_demo or s.finished or not masked]

    def _samples(self, groups: list[Group], advantages: list[list[float]], number: int) -> list[dict[str, Any]]:
        """The first rollout of some prompts, to look at."""
        of_groups = [each for each in zip(groups, advantages) if each[0].rollouts]
        return [
            {
                "step": number,
                "task": group.problem.example.task,
                "prompt": group.problem.example.messages[-1]["content"],
                "completion": self.prompter.decode(group.rollouts[0].tokens),
                "reward": group.rewards[0],
                "advantage": advantage,
                "finished": group.rollouts[0].finished,
            }
            for group, (advantage, *_) in of_groups[: self.config.run.samples_per_step]
        ]

    def _pack(self, sequences: list[Sequence]) -> list[Microbatch]:
        return pack(
            sequences,
            token_budget=self.config.train.token_budget,
            average=self.config.loss.average,
            max_length=self.config.rollout.max_new_tokens,
            pad_id=self.loaded.pad_id,
            device=self.loaded.device,
            rows=self.rows,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
        )

    def _learn(self, microbatches: list[Microbatch], number: int) -> dict[str, float]:
        """The step's updates; metrics are means over them (one, unless train.updates_per_rollout says more)."""
        updates = self.config.train.updates_per_rollout
        known: dict[str, Tensor] = {}
        if updates > 1:  # from the second update on the rollouts are no longer the policy's own
            known["old_logprobs"] = self._statistics(microbatches)[0]
        if refers(self.objective):
            with without_adapters(self.reference.adapters):
                known["ref_logprobs"] = self._statistics(microbatches, self.reference)[0]
        lines = [self._update(microbatches, number, known) for _ in range(updates)]
        self.stale |= bool(microbatches) and not all(line["skipped_updates"] for line in lines)
        means = {name: mean([line[name] for line in lines]) for name in lines[0]}
        return means | {"updates": sum(1 - line["skipped_updates"] for line in lines) if microbatches else 0.0}

    def _update(self, microbatches: list[Microbatch], number: int, known: dict[str, Tensor]) -> dict[str, float]:
        """One update. known: annotations (N,) of the step's tokens that the microbatches do not have."""
        if not microbatches:  # nothing was scored, and there are no demonstrations
            return {"loss": 0.0, **self.optimizer.step(number - self.stage.before - 1)}
        if "weight_entropy" in self.objective.needs_of_step(microbatches[0].annotations):
            # The mean entropy of the whole step has to be known before its first microbatch.
            stats, tokens = self._step_tokens(microbatches, *self._statistics(microbatches), known)
            known = known | {"weight_entropy": self.objective.weight_entropy(stats, tokens)}
        loss, squares = torch.zeros((), device=self.loaded.device), torch.zeros(2, device=self.loaded.device)
        outputs = []
        for microbatch in microbatches:
            annotations = microbatch.annotations | {name: of[microbatch.step_index] for name, of in known.items()}
            part, *statistics = self._token_loss(microbatch, annotations, squares)
            part.backward()
            loss += part.detach()
            outputs.append(statistics)
        metrics = {"loss": float(self.ranks.add(loss)), **self._token_metrics(microbatches, outputs, known)}
        metrics["demo_grad_norm"], metrics["rollout_grad_norm"] = self.ranks.add(squares).sqrt().tolist()
        return metrics | self.optimizer.step(number - self.stage.before - 1)

    def _token_metrics(
        self, microbatches: list[Microbatch], outputs: list[tuple[Tensor, Tensor]], known: dict[str, Tensor]
    ) -> dict[str, float]:
        """Token means over the whole step.

        They are formed once, from the log-probs and entropies of all tokens of the step, and not from the microbatches'
        means: to put those together, a mean over, say, positive rollout tokens needs another weight than one over all.
        """
        columns = (self._in_step_order(microbatches, list(column)).float() for column in zip(*outputs))
        stats, tokens = self._step_tokens(microbatches, *columns, known)
        is_demo, (demo_weight, rollout_weight) = tokens.is_demo, self.objective.entropy_weights(stats, tokens)
        values = self.objective.metrics(stats, tokens) | {
            "demo_entropy": stats.entropy[is_demo].mean(),
            "rollout_entropy": stats.entropy[~is_demo].mean(),
            "rollout_surprise": -stats.logprobs[~is_demo].mean(),
            "demo_entropy_weight": demo_weight[is_demo].mean(),
            "rollout_entropy_weight": rollout_weight[~is_demo].mean(),
        }
        return {name: float(value) for name, value in values.items()}

    def _head_input(self, microbatch: Microbatch, of: LoadedModel) -> dict[str, Any]:
        """Arguments of the loss head: hidden states (n, H) that predict the targets, the targets (n,), and the head.

        Prompts and padding stay behind. To be called where the head is whole: within `ranks.forward`.
        """
        hidden = predictors(of.model, microbatch)
        temperature = self.config.rollout.temperature if self.learns_from_rollouts else 1.0
        return {"input": hidden, "target": microbatch.target, "temperature": temperature, **head_of(of.model)}

    def _token_loss(
        self, microbatch: Microbatch, annotations: dict[str, Tensor], squares: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the microbatch's part of the loss, log-probs (n,), entropies (n,)); its backward adds to squares (2,)."""

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            head_input = self._head_input(microbatch, self.loaded)
            head_input["input"].register_hook(partial(add_squares, squares, annotations["is_demo"]))
            out = self.loss_function(objective=self.objective, **head_input, **annotations)
            return out.loss, out.logprobs, out.entropy

        return self.ranks.forward(self.loaded, forward)

    @torch.no_grad()
    def _statistics(self, microbatches: list[Microbatch], of: LoadedModel | None = None) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) of the step's N tokens under the model as it is now, or under another one."""
        of = of or self.loaded
        heads = [partial(self._head_input, m, of) for m in microbatches]
        stats = [self.ranks.forward(of, lambda head=head: sk.linear_logprobs(**head())) for head in heads]
        return (
            self._in_step_order(microbatches, [s.logprobs for s in stats]),
            self._in_step_order(microbatches, [s.entropy for s in stats]),
        )

    def _step_tokens(
        self, microbatches: list[Microbatch], logprobs: Tensor, entropy: Tensor, known: dict[str, Tensor]
    ) -> tuple[sk.TokenStats, sk.Tokens]:
        """All tokens of the step as an objective sees them."""
        names = [*microbatches[0].annotations, "target"]
        tokens = sk.Tokens(**{name: self._gather(microbatches, name) for name in names}, **known)
        nowhere = torch.full_like(entropy, torch.nan)  # nothing that is asked of a whole step reads the log-sum-exp
        return sk.TokenStats(logprobs, entropy, nowhere), tokens

    def _gather(self, microbatches: list[Microbatch], name: str) -> Tensor:
        parts = [m.target if name == "target" else m.annotations[name] for m in microbatches]
        return self._in_step_order(microbatches, parts)

    def _in_step_order(self, microbatches: list[Microbatch], parts: list[Tensor]) -> Tensor:
        """(N,): one tensor per microbatch, of all ranks, put together in the order of the step's tokens."""
        if not parts:
            return torch.zeros(0)
        order, values = self.ranks.concatenate(torch.cat([m.step_index for m in microbatches]), torch.cat(parts))
        return torch.empty_like(values).index_copy_(0, order, values)
