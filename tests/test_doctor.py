"""The doctor finds what is wrong, says what to do, and passes what is right."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minitune import doctor
from minitune.commands import examine_machine as machine
from minitune.commands.examine_data import examine_data
from minitune.commands.examine_machine import examine_machine
from minitune.commands.examine_run import examine_run
from minitune.support.cli import run_script
from minitune.support.finding import GOOD, NOTE, WRONG
from minitune.support.reference import REFERENCE, SETTINGS
from minitune.support.runtime import Runtime

SAMPLES = Path(__file__).parents[1] / "data" / "samples"


def findings(of, kind):
    return [finding.found for finding in of if finding.kind == kind]


def write_run(directory: Path, losses: list[float], validation: tuple = (), **settings) -> Path:
    """A run of train.py: a loss every 10 steps of 4,000 tokens."""
    directory.mkdir()
    (directory / "settings.json").write_text(json.dumps(SETTINGS | settings))
    entries = [
        {"step": 10 * i, "steps": 1000, "loss": loss, "tokens": 40_000 * i, "seconds": float(i)}
        for i, loss in enumerate(losses, start=1)
    ]
    for entry, loss in zip(entries, validation, strict=False):
        entry["validation"] = {"loss": loss, "accuracy": 0.1}
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (directory / "log.jsonl").write_text(lines)
    return directory


def write_table(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return str(path)


ROWS = [
    (f"a {['dull', 'fine'][i % 2]} film about number {i}", ["bad", "good"][i % 2])
    for i in range(60)
]


def test_the_reference_run_is_healthy(tmp_path):
    shutil.copytree(REFERENCE, tmp_path / "run")
    found = list(examine_run(tmp_path / "run"))
    assert {finding.kind for finding in found} == {GOOD}
    steps = json.loads((REFERENCE / "metrics.json").read_text())["steps"]
    assert f"finished, {steps:,} steps" in found[0].found


@pytest.mark.parametrize(("steps", "kind"), [(20, NOTE), (80, WRONG)])
def test_a_loss_on_the_plateau_is_wrong_only_after_300_steps(tmp_path, steps, kind):
    run = write_run(tmp_path / "run", [6.68] * steps)
    assert any("plateau" in found for found in findings(examine_run(run), kind))


def test_a_run_behind_the_reference_run_is_told_by_how_much(tmp_path):
    run = write_run(tmp_path / "run", [6.2] * 80, lr=1e-5)
    [found] = findings(examine_run(run), WRONG)
    assert "loss 6.20 after 800 steps" in found
    lines = (REFERENCE / "log.jsonl").read_text().splitlines()
    reference = [json.loads(line) for line in lines]
    before = [entry["loss"] for entry in reference if entry["tokens"] <= 3_200_000][-10:]
    assert f"the reference run had {sum(before) / 10:.2f} after as many tokens" in found


def test_a_run_on_other_data_is_not_compared(tmp_path):
    run = write_run(tmp_path / "run", [6.2] * 80, data="mine.txt")
    assert not findings(examine_run(run), WRONG)


def test_an_unfinished_run_can_be_continued(tmp_path):
    run = write_run(tmp_path / "run", [6.0] * 10)
    [finding] = [f for f in examine_run(run) if "step 100 of 1,000" in f.found]
    assert "--resume" in finding.advice


def test_an_unfinished_run_of_fine_tuning_is_continued_in_the_directory_of_its_methods(tmp_path):
    (tmp_path / "my runs" / "full").mkdir(parents=True)
    run = write_run(tmp_path / "my runs" / "full" / "64", [6.0])
    (run / "settings.json").write_text(json.dumps({"experiment": {"method": "full"}}))
    [finding] = examine_run(tmp_path)
    assert finding.advice == f"continue it with --resume --out '{tmp_path}/my runs'"


def test_a_run_that_has_logged_no_step_can_be_continued_until_it_is_finished(tmp_path):
    run = write_run(tmp_path / "run", [])
    [finding] = examine_run(run)
    assert "at step 0" in finding.found and "--resume" in finding.advice
    (run / "log.jsonl").unlink()
    assert [finding] == list(examine_run(run))
    (run / "metrics.json").write_text(json.dumps({"steps": 10}))
    assert len(findings(examine_run(run), WRONG)) == 1


DAMAGED = {
    "no steps in the log of an earlier version": (NOTE, {}, {"steps": None}),
    "no tokens": (WRONG, {}, {"tokens": "many"}),
    "a huge loss": (WRONG, {}, {"loss": 10**400}),
    "no loss of validation": (WRONG, {}, {"validation": {}}),
    "metrics of nothing": (WRONG, {"method": "full"}, {}),
    "a log of words": (WRONG, {}, {"loss": "low"}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_run_is_a_finding_and_the_next_one_is_examined(tmp_path, case):
    kind, metrics, entry = DAMAGED[case]
    run = write_run(tmp_path / "a", [5.0] * 9, (5.0,) * 9)
    write_run(tmp_path / "b", [5.0] * 9)
    if metrics:
        (run / "settings.json").write_text("{}")
        (run / "metrics.json").write_text(json.dumps(metrics))
    lines = [json.loads(line) | entry for line in (run / "log.jsonl").read_text().splitlines()]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(examine_run(tmp_path))
    assert kind in [finding.kind for finding in found if finding.subject == str(run)]
    assert any(finding.subject == str(tmp_path / "b") for finding in found)


def test_a_rising_validation_loss_is_overfitting(tmp_path):
    rising = write_run(tmp_path / "rising", [5.0] * 10, (5.0, 4.5, 4.6, 5.2))
    steady = write_run(tmp_path / "steady", [5.0] * 10, (5.0, 4.6, 4.5, 4.55))
    assert any("4.500 at best" in f for f in findings(examine_run(rising), NOTE))
    assert not any("overfitting" in f.found for f in examine_run(steady))


@pytest.mark.parametrize(("accuracy", "kind"), [(0.5, WRONG), (0.9, GOOD)])
def test_a_classifier_that_gives_one_answer_only_is_wrong(tmp_path, accuracy, kind):
    data = write_table(tmp_path / "rows.tsv", ROWS)
    run = write_run(tmp_path / "run", [0.7] * 10)
    (run / "settings.json").write_text(json.dumps({"method": "full"}))
    (run / "metrics.json").write_text(json.dumps({"accuracy": accuracy, "data": data}))
    found = findings(examine_run(run), kind)
    assert any("always the same answer would have 50.0%" in line for line in found)


def test_a_healthy_table_has_a_baseline_to_beat_and_nothing_wrong(tmp_path):
    found = list(examine_data(write_table(tmp_path / "rows.tsv", ROWS)))
    assert {finding.kind for finding in found} == {GOOD}
    assert any("NB-SVM (a bag of words) 100.0%" in finding.found for finding in found)


def test_a_text_in_train_and_test_is_wrong_and_one_twice_in_train_a_note(tmp_path):
    leak = write_table(tmp_path / "leak.tsv", [*ROWS, ROWS[0]])
    assert any("two splits" in f for f in findings(examine_data(leak), WRONG))
    twice = write_table(tmp_path / "twice.tsv", [ROWS[0], *ROWS])
    assert any("1 row with the text" in f for f in findings(examine_data(twice), NOTE))


def test_a_text_with_two_labels_is_wrong(tmp_path):
    text, label = ROWS[0]
    other = next(given for _, given in ROWS if given != label)
    table = write_table(tmp_path / "rows.tsv", [(text, other), *ROWS])
    assert any("1 text with more than one label" in f for f in findings(examine_data(table), WRONG))


def test_columns_of_other_names_are_to_be_named(tmp_path):
    (tmp_path / "rows.csv").write_text("Text,Label\ngood,1\n")
    [finding] = examine_data(str(tmp_path / "rows.csv"))
    assert finding.kind == WRONG and "--text-column" in finding.advice
    (tmp_path / "rows.csv").write_text("text,label\n,1\n")
    [finding] = examine_data(str(tmp_path / "rows.csv"))
    assert finding.kind == WRONG and finding.advice == "put that right"


@pytest.mark.parametrize("content", ["", "text,label\n", "\n"])
def test_a_file_without_rows_is_wrong(tmp_path, content):
    (tmp_path / "rows.csv").write_text(content)
    [finding] = examine_data(str(tmp_path / "rows.csv"))
    assert finding.kind == WRONG and "holds no text" in finding.found


def test_uneven_labels_are_a_note(tmp_path):
    rows = [(text + " again" * (i // 2), "good") for i, (text, _) in enumerate(ROWS)]
    data = write_table(tmp_path / "rows.tsv", [*ROWS[::2], *rows, *[(f"{t}.", n) for t, n in rows]])
    assert any("bad 20%" in found for found in findings(examine_data(data), NOTE))


def test_long_texts_and_unknown_tokens_are_found(tmp_path):
    long = write_table(tmp_path / "long.tsv", [(f"{text} " * 100, label) for text, label in ROWS])
    found = findings(examine_data(long), NOTE)
    assert any("100.0% of the texts have more than 512 tokens" in line for line in found)
    strange = write_table(tmp_path / "strange.tsv", [(f"{t} ☃ ☂ ☄", label) for t, label in ROWS])
    assert any("are [UNK]" in f for f in findings(examine_data(strange), WRONG))


def test_an_empty_text_is_wrong_and_no_label_a_note(tmp_path):
    empty = write_table(tmp_path / "empty.tsv", [*ROWS, (" ", "good")])
    assert any("line 62" in found for found in findings(examine_data(empty), WRONG))
    found = findings(examine_data(str(SAMPLES / "reviews.txt")), NOTE)
    assert any("no labels" in line for line in found)


def test_a_slow_machine_is_told_how_many_minutes_it_needs(monkeypatch):
    tokens = json.loads((REFERENCE / "metrics.json").read_text())["tokens"]
    enough = tokens / (17 * 60 * 0.9)  # tokens a second
    monkeypatch.setattr(machine, "measure_speed", lambda _: enough / 3.99)
    [slow] = [f for f in examine_machine(Runtime.start("cpu")) if "tokens/s" in f.found]
    assert slow.kind == NOTE and "--minutes 68" in slow.advice
    monkeypatch.setattr(machine, "measure_speed", lambda _: enough)
    [fast] = [f for f in examine_machine(Runtime.start("cpu")) if "tokens/s" in f.found]
    assert fast.kind == GOOD


def test_little_memory_is_wrong(monkeypatch):
    monkeypatch.setattr(machine, "measure_speed", lambda _: 1e5)
    monkeypatch.setattr(machine, "_available_memory", lambda: 10**9)
    assert findings(examine_machine(Runtime.start("cpu")), WRONG)


def test_the_speed_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0)
    monkeypatch.setattr(machine, "PROBE_TOKENS", 512)
    threads = torch.get_num_threads()
    assert machine.measure_speed(Runtime.start("cpu", "fp32")) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("subject", "status"), [("good.tsv", 0), ("leak.tsv", 1), ("nowhere.tsv", 2)]
)
def test_the_exit_status_says_whether_something_is_wrong(
    tmp_path, monkeypatch, capsys, subject, status
):
    write_table(tmp_path / "good.tsv", ROWS)
    write_table(tmp_path / "leak.tsv", [*ROWS, ROWS[0]])
    monkeypatch.setattr(sys, "argv", ["doctor", str(tmp_path / subject), "--json"])
    with pytest.raises(SystemExit) as ended:
        run_script(doctor.main)
    assert ended.value.code == status
    output = capsys.readouterr()
    for line in output.out.splitlines():
        assert json.loads(line).keys() == {"subject", "kind", "found", "advice"}
    assert len(output.err.splitlines()) == (status == 2)
