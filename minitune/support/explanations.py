"""What explanations look like: words in colours, words in a table, and the table of their test."""

from collections.abc import Callable, Sequence
from statistics import mean

from minitune.support.errors import plural
from minitune.support.results import table

SHOWN = 20  # words of an explanation in a table
BLUES, ORANGES = (195, 153, 111, 75), (230, 223, 216, 208)  # of a terminal's 256, weak to strong


def coloured(words: Sequence[str], numbers: Sequence[float]) -> str:
    """The words in a line of a terminal: blue where the number is positive, orange below zero.

    The strongest colour is for half of the largest number or more, none for less than an eighth.
    """
    largest, parts = max(map(abs, numbers)) or 1.0, []
    for word, number in zip(words, numbers, strict=True):
        strength = min(int(8 * abs(number) / largest), 4)
        shades = BLUES if number > 0 else ORANGES
        parts.append(f"\033[30;48;5;{shades[strength - 1]}m{word}\033[0m" if strength else word)
    return " ".join(parts)


def word_table(words: Sequence[str], numbers: Sequence[float], others: dict[str, float]) -> str:
    """The words with the largest numbers in a table, the sum of the rest, and `others` below."""
    pairs = sorted(zip(words, numbers, strict=True), key=lambda pair: -abs(pair[1]))
    rows, rest = pairs[:SHOWN], [number for _, number in pairs[SHOWN:]]
    rows += [(f"({plural(len(rest), 'other word')})", sum(rest))] if rest else []
    columns = {"word": lambda row: row[0], "adds": lambda row: f"{row[1]:+.2f}"}
    return table([*rows, *others.items()], columns)


COLUMNS: dict[str, Callable[[dict], str]] = {
    "ten words hidden": lambda row: row["ranking"],
    "drop": lambda row: f"{row['drop']:.2f}",
    "times random": lambda row: f"{row['times_random']:.1f}",
    "Spearman with occlusion": lambda row: f"{row['spearman']:.2f}",
}


def summarise(tests: list[dict[str, dict[str, float]]]) -> list[dict]:
    """A row for each ranking of words: the means of `explain.deletion_test` over several texts."""
    rows, at_random = [], mean(test["random"]["drop"] for test in tests)
    for name, figures in tests[0].items():
        row = {key: mean(test[name][key] for test in tests) for key in figures}
        row["times_random"] = row["drop"] / at_random
        rows.append({"ranking": name, "texts": len(tests)} | row)
    return rows
