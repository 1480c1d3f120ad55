"""The options of the three scripts.

Nothing here imports torch, which takes seconds: `--help` and a wrong option are answered at once.
So the names of presets, methods and the like are read from the source of their lessons.
"""

import ast
import functools
from collections.abc import Callable
from pathlib import Path

from minitune.support.cli import (
    Parser,
    add_columns,
    float_range,
    int_range,
    path,
    text,
)

UNPROMPTED = ("feature", "scratch", "prompt")  # methods that --train cannot name
LESSONS = Path(__file__).parents[1]
MODEL = "reference, minilm, a directory, a hub id; default: the last run of train.py on IMDb, "
MODEL += "else reference"


@functools.cache  # options are made several times in a script
def _constant(lesson: str, name: str) -> ast.expr:
    """What a lesson assigns to a name at its top level, as it is written there."""
    for statement in ast.parse((LESSONS / f"{lesson}.py").read_text(encoding="utf-8")).body:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return statement.value
    raise KeyError(f"{lesson}.py has no {name}")


def _keys(lesson: str, name: str) -> list[str]:
    """The keys of a dictionary of a lesson."""
    return [ast.literal_eval(key) for key in _constant(lesson, name).keys]


def train_options() -> Parser:
    """Of train.py."""
    options = Parser("Pretrain a BERT from scratch by guessing masked words.")
    add = options.group("what is trained, on what")
    data = "imdb, rotten_tomatoes, a .txt .csv .tsv .jsonl .parquet file, a folder, a hub id"
    add("--data", data, default="imdb")
    add_columns(add)
    add("--preset", "size of the model", _keys("model", "PRESETS"), "tiny")
    add("--init", "start from minilm, a BERT directory or a hub id instead", metavar="MODEL")
    add("--vocab-size", "entries of a new vocabulary", int_range(64, 10**6), 8192)
    add("--out", "directory of the run", path, Path("runs/pretrain"))
    add("--resume", "continue the run in --out", bool)
    add("--overwrite", "replace the run in --out", bool)
    add = options.group("how long")
    add("--minutes", "for all of it, tokenising included", float_range(0, 1e6), 17)
    add("--steps", "this many optimizer steps instead", int_range(1, 10**9))
    add("--save-minutes", "minutes between checkpoints", float_range(0, 1e6), "2")
    add = options.group("the recipe")
    rate = ast.literal_eval(_constant("pretraining", "MASK_RATE"))
    add("--mask-rate", "share of the tokens to guess", float_range(0, 0.9), rate)
    add("--whole-word", "mask whole words, not single tokens", bool)
    add("--summary-weight", "of guessing words from [CLS]", float_range(0, 100, above=False), 1.0)
    add("--max-len", "tokens in a sequence at most (default: up to 512)", int_range(8, 10**6))
    batch = "tokens in a step, all processes together (default: 4096, on a GPU 65536)"
    add("--batch-tokens", batch, int_range(8, 10**7))
    add(
        "--accumulate", "compute a batch in N parts, for memory", int_range(1, 1024), 1, metavar="N"
    )
    add("--optimizer", "for the hidden matrices", ["muon", "adamw"], "muon")
    lr = "its peak rate (default: muon 0.01, adamw 0.001; 2 times that with a GPU's default batch)"
    add("--lr", lr, float_range(0, 1e38))
    adamw_lr = "peak rate for the rest, beside muon (default: that of adamw)"
    add("--adamw-lr", adamw_lr, float_range(0, 1e38))
    add("--weight-decay", "of matrices", float_range(0, 100, above=False), 0.01)
    _add_machine_options(options, compiles=["auto", "on", "off"])
    return options


def finetune_options() -> Parser:
    """Of finetune.py."""
    options = Parser(
        "Fine-tune a BERT for the sentiment of reviews, or label new ones with the result."
    )
    add = options.group("what is trained, on what")
    method = "one, or several to be compared in one table"
    add("--method", method, _keys("methods", "METHODS"), ["adapter"], nargs="+")
    add("--model", f"{MODEL}. With --predict: what a run of finetune.py wrote")
    data = "imdb, rotten_tomatoes, a .csv .tsv .jsonl .parquet file, a folder, a hub id"
    add("--data", data, default="imdb")
    test = "labelled test rows; default: the last 10%% of each label in --data"
    add("--test", test, metavar="FILE")
    add_columns(add)
    few = "train on N rows only; several N draw accuracy against the number of labels"
    add("--train-examples", few, int_range(0, 10**9), nargs="+", metavar="N")
    unlabelled = "learn from the other training rows too, as a prompt and a bag of words label them"
    add("--unlabelled", unlabelled, bool)
    seeds = "train with N seeds, from --seed on; with --train-examples each draws its rows"
    add("--seeds", seeds, int_range(1, 100), 1, metavar="N")
    add("--out", "each method writes to OUT/METHOD", path, Path("runs/finetune"))
    add("--resume", "continue the runs in --out", bool)
    add("--overwrite", "replace the runs in --out", bool)
    add("--save-minutes", "minutes between checkpoints", float_range(0, 1e6), "2")
    add = options.group("the recipe; what is not given is the method's own")
    add("--epochs", "how often the training rows are read", int_range(1, 10_000))
    soup = "train N times from the same weights, in other orders, and try their average too"
    add("--soup", soup, int_range(1, 100), 1, metavar="N")
    add("--adapter-size", "units in the bottleneck of an adapter", int_range(1, 10_000), 64)
    targets = "linear maps of each layer that LoRA changes, by BERT's names, with commas between"
    maps = ast.literal_eval(_constant("lora", "LINEAR_MAPS")).values()
    maps = ",".join(name for names in maps for name in names)
    add("--lora-targets", targets, default=maps, metavar="MAPS")
    add("--lora-rank", "rows of A and columns of B", int_range(1, 10_000), 8)
    add("--lora-alpha", "B A is multiplied by alpha / rank", float_range(0, 1e6), "16")
    add("--lora-dropout", "on what A reads", float_range(0, 0.9, above=False), "0")
    add("--rslora", "multiply B A by alpha / sqrt(rank)", bool)
    add("--dora", "train the lengths of the matrices' rows apart from their directions", bool)
    parts = [name for name in _keys("methods", "METHODS") if name not in UNPROMPTED]
    add("--train", "what --method prompt trains", parts, "full")
    _add_cloze(add, "cloze")
    cloze_len = "tokens of a cloze; of a longer text the end is read; default: 128"
    add("--cloze-len", cloze_len, int_range(8, 10**6))
    max_len = "tokens of a text; longer ones keep their ends; default: 512, if there is room"
    add("--max-len", max_len, int_range(8, 10**6))
    add("--batch-tokens", "tokens in a step, all processes together", int_range(8, 10**7))
    add(
        "--accumulate", "compute a batch in N parts, for memory", int_range(1, 1024), 1, metavar="N"
    )
    add("--lr", "peak learning rate; some parts get a multiple of it", float_range(0, 1e38))
    add("--weight-decay", "of matrices", float_range(0, 100, above=False), 0.01)
    weights = "balanced: rare labels count more in the loss, so that all count alike"
    add("--class-weights", weights, ["none", "balanced"], "none")
    bag = "answer together with a bag of words, NB-SVM, trained on the same rows"
    add("--bag", bag, bool)
    masked = "also guess masked words, with this weight, which falls to 0; of a model of train.py"
    add("--masked-words", masked, float_range(0, 100, above=False), "0", metavar="WEIGHT")
    add = options.group("new reviews")
    predict = "label these texts, or a .txt .csv .tsv .jsonl file, or - for the lines of stdin"
    add("--predict", predict, nargs="+", metavar="TEXT")
    add("--explain", "with --predict: also what each word adds to the answer", bool)
    evaluate = "with --explain: test that on N test rows of --data"
    add("--evaluate", evaluate, int_range(1, 10**6), metavar="N")
    add("--base", "the pretrained model of --model, if it was moved", metavar="DIR")
    add("--json", "print one JSON object a review instead of CSV", bool)
    page = "write --model, or the newest run in --out, as a web page that answers by itself"
    add("--page", page, path, metavar="NAME.html")
    add("--yes", "with --page: even if the file is large", bool)
    add = options.group("a plain BERT from runs of lora or ia3")
    add(
        "--merge",
        "fold these runs into the weights of their base, written to --out",
        nargs="+",
        metavar="RUN",
    )
    add(
        "--weights",
        "of each run in the sum of their changes; default: equal shares",
        float_range(-100, 100, above=False),
        nargs="+",
        metavar="W",
    )
    # Fine-tuning on a GPU may be done before compiling has paid off.
    _add_machine_options(options, compiles=["off", "on"])
    return options


def prompt_options() -> Parser:
    """Of prompt.py."""
    options = Parser("Ask a masked language model about reviews. No weight changes.")
    texts = "reviews, or a .txt .csv .tsv .jsonl file, or - for the lines of stdin"
    options.add_argument("texts", nargs="*", metavar="TEXT", type=text, help=texts)
    add = options.group("what else it can do")
    add("--evaluate", "score every template on the test rows of this dataset", metavar="DATA")
    add("--fill", "the most probable words for each [MASK] in it", metavar="SENTENCE")
    add("--look", "draw the attention weights of every layer and head", metavar="SENTENCE")
    page = "write the model as a web page that answers by itself"
    add("--page", page, path, metavar="NAME.html")
    add("--yes", "with --page: even if the file is large", bool)
    add("--generate", "write N tokens after each TEXT", int_range(1, 10**6), metavar="N")
    add("--explain", "with texts: what each word adds to the answer of one template", bool)
    add = options.group("how a text becomes a query")
    add("--model", MODEL)
    _add_cloze(add, "prompting")
    calibrate = "without labels; default: the best on validation rows"
    add("--calibrate", calibrate, _keys("calibration", "CALIBRATIONS"), "prior")
    add("--data", "its train rows are for --calibrate prior and --shots", default="imdb")
    add_columns(add)
    add("--unlabelled", "reviews for --calibrate prior", int_range(1, 10**6), 256, metavar="N")
    shots = "few-shot: train rows, with their labels, in front of the text"
    add("--shots", shots, int_range(1, 64), 0, metavar="N")
    max_len = "tokens of a query; of a longer text the end is read"
    add("--max-len", max_len, int_range(8, 10**6), 128)
    add("--batch-tokens", "tokens in a batch", int_range(8, 10**7))
    add = options.group("what comes out")
    add("--top", "print the N most probable words", int_range(1, 1000), 5, metavar="N")
    temperature = "of --generate; 0: always the most probable token"
    add("--temperature", temperature, float_range(0, 100, above=False), 0.7)
    add("--json", "print one JSON object a line", bool)
    curves = "with --evaluate: draw it beside this compare.json of finetune.py --train-examples"
    add("--curves", curves, path)
    out = "where --evaluate writes (default: runs/prompt), or --look (default: runs/attention.png)"
    add("--out", out, path)
    _add_machine_options(options)
    return options


def _add_cloze(add: Callable, lesson: str) -> None:
    """The options about templates, those of a lesson by default, and words."""
    template = "with {text} and [MASK]; several answer together; default: "
    templates = list(ast.literal_eval(_constant(lesson, "TEMPLATES")))
    template += f"{len(templates)} templates about films"
    add("--template", template, default=templates, nargs="+", metavar="SENTENCE")
    words = "the words of each label; where data has numbers, 0 is the first label; default: "
    listed = ast.literal_eval(_constant("prompting", "WORDS"))
    default = [f"{label}={','.join(several)}" for label, several in listed.items()]
    words += "six for negative and six for positive"
    add("--words", words, default=default, nargs="+", metavar="LABEL=WORD,WORD")


def _add_machine_options(parser: Parser, compiles: list[str] | None = None) -> None:
    """The options about how to compute, in every script; where one trains, the values of --compile.

    The first of these is the default.
    """
    add = parser.group("how it is computed")
    precision = "of matrix multiplications; auto: bf16 where it is fast"
    add("--precision", precision, ["auto", "fp32", "bf16", "fp16"], "auto")
    add(
        "--attention",
        "one of several that compute the same",
        ["auto", *_keys("attention", "ON_ANY_DEVICE"), "triton"],
        "auto",
    )
    add("--device", "auto: a GPU if there is one", ["auto", "cpu", "cuda"], "auto")
    add("--threads", "of the processor (default: torch decides)", int_range(1, 1024))
    if compiles:
        what = "fuse operations by torch.compile, on a GPU"
        if "auto" in compiles:
            what += "; auto: for --minutes 5 or more, not for --steps"
        add("--compile", what, compiles, compiles[0])
        graphs = "repeat recorded training steps; auto: on a GPU"
        add("--cuda-graphs", graphs, ["auto", "off"], "auto")
    add("--seed", "of everything that is random", int_range(0, 2**31), 0)
