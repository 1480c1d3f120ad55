"""The options of the scripts: their choices are those of the lessons, and --help is quick."""

import runpy
import sys
from pathlib import Path

import pytest

from minitune.attention import BACKENDS
from minitune.calibration import CALIBRATIONS
from minitune.lora import TARGETS
from minitune.methods import METHODS
from minitune.model import PRESETS
from minitune.prompting import TEMPLATES
from minitune.support.options import finetune_options, prompt_options, train_options
from train import PEAK_LR

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
    assert prompt_options().get_default("template") == TEMPLATES


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
