"""The exercises: the lesson's own lines are right, every typical mistake is named, and nothing hangs."""

import ast
import subprocess
import sys
import textwrap

import pytest

from minitune.checkpoint import save_model
from minitune.data import Dataset
from minitune.model import BertForMaskedLM
from minitune.tokenizer import Tokenizer
from tests.exercises import __main__ as program
from tests.exercises import checks, grade, trials
from tests.exercises.observations import SAMPLES, SMALL, large_weights
from tests.exercises.source import ROOT, TO_DO, find
from tests.exercises.table import EXERCISES, FOLDER

each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
MISTAKES = [(exercise, words) for exercise in EXERCISES for words in exercise.mistakes]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A runs/exercises of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    FOLDER.mkdir(parents=True)
    return FOLDER


def write(exercise, bodies=None):
    """The file to fill in, with these bodies (by function), else with the lesson's own."""
    text = exercise.text()
    for lesson in exercise.lessons:
        hole, function = find(ast.parse(text), lesson.name)[-1], lesson.nodes[-1]
        has_docstring = ast.get_docstring(function) is not None
        body = lesson.lines[function.body[has_docstring].lineno - 1 : function.end_lineno]
        if bodies is not None:
            indent = " " * hole.body[0].col_offset
            body = textwrap.indent(bodies.get(lesson.name, TO_DO), indent).splitlines()
        lines = text.splitlines()
        lines[hole.end_lineno - 1 : hole.end_lineno] = body
        text = "\n".join([*lines, ""])
    exercise.file.write_text(text)


def named(name):
    return next(exercise for exercise in EXERCISES if exercise.name == name)


@each_exercise
def test_the_lesson_s_own_lines_are_right(exercise, capsys):
    write(exercise)
    assert grade.check(exercise) == 0
    assert f"exercise {exercise.number}, {exercise.title}: right" in capsys.readouterr().out


@each_exercise
def test_a_file_as_it_was_made_is_not_written_yet(exercise, capsys):
    exercise.file.write_text(exercise.text())
    assert grade.check(exercise) == 1
    assert capsys.readouterr().out.strip().endswith(": not written yet")


@each_exercise
def test_an_empty_file_is_not_written_yet(exercise, capsys):
    exercise.file.write_text("")
    assert grade.check(exercise) == 1
    assert capsys.readouterr().out.strip().endswith(": not written yet")


def test_all_files_are_made_though_nobody_reads_the_list():
    words = f"set -o pipefail; {sys.executable} -m tests.exercises | true"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(exercise.file.is_file() for exercise in EXERCISES)


@each_exercise
def test_three_mistakes_at_least_are_known(exercise):
    assert len(exercise.mistakes) >= 3


@pytest.mark.parametrize(
    ("exercise", "words"), MISTAKES, ids=[f"{e.name}: {words}" for e, words in MISTAKES]
)
def test_a_typical_mistake_is_named(exercise, words):
    named_first, *seen = checks.verdict(exercise, checks.with_mistakes(exercise)[words])
    assert named_first == words and seen


def test_a_mistake_in_a_file_is_named(capsys):
    body = "top = torch.einsum('ihd,jhd->hij', q, k)\nreturn torch.softmax(top, 2)"
    write(named("attention"), {"attention_weights": body, "one_sequence": "return v"})
    assert grade.check(named("attention")) == 1
    heading, mistake, _, hint = capsys.readouterr().out.splitlines()
    assert heading.endswith(": not right yet")
    assert mistake == "The scores are not divided by √D."
    assert hint == "a hint: python -m tests.exercises hint 2"


def test_a_mistake_that_would_have_been_seen_before_is_not_named():
    seen = [(words, value is not True and value) for words, value in checks.right(named("lora"))]
    said = checks.verdict(named("lora"), seen)  # not that the merge lacks the scale
    assert said == ["the merged map computes the same: that is not so"]


def test_a_mistake_that_is_not_known_is_described(capsys):
    write(named("packed"), {"reference": "return v[: len(q)] + 1"})
    assert grade.check(named("packed")) == 1
    _, seen, _ = capsys.readouterr().out.splitlines()
    what = "the output for sequences of 2, 5 and 2 tokens"
    assert seen.startswith(f"{what}: numbers are off by up to")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("pass; q", "a tensor is expected, and it is None"),
        ("return v[:2]", "the shape is (2, 3, 8), expected is (9, 3, 8)"),
        ("return v / 0", "there are numbers that are not finite (nan or inf)"),
        ("exit()", "the code ends the program"),
    ],
)
def test_what_is_no_result_is_said_without_a_traceback(body, said, capsys):
    write(named("packed"), {"reference": body})
    assert grade.check(named("packed")) == 1
    assert capsys.readouterr().out.splitlines()[1].endswith(said)


def test_a_result_that_the_project_cannot_use_is_said_without_a_traceback(capsys):
    write(named("masking"), {"mask_tokens": "return tokens"})
    assert grade.check(named("masking")) == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line == "the project cannot use it: ValueError: too many values to unpack (expected 3)"


def test_what_the_code_raises_is_shown_with_its_own_lines_alone(capsys):
    write(named("packed"), {"reference": "return torch.einsum('ab,bc->ac', q, k)"})
    assert grade.check(named("packed")) == 1
    out = capsys.readouterr().out
    assert out.count("File ") == 1 and f'"{named("packed").file}"' in out
    assert "torch.einsum('ab,bc->ac', q, k)" in out and "RuntimeError" in out


def test_an_error_of_syntax_is_shown(capsys):
    named("attention").file.write_text("def one_sequence(q, k, v)\n    return q")
    assert grade.check(named("attention")) == 1
    assert "SyntaxError: expected ':'" in capsys.readouterr().out


def test_one_of_two_functions_is_not_written_yet(capsys):
    write(named("adapter"), {"Adapter.forward": "return x + self.up(F.gelu(self.down(x)))"})
    assert grade.check(named("adapter")) == 1
    assert capsys.readouterr().out.strip().endswith("adapter_parameters is not written yet")


def test_the_project_is_as_it_was_after_a_check():
    from minitune import attention, model

    before = attention.reference, attention.ON_ANY_DEVICE["reference"], model.Layer.forward
    with checks.in_place(
        {"minitune.attention:reference": len, "minitune.model:Layer.forward": len}
    ):
        assert attention.reference is attention.ON_ANY_DEVICE["reference"] is len
        assert model.Layer.forward is len
    assert before == (
        attention.reference,
        attention.ON_ANY_DEVICE["reference"],
        model.Layer.forward,
    )


def test_the_list_makes_files_that_are_missing_and_leaves_the_others(folder, capsys):
    named("attention").file.write_text("mine")
    assert program.main([]) == 0
    assert {path.stem for path in folder.iterdir()} == {exercise.name for exercise in EXERCISES}
    assert named("attention").file.read_text() == "mine"
    assert named("layer").file.read_text() == named("layer").text()
    out = capsys.readouterr().out
    assert all(exercise.title in out and exercise.read in out for exercise in EXERCISES)


@each_exercise
def test_hint_and_answer(exercise, capsys):
    assert program.main(["hint", str(exercise.number)]) == 0
    assert exercise.hint in capsys.readouterr().out
    assert program.main(["answer", str(exercise.number)]) == 0
    out = capsys.readouterr().out
    for lesson in exercise.lessons:
        first, last = lesson.place
        assert f"{lesson.file}, lines {first} to {last}:" in out
        assert f"{last:>5}  {lesson.lines[last - 1]}" in out


@pytest.mark.parametrize(
    "words", [["check", "11"], ["check"], ["solve", "2"], ["check", "two"], ["try", "2"]]
)
def test_bad_input_is_one_line(words):
    command = [sys.executable, "-m", "tests.exercises", *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("error: ")


def test_the_list_does_not_import_torch():
    code = "import sys, tests.exercises.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def small_trials(tmp_path, monkeypatch, fixed_seed):
    """Trials on the sample reviews, with a model of a few numbers."""
    monkeypatch.setattr(trials, "DATA", str(SAMPLES / "reviews.csv"))
    monkeypatch.setattr(trials, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(trials, "ROWS", 8)
    monkeypatch.setattr(trials, "SMALL", SMALL)
    texts = [row.text for row in Dataset(trials.DATA).read()]
    (tmp_path / "model").mkdir()
    save_model(
        large_weights(BertForMaskedLM(SMALL)),
        Tokenizer.train(texts, SMALL.vocab_size),
        tmp_path / "model",
    )
    monkeypatch.setattr(trials, "default_model", lambda: (str(tmp_path / "model"), "a test"))


@each_exercise
def test_a_trial_shows_the_same_figures_for_the_lesson_s_own_lines(exercise, small_trials, capsys):
    write(exercise)
    assert grade.try_out(exercise) == 0
    *_, first, second, verdict = capsys.readouterr().out.splitlines()
    assert first.startswith("the lesson's ") and second.startswith("yours ")
    assert verdict == "the same figures"


COARSE = {
    "masking": "Every chosen token becomes [MASK]",
    "attention": "There is no softmax",
    "packed": "Sequences see their neighbours",
    "online_softmax": "The output is not divided",
    "layer": "The residual sums are missing",
    "masked_loss": "The loss is that of all tokens",
    "adapter": "The skip connection is missing",
    "lora": "The frozen map's own result",
    "prompt": "The bias has the wrong sign",
    "gradients": "The sum over the steps",
}


@each_exercise
def test_a_trial_shows_what_a_mistake_changes(exercise, small_trials):
    (edits,) = (
        e for words, e in exercise.mistakes.items() if words.startswith(COARSE[exercise.name])
    )
    functions = checks.lessons_own(exercise, edits)
    *rows, verdict = trials.lines(exercise, functions)
    assert verdict.startswith("the figures differ"), rows


def test_a_loop_without_an_end_is_stopped(monkeypatch, capsys):
    monkeypatch.setitem(program.SECONDS, "check", 1)
    write(named("packed"), {"reference": "while True: pass"})
    assert program.run("check", named("packed")) == 1
    assert "is there a loop without an end?" in capsys.readouterr().out
