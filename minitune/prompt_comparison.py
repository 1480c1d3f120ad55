"""How much an answer depends on how one asks: every template with every calibration, on labelled rows."""

from collections import Counter
from collections.abc import Iterator
from statistics import pstdev

from torch import Tensor

from minitune.calibration import CALIBRATIONS, agree, expected_calibration_error
from minitune.classification import interval
from minitune.comparison import aligned
from minitune.prompting import Prompt

TOGETHER = "all of them together"


def compare_prompts(
    prompts: list[Prompt], texts: list[list[int]], labels: Tensor, unlabelled: list[list[int]]
) -> Iterator[dict]:
    """A row for each template and calibration, and last, for each calibration, one for all templates."""
    names = prompts[0].words.names
    calibrated: dict[str, list[Tensor]] = {name: [] for name in CALIBRATIONS}
    for prompt in prompts:
        scores = prompt.scores(texts)
        for name, calibrate in CALIBRATIONS.items():
            own = scores + calibrate(prompt, unlabelled)
            calibrated[name].append(own)
            yield {"template": prompt.sentence, "calibration": name} | figures(own, labels, names)
    if len(prompts) > 1:
        for name, own in calibrated.items():
            yield {"template": TOGETHER, "calibration": name} | figures(agree(own), labels, names)


def figures(scores: Tensor, labels: Tensor, names: dict[int, str]) -> dict:
    """What scores (N, L) are worth, given the right labels (N,)."""
    probabilities = scores.softmax(-1)
    answers = probabilities.argmax(-1)
    accuracy = (answers == labels).double().mean().item()
    most, count = Counter(answers.tolist()).most_common(1)[0]
    return {
        "accuracy": accuracy,
        "interval": interval(accuracy, len(labels)),
        "majority_answer": names[most],
        "majority_share": count / len(labels),
        "calibration_error": expected_calibration_error(probabilities, labels),
    }


HEADER = ("shots", "template", "calibration", "accuracy", "95% interval", "most frequent answer", "ECE")


def table(rows: list[dict], bag: list[dict]) -> str:
    """The rows as text; `bag`: rows of comparison.simple_methods, which learned from labels."""
    lines = [HEADER]
    for row in rows + bag:
        low, high = row["interval"]
        figures = (f"{row['accuracy']:.1%}", f"{100 * low:.1f} to {100 * high:.1f}")
        if "method" in row:
            words = f"{row['method']}, from {row['train_examples']:,} labels"
            lines.append(("", words, "", *figures, "", ""))
            continue
        answer = f"{row['majority_share']:.0%} {row['majority_answer']}"
        shots, error = str(row["shots"]), f"{row['calibration_error']:.3f}"
        lines.append((shots, row["template"], row["calibration"], *figures, answer, error))
    return aligned(lines, left=3)


def summary(rows: list[dict]) -> list[str]:
    """What the table says about templates, their ensemble and demonstrations, a line for each calibration."""
    lines = []
    for name in CALIBRATIONS:
        for shots in sorted({row["shots"] for row in rows}):
            own = [row for row in rows if (row["calibration"], row["shots"]) == (name, shots)]
            own = {row["template"]: row["accuracy"] for row in own}
            together = own.pop(TOGETHER, None)
            each = list(own.values())
            line = f"{name}: templates from {min(each):.1%} to {max(each):.1%}"
            if together is not None:
                line += f", standard deviation {100 * pstdev(each):.1f} points; together {together:.1%}"
            lines.append(line + (f", with {shots} shots" if shots else ""))
    return lines
