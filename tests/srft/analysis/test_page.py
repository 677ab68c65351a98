import math

from srft.analysis.page import page, table_of

SUMMARY = {
    "tokens": 9, "kl": 0.25, "kl_interval": [0.1, 0.4], "js": 0.05, "change": -0.5, "changed": 0.5, "raised": 0.25,
    "entropy_before": 1.0, "entropy_after": 0.5, "weight_down": 0.6, "weight_up": 1.6, "unshifted": 0.75,
    "marginal": 0.125, "shifted": 0.125,
}  # fmt: skip


def model(name: str, kl: float) -> dict:
    summary = SUMMARY | {"kl": kl}
    return {
        "path": name,
        "rewards": {each: {"reward": 0.5, "interval": [0.4, 0.6]} for each in ("task", "gcd")},
        "gradients": {"demonstrations": 3.0, "rollouts": 1.0, "cosine": math.nan, "share": 0.75},
        "shift": {each: dict.fromkeys(("demonstrations", "base", name), summary) for each in ("task", "gcd")},
        "histograms": {"base": [(0.0, 1.0), (1.0, 2.0)]},
        "by_position": [(0.0, 1.0)],
        "by_entropy": [(0.5, 1.0)],
        "texts": [
            {"prompt": "1 < 2", "writer": name, "reward": 1.0, "tokens": [("<b>", 1.5), (" x\n", -9.0), ("y", 0.0)]}
        ],
        "weights": {"share": 0.1, "matrices": {"lm_head": (1, 10)}},
        "crossing": [{"writer": "base", "swapped": 0.1, "reward": 0.2, "interval": [0.1, 0.3]}],
    }


RESULT = {
    "sets": {"task": 4, "gcd": 4},
    "models": {"base": model("base", 0.0), "sft-0": model("sft-0", 0.25)},
    "map": {"points": [
        {"model": "base", "step": None, "x": 0.0, "y": 0.0, "js": 0.0},
        {"model": "sft-0", "step": 8, "x": 0.1, "y": 0.2, "js": 0.05},
        {"model": "sft-0", "step": None, "x": 0.2, "y": 0.3, "js": 0.1},
    ], "shown": 0.9},
}  # fmt: skip


def test_the_table_has_a_row_of_each_model():
    header, base, sft = table_of(RESULT)
    assert len(header) == len(base) == len(sft) == 12
    told = dict(zip(header, sft))
    assert told["KL from base"] == "0.250" and told["cosine"] == "–" and told["weights"] == "10.0%"
    assert told["tokens changed"] == "50.0%" and told["gradient of these"] == "75.0%" and told["on others"] == "0.250"


def test_the_page_shows_figures_texts_and_numbers_and_escapes_what_models_write():
    html = page("mine", RESULT)
    for title in ("KL from base, and reward", "Change by entropy", "Map of the models", "Distance from base"):
        assert f"<figcaption>{title}</figcaption>" in html
    assert html.count("<svg") >= 8 and "nan" not in html.lower().replace("resonan", "")
    assert '<span class="up" style="--by: 0.38" title="Δ log p +1.50">&lt;b&gt;</span>' in html
    assert '<span class="down" style="--by: 0.75" title="Δ log p -9.00"> x\n</span><span>y</span>' in html
    assert "lm_head" in html and "<b>" not in html.split("Tokens, by their change")[1].split("Every set")[0]


def test_without_other_tasks_and_of_the_base_alone():
    alone = {
        "sets": {"task": 4},
        "models": {"base": model("base", 0.0) | {"weights": None, "crossing": []}},
        "map": {"points": RESULT["map"]["points"][:1], "shown": 1.0},
    }
    assert len(table_of(alone)[0]) == 10 and table_of(alone)[1][-1] == "–"
    assert "<figcaption>KL from base, and reward" in page("mine", alone)
