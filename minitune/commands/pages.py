"""Pages: a model in one HTML file that answers in any browser, without a server and without Python.

    python finetune.py --model runs/finetune/adapter --page demo.html
    python prompt.py --page demo.html

BERT is arithmetic: support/page/bert.js computes in 300 lines of JavaScript what model.py computes
here, with weights of 8 bits. This file says what such a page has to know besides the weights.
"""

import argparse

from minitune.calibration import Ensemble
from minitune.classification import BEGINNING_SHARE
from minitune.commands.labelling import latest_run
from minitune.merging import merge
from minitune.prediction import Classifier
from minitune.prompting import MASK, TEXT, Prompt
from minitune.support.answers import say
from minitune.support.errors import UserError
from minitune.support.page import check_path, make_page, write_page
from minitune.support.runtime import Runtime


def write_page_of_run(args: argparse.Namespace) -> None:
    """`finetune.py --page`, from its options to the file."""
    check_path(args.page)
    name = latest_run(args.out) if args.model is None else args.model
    classifier = Classifier.load(name, Runtime.start("cpu", "fp32", args.threads), base=args.base)
    if classifier.model.pooling == "cloze":
        raise UserError(f"--page: {name} is a run of prompt, which a page does not compute yet")
    say(f"model: {name}; labels: {', '.join(classifier.labels.values())}")
    if classifier.bag:
        say("the page has the network alone, without its bag of words")
    print(write_page(args.page, page_of_classifier(classifier, name), args.yes))


def page_of_classifier(classifier: Classifier, name: str) -> str:
    """The page of a fine-tuned model. LoRA and (IA)³ are merged into the classifier's weights."""
    merge(classifier.model)
    room = classifier.max_len - 2  # beside [CLS] and [SEP]
    reading = {"room": room, "beginning": round(BEGINNING_SHARE * room)}
    facts = {"labels": list(classifier.labels.values()), "prompts": []}
    model = {"pooling": classifier.model.pooling, "temperature": classifier.model.temperature}
    facts["classifier"] = model | reading
    return make_page(name, classifier.model, classifier.tokenizer.backend, facts)


def page_of_prompts(ensemble: Ensemble, name: str) -> str:
    """The page of a masked language model, which answers by these prompts."""
    pairs = zip(ensemble.prompts, ensemble.biases, strict=True)
    prompts = [describe_prompt(prompt) | {"bias": bias.tolist()} for prompt, bias in pairs]
    facts = {"labels": list(ensemble.names.values()), "prompts": prompts, "classifier": None}
    fill_mask = ensemble.prompts[0].fill_mask
    return make_page(name, fill_mask.model, fill_mask.tokenizer.backend, facts)


def describe_prompt(prompt: Prompt) -> dict:
    """A prompt as support/page/__init__.py wants it: everything in token ids."""
    template, verbalizer = prompt.template, prompt.verbalizer
    first, second = (TEXT, MASK) if template.text_first else (MASK, TEXT)
    before = prompt.demonstrations + template.before
    parts = [before, first, template.between, second, template.after]
    # The blank of one [MASK] comes first: its words are shown.
    blanks = {(prompt.fill_mask.tokenizer.mask_id,): []} | verbalizer.blanks
    blanks = [{"ids": ids, "guesses": guesses} for ids, guesses in blanks.items()]
    description = {"sentence": prompt.sentence, "parts": parts, "room": prompt.room}
    return description | {"words": verbalizer.labels, "blanks": blanks}
