import pytest

from srft.health import RECENT, health

WELL = {
    "informative": 0.5, "reward_mean": 0.4, "reward_demo": None, "rollout_entropy": 0.5, "rollout_surprise": 0.52,
    "finished": 0.9, "response_tokens": 40.0, "approx_kl": 0.001, "grad_norm": 1.0, "skipped_updates": 0.0,
    "reward_failed": 0.0,
}  # fmt: skip


def steps(count: int = 3 * RECENT, **last) -> list[dict]:
    """Steps that are well, but for the last ones."""
    return [{"step": n, **WELL, **(last if n > count - RECENT else {})} for n in range(1, count + 1)]


def test_a_run_that_is_well_says_nothing():
    assert health(steps()) == [] and health([]) == [] and health(steps(1)) == []
    assert health([{"step": n, "loss": 1.0, "rollout_entropy": None} for n in range(1, 30)]) == []


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ({"informative": 0.0}, "all got the same reward in the last 8 steps (0.40 on average)"),
        ({"informative": 0.0, "reward_mean": 1.0}, "Try harder prompts"),
        ({"informative": 0.0, "reward_mean": 0.0}, "Try easier prompts, or SFT first"),
        ({"rollout_entropy": 0.001, "rollout_surprise": 0.001, "informative": 0.05}, "Entropy collapse: the entropy"),
        ({"finished": 0.4, "response_tokens": 90.0}, "grew from 40 to 90 tokens, and 40% end by themselves, after 90%"),
        ({"approx_kl": 0.2}, "KL grows: a step moves the policy 0.200 nats"),
        ({"skipped_updates": 0.25}, "Not finite: 25% of the last updates"),
        ({"rollout_surprise": 1.4}, "Stale engine: rollouts have −log p of 1.40 nats per token"),
        ({"reward_failed": 2}, "Rewards fail: 16 of the last rollouts"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_try(last, told):
    lines = health(steps(**last))
    assert len(lines) == 1 and told in lines[0] and ". " in lines[0], lines


def test_one_spike_is_told_with_its_step_until_it_is_long_ago():
    run = steps()
    run[-3]["grad_norm"] = 30.0
    (line,) = health(run)
    assert "step 22 has norm 30, 30 times the median" in line
    assert health([*run, *({**run[0], "step": n} for n in range(25, 33))]) == []
    assert health(run[-4:]) == []


@pytest.mark.parametrize(
    ("under", "over"),
    [
        ({"informative": 0.001}, {"informative": 0.0}),
        (
            {"rollout_entropy": 0.021, "rollout_surprise": 0.02, "informative": 0.09},
            {"rollout_entropy": 0.019, "rollout_surprise": 0.02, "informative": 0.09},
        ),
        (
            {"rollout_entropy": 0.01, "rollout_surprise": 0.01, "informative": 0.11},
            {"rollout_entropy": 0.01, "rollout_surprise": 0.01, "informative": 0.09},
        ),
        ({"finished": 0.71, "response_tokens": 90.0}, {"finished": 0.69, "response_tokens": 90.0}),
        ({"finished": 0.5, "response_tokens": 39.0}, {"finished": 0.5, "response_tokens": 41.0}),
        ({"approx_kl": 0.049}, {"approx_kl": 0.051}),
        ({"grad_norm": 1.0}, {"skipped_updates": 0.01}),
        ({"rollout_surprise": 0.79}, {"rollout_surprise": 0.81}),
    ],
)
def test_just_below_and_just_above_what_is_told(under, over):
    assert health(steps(**under)) == [] and len(health(steps(**over))) == 1
    assert health(steps(RECENT - 1, **{name: value for name, value in over.items() if name != "skipped_updates"})) == []


def test_a_spike_is_more_than_ten_times_the_median():
    for norm, told in ((9.9, 0), (10.1, 1)):
        run = steps()
        run[-1]["grad_norm"] = norm
        assert len(health(run)) == told


def test_rollouts_that_all_failed_have_advantages_where_the_demonstration_did_not():
    assert health(steps(informative=0.0, reward_mean=0.0, reward_demo=1.0)) == []
    assert len(health(steps(informative=0.0, reward_mean=1.0, reward_demo=1.0))) == 1


def test_a_solved_task_is_no_collapse():
    solved = {"rollout_entropy": 0.001, "rollout_surprise": 0.001, "informative": 0.05, "reward_mean": 0.99}
    assert health(steps(**solved)) == []


def test_steps_that_do_not_know_do_not_silence_a_rule():
    run = steps(informative=0.0)
    run[-2]["informative"] = None
    assert len(health(run)) == 1
    assert health([{**each, "informative": None} for each in run]) == []


def test_a_low_entropy_where_rollouts_still_differ_is_none_of_these():
    assert health(steps(rollout_entropy=0.01, rollout_surprise=0.01)) == []


def test_of_several_stages_the_last_is_judged():
    run = [{**each, "stage": 1} for each in steps(informative=0.0)] + [{**each, "stage": 2} for each in steps()]
    assert health(run) == []
