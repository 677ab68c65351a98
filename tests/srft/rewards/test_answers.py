"""Where the answer of a text stands, and when a mark has to be before it."""

import time

import pytest

from srft.rewards.answers import MarkRule, final_answer, is_answer, same, written_out

CUT = "1 + 4 = 5\nAdding 1 to 4,"  # the answer is 4


@pytest.mark.parametrize(
    ("completion", "numeric", "expected"),
    [
        ("1 + 1 = 2\n#### 2", True, "2"),
        ("#### 1\n#### 1,234.5 apples\nand not 7", True, "1,234.5"),
        ("#### 1,234.5 apples, not 7", True, ""),
        ("#### 3/4", True, ""),
        ("#### 3 or 5 or 7", True, ""),
        (r"\boxed{\frac{3}{4}}", True, ""),
        (r"\boxed{-\frac{1}{2}}", True, ""),
        (r"\boxed{3\sqrt{2}}", True, ""),
        (r"\boxed{3x+1}", True, ""),
        (r"\boxed{3x}", True, ""),
        (r"\boxed{(3, 4)}", True, ""),
        (r"\boxed{10^{6}}", True, ""),
        (r"\boxed{2\pi}", True, ""),
        (r"\boxed{5!}", True, ""),
        (r"\boxed{1,2}", True, ""),
        (r"\boxed{12:30}", True, ""),
        (r"\boxed{x = 7}", True, "7"),
        (r"\boxed{50\%}", True, "50"),
        (r"\boxed{\$1{,}200.50}", True, "1,200.50"),
        (r"\boxed{5\text{ cm}}", True, "5"),
        ("#### $5 kg.", True, "5"),
        ("#### -4 °C", True, "-4"),
        ("#### 12,34,567", True, "12,34,567"),
        ("#### 1e3", True, "1e3"),
        ("#### .5", True, ".5"),
        ("it is 3/4", True, ""),
        ("at 12:30", True, ""),
        ("The answer is 14.", True, "14"),
        ("5-3 gives 2, so x=-4", True, "-4"),
        ("from 5-3", True, "3"),  # a minus between numbers is no sign
        ("no idea", True, ""),
        ("####", True, ""),
        (r"so \boxed{\frac{1}{2}} holds", False, r"\frac{1}{2}"),
        ("####  Paris \n", False, "Paris"),
        ("Paris", False, "Paris"),
    ],
)
def test_final_answer(completion, numeric, expected):
    assert final_answer(completion, numeric) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("#### 14", "14", True),
        ("#### 114", "14", False),
        ("it is 1,000.00", "1000", True),
        ("#### 5", "a long solution with 3\n#### 5", True),
        ("#### paris.", "Paris", True),
        ("London", "Paris", False),
        ("", "4", False),
    ],
)
def test_same(completion, answer, expected):
    assert same(completion, answer) is expected


@pytest.mark.parametrize("reference", [None, "", "  \n", "####", "so it is\n#### ", r"\boxed{}", r"\boxed{ }", "."])
def test_a_reference_that_says_nothing_is_no_answer(reference):
    assert not is_answer(reference)
    assert is_answer("0") and is_answer("#### 5")


@pytest.mark.parametrize(
    "text",
    [
        *("#### 18.", "**#### 18**", "#### **18**", "#### `18`", r"#### \boxed{18}", r"#### \(18\)", "#### $x = 18$"),
        *("#### Answer: 18", "#### The answer is 18", "#### = 18", "#### ≈ 18", "#### 18m", "#### 18 km/h", "#### $18"),
        *("#### 18 cm^2", "#### 18 (dollars)", "#### 18</s>", "#### 18\nand 3 more", "#### 18%", r"\boxed{18\%}"),
        *(r"\boxed{18^\circ}", r"\boxed{18^{\circ}}", r"\boxed{\alpha=18^\circ}", r"\boxed{18 \text{ cm}^2}"),
        *(r"\boxed{18~\text{cm}}", r"\boxed{18\mathrm{~cm}}", r"\boxed{18\text{ km/h}}", r"\boxed{18\:\text{units}}"),
        *(r"\boxed{\displaystyle 18}", r"\boxed{\theta = 18}", r"\boxed{\$18}", r"\boxed{18\text{ dollars}}"),
    ],
)
def test_a_number_in_what_people_and_models_write_around_it(text):
    assert final_answer(text, numeric=True) == "18" and same(text, "18")


@pytest.mark.parametrize(
    "text",
    [
        *("#### 18 or 5", "#### 18-20", "#### 18 + 2", "#### 18, 19", "#### 18 million", "#### 18 dozen"),
        *("#### 18 or four", "#### 18 plus two", "#### 18 squared", r"\boxed{(18, x)}", r"\boxed{18\text{ or }x}"),
        *(r"\boxed{18 n}", r"\boxed{18 i}", r"\boxed{18_{10}}", r"\boxed{-\frac{1}{18}}", r"\boxed{18\pi}"),
    ],
)
def test_a_number_that_is_a_part_of_the_answer(text):
    assert final_answer(text, numeric=True) == "" and not same(text, "18")


def test_references_as_mathematicians_write_them():
    for completion, reference in (
        (r"\boxed{10,\!080}", "10080"),
        ("#### 10080", r"10,\!080"),
        (r"\boxed{18}", r"\$18"),
        (r"\boxed{90}", r"90^\circ"),
        ("#### -$5.50", "-5.5"),
    ):
        assert same(completion, reference)
    assert not same("#### 3 AM", "3 PM") and same("#### 3 pm.", "3 PM")


def test_no_line_takes_long_to_read():
    words = "18 dollars every day at the farmers market because she keeps some eggs for friends and bakes, that is "
    start = time.monotonic()
    for tail in ("9 x 2", "(19+23)", "- done", "a" * 2000 + "1", "，" * 2000, "{" * 2000, r"\text{" * 500, "1," * 2000):
        final_answer(f"#### {words * 20}{tail}", numeric=True)
        final_answer(f"{words * 20}{tail}", numeric=True)
        final_answer(r"\boxed{" + words * 20 + tail + "}", numeric=True)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("prompt", "system_prompt", "asks"),
    [
        ("2 + 3?", None, False),
        ("2 + 3?", "Answer after ####.", True),
        ("2 + 3? End with a line\n#### <answer>", None, True),
        ("2 + 3? End with\n#### answer", None, True),
        (r"2 + 3? Put it in \boxed{}.", None, True),
        ("2 + 3? Put it in \\boxed{}.", "", True),
        ([{"role": "system", "content": "Answer after ####."}, {"role": "user", "content": "2 + 3?"}], None, True),
        ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "?"}], "Answer after ####.", False),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "#### 5"}], None, False),
        ([{"role": "user", "content": [{"type": "text", "text": "answer after ####"}]}], None, True),
        ("#### Problem\n2 + 3?", None, False),  # a heading of Markdown
        ("##### Answer the question\n2 + 3?", None, False),
    ],
)
def test_a_prompt_that_asks_for_a_mark(prompt, system_prompt, asks):
    rule = MarkRule("auto", system_prompt)
    assert (rule.counted(prompt, "it is 5") is None) == asks
    assert rule.counted(prompt, "#### 5").endswith("#### 5")


@pytest.mark.parametrize(
    ("mode", "prompt", "completion", "finished", "expected"),
    [
        ("auto", "Answer after ####.", CUT, False, None),
        ("auto", "Answer after ####.", CUT, True, None),
        ("auto", "2 + 2?", CUT, False, None),
        ("auto", "2 + 2?", CUT, True, CUT),
        ("auto", "2 + 2?", CUT + "#### 4", False, CUT + "#### 4"),
        ("any", "Answer after ####.", CUT, True, CUT),
        ("any", "Answer after ####.", CUT, False, None),
        ("required", "2 + 2?", CUT, True, None),
        ("required", "2 + 2?", r"\boxed{4} I think", True, r"\boxed{4}"),
        ("auto", r"Use \boxed{}.", "\\boxed{4}\n#### Note\n7", True, r"\boxed{4}"),
        ("auto", "Answer after ####.", "\\boxed{7}\n#### 4", True, "#### 4"),
        ("auto", r"Use \boxed{}.", "so\n#### 4", True, "#### 4"),  # the other mark is a given answer too
    ],
)
def test_what_counts_of_a_completion(mode, prompt, completion, finished, expected):
    assert MarkRule(mode).counted(prompt, completion, finished) == expected


def test_an_exponent_of_ten_is_written_out():
    assert written_out("4.5e33") == "4.5 \\times 10^{33}" and written_out("$-1e-3$") == "-1 \\times 10^{-3}"
    for other in ("2e", "x2e5", "e5", "3e5x", "1.2.3e4", "-1+2e-1", "\\frac{2e-1}{3}", "4.5e33 m"):
        assert written_out(other) == other
