"""`--method prompt`: the masked language model is fine-tuned as a cloze, from its prompt's answers on."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import prompt
from minitune.batching import PackedBatch
from minitune.calibration import Ensemble
from minitune.checkpoint import load_masked_lm, load_tokenizer, save_model, weights_hash
from minitune.classification import Examples, TokenizedTexts
from minitune.cloze import ClozeClassifier
from minitune.experiment import choose_unlabelled
from minitune.methods import METHODS, all_parameters, build
from minitune.model import BertConfig, BertForMaskedLM
from minitune.prediction import Classifier
from minitune.prompting import FillMask, Prompt
from minitune.support.errors import UserError
from minitune.support.options import UNPROMPTED
from minitune.support.runs import Run
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer
from tests.test_finetune import assert_refused, contents, log, metrics, run, succeed
from tests.test_prompt import ROWS, pretrain

CPU = Runtime.start("cpu", "fp32")
NAMES = {0: "no", 1: "yes"}
TEMPLATES = ["{text} it is [MASK] .", "it is [MASK] : {text}"]
WORDS = {"no": ["bad", "dull"], "yes": ["good", "great"]}
AGAINST = ["no=good,great", "yes=bad,dull"]  # what pretraining has taught is wrong then
MAX_LEN = 12
TRAINS = [name for name in METHODS if name not in UNPROMPTED]
SMALL = {"adapter_size": 4, "lora_targets": "query,value", "lora_rank": 2, "lora_alpha": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`, a model that knows the reviews, `headless`, one without a head, and data.csv.

    Nothing in them may change.
    """
    folder = tmp_path_factory.mktemp("cloze")
    with open(folder / "data.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    tokenizer = Tokenizer.train([f"{text} it is . : {label}" for text, label in ROWS], 110)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "hidden_dropout_prob": 0.1}
    config = BertConfig(vocab_size=tokenizer.vocab_size, **sizes)
    torch.manual_seed(0)
    model = pretrain(BertForMaskedLM(config).eval(), tokenizer)
    for name in ("base", "headless"):
        (folder / name).mkdir()
        save_model(model, tokenizer, folder / name)
    headless = build("full", folder / "base", NAMES)
    save_model(headless, tokenizer, folder / "headless")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def new_model(folder, train="full", templates=TEMPLATES, words=WORDS, **more):
    names = METHODS[train].options
    options = {name: SMALL[name] for name in names if name in SMALL}
    words = [f"{label}={','.join(several)}" for label, several in words.items()]
    cloze = {"train": train, "template": templates, "words": words, "cloze_len": MAX_LEN}
    return build("prompt", folder / "base", NAMES, **cloze | options | more)


def read(model, texts=tuple(text for text, _ in ROWS)):
    return TokenizedTexts(texts, model.tokenizer, model.max_len, model.beginning)


def prompts(folder, templates=TEMPLATES, words=WORDS):
    model, _ = load_masked_lm(folder / "base")
    fill_mask = FillMask(model, load_tokenizer(folder / "base", model.config), CPU)
    return [Prompt(sentence, words, fill_mask, MAX_LEN) for sentence in templates]


def command(folder, out, *more):
    """`finetune.py --method prompt` on the rows of data.csv; later options win."""
    data = ["--model", folder / "base", "--data", folder / "data.csv", "--out", out]
    how = ["--template", *TEMPLATES, "--words", "no=bad,dull", "yes=good,great"]
    how += ["--cloze-len", MAX_LEN, "--epochs", "2", "--adapter-size", "4", "--lora-rank", "2"]
    return ["--method", "prompt", *data, *how, "--precision", "fp32", "--device", "cpu", *more]


# Before the first step


LONG = " and ".join(text for text, _ in ROWS[:5])


def test_the_start_answers_as_the_calibrated_prompt_does(folder):
    model, texts = new_model(folder), [*(text for text, _ in ROWS), LONG, ""]
    unlabelled = choose_unlabelled(read(model), seed=3)
    model.calibrate(unlabelled, CPU)
    encoded = [ids[1:-1].tolist() for ids in unlabelled.ids]
    ensemble = Ensemble(prompts(folder), "prior", encoded)
    assert torch.allclose(model.offsets, torch.stack(ensemble.biases), atol=1e-5)
    assert (model.offsets[:, 0] - model.offsets[:, 1]).abs().min() > 1e-3
    expected = ensemble.log_probabilities(model.tokenizer.encode(texts))
    with torch.no_grad():
        given = model.eval()(read(model, texts).pack())
    assert torch.allclose(given, expected, atol=1e-5)


def test_the_unlabelled_texts_are_those_that_prompt_py_draws(folder):
    texts = [f"{text} {i}" for i, (text, _) in enumerate(ROWS * 6)]
    args = SimpleNamespace(seed=5, unlabelled=256)
    model = new_model(folder)
    drawn = choose_unlabelled(read(model, texts), seed=5)
    assert len(drawn.ids) == 256
    expected = read(model, prompt.choose_unlabelled(args, texts))
    assert [ids.tolist() for ids in drawn.ids] == [ids.tolist() for ids in expected.ids]


def test_of_a_long_text_the_end_is_read(folder):
    model = new_model(folder)
    (ids,) = read(model, ["bad " * 30 + "the cast was good"]).ids
    assert len(ids) == MAX_LEN
    for k, room in enumerate(model.rooms):
        cloze, blank = model.cloze(ids[1:-1].tolist(), k)
        assert len(cloze) == MAX_LEN and cloze[blank] == model.tokenizer.mask_id
        assert cloze.count(model.tokenizer.mask_id) == 1
        assert model.tokenizer.encode(["bad " * 30 + "the cast was good"])[0][-room:] == [
            *ids[1:-1].tolist()[-room:]
        ]


# The loss


def test_the_loss_is_that_of_its_definition_in_float64(folder):
    model = new_model(folder)
    model.offsets.copy_(torch.tensor([[0.3, -0.2], [0.0, 0.7]]))
    texts, labels = ["the film was good", "the plot was dull dull", "joke"], [1, 0, 1]
    batch = read(model, texts).pack()
    tokenizer, whole = model.tokenizer, model.masked_lm().eval()
    torch.manual_seed(1)
    drawn = int(torch.randint(2, ()))
    losses = []
    for text, label in zip(texts, labels, strict=True):
        sentence = TEMPLATES[drawn].replace("{text}", text)
        before, after = tokenizer.encode(sentence.split("[MASK]"))
        ids = torch.tensor(tokenizer.frame([*before, tokenizer.mask_id, *after]))
        with torch.no_grad():
            logits = whole(PackedBatch.from_sequences([ids]), torch.tensor([1 + len(before)]))[0]
        logs = logits.double().log_softmax(-1)
        scores = []
        for name, offset in zip(WORDS, model.offsets[drawn].double(), strict=True):
            words = [tokenizer.encode([word])[0][0] for word in WORDS[name]]
            scores.append(sum(logs[word] for word in words) / len(words) + offset)
        losses.append(-(scores[label] - torch.stack(scores).logsumexp(0)))
    for module in model.modules():  # no dropout; only the drawing of templates is of training
        module.training = False
    model.training = True
    torch.manual_seed(1)
    loss = torch.nn.functional.cross_entropy(model(batch), torch.tensor(labels), reduction="none")
    assert loss.double().tolist() == pytest.approx([x.item() for x in losses], abs=1e-5)


def test_a_batch_of_training_draws_one_template_and_a_prediction_reads_all(folder, monkeypatch):
    model, asked = new_model(folder), []
    answer = ClozeClassifier.answer
    monkeypatch.setattr(
        ClozeClassifier, "answer", lambda self, *x: (asked.append(x[2]), answer(self, *x))[1]
    )
    batch = read(model).pack()
    model.train()
    for seed in range(30):
        torch.manual_seed(seed)
        model(batch)
    assert len(asked) == 30 and 5 < sum(asked) < 25
    asked.clear()
    model.eval()(batch)
    assert asked == [0, 1]


# What trains


@pytest.mark.parametrize("train", TRAINS)
def test_what_trains_is_what_train_names(folder, train):
    model = new_model(folder, train)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(METHODS[train].trained(model)) > set()
    if train == "full":
        assert trained == set(all_parameters(model))
    if train == "bitfit":
        assert trained == {name for name in all_parameters(model) if name.endswith("bias")}
    fresh = {name for name in trained if "adapter" in name or name.endswith((".A", ".B"))}
    assert bool(fresh) == (train in ("adapter", "lora"))


@pytest.mark.parametrize("rows", [16, 64, 2000])
@pytest.mark.parametrize("train", TRAINS)
def test_rates_are_those_of_what_trains_and_few_rows_are_not_read_often(train, rows):
    args = SimpleNamespace(train=train, epochs=None, batch_tokens=None, lr=None)
    texts = SimpleNamespace(lengths=np.full(rows, 100), unit="tokens")
    examples = Examples(texts, torch.zeros(rows))
    found = METHODS["prompt"].recipe(args, examples, 256, Path("no run"))
    other = METHODS[train]
    assert found["lr"] == pytest.approx(other.lr(256) * (rows / 8192) ** 0.5)
    assert found["optimizer"] == other.optimizer
    assert found["epochs"] <= METHODS["prompt"].most_epochs
    assert found["batch_tokens"] == 1600


# From end to end


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run for each of two ways to train, from words that say the opposite."""
    out = tmp_path_factory.mktemp("runs")
    for train, lr in (("full", "3e-3"), ("lora", "1e-2"), ("bitfit", "1e-2")):
        words = ["--words", *AGAINST, "--epochs", "12", "--lr", lr, "--train", train]
        succeed(*command(folder, out / train, *words))
    return out


def test_the_first_evaluation_is_the_prompt_and_training_gets_better(trained, folder):
    for train in ("full", "lora"):
        first, *later = log(trained / train / "prompt")
        assert first["step"] == 0 and first["validation"]["accuracy"] == 0.0
        assert metrics(trained / train / "prompt")["accuracy"] == 1.0, train
        assert max(entry["step"] for entry in later) == metrics(trained / train / "prompt")["steps"]


def test_the_start_is_kept_where_training_does_harm(folder, tmp_path):
    succeed(*command(folder, tmp_path / "out", "--lr", "10"))
    run = tmp_path / "out" / "prompt"
    assert metrics(run)["best_epoch"] == 0 and metrics(run)["accuracy"] == 1.0
    state, _ = load_masked_lm(run)
    base, _ = load_masked_lm(folder / "base")
    for name, tensor in base.state_dict().items():
        assert torch.equal(state.state_dict()[name], tensor), name


@pytest.mark.parametrize("train", ["full", "lora", "bitfit"])
def test_a_saved_run_answers_as_in_training(trained, train, tmp_path):
    run = trained / train / "prompt"
    answers = json.loads((run / "answers.json").read_text())
    logits = torch.tensor(answers["test"]["logits"]) / answers["temperature"]
    texts = [text for text, _ in ROWS]
    tests = [text for rows in (ROWS[:30], ROWS[30:]) for text, _ in rows[-3:]]  # 10% of each label
    shutil.copytree(run, tmp_path / "moved")
    for place in (run, tmp_path / "moved"):
        classifier = Classifier.load(str(place), CPU)
        assert classifier.model.max_len == classifier.max_len == MAX_LEN
        given = [answer.probabilities for answer in classifier.predict(tests)]
        expected = logits.softmax(-1)
        for row, right in zip(given, expected.tolist(), strict=True):
            assert [row["no"], row["yes"]] == pytest.approx(right, abs=1e-4)
    done = succeed("--model", run, "--predict", *texts[:3], "--json", "--precision", "fp32")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["probabilities"] for line in lines] == [
        pytest.approx(answer.probabilities, abs=1e-4) for answer in classifier.predict(texts[:3])
    ]


def test_a_fully_trained_run_is_a_masked_language_model(trained, folder, tmp_path):
    run = trained / "full" / "prompt"
    model, has_head = load_masked_lm(run)
    assert has_head
    saved = json.loads((run / "trained.json").read_text())
    assert saved["base"]["sha256"] == weights_hash(run)
    command_again = command(folder, tmp_path / "more", "--words", *AGAINST, "--model", run)
    succeed(*command_again)
    assert log(tmp_path / "more" / "prompt")[0]["validation"]["accuracy"] == 1.0


def test_a_partly_trained_run_needs_its_base(trained, folder, tmp_path):
    shutil.copytree(trained / "lora" / "prompt", tmp_path / "run")
    shutil.copytree(folder / "base", tmp_path / "other")
    model, _ = load_masked_lm(folder / "base")
    model.head.bias.data += 1
    save_model(model, load_tokenizer(folder / "base", model.config), tmp_path / "other")
    with pytest.raises(UserError, match="another base model"):
        Classifier.load(str(tmp_path / "run"), CPU, base=str(tmp_path / "other"))


def test_an_explanation_is_of_the_first_template(trained):
    classifier = Classifier.load(str(trained / "full" / "prompt"), CPU)
    found = classifier.explain("the film was superb superb").explanation
    assert found.words == ["the", "film", "was", "superb", "superb", "it", "is", "."]
    assert found.error <= 0.02
    inputs = classifier.read(["the film was superb superb"])
    clozes, blanks = classifier.model.clozes(inputs.pack(), 0)
    no, yes = classifier.model.answer(clozes, blanks, 0)[0].tolist()
    assert abs(found.difference) == pytest.approx(abs(no - yes), abs=1e-4)


def test_templates_and_words_are_those_of_the_run(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "full" / "prompt", run)
    text = "the film was superb"
    before = Classifier.load(str(run), CPU).predict([text])[0]
    saved = json.loads((run / "trained.json").read_text())
    assert saved["template"] == TEMPLATES and saved["train"] is None
    saved["words"] = [f"no={AGAINST[1].partition('=')[2]}", f"yes={AGAINST[0].partition('=')[2]}"]
    (run / "trained.json").write_text(json.dumps(saved))
    after = Classifier.load(str(run), CPU).predict([text])[0]
    assert after.probabilities["yes"] != pytest.approx(before.probabilities["yes"], abs=0.05)


def test_three_labels_and_numbers(folder, tmp_path):
    rows = [("text", "label"), *((text, int(label == "yes")) for text, label in ROWS)]
    with open(tmp_path / "numbers.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    succeed(*command(folder, tmp_path / "out", "--data", tmp_path / "numbers.csv"))
    assert log(tmp_path / "out" / "prompt")[0]["validation"]["accuracy"] == 1.0


def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path, monkeypatch):
    succeed(*command(folder, tmp_path / "straight"))
    saves, save = [], Run.save

    def stop(self, checkpoint):
        saves.append(save(self, checkpoint))
        if len(saves) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", stop)
        options = command(folder, tmp_path / "stopped", "--save-minutes", "1e-9")
        assert run(*options).status == 130
    succeed(*options, "--resume")
    one, other = (tmp_path / name / "prompt" for name in ("straight", "stopped"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert [e["step"] for e in log(one)] == [e["step"] for e in log(other)]


# What is refused


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (["--model", "headless"], "has no masked-LM head"),
        (["--words", "no=bad", "maybe=good"], "the label yes is none of --words"),
        (["--words", "no=bad", "yes=goodgreat"], "words of one token"),
        (["--words", "no=bad", "yes=漢"], "does not know"),
        (["--words", "no=bad", "yes=bad"], "stands for two labels"),
        (["--words", "no"], "should be LABEL=WORD"),
        (["--template", "{text}"], "must hold [MASK] once"),
        (["--template", "{text} [MASK] " + "film " * 20], "leaves no room"),
        (["--cloze-len", "65"], "--cloze-len 65: the model has 64 positions"),
        (["--train", "feature"], "--train"),
        (["--train", "lora", "--lora-rank", "33"], "rank 33"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(folder, tmp_path, words, naming):
    if words[0] == "--model":
        words = ["--model", folder / "headless"]
    assert_refused(*command(folder, tmp_path / "out", *words), naming=naming)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{text} [MASK]"},
        {"template": [5]},
        {"words": "no=bad"},
        {"words": ["bad"]},
        {"words": {"no": ["bad"], "yes": ["good"]}},
        {"train": "no method"},
        {"template": None},
        {"max_len": 10**6},
        {"words": ["no=bad", "maybe=good"]},
    ],
)
def test_a_damaged_description_is_refused(trained, tmp_path, change):
    run = tmp_path / "run"
    shutil.copytree(trained / "full" / "prompt", run)
    saved = json.loads((run / "trained.json").read_text())
    (run / "trained.json").write_text(json.dumps(saved | change))
    with pytest.raises(UserError):
        Classifier.load(str(run), CPU)


def test_a_page_is_refused(trained, tmp_path):
    run = trained / "full" / "prompt"
    assert_refused("--model", run, "--page", tmp_path / "page.html", naming="a run of prompt")
    assert not (tmp_path / "page.html").exists()


def test_no_options_but_those_of_what_trains_are_saved(trained):
    saved = json.loads((trained / "bitfit" / "prompt" / "trained.json").read_text())
    assert not [key for key in saved if "lora" in key or "adapter" in key]
    assert saved["train"] == "bitfit"
