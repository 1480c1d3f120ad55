"""Check that LoRA and (IA)³ directories of minitune load in Hugging Face's peft, and the way back.

    PYTHONPATH=. python tests/benchmarks/check_peft.py runs/finetune/lora runs/finetune/ia3

Run it in an environment that has `transformers` and `peft` (checked with 4.57 and 0.21) beside
minitune's own needs; minitune itself does not use them. Exit status 0 and one line for each thing
that holds, or an AssertionError that says what does not. With --write it computes the numbers in
tests/peft_cases.json anew.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers

from minitune.batching import PackedBatch
from minitune.methods import build
from minitune.peft_files import PeftDirectory
from minitune.prediction import Classifier
from minitune.support.runtime import Runtime
from tests.peft_cases import FILE, OURS, PEFT, SEQUENCES, numbers, write_adapter, write_base

TOLERANCE = 1e-5
FP32 = Runtime.start("cpu", "fp32")
TEXTS = [
    "A film.",
    "An unforgettable, heartbreakingly funny performance!",
    "A waste of time. " * 20,
]


def load_in_peft(base: Path, labels: dict[int, str], adapter: Path) -> peft.PeftModel:
    """The base as a classifier of transformers with this adapter; nothing may be left over."""
    names = {"id2label": labels, "label2id": {name: k for k, name in labels.items()}}
    plain = transformers.BertForSequenceClassification.from_pretrained(base, **names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(plain, adapter)
        problems = model.load_adapter(adapter, "again")
    assert not problems.unexpected_keys, f"left over: {problems.unexpected_keys}"
    missing = [name for name in problems.missing_keys if ".again." in name or "lora" in name]
    assert not missing, f"missing: {missing}"
    return model.eval()


@torch.no_grad()
def compare(
    theirs: torch.nn.Module, adapter: Path, base: Path, sequences: list[list[int]]
) -> float:
    """The largest difference of logits between peft and minitune, a text at a time and together."""
    ours = Classifier.load(str(adapter), FP32, base=str(base)).model
    logits = ours(PackedBatch.from_sequences([torch.tensor(ids) for ids in sequences]))
    expected = [theirs(input_ids=torch.tensor([ids])).logits[0] for ids in sequences]
    return (logits - torch.stack(expected)).abs().max().item()


def check(adapter: Path) -> None:
    """A directory of a run: peft loads it, computes the same, and what peft saves loads here."""
    run = PeftDirectory.read(adapter)
    base = run.find_base(adapter)
    classifier = Classifier.load(str(adapter), FP32)
    theirs = load_in_peft(base, run.labels, adapter)
    encoded = [classifier.tokenizer.frame(ids) for ids in classifier.tokenizer.encode(TEXTS)]
    difference = compare(theirs, adapter, base, encoded)
    assert difference <= TOLERANCE, f"logits differ by {difference:.1e}"
    print(f"{adapter}: nothing missing or left over; logits differ by {difference:.1e} at most")
    with tempfile.TemporaryDirectory() as saved:
        theirs.save_pretrained(saved, selected_adapters=["default"])
        again = Classifier.load(saved, FP32, base=str(base))
        assert again.labels == run.labels and again.max_len == run.max_len
        difference = compare(theirs, Path(saved), base, encoded)
    assert difference <= TOLERANCE, f"saved by peft: logits differ by {difference:.1e}"
    print(f"saved by peft again: labels kept, logits differ by {difference:.1e} at most")


def configurations(folder: Path, base: Path) -> dict[str, dict]:
    """What peft is given in each case: keyword arguments, ours as minitune writes them."""
    cases = {name: {"task_type": "SEQ_CLS"} | options for name, options in PEFT.items()}
    for name, (method, options) in OURS.items():
        labels = {0: "bad", 1: "fair", 2: "good"}
        run = PeftDirectory(method, "cls", options, labels, 32, str(base), "0" * 64)
        (folder / name).mkdir()
        run.save(build(method, base, labels, **options), folder / name)
        cases[name] = json.loads((folder / name / "adapter_config.json").read_text())
        del cases[name]["auto_mapping"]
    return cases


def compute_cases() -> dict[str, dict]:
    """By the name of a case: adapter_config.json, shapes of the tensors and logits, of peft."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_base(folder / "base")
        for name, options in configurations(folder, folder / "base").items():
            plain = transformers.BertForSequenceClassification.from_pretrained(folder / "base")
            kind = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config}[options.pop("peft_type")]
            model = peft.get_peft_model(plain, kind(**options)).eval()
            tensors = peft.get_peft_model_state_dict(model)
            filled = {key: numbers(key, tuple(tensor.shape)) for key, tensor in tensors.items()}
            left = peft.set_peft_model_state_dict(model, filled).unexpected_keys
            assert not left, f"{name}: {left}"
            model.save_pretrained(folder / f"peft, {name}")
            config = json.loads((folder / f"peft, {name}" / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = None
            with torch.no_grad():
                logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in SEQUENCES]
            shapes = {key: list(tensor.shape) for key, tensor in sorted(tensors.items())}
            logits = [[round(x, 6) for x in row.tolist()] for row in logits]
            results[name] = {"config": config, "tensors": shapes, "logits": logits}
    return results


def check_cases(write: bool) -> None:
    """The numbers in the suite are those of peft."""
    results = compute_cases()
    if write:
        lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in results.items()]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    kept = json.loads(FILE.read_text())
    assert kept.keys() == results.keys()
    for name, case in results.items():
        assert kept[name]["tensors"] == case["tensors"], f"{name}: peft has other tensors"
        difference = torch.tensor(kept[name]["logits"]) - torch.tensor(case["logits"])
        assert difference.abs().max() <= TOLERANCE, f"{name}: peft has other logits"
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_base(folder / "base")
            write_adapter(folder / "adapter", case, folder / "base")
            theirs = load_in_peft(
                folder / "base", {0: "bad", 1: "fair", 2: "good"}, folder / "adapter"
            )
            difference = compare(theirs, folder / "adapter", folder / "base", SEQUENCES)
        assert difference <= TOLERANCE, f"{name}: logits differ by {difference:.1e}"
        print(f"{name}: as in {FILE.name}; minitune's logits differ by {difference:.1e} at most")


def main() -> None:
    """The cases of the suite, then each directory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, nargs="*")
    parser.add_argument("--write", action="store_true", help="write tests/peft_cases.json")
    args = parser.parse_args()
    print(
        f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    check_cases(args.write)
    for directory in args.directory:
        check(directory)


if __name__ == "__main__":
    main()
