"""Check that a directory written by minitune is a BERT to `transformers` too, and the way back.

    PYTHONPATH=. python tests/benchmarks/check_transformers.py runs/pretrain runs/finetune/full

Run it in an environment that has `transformers` (checked with 4.57 and 5.24) beside minitune's own
needs; minitune itself does not use it. Exit status 0 and one line for each thing that holds, or an
AssertionError that says what does not.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
import transformers

from minitune.batching import PackedBatch
from minitune.checkpoint import load_classifier, load_masked_lm
from minitune.data import Dataset
from minitune.prompting import FillMask, fill_blanks
from minitune.support.runs import read_json
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer
from tests.test_tokenizer import FOLLOWED, TEXT, write

FP32 = Runtime.start("cpu", "fp32")
TEXTS = [
    "A film.",
    "An unforgettable, heartbreakingly funny performance from start to finish!",
    "I'd rather watch 90 minutes of paint drying (in 4:3, dubbed) than THAT again...",
    "Zoë's café scene: naïve? Überlong? Perhaps — but I laughed; so did everybody else in row 7.",
    "It rained all night and the river rose, and in the morning nobody spoke of it. " * 6,
    "A waste of time.<br /><br />Bad.<BR>x < br>",
]
REVIEWS = 1000  # of IMDb, with line breaks

SENTENCES = [
    "A [MASK] film.",
    "The plot was [MASK] and the acting [MASK].",
    "[MASK], I'd rather watch 90 minutes of paint drying (in 4:3, dubbed) than [MASK] [MASK] again...",
]


def check_weights(directory: Path) -> transformers.BertPreTrainedModel:
    """Every tensor is asked for, and none is left over or of another shape."""
    (architecture,) = read_json(directory / "config.json")["architectures"]
    model, info = getattr(transformers, architecture).from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    problems = {kind: names for kind, names in info.items() if names}
    assert not problems, f"loading in transformers: {problems}"
    print("weights: no key missing, unexpected or of another shape")
    return model.eval()


def check_tokens(directory: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """The same ids, once [CLS] and [SEP] stand around ours."""
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    special = (
        tokenizer.pad_id,
        tokenizer.unk_id,
        tokenizer.cls_id,
        tokenizer.sep_id,
        tokenizer.mask_id,
    )
    assert special == tuple(
        getattr(theirs, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")
    ), f"special ids: {special}"
    reviews = (row.text for row in Dataset("imdb").read() if "<br" in row.text)
    texts = [*TEXTS, *itertools.islice(reviews, REVIEWS)]
    encoded = [tokenizer.frame(ids) for ids in tokenizer.encode(texts)]
    fast = [theirs]
    if transformers.__version__ < "5":  # from 5 on this class has a normalizer of its own
        fast.append(transformers.BertTokenizerFast.from_pretrained(directory))
    for tokenize in fast:
        for text, ids in zip(texts, encoded, strict=True):
            assert ids == tokenize(text)["input_ids"], f"other token ids for {text!r}"
    print(f"tokens: the same ids for {len(texts)} texts, {sum(map(len, encoded))} tokens")
    return encoded[: len(TEXTS)]


def check_other_directories() -> None:
    """`transformers` finds the tokens that the tests expect of directories in various forms."""
    for name, (files, expected) in FOLLOWED.items():
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory), {"config.json": {"model_type": "bert"}} | files)
            tokens = transformers.AutoTokenizer.from_pretrained(directory).tokenize(TEXT)
            assert tokens == expected.split(), f"{name}: {tokens}"
    print(f"directories: the tokens that the tests expect of {len(FOLLOWED)}")


def load(directory: Path) -> torch.nn.Module:
    """Our model, whichever it is."""
    if read_json(directory / "config.json")["architectures"] == ["BertForSequenceClassification"]:
        return load_classifier(directory)
    model, has_head = load_masked_lm(directory)
    assert has_head, "minitune finds no masked-LM head"
    return model


@torch.no_grad()
def check_logits(
    directory: Path, theirs: transformers.BertPreTrainedModel, encoded: list[list[int]]
) -> None:
    """Ours for all texts in one packed batch, theirs for one text at a time."""
    ours = load(directory)
    longest = ours.config.max_position_embeddings
    sequences = [torch.tensor(ids[:longest]) for ids in encoded]
    batch = PackedBatch.from_sequences(sequences)
    if ours.config.id2label:
        assert theirs.config.id2label == ours.config.id2label, f"labels: {theirs.config.id2label}"
        assert theirs.config.label2id == {name: i for i, name in ours.config.id2label.items()}
        print(f"labels: {ours.config.id2label} on both sides")
        logits = ours(batch)
    else:
        logits = ours(batch, torch.arange(batch.tokens.numel())).split([len(s) for s in sequences])
    expected = [theirs(input_ids=sequence[None]).logits[0] for sequence in sequences]
    difference = max((a - b).abs().max().item() for a, b in zip(logits, expected, strict=True))
    largest = max(x.abs().max().item() for x in expected)
    assert difference <= 1e-4, f"logits differ by {difference:.1e}"
    print(f"logits: largest difference {difference:.1e}, largest logit {largest:.1f}")


def check_blanks(directory: Path, theirs: transformers.BertPreTrainedModel) -> None:
    """`prompt.py --fill` and the pipeline fill-mask give the same words the same probabilities."""
    pipeline = transformers.pipeline(
        "fill-mask", model=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(directory)
    )
    fill_mask, difference = FillMask(load(directory), Tokenizer.load(directory), FP32), 0.0
    for sentence in SENTENCES:
        answers = pipeline(sentence, top_k=5)
        answers = (
            answers if isinstance(answers[0], list) else [answers]
        )  # one blank, no list around it
        for ours, expected in zip(fill_blanks(fill_mask, sentence, 5), answers, strict=True):
            assert [word for word, _ in ours] == [answer["token_str"] for answer in expected], (
                sentence
            )
            pairs = zip(ours, expected, strict=True)
            difference = max(difference, *(abs(p - answer["score"]) for (_, p), answer in pairs))
    assert difference <= 1e-4, f"probabilities differ by {difference:.1e}"
    print(f"blanks: the same words, probabilities differ by {difference:.1e} at most")


def check_way_back(directory: Path, theirs: transformers.BertPreTrainedModel) -> None:
    """What `save_pretrained` writes loads here as the very same tensors."""
    with tempfile.TemporaryDirectory() as saved:
        theirs.save_pretrained(saved)
        back = load(Path(saved))
    ours = load(directory)
    assert back.config == ours.config, f"saved by transformers: {back.config}"
    returned = back.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, returned[name]), f"saved by transformers: {name} differs"
    print(f"way back: {len(returned)} tensors saved by transformers are bit for bit those here")


def main() -> None:
    """All checks on each directory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, nargs="+")
    check_other_directories()
    for directory in parser.parse_args().directory:
        print(f"{directory}, transformers {transformers.__version__}, torch {torch.__version__}")
        theirs = check_weights(directory)
        encoded = check_tokens(directory, Tokenizer.load(directory))
        check_logits(directory, theirs, encoded)
        if theirs.config.architectures == ["BertForMaskedLM"]:
            check_blanks(directory, theirs)
        check_way_back(directory, theirs)


if __name__ == "__main__":
    main()
