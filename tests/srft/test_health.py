import pytest

from srft.health import RECENT, health

WELL = {
    "informative": 0.5, "reward_mean": 0.4, "rollout_entropy": 0.5, "rollout_surprise": 0.52, "finished": 0.9,
    "response_tokens": 40.0, "approx_kl": 0.001, "grad_norm": 1.0, "skipped_updates": 0.0, "reward_failed": 0.0,
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
        ({"skipped_updates": 0.5}, "Not finite: 4 of the last updates"),
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
    assert (
        health(run) == [pytest.approx(health(run)[0])] and "step 22 has norm 30, 30 times the median" in health(run)[0]
    )
    assert health([*run, *({**run[0], "step": n} for n in range(25, 33))]) == []
    assert health(run[-4:]) == []


def test_a_low_entropy_where_rollouts_still_differ_is_none_of_these():
    assert health(steps(rollout_entropy=0.01, rollout_surprise=0.01)) == []


def test_of_several_stages_the_last_is_judged():
    run = [{**each, "stage": 1} for each in steps(informative=0.0)] + [{**each, "stage": 2} for each in steps()]
    assert health(run) == []
