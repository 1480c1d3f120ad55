"""The options of the scripts: their choices are those of the lessons, and --help is quick."""

import runpy
import sys
from pathlib import Path

import pytest

from minitune import cloze
from minitune.attention import BACKENDS
from minitune.calibration import CALIBRATIONS
from minitune.lora import TARGETS
from minitune.methods import METHODS
from minitune.model import PRESETS
from minitune.prompting import TEMPLATES
from minitune.support.cli import ADDED, columns, options_to_save
from minitune.support.errors import UserError
from minitune.support.options import finetune_options, prompt_options, train_options
from train import DEFAULTS_BY_DEVICE, PEAK_LR

ROOT = Path(__file__).parents[1]


def choices(options, name):
    return next(action.choices for action in options._actions if action.dest == name)


def test_choices_are_what_the_lessons_have():
    assert choices(train_options(), "preset") == list(PRESETS)
    assert choices(train_options(), "optimizer") == list(PEAK_LR)
    assert choices(finetune_options(), "method") == list(METHODS)
    assert choices(prompt_options(), "calibrate") == list(CALIBRATIONS)
    for options in (train_options, finetune_options, prompt_options):
        assert choices(options(), "attention") == ["auto", *BACKENDS]


def test_defaults_are_what_the_lessons_have():
    assert finetune_options().get_default("lora_targets") == ",".join(TARGETS)
    assert prompt_options().get_default("template") == list(TEMPLATES)
    assert finetune_options().get_default("template") == list(cloze.TEMPLATES)
    assert set(cloze.TEMPLATES) < set(TEMPLATES)
    (cpu, _), (gpu, factor) = DEFAULTS_BY_DEVICE["cpu"], DEFAULTS_BY_DEVICE["cuda"]
    rates = ", ".join(f"{name} {rate}" for name, rate in PEAK_LR.items())
    told = " ".join(train_options().format_help().split())
    assert f"(default: {cpu}, on a GPU {gpu})" in told
    assert f"(default: {rates}; {factor} times that with a GPU's default batch)" in told


@pytest.mark.parametrize(
    ("words", "status"), [(["--help"], 0), (["--seed", "one"], 2), (["--no-such-option"], 2)]
)
@pytest.mark.parametrize("script", ["train.py", "finetune.py", "prompt.py"])
def test_help_and_wrong_options_are_answered_without_torch(
    monkeypatch, capsys, script, words, status
):
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setitem(sys.modules, "torch", None)  # its import would be an ImportError
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert (ended.value.code or 0) == status
    out, err = capsys.readouterr()
    assert out.startswith("usage: ") if status == 0 else err.startswith("error: ")
    assert err.count("\n") == (status == 2)


@pytest.mark.parametrize("options", [train_options, finetune_options])
def test_a_run_without_the_options_of_later_versions_has_their_defaults(monkeypatch, options):
    saved = options_to_save(options().parse_args(["--max-len", "32"]))
    older = {key: value for key, value in saved.items() if key not in ADDED}
    monkeypatch.setattr(sys, "argv", ["script"])
    assert older != saved == options_to_save(options().resumed(older, set(), "run"))
    monkeypatch.setattr(sys, "argv", ["script", "--text-column", "review"])
    with pytest.raises(UserError, match="--text-column review: the run in run has text"):
        options().resumed(older, set(), "run")


def test_one_column_for_text_and_label_is_refused():
    args = finetune_options().parse_args(["--text-column", "label"])
    with pytest.raises(UserError, match="--text-column and --label-column are both label"):
        columns(args)
