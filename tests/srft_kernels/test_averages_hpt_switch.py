"""HPT's choice between a prompt's demonstration and its rollouts."""

import pytest
import torch

import srft_kernels as sk

# prompt 5: rollouts of 1, 3 and 2 tokens, rewards 1, 0, 0, and a demonstration; prompt 2: all fail; prompt 8: no
# rollouts; prompt 1: all succeed, no demonstration
PROMPT = torch.tensor([5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 8, 1, 1])
SEQUENCE = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7])
DEMO = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0]).bool()
REWARD = torch.tensor([1.0, 0, 0, 0, 0, 0, 1, 1, -1, 1, 1, 1, 1, 1])
ROLLOUTS_OF_5, DEMO_OF_5 = [0, 1, 2, 3, 4, 5], [6, 7]
OTHERS = [9, 10, 11, 12, 13]


@pytest.mark.parametrize(
    "threshold, chosen", [(0.0, ROLLOUTS_OF_5), (0.3, ROLLOUTS_OF_5), (1 / 3, DEMO_OF_5), (0.5, DEMO_OF_5)]
)
def test_a_prompt_that_succeeds_often_enough_learns_from_its_rollouts(threshold, chosen):
    """The rate counts rollouts, not tokens, and has to exceed the threshold."""
    switch = sk.hpt_switch(DEMO, REWARD, PROMPT, SEQUENCE, threshold)
    assert switch.dtype == torch.bool and switch.nonzero()[:, 0].tolist() == chosen + OTHERS
    order = torch.randperm(14)
    columns = (column[order].view(2, 7) for column in (DEMO, REWARD, PROMPT, SEQUENCE))
    assert torch.equal(sk.hpt_switch(*columns, threshold), switch[order].view(2, 7))


def test_masked_tokens_do_not_count():
    """Without its first rollout prompt 5 never succeeds; a rollout cut short by the mask is still one rollout."""
    mask = torch.ones(14).bool()
    mask[[0, 2, 3]] = False
    assert sk.hpt_switch(DEMO, REWARD, PROMPT, SEQUENCE, mask=mask).nonzero()[:, 0].tolist() == DEMO_OF_5 + OTHERS
    mask[0] = True
    for threshold, chosen in ((0.33, [0, 1, 4, 5]), (0.34, DEMO_OF_5)):
        switch = sk.hpt_switch(DEMO, REWARD, PROMPT, SEQUENCE, threshold, mask)
        assert switch.nonzero()[:, 0].tolist() == chosen + OTHERS


def test_switched_loss():
    """With the switch as the mask of an average the loss is that of the chosen tokens, each kind by its formula."""
    x, w, y = torch.randn(14, 8).double(), torch.randn(20, 8).double(), torch.randint(20, (14,))
    advantages = torch.randn(14).double()
    switch = sk.hpt_switch(DEMO, REWARD, PROMPT, SEQUENCE)
    weight = sk.constant_length(switch, SEQUENCE, 4)
    out = sk.linear_loss(x, w, y, sk.hpt(), is_demo=DEMO, advantages=advantages, token_weight=weight)
    logprobs = (x @ w.T).log_softmax(-1).gather(1, y[:, None])[:, 0]
    demo, roll = [9, 10, 11], [*ROLLOUTS_OF_5, 12, 13]  # of 6 sequences
    torch.testing.assert_close(out.loss, -(logprobs[demo].sum() + advantages[roll].sum()) / 24)  # r = 1: −r·A = −A


@pytest.mark.parametrize("arguments, message", [
    ((DEMO, REWARD[:3], PROMPT, SEQUENCE), r"rewards must be shaped like is_demo \(14,\), found \(3,\)"),
    ((DEMO, REWARD, PROMPT, SEQUENCE, 1.5), r"threshold must lie in \[0, 1\], the share of successes .*, found 1.5"),
])  # fmt: skip
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        sk.hpt_switch(*arguments)


def test_no_tokens():
    empty = torch.zeros(0)
    assert sk.hpt_switch(empty.bool(), empty, empty.long(), empty.long()).shape == (0,)
