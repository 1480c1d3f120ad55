"""Merging: LoRA or (IA)³ folded into the weights of the base, and several runs added up.

    python finetune.py --merge runs/finetune/lora --out runs/merged
    python finetune.py --merge runs/one runs/other --weights 0.5 0.5 --out runs/sum
    python finetune.py --merge runs/one runs/other --weights 1 -0.5 --out runs/less

The result is a plain BERT classifier, which loads anywhere and is as fast as its base. What a run
changed in each weight of the base is its task vector. Several runs are merged by adding the
weighted sum of their task vectors to the base (Ilharco et al. 2023, "Editing Models with Task
Arithmetic"); a negative weight takes away what a run has learned. A weight that the base does not
have, such as the classifier's, counts as zero there.
"""

import argparse

import torch
from torch import Tensor, nn

from minitune.checkpoint import load_for_classification, save_model
from minitune.ia3 import ScaledKeysAndValues, ScaledUnits
from minitune.lora import LoRA
from minitune.peft_files import METHODS_OF_PEFT, read_trained
from minitune.prediction import Classifier
from minitune.support.errors import UserError
from minitune.support.model_names import find_model
from minitune.support.runs import Run
from minitune.support.runtime import Runtime


def merge(model: nn.Module) -> None:
    """Replace what LoRA or (IA)³ put into a model by linear maps that compute the same."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRA | ScaledKeysAndValues | ScaledUnits):
            model.set_submodule(path, module.merged())


@torch.no_grad()
def add_task_vectors(
    base: dict[str, Tensor], models: list[dict[str, Tensor]], weights: list[float]
) -> dict[str, Tensor]:
    """base + the sum of weight * (model - base), for each tensor."""
    rest = 1 - sum(weights)  # of the base; exactly 0 for one model of weight 1
    total = {}
    for name in models[0]:
        total[name] = sum(w * model[name] for w, model in zip(weights, models, strict=True))
        if rest and name in base:
            total[name] += rest * base[name]
    return total


def load_to_merge(names: list[str], base: str | None) -> list[Classifier]:
    """The runs, which have one base; or a UserError where they cannot be merged."""
    runtime, classifiers = Runtime.start("cpu", "fp32"), []
    for name in names:
        directory = find_model(name)
        trained = read_trained(directory)
        if trained is None:
            raise UserError(f"--merge {name}: it holds no LoRA and no (IA)³ of a base model")
        if trained.method not in METHODS_OF_PEFT.values():
            raise UserError(f"--merge {name}: {trained.method} cannot be merged; lora and ia3 can")
        classifiers.append(Classifier.load(name, runtime, base=base))
        if classifiers[-1].base_hash != classifiers[0].base_hash:
            raise UserError(f"--merge {name} was trained on another base model than {names[0]}")
        if classifiers[-1].labels != classifiers[0].labels:
            raise UserError(f"--merge {name} has other labels than {names[0]}")
    return classifiers


def merge_runs(args: argparse.Namespace) -> None:
    """`finetune.py --merge`: from its options to the directory of the merged model."""
    weights = args.weights or [1 / len(args.merge)] * len(args.merge)
    if len(weights) != len(args.merge):
        raise UserError(f"--weights: {len(weights)} for {len(args.merge)} runs")
    for folder in args.out.resolve().parents:  # all in there is taken for a part of these runs
        if (folder / "settings.json").is_file() or (folder / "compare.json").is_file():
            raise UserError(f"--out {args.out} lies inside {folder}, which holds runs")
    with Run.open(args.out, resume=False, overwrite=args.overwrite, mark="merged") as run:
        classifiers = load_to_merge(args.merge, args.base)
        first = classifiers[0]
        if any(classifier.bag for classifier in classifiers):
            print("merged are the networks alone, without their bags of words")
        plain, new = load_for_classification(first.source, first.labels)
        base = {name: p for name, p in plain.state_dict().items() if name not in new}
        for classifier in classifiers:
            merge(classifier.model)
        states = [classifier.model.state_dict() for classifier in classifiers]
        plain.load_state_dict(add_task_vectors(base, states, weights))
        # The temperature of a sum could only be fitted on validation rows.
        plain.temperature = first.model.temperature if len(states) == 1 else 1.0
        max_len = max(classifier.max_len for classifier in classifiers)
        description = {"merged": args.merge, "weights": weights, "max_len": max_len}
        run.start(description)
        save_model(plain, first.tokenizer, args.out)
        run.finish({"method": "merge"} | description)
    print(f"wrote {args.out}: a BERT classifier with the labels {', '.join(first.labels.values())}")
