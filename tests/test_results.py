"""Intervals, calibration error and tables, recomputed; pictures, by what is drawn in them."""

import itertools
import math

import matplotlib.image
import numpy as np
import pytest

from minitune.support import plots
from minitune.support.results import (
    TOGETHER,
    expected_calibration_error,
    in_percent,
    in_seconds,
    interval,
    mcnemar,
    prompt_summary,
    prompt_table,
    summarise,
    table,
)

pytestmark = pytest.mark.filterwarnings("error")  # a layout that does not fit, a division by zero
DAMAGED = ["$\\frac$", "$", "日本 🎬", "a\nb\0c", "caf\udce9", "x" * 500]  # names that may be drawn


# Intervals


# The first four are in Newcombe (1998), "Two-sided confidence intervals for the single proportion",
# table I.
@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_the_interval_of_an_accuracy_is_wilsons(right, n, low, high):
    assert interval(right / n, n) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_an_accuracy_is_inside_its_interval_and_the_interval_inside_zero_and_one():
    for n in range(1, 1001):
        for right in (0, 1, n // 3, n - 1, n):
            low, high = interval(right / n, n)
            assert 0 <= low <= right / n <= high <= 1, (right, n)
        assert interval(0.0, n)[0] == 0 and interval(1.0, n)[1] == 1


def test_more_rows_make_a_narrower_interval_around_the_accuracy():
    (low, high), (inner_low, inner_high) = interval(0.9, 100), interval(0.9, 10_000)
    assert low < inner_low < 0.9 < inner_high < high


# McNemar's test


@pytest.mark.parametrize("ours, theirs", [(0, 0), (1, 0), (3, 3), (7, 2), (0, 9), (4, 8)])
def test_mcnemar_counts_all_ways_in_which_fair_coins_could_fall(ours, theirs):
    right = [True] * ours + [False] * theirs + [True, False] * 5
    other = [False] * ours + [True] * theirs + [True, False] * 5
    flips = itertools.product((0, 1), repeat=ours + theirs)
    as_far = [abs(2 * sum(f) - len(f)) >= abs(ours - theirs) for f in flips]
    expected = sum(as_far) / len(as_far)
    assert mcnemar(right, other) == (ours, theirs, pytest.approx(expected, abs=1e-12))
    assert mcnemar(other, right) == (theirs, ours, pytest.approx(expected, abs=1e-12))


def test_mcnemar_of_many_rows():
    # scipy.stats.binomtest(1450, 3000).pvalue
    right, other = [True] * 1450 + [False] * 1550, [False] * 1450 + [True] * 1550
    assert mcnemar(right, other)[2] == pytest.approx(0.070669045, abs=1e-8)


# Calibration error


@pytest.mark.parametrize(
    "confident, right, expected",
    [
        ([1.0, 1.0], [True, True], 0),
        ([1.0, 1.0], [False, False], 1),
        ([1.0, 1.0], [True, False], 0.5),
        ([0.5, 0.5], [True, False], 0),
        ([0.75, 0.85], [False, True], (0.75 + 0.15) / 2),
        ([0.72, 0.78], [False, True], abs(0.5 - 0.75)),
        ([0.999], [True], 0.001),
    ],
)
def test_expected_calibration_error_at_the_edges(confident, right, expected):
    probabilities = np.array([[p, 1 - p] for p in confident])
    labels = np.array([0 if answer else 1 for answer in right])
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)


def test_expected_calibration_error_bin_by_bin():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet([0.6, 0.4, 0.5], size=500)
    # Answers are right in every second bin and wrong in the others: no two bins are alike.
    labels = np.where((10 * probabilities.max(1)).astype(int) % 2, probabilities.argmax(1), 3)
    expected = 0.0
    for low in np.arange(10) / 10:
        rows = [
            (max(p), int(np.argmax(p)) == label)
            for p, label in zip(probabilities, labels, strict=True)
            if low < max(p) <= low + 0.1
        ]
        if rows:
            confidence, right = zip(*rows, strict=True)
            expected += len(rows) / 500 * abs(sum(right) / len(rows) - sum(confidence) / len(rows))
    assert 0.4 < expected < 0.6
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected)


# Rows and tables


def run(method, accuracy, count=100, **more):
    return {"method": method, "accuracy": accuracy, "train_examples": count} | more


COSTS = {"trainable_params": 10_754, "total_params": 22_713_216, "train_seconds": 8.4}
COSTS |= {"tokens_per_second": 12_345.6, "peak_memory_bytes": 2.2e9, "saved_bytes": 86_400}


def test_a_row_holds_the_means_over_seeds_the_interval_and_the_deviation_between_seeds():
    runs = [run("full", a, loss=1 - a, seed=s) for s, a in enumerate((0.70, 0.76, 0.79))]
    [row] = summarise(runs, test_rows=200)
    assert row["accuracy"] == pytest.approx(0.75) and row["loss"] == pytest.approx(0.25)
    assert row["interval"] == interval(0.75, 200)
    assert row["spread"] == pytest.approx(math.sqrt((0.05**2 + 0.01**2 + 0.04**2) / 2))
    assert row["seeds"] == 3 and "seed" not in row
    assert summarise(runs[:1], 200)[0]["spread"] is None


def test_rows_come_by_training_rows_and_then_in_the_order_that_is_given():
    runs = [run(m, 0.5, n) for n in (64, 16) for m in ("full", "new", "newer", "majority")]
    rows = summarise(runs, 10, order=["majority", "feature", "full"])
    expected = [(n, m) for n in (16, 64) for m in ("majority", "full", "new", "newer")]
    assert [(row["train_examples"], row["method"]) for row in rows] == expected


def test_a_table_has_a_cell_for_each_figure_and_none_where_there_is_no_figure():
    runs = [run("bitfit", a, **COSTS) for a in (0.8, 0.9)] + [run("majority", 0.5, 7252)]
    heading, bitfit, majority = table(summarise(runs, 852)).splitlines()
    assert "share" in heading and len(bitfit) == len(majority) == len(heading)
    low, high = interval(0.85, 852)
    cells = ["bitfit", "100", "85.0% ± 7.1", f"{100 * low:.1f} to {100 * high:.1f}", "10,754"]
    cells += ["0.047%", "8", "12,346", "2,200.0 MB", "86 kB"]
    assert " ".join(bitfit.split()) == " ".join(cells)
    assert majority.split() == ["majority", "7,252", "50.0%", "46.7", "to", "53.3"]


@pytest.mark.parametrize(
    "share, words",
    [(1, "100.0%"), (0.048, "4.8%"), (0.00047, "0.047%"), (1e-6, "0.00010%"), (0, "0.0%")],
)
def test_a_small_share_has_enough_digits(share, words):
    assert in_percent(share) == words


@pytest.mark.parametrize(
    "seconds, words", [(0.04, "0.04 s"), (8.4, "8.4 s"), (84, "84 s"), (90, "1.5 min")]
)
def test_a_short_time_has_enough_digits(seconds, words):
    assert in_seconds(seconds) == words


def prompt_rows(accuracies, shots=(0,), templates=("a", "b", "c", TOGETHER), n=100):
    """Rows as `compare_prompts` makes them; `accuracies` of the templates, with another 0.01 a shot."""
    return [
        {
            "template": template,
            "calibration": calibration,
            "shots": k,
            "accuracy": accuracy + 0.01 * k,
            "interval": interval(accuracy + 0.01 * k, n),
            "majority_answer": "yes",
            "majority_share": 0.75,
            "calibration_error": 0.125,
        }
        for calibration in ("none", "prior")
        for template, accuracy in zip(templates, accuracies, strict=False)
        for k in shots
    ]


def test_the_summary_of_prompts_names_the_range_and_the_deviation():
    lines = prompt_summary(prompt_rows((0.6, 0.5, 0.7, 0.8), shots=(0, 4)))
    spread = "standard deviation 8.2 points"
    assert len(lines) == 4
    assert f"prior: templates from 50.0% to 70.0%, {spread}; together 80.0%" in lines
    assert f"none: templates from 54.0% to 74.0%, {spread}; together 84.0%, with 4 shots" in lines
    assert prompt_summary(prompt_rows([0.6])[:1]) == ["none: templates from 60.0% to 60.0%"]


def test_the_table_of_prompts_has_a_line_for_each_row_and_for_baselines_without_shots():
    baseline = run("nb-svm", 0.9, 7252, interval=interval(0.9, 100))
    heading, first, *_, last = prompt_table(prompt_rows((0.6, 0.5)), [baseline]).splitlines()
    assert heading.split()[:3] == ["shots", "template", "calibration"]
    assert " ".join(first.split()) == "0 a none 60.0% 50.2 to 69.1 75% yes 0.125"
    assert " ".join(last.split()) == "nb-svm, from 7,252 labels 90.0% 82.6 to 94.5"


# Pictures


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a picture into a file and returns its axes, for a look at what is in them."""
    figures, save = [], plots.save
    monkeypatch.setattr(
        plots, "save", lambda figure, path: figures.append(figure) or save(figure, path)
    )

    def run(plot, *arguments, **options):
        plot(*arguments, tmp_path / "picture.png", **options)
        height, width = matplotlib.image.imread(tmp_path / "picture.png").shape[:2]
        assert 150 < height < 10_000 and width == 1200
        [axes] = figures[-1].axes
        return axes

    return run


def errors_of(container):
    """(low, high) of each error bar along its own axis, and where they stand on the other."""
    _, _, [bars] = container.lines
    return np.array(
        [[(a, b) for a, b in segment.T if a != b][0] for segment in bars.get_segments()]
    )


def compared(accuracies, n=100, counts=(100,), methods=("majority", "scratch", "bitfit", "lora")):
    runs = [
        run(method, accuracy, count, **(COSTS if method in ("bitfit", "full") else {}))
        for count in counts
        for method, accuracy in zip(methods, accuracies, strict=False)
    ]
    return summarise(runs, n)


def test_bars_begin_at_zero_and_end_at_the_accuracy_within_the_interval(draw):
    rows = compared((0.5, 0.75, 0.9, 0.95))
    axes = draw(plots.plot_comparison, rows, "a title")
    bars, errors = axes.containers[1], errors_of(axes.containers[0])
    assert axes.get_xlim() == (0, 100) and axes.get_title("left") == "a title"
    assert [bar.get_x() for bar in bars] == [0, 0, 0, 0]
    assert [bar.get_width() for bar in bars] == pytest.approx([50, 75, 90, 95])
    assert errors == pytest.approx(100 * np.array([row["interval"] for row in rows]))
    assert [label.get_text() for label in axes.get_yticklabels()] == [row["method"] for row in rows]
    assert len({bar.get_facecolor() for bar in bars}) == 4  # methods nobody has heard of too
    words = [text.get_text() for text in axes.texts]
    assert words == ["50.0%", "75.0%", "90.0%   trains 0.047%   saves 86 kB   8.4 s", "95.0%"]


def test_below_the_bars_accuracy_stands_against_the_trained_parameters(tmp_path, monkeypatch):
    figures, methods = [], ("scratch", "feature", "lora", "full")
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    rows = compared((0.72, 0.8, 0.85, 0.86), methods=methods)
    for row, count in zip(rows, (2e7, 1e4, 5e5, 2e7), strict=True):
        row["trainable_params"] = count
    plots.plot_comparison(rows, "", tmp_path / "picture.png")
    _, below = figures[0].axes
    assert below.get_xscale() == "log"
    points = {(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in below.containers}
    assert points == {(2e7, 72), (1e4, 80), (5e5, 85), (2e7, 86)}
    expected = {row["method"]: 100 * np.array(row["interval"]) for row in rows}
    for text in below.texts:  # each name stands at an end of its interval
        assert min(abs(text.xy[1] - expected.pop(text.get_text()))) < 1e-9
    assert not expected


def test_curves_go_through_the_accuracies_with_their_intervals(draw):
    rows = compared((0.5, 0.7, 0.8), counts=(16, 64))
    for row in rows:
        row["accuracy"] += row["train_examples"] / 1000
        row["interval"] = interval(row["accuracy"], 100)
    axes = draw(plots.plot_comparison, rows, "")
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["majority", "scratch", "bitfit"]
    for name, container in zip(names, axes.containers, strict=True):
        curve = [row for row in rows if row["method"] == name]
        x, y = container.lines[0].get_data()
        assert y == pytest.approx([100 * row["accuracy"] for row in curve])
        assert x == pytest.approx([16, 64], rel=0.1)
        assert errors_of(container) == pytest.approx(100 * np.array([r["interval"] for r in curve]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "64"]


def test_the_prompt_beside_the_curves_has_its_interval(draw):
    prompt = {"accuracy": 0.7, "interval": interval(0.7, 50)}
    axes = draw(plots.plot_comparison, compared((0.5, 0.7), counts=(4, 8)), "", prompt=prompt)
    [band] = axes.patches
    assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx(
        [100 * end for end in prompt["interval"]]
    )
    [line] = [line for line in axes.lines if line.get_label() == "prompt, no labels"]
    assert set(line.get_ydata()) == {70}


def test_each_template_and_calibration_is_a_dot_with_its_interval(draw):
    rows = prompt_rows((0.6, 0.5, 0.7, 0.8), shots=(0, 4))
    baselines = [run("nb-svm", 0.9), run("majority", 0.4)]
    axes = draw(plots.plot_prompts, rows, baselines, "a title")
    assert axes.get_title("left") == "a title, 4 shots"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c", TOGETHER]
    for name, container in zip(("none", "prior"), axes.containers, strict=True):
        chosen = [row for row in rows if (row["calibration"], row["shots"]) == (name, 4)]
        x, y = container.lines[0].get_data()
        assert x == pytest.approx([64, 54, 74, 84]) and [round(place) for place in y] == [
            0,
            1,
            2,
            3,
        ]
        assert errors_of(container) == pytest.approx(
            100 * np.array([r["interval"] for r in chosen])
        )
    across = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert across == [40, 90]


WRONG_SIDE = 44  # rows: all right or all wrong, rounding puts an end beyond the accuracy


@pytest.mark.parametrize("n", [1, WRONG_SIDE])
@pytest.mark.parametrize("methods", [["full"], DAMAGED])
def test_all_right_and_all_wrong_can_be_drawn(draw, n, methods):
    accuracies = [0.0, 1.0] * 3
    for counts in [(16,), (16, 64)]:
        axes = draw(plots.plot_comparison, compared(accuracies, n, counts, methods), methods[-1])
        ends = np.concatenate([errors_of(c) for c in axes.containers if hasattr(c, "lines")])
        assert np.isfinite(ends).all() and ends.min() >= 0 and ends.max() <= 100
    prompt = {"accuracy": 1.0, "interval": interval(1.0, n)}
    draw(plots.plot_comparison, compared(accuracies, n, counts, methods), "", prompt=prompt)
    rows = prompt_rows(accuracies, templates=methods, n=n)
    draw(plots.plot_prompts, rows, [run(methods[0], 1.0), run(methods[-1], 1.0)], methods[-1])


def test_very_many_templates_fit_into_a_picture(draw):
    rows = prompt_rows([0.5] * 400, templates=[f"{i} {{text}} [MASK]" for i in range(400)])
    draw(plots.plot_prompts, rows, [], "many")


# The loss of pretraining


def log_of(losses, minutes=None):
    minutes = np.linspace(0, 10, len(losses)) if minutes is None else minutes
    return [{"seconds": 60 * m, "loss": loss} for m, loss in zip(minutes, losses, strict=True)]


FLAT = [9 - 2.3 * m if m < 1 else 6.6 if m < 6 else 6.6 - (m - 6) for m in np.linspace(0, 10, 101)]


def test_the_loss_is_drawn_beside_what_it_is_compared_with(draw):
    log = log_of([9.0, 7.0, 6.0, 5.0])
    log[2]["validation"] = {"loss": 6.5}
    axes = draw(plots.plot_pretraining, log, 9.01, 6.68, {"loss": 4.5})
    training, validation, *levels = axes.lines
    assert training.get_ydata() == pytest.approx([9.0, 7.0, 6.0, 5.0])
    assert training.get_xdata() == pytest.approx([0, 10 / 3, 20 / 3, 10])
    assert np.array(validation.get_data()) == pytest.approx(np.array([[20 / 3, 10], [6.5, 4.5]]))
    assert [line.get_ydata()[0] for line in levels] == [9.01, 6.68]


def test_the_plateau_is_shaded_while_the_loss_is_near_the_unigram_entropy_and_no_longer(draw):
    axes = draw(plots.plot_pretraining, log_of(FLAT), 9.01, 6.68, {"loss": 2.6})
    [band] = axes.patches
    assert band.get_x() == pytest.approx(1, abs=0.2)
    assert band.get_x() + band.get_width() == pytest.approx(6, abs=0.2)


def test_the_plateau_survives_the_noise_of_single_batches():
    noise = np.random.default_rng(0).normal(0, 0.15, size=101)
    minutes = np.linspace(0, 10, 101).tolist()
    start, stop = plots.plateau(minutes, (FLAT + noise).tolist(), 6.65)
    assert start == pytest.approx(1, abs=0.5) and stop == pytest.approx(6, abs=0.5)


@pytest.mark.parametrize(
    "losses",
    [
        [3.0] * 101,  # far below
        [9 - 0.6 * i for i in range(11)],  # straight through
        np.linspace(9, 3, 101).tolist(),
        [6.68, 6.68],  # two points are no time
        [],
    ],
)
def test_no_plateau_is_shaded_where_there_is_none(draw, losses):
    axes = draw(plots.plot_pretraining, log_of(losses), 9.01, 6.68, {"loss": 3.0})
    assert not axes.patches


def test_of_a_slow_fall_only_what_is_near_the_unigram_entropy_is_shaded():
    minutes, losses = np.linspace(0, 15, 300).tolist(), np.linspace(6.7, 5.9, 300).tolist()
    start, stop = plots.plateau(minutes, losses, 6.68)
    assert start == 0 and stop == pytest.approx(15 * (6.7 - 6.58) / 0.8, abs=0.2)
