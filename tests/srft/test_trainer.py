import json
import math

import pytest
import torch

import srft_kernels as sk
from srft.config import DataConfig
from srft.data import Example, build_prompter
from srft.errors import UserError
from srft.learn.credit import advantages_of, reward_metrics
from srft.learn.job import training_problems
from srft.learn.objective import build_objective
from srft.learn.order import drawn
from srft.learn.packing import Sequence, pack
from srft.learn.stages import whole
from srft.metrics import DESCRIPTIONS
from srft.model import LoadedModel, Rows
from srft.model.head import positions
from srft.rewards import Scorer
from srft.rollout import Engine, Rollout
from srft.settings import load
from srft.trainer import Trainer
from tests.srft.conftest import loaded_model, tiny_model

ROWS = (Rows(), Rows(packed=True), Rows(packed=True, shared=True))
QUESTIONS = ["2 + 3", "7 - 4", "1 + 1", "9 - 9", "4 + 8"]


def examples(demonstrations: bool = True) -> list[Example]:
    return [
        Example([{"role": "user", "content": q}], f"#### {eval(q)}" if demonstrations else None, str(eval(q)), "sums")
        for q in QUESTIONS
    ]


def length_reward(prompts, completions, **columns):
    """Something that differs between completions of a random model: how many bytes are even."""
    return [sum(ord(c) % 2 == 0 for c in text) / (len(text) or 1) for text in completions]


def make(loaded: LoadedModel, *overrides: str, data=None, reward=length_reward, **options) -> Trainer:
    small = "--train.prompts_per_step=3 --rollout.per_prompt=3 --rollout.max_new_tokens=8 --train.lr=1e-3"
    config = load(None, [*small.split(), *overrides])
    prompter = build_prompter(loaded.tokenizer, DataConfig(system_prompt=""))
    objective, limit = build_objective(config.loss), positions(loaded.model.config)
    problems = training_problems(config, prompter, examples() if data is None else data, objective, limit)
    return Trainer(whole(config, problems), loaded, prompter, Scorer("test", reward), **options)


def fresh(dtype: torch.dtype = torch.float32, **changes) -> LoadedModel:
    return loaded_model(tiny_model(**changes).to(dtype))


def gradients(trainer: Trainer, microbatches) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one update that is not taken."""
    trainer.optimizer.step = lambda number: {}
    trainer.loaded.model.zero_grad()
    loss = trainer._update(microbatches, 1, {})["loss"]
    return loss, [p.grad.clone() for p in trainer.loaded.model.parameters()]


def some_sequences(common_prompts: bool = False) -> list[Sequence]:
    """common_prompts: sequences whose prompts are of one length have one prompt."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(1, 258, (n,), generator=generator).tolist()

    shapes = [
        (4, 6, False, 1.0),
        (4, 3, False, 0.0),
        (4, 5, True, 1.0),
        (9, 2, False, 1.0),
        (9, 7, True, 1.0),
        (2, 9, False, 0),
    ]
    prompts = {p: ids(p) for p, *_ in shapes}
    return [
        Sequence(prompts[p] if common_prompts else ids(p), ids(c), demo, reward, advantage=reward - 0.4 + 0.1 * i)
        for i, (p, c, demo, reward) in enumerate(shapes)
    ]


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize(
    "preset",
    ["srft_paper", "srft_official", "srft_hpt", "srft_paper level=batch", "gspo", "chord", "luffy", "grpo", "sft"],
)
def test_gradient_does_not_depend_on_the_cut_into_microbatches(preset, average):
    loaded = fresh(torch.float64)
    name, *options = preset.split()
    trainer = make(loaded, "--loss.preset", name, *(f"--loss.options.{o}" for o in options))
    results = {}
    for rows in ROWS:
        for budget in (1, 20, 30, 10_000):
            options = {"average": average, "max_length": 9, "rows": rows}
            parts = pack(some_sequences(common_prompts=True), token_budget=budget, **options)
            results[rows, len(parts)] = gradients(trainer, parts)
    assert len(results) >= 9 and {(rows, 1) for rows in ROWS} <= set(results)
    loss, whole = results[Rows(), 1]
    for other_loss, other in results.values():
        # token weights and the model's norms are fp32, everything else fp64
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(other, whole))


def test_step_metrics_do_not_depend_on_the_cut():
    trainer = make(fresh())
    trainer.optimizer.step = lambda number: trainer.loaded.model.zero_grad() or {}
    cuts = [(budget, rows) for rows in ROWS for budget in (1, 25, 10_000)]
    parts = [pack(some_sequences(common_prompts=True), token_budget=b, rows=rows) for b, rows in cuts]
    lines = [trainer._update(each, 1, {}) for each in parts]
    for line in lines[1:]:
        assert line == pytest.approx(lines[0], rel=1e-4, abs=1e-6)


def test_ten_steps_with_the_fused_loss_and_with_full_logits_agree():
    losses = {}
    for name, function in {"fused": sk.linear_loss, "full": sk.reference.linear_loss}.items():
        trainer = make(fresh(), "--train.token_budget", "200", loss_function=function)
        losses[name] = [trainer.step(number)[0]["loss"] for number in range(1, 11)]
    assert len(set(losses["fused"])) == 10  # it learns
    assert losses["fused"] == pytest.approx(losses["full"], rel=1e-4)


def test_training_makes_demonstrations_likelier(tiny):
    trainer = make(tiny, "--train.lr", "1e-2", "--loss.preset", "sft", "--train.prompts_per_step", "5")
    demos = pack([Sequence(p.prompt, p.demonstration, True) for p in trainer.pool], token_budget=1000)
    before = trainer._statistics(demos)[0].mean()
    for number in range(1, 6):
        trainer.step(number)
    assert trainer._statistics(demos)[0].mean() > before + 1


def test_a_step_of_hpt_has_no_prompt_that_learns_from_both(tiny):
    never, always = (make(tiny, "--loss.preset=hpt", reward=reward) for reward in (nothing, everything))
    line = never.step(1)[0]
    assert line["rollout_tokens"] == 0 < line["demo_tokens"]
    line = always.step(1)[0]
    assert line["demo_tokens"] == 0 < line["rollout_tokens"]


def test_the_threshold_of_hpt_is_that_of_the_configuration(tiny):
    def a_third(prompts, completions, **columns):
        return [float(i % 3 == 0) for i in range(len(completions))]

    for threshold, demo in (("0.3", False), ("0.4", True)):
        line = make(tiny, "--loss.preset=hpt", "--loss.hpt_threshold", threshold, reward=a_third).step(1)[0]
        assert (line["demo_tokens"] > 0) == demo and (line["rollout_tokens"] == 0) == demo


def nothing(prompts, completions, **columns):
    return [0.0] * len(completions)


def everything(prompts, completions, **columns):
    return [1.0] * len(completions)


def test_a_step_reports_every_key_of_the_issue(tiny):
    line, samples = make(tiny, "--run.samples_per_step", "2").step(1)
    expected = """step loss demo_sft_loss demo_rl_loss rollout_loss demo_entropy rollout_entropy demo_entropy_weight
    rollout_entropy_weight reward_mean reward_std response_tokens clip_fraction approx_kl grad_norm learning_rate
    demo_tokens rollout_tokens seconds_rollout seconds_train tokens_per_second peak_memory_mb"""
    assert set(expected.split()) <= set(line)
    assert set(line) <= set(DESCRIPTIONS)
    assert all(math.isfinite(line[name]) for name in expected.split())
    assert [set(s) for s in samples] == [
        {"step", "task", "prompt", "completion", "reward", "advantage", "finished"}
    ] * 2
    json.dumps([line, samples])


def test_entropy_weights_are_means_of_exponentials(tiny):
    trainer = make(tiny)
    parts = pack(some_sequences(), token_budget=30)
    entropy = trainer._statistics(parts)[1]
    is_demo = trainer._gather(parts, "is_demo")
    line = trainer._update(parts, 1, {})
    assert line["demo_entropy_weight"] == pytest.approx(float((-entropy[is_demo]).exp().mean()), rel=1e-4)
    assert line["rollout_entropy_weight"] == pytest.approx(float(entropy[~is_demo].exp().mean()), rel=1e-4)


@pytest.mark.parametrize("level", ["sequence", "batch"])
def test_logged_entropy_weights_are_those_of_the_level(tiny, level):
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight.mul_(8)  # entropies that differ
    trainer = make(tiny, "--loss.options.level", level)
    parts = pack(some_sequences(), token_budget=30)
    entropy = trainer._statistics(parts)[1]
    is_demo = trainer._gather(parts, "is_demo")
    over = trainer._gather(parts, "sequence_ids") if level == "sequence" else is_demo
    mean = torch.stack([entropy[over == each].mean() for each in over])
    expected = {
        "demo_entropy_weight": float((-mean[is_demo]).exp().mean()),
        "rollout_entropy_weight": float(mean[~is_demo].exp().mean()),
    }
    line = trainer._update(parts, 1, {})
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert line["demo_entropy_weight"] == pytest.approx(line["demo_weight"] / 0.5, rel=1e-4)
    assert abs(expected["rollout_entropy_weight"] / float(entropy[~is_demo].exp().mean()) - 1) > 0.01


@pytest.mark.parametrize("options", [["--loss.preset", "grpo"], ["--loss.options.positive", "advantage"]])
def test_equal_rewards_leave_no_gradient_of_the_rollouts(tiny, options):
    trainer = make(
        tiny,
        *options,
        data=examples(demonstrations=False),
        reward=lambda prompts, completions, **_: [0.1] * len(completions),
    )
    before = [p.detach().clone() for p in tiny.model.parameters()]
    line, _ = trainer.step(1)
    assert line["grad_norm"] == 0 and line["reward_std"] == pytest.approx(0) and line["informative"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, tiny.model.parameters()))


def test_equal_rewards_still_learn_from_the_demonstration(tiny):
    line, _ = make(tiny, reward=lambda prompts, completions, **_: [1.0] * len(completions)).step(1)
    assert line["grad_norm"] > 0 and line["demo_rl_loss"] == 0 and math.isfinite(line["loss"])


def test_rewards_of_none_are_left_out(tiny):
    def reward(prompts, completions, **columns):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    line, _ = make(tiny, reward=reward).step(1)
    assert line["reward_mean"] == 1.0 and 0 < line["rollout_tokens"] < 9 * 8
    assert math.isfinite(line["loss"])


@pytest.mark.parametrize("options", [[], ["--loss.options.level", "batch"], ["--train.updates_per_rollout", "2"]])
@pytest.mark.parametrize("demonstrations", [True, False])
def test_a_step_in_which_nothing_was_scored(tiny, demonstrations, options):
    def reward(prompts, completions, **_):
        return [None] * len(completions)

    trainer = make(tiny, *options, data=examples(demonstrations), reward=reward)
    line, _ = trainer.step(1)
    assert math.isnan(line["reward_mean"]) and line["rollout_tokens"] == 0
    assert line["loss"] == 0 if not demonstrations else line["demo_tokens"] > 0
    assert math.isfinite(line["loss"]) and all(p.isfinite().all() for p in tiny.model.parameters())


def test_prompts_without_a_demonstration_learn_from_their_rollouts(tiny):
    mixed = [*examples()[:2], *examples(demonstrations=False)[2:]]
    trainer = make(tiny, "--train.prompts_per_step", "5", data=mixed)
    line, _ = trainer.step(1)
    assert line["demo_tokens"] == sum(len("#### 5") + 1 for _ in range(2))
    assert line["rollout_tokens"] > 0 and math.isfinite(line["loss"])


def test_the_end_of_sequence_is_trained_on_in_demonstrations_and_rollouts(tiny):
    class Scripted(Engine):
        def generate(self, prompts, samples, **_):
            return [[Rollout([70, 71, 0], True), Rollout([72, 73], False)] for _ in prompts]

    trainer = make(tiny, engine=Scripted())
    problems = drawn(trainer.stage, 1)
    groups = trainer._score(problems, trainer._roll_out(problems, 1))
    sequences = trainer._credit(groups, [advantages_of(group, trainer.config.loss) for group in groups])
    metrics = reward_metrics(groups)
    (m,) = pack(sequences, token_budget=10_000)
    ends = m.target == 0
    assert ends.sum() == 2 * len(problems)  # one in each demonstration, one in each finished rollout
    assert metrics["finished"] == 0.5 and metrics["response_tokens"] == 2.5
    assert all(s.completion[-1] == 0 for s in sequences if s.is_demo)


@pytest.mark.parametrize(
    "preset, rollouts, demos", [("sft", 0, 1), ("dft", 0, 1), ("grpo", 1, 0), ("srft_paper", 1, 1), ("luffy", 1, 1)]
)
def test_each_kind_of_objective_learns_from_its_kind_of_data(tiny, preset, rollouts, demos):
    line, _ = make(tiny, "--loss.preset", preset).step(1)
    assert (line["rollout_tokens"] > 0, line["demo_tokens"] > 0) == (bool(rollouts), bool(demos))
    assert line["grad_norm"] > 0


def test_supervised_training_without_demonstrations_is_refused(tiny):
    with pytest.raises(UserError, match="demonstration"):
        make(tiny, "--loss.preset", "sft", data=examples(demonstrations=False))


def test_several_updates_on_the_same_rollouts_drift_from_them(tiny):
    line, _ = make(tiny, "--train.updates_per_rollout", "3", "--train.lr", "1e-2", "--loss.preset", "grpo").step(1)
    assert line["approx_kl"] > 0
    assert make(fresh(), "--loss.preset", "grpo").step(1)[0]["approx_kl"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("budget", [10_000, 60])
def test_norms_of_the_gradient_to_the_hidden_states_of_each_kind(tiny, budget):
    seen = []

    def watched(input, *, is_demo, **rest):
        input.register_hook(lambda gradient: seen.append((gradient, is_demo)))
        return sk.linear_loss(input, is_demo=is_demo, **rest)

    trainer = make(tiny, loss_function=watched)
    trainer.optimizer.step = lambda number: {}
    microbatches = pack(some_sequences(), token_budget=budget)
    line = trainer._update(microbatches, 1, {})
    assert len(seen) == len(microbatches) and (len(seen) > 1) == (budget < 100)
    for kind, norm in ((True, line["demo_grad_norm"]), (False, line["rollout_grad_norm"])):
        gradient = torch.cat([gradient[is_demo == kind] for gradient, is_demo in seen])
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-5) and norm > 0


def other_model(kind: str):
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

    common = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.3,  # logits large enough for the cap and the scale to matter
    }
    configs = {
        "soft cap": lambda: Gemma2Config(**common, head_dim=8, final_logit_softcapping=2.0),
        "logit scale": lambda: CohereConfig(**common, logit_scale=0.25),
        "logits scaling": lambda: GraniteConfig(**common, logits_scaling=4.0),
        "tied": lambda: tiny_model().config,
        "untied": lambda: tiny_model(tie_word_embeddings=False).config,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[kind]())


@pytest.mark.parametrize("kind", ["soft cap", "logit scale", "logits scaling", "tied", "untied"])
def test_training_log_probs_are_those_of_the_models_own_logits(kind):
    model = other_model(kind)
    trainer = make(loaded_model(model), "--rollout.temperature", "0.8")
    everything = some_sequences()
    ours, entropy = trainer._statistics(pack(everything, token_budget=30))
    model.eval()
    expected = []
    for s in everything:
        with torch.no_grad():
            logits = model(torch.tensor([s.prompt + s.completion])).logits[0, len(s.prompt) - 1 : -1]
        expected.append((logits / 0.8).log_softmax(-1))
    logp = torch.cat(expected)
    targets = torch.tensor([token for s in everything for token in s.completion])
    torch.testing.assert_close(ours, logp.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-5)
    assert trainer.step(1)[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--train.token_budget=60"],
            r"long: 63 tokens \(prompt 55 \+ rollout.max_new_tokens 8\), but train.token_budget is 60; raise it or "
            "shorten rollout.max_new_tokens or the prompt",
        ),
        (
            ["--rollout.max_new_tokens=500"],
            r"long: 555 tokens .*, but the model's max_position_embeddings is 512; shorten rollout.max_new_tokens",
        ),
        (
            ["--train.token_budget=60", "--rollout.max_new_tokens=2"],
            r"sums: \d+ tokens \(prompt \d+ \+ its demonstration 43\), .* or shorten its demonstration or the prompt",
        ),
        (["--train.token_budget=60", "--loss.preset=sft"], "its demonstration 43"),
    ],
)
def test_a_sequence_beyond_the_token_budget_or_the_model_is_refused(tiny, options, expected):
    long = Example([{"role": "user", "content": "x" * 36}], None, "1", "long")
    data = [*examples(), long]
    if "demonstration" in expected:
        data[0] = Example(data[0].messages, "#" * 42, "5", "sums")
    with pytest.raises(UserError, match=expected):
        make(tiny, *options, data=data)
    make(tiny, "--train.token_budget=90", data=data)


class Sums(Engine):
    """Completions of its own making, by the number of the call: all alike at first, then different ones."""

    def __init__(self, lengths: list[list[int]], finished: bool = True):
        self.lengths, self.finished, self.prompts = lengths, finished, []

    def generate(self, prompts, samples, **_):
        lengths = self.lengths[min(len(self.prompts), len(self.lengths) - 1)]
        self.prompts.append(len(prompts))
        return [[Rollout([70] * lengths[i % len(lengths)], self.finished) for i in range(samples)] for _ in prompts]


def by_length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def test_prompts_without_information_are_replaced(tiny):
    """Where the rollouts of all prompts got the same reward at first, others are drawn, none twice in a step."""
    engine = Sums([[3], [2, 3]])
    trainer = make(tiny, "--loss.preset", "grpo", "--rollout.resample", "4", engine=engine, reward=by_length)
    line, _ = trainer.step(1)
    assert engine.prompts == [3, 2] and line["resampled"] == 2  # of five
    assert line["informative"] == pytest.approx(2 / 5) and line["rollout_tokens"] == 2 * (2 + 3 + 2)
    engine = Sums([[3]])
    trainer = make(fresh(), "--loss.preset", "grpo", "--rollout.resample", "1", engine=engine, reward=by_length)
    line, _ = trainer.step(1)
    assert engine.prompts == [3, 2] and line["rollout_tokens"] == 0  # nothing is left
    assert line["reward_mean"] == 3 and line["informative"] == 0
    assert "resampled" not in make(fresh(), engine=Sums([[3]]), reward=by_length).step(1)[0]


def test_a_demonstration_that_did_better_than_all_rollouts_is_information(tiny):
    engine = Sums([[3]])
    trainer = make(tiny, "--rollout.resample", "2", engine=engine, reward=by_length)  # "#### 5" is longer
    line, _ = trainer.step(1)
    assert engine.prompts == [3] and line["demo_tokens"] > 0 and line["informative"] == 0


def test_who_is_drawn_again_does_not_depend_on_the_number_of_steps(tiny):
    def prompts(steps: str) -> list[str]:
        options = ["--rollout.resample", "1", "--train.steps", steps, "--loss.preset", "grpo"]
        trainer = make(fresh(), *options, "--run.samples_per_step", "9", engine=Sums([[3], [2, 3]]), reward=by_length)
        return [sample["prompt"] for sample in trainer.step(1)[1]]

    assert prompts("1") == prompts("30") != []


def test_what_is_drawn_again_is_the_same_in_a_resumed_run(tiny):
    steps = []
    for _ in range(2):
        trainer = make(fresh(), "--rollout.resample", "2", reward=by_length)
        steps.append([trainer.step(n)[0]["loss"] for n in (1, 2)])
    assert steps[0] == steps[1]


@pytest.mark.parametrize("masked", [True, False])
def test_rollouts_that_were_cut_have_no_loss_where_asked(tiny, masked):
    option = ["--loss.mask_truncated", str(masked).lower()]
    engine = Sums([[2, 3]], finished=False)
    trainer = make(tiny, "--loss.preset", "grpo", *option, engine=engine, reward=by_length)
    line, _ = trainer.step(1)
    assert (line["rollout_tokens"] == 0) == masked and line["reward_std"] > 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_is_its_formula_with_the_log_probs_of_the_reference(estimator):
    """Value and gradient, from full logits of each sequence alone."""
    terms = {
        "k1": lambda p, q: p - q,
        "k2": lambda p, q: (p - q) ** 2 / 2,
        "k3": lambda p, q: (q - p).exp() - (q - p) - 1,
    }
    loaded, reference = fresh(torch.float64), fresh(torch.float64)
    with torch.no_grad():
        for weight in reference.model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    sequences = [each for each in some_sequences() if not each.is_demo]
    found = {}
    for coefficient in (0.0, 0.3):
        options = ("--loss.preset", "grpo", "--loss.options.kl_coef", str(coefficient), "--rollout.temperature", "0.7")
        trainer = make(loaded, *options, "--loss.options.kl_estimator", estimator, reference=reference)
        trainer.optimizer.step = lambda number: {"skipped_updates": 0.0}
        loaded.model.zero_grad()
        metrics = trainer._learn(pack(sequences, token_budget=25, rows=trainer.rows), 1)
        found[coefficient] = metrics, [p.grad.clone() for p in loaded.model.parameters()]
    (plain, plain_gradients), (metrics, gradients) = found.values()
    assert "ref_kl" not in plain and all(p.grad is None for p in reference.model.parameters())

    def logprobs(model, sequence):
        ids = torch.tensor([*sequence.prompt, *sequence.completion])
        every = (model(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        return every.gather(1, ids[1:, None])[len(sequence.prompt) - 1 :, 0]

    each = [(logprobs(loaded.model, s), logprobs(reference.model, s).detach()) for s in sequences]
    kl = torch.cat([terms[estimator](*pair) for pair in each])
    expected = torch.autograd.grad(0.3 * kl.mean(), list(loaded.model.parameters()))
    assert metrics["ref_kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert metrics["loss"] - plain["loss"] == pytest.approx(0.3 * float(kl.mean()), rel=1e-5)
    for ours, without, theirs in zip(gradients, plain_gradients, expected):
        assert (ours - without - theirs).norm() <= 1e-5 * theirs.norm()
