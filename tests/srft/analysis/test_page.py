import itertools
import math

from srft.analysis.page import drawn, page, table_of

KEYS = (
    "kl", "js", "change", "changed", "entropy_before", "entropy_after", "weight_down", "weight_up", "unshifted",
    "marginal", "shifted",
)  # fmt: skip


def model(name: str, first: float) -> dict:
    """Each number of it is another: by set, by writer and by what it says of them."""
    numbers = itertools.count()
    shifts = {
        of_set: {
            writer: {"tokens": 9, "kl_interval": [0.1, 0.4], **{key: first + 0.001 * next(numbers) for key in KEYS}}
            for writer in dict.fromkeys(("demonstrations", "base", name))
        }
        for of_set in ("task", "gcd")
    }
    return {
        "path": f"runs/{name}/final",
        "rewards": {"task": {"reward": 0.5, "interval": [0.4, 0.6]}, "gcd": {"reward": 0.25, "interval": [0.1, 0.4]}},
        "gradients": {"demonstrations": 3.0, "rollouts": 1.0, "cosine": math.nan, "share": 0.75},
        "shift": shifts,
        "histograms": {"base": [(0.0, 1.0), (1.0, 2.0)]},
        "by_position": [(0.0, 1.0)],
        "by_entropy": [(0.5, 1.0)],
        "texts": [
            {"prompt": "1 < 2", "writer": name, "reward": 1.0, "tokens": [("<b>", 1.5), (" x\n", -9.0), ("y", 0.0)]}
        ],
        "weights": {"share": 0.1, "matrices": {"lm_head": (1, 10)}},
        "crossing": [
            {"writer": "base", "swapped": 0.1, "reward": 0.2, "interval": [0.1, 0.3]},
            {"writer": name, "swapped": 0.3, "reward": 0.4, "interval": [0.1, 0.5]},
        ],
    }


RESULT = {
    "sets": {"task": 4, "gcd": 3},
    "sampled": {"samples": 2, "temperature": 1.0},
    "models": {"base": model("base", 0.0), "sft-0": model("sft-0", 0.25)},
    "map": {"points": [
        {"model": "base", "step": None, "x": 0.0, "y": 0.0, "js": 0.0},
        {"model": "sft-0", "step": 8, "x": 0.1, "y": 0.2, "js": 0.05},
        {"model": "sft-0", "step": None, "x": 0.2, "y": 0.3, "js": 0.1},
    ], "shown": 0.9},
}  # fmt: skip


def test_the_table_has_a_row_of_each_model():
    header, base, sft = table_of(RESULT)
    assert len(header) == len(base) == len(sft)
    told, shift = dict(zip(header, sft)), RESULT["models"]["sft-0"]["shift"]
    own = shift["task"]["sft-0"]
    assert told == {
        "model": "sft-0",
        "reward": "0.500",
        "95 %": "0.40 – 0.60",
        "other tasks": "0.250",
        "KL from base": f"{shift['task']['base']['kl']:.4f}",
        "on others": f"{shift['gcd']['base']['kl']:.4f}",
        "tokens changed": f"{own['changed']:.1%}",
        "shifted": f"{own['shifted']:.1%}",
        "entropy": f"{own['entropy_after']:.3f}",
        "of demonstrations": f"{shift['task']['demonstrations']['entropy_after']:.3f}",
        "gradient of these": "75.0%",
        "cosine": "–",
        "weights": "10.0%",
    }


def test_figures_have_the_numbers_of_their_titles(monkeypatch):
    figures = {}
    monkeypatch.setattr("srft.analysis.page.svg", lambda title, lines, *_, **__: figures.update({title: lines}) or "")
    list(drawn(RESULT))
    shift = RESULT["models"]["sft-0"]["shift"]
    assert figures["KL from base, and reward"]["sft-0"] == [(shift["task"]["base"]["kl"], 0.5)]
    assert figures["KL from base on other tasks, and their reward"]["sft-0"] == [(shift["gcd"]["base"]["kl"], 0.25)]
    assert figures["The base, with tokens of the model"] == {"sft-0": [(0.1, 0.2)]}
    assert figures["The model, with tokens of the base"] == {"sft-0": [(0.3, 0.4)]}
    assert figures["Map of the models"] == {"sft-0": [(0.0, 0.0), (0.1, 0.2), (0.2, 0.3)]}
    assert figures["Distance from base"] == {"sft-0": [(0, 0.0), (8, 0.05)]}
    assert figures["Change of the base's completions"] == {"sft-0": [(0.0, 1.0), (1.0, 2.0)]}


def test_the_page_shows_figures_texts_and_numbers_and_escapes_what_models_write():
    html = page("mine", RESULT)
    for title in ("KL from base, and reward", "Change by entropy", "Map of the models", "Distance from base"):
        assert f"<figcaption>{title}</figcaption>" in html
    assert html.count("<svg") >= 8 and "nan" not in html.lower().replace("resonan", "")
    assert '<span class="up" style="--by: 0.38" title="Δ log p +1.50">&lt;b&gt;</span>' in html
    assert '<span class="down" style="--by: 0.75" title="Δ log p -9.00"> x\n</span><span>y</span>' in html
    assert "Prompts: 4 of task, 3 of gcd; 2 completions of each at temperature 1." in html
    assert "sft-0: <code>runs/sft-0/final</code>." in html
    assert "lm_head" in html and "<b>" not in html.split("Tokens, by their change")[1].split("Every set")[0]


def test_without_other_tasks_and_of_the_base_alone():
    alone = {
        "sets": {"task": 4},
        "sampled": RESULT["sampled"],
        "models": {"base": model("base", 0.0) | {"weights": None, "crossing": []}},
        "map": {"points": RESULT["map"]["points"][:1], "shown": 1.0},
    }
    assert len(table_of(alone)[0]) == 11 and table_of(alone)[1][-1] == "–"
    assert "<figcaption>KL from base, and reward" in page("mine", alone)
