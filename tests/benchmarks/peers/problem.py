"""What both sides of a comparison are given: one starting model, the same texts, ids, labels and batches."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitune.adapters import insert_adapters
from minitune.checkpoint import (
    load_for_classification,
    load_tokenizer,
    read_config,
    save_model,
    weights_hash,
)
from minitune.classification import TokenizedTexts
from minitune.corpus import Corpus
from minitune.data import Dataset, Reviews
from minitune.lora import TARGETS, LoRA
from minitune.masking import mask_tokens
from minitune.methods import build
from minitune.model import PRESETS, BertForMaskedLM
from minitune.peft_files import PeftDirectory
from minitune.support.model_names import find_model
from minitune.support.runs import write_tensors

LABELS = {0: "negative", 1: "positive"}
ADAPTER_SIZE = 64
LORA = {
    "lora_targets": ",".join(TARGETS), "lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.0,
    "rslora": False, "dora": False,
}  # fmt: skip
RATE = 0.15  # of masked tokens
EPOCHS = 3  # of feature extraction: over the same texts
LR = 1e-4


@dataclass
class Problem:
    """One job, the same for everybody."""

    job: str  # full, adapter, lora, feature, label or mlm
    directory: Path  # the starting model, in BERT's layout
    precision: str  # of minitune and of the tuned peer; as shipped it is float32
    max_len: int
    ids: list[list[int]]  # with [CLS] and [SEP]
    texts: list[str]  # of the same rows; the job "label" begins with them
    labels: list[int]
    shuffled: list[list[int]]  # rows of each batch, as a shuffle gives them
    grouped: list[list[int]]  # the same number of batches of the same rows, alike in length

    @property
    def blanks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first batch with blanks, for comparing losses: tokens (T,), positions (M,), labels (M,)."""
        tokens = torch.cat([torch.tensor(self.ids[row]) for row in self.grouped[0]])
        tokenizer = load_tokenizer(self.directory, read_config(self.directory))
        return mask_tokens(
            tokens,
            torch.Generator().manual_seed(0),
            rate=RATE,
            mask_id=tokenizer.mask_id,
            special_ids=tokenizer.special_ids,
            vocab_size=tokenizer.vocab_size,
        )


def write_lora(directory: Path, max_len: int) -> None:
    """A LoRA in peft's layout for both sides; its B are not zero, so that A has gradients."""
    lora = build("lora", directory, LABELS, **LORA)
    with torch.no_grad():
        for module in (module for module in lora.modules() if isinstance(module, LoRA)):
            module.B.normal_(std=0.02)
    (directory / "lora").mkdir()
    base = str(directory), weights_hash(directory)
    saved = PeftDirectory("lora", "cls", LORA, LABELS, max_len, *base)
    saved.save(lora, directory / "lora")


def make(
    job: str, data: str, max_len: int, rows: int, batch: int, precision: str, directory: Path
) -> Problem:
    """Write the starting model into `directory` and choose the rows."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if job == "mlm":
        corpus = Corpus.open(Dataset(data), None, 8192)
        save_model(BertForMaskedLM(PRESETS["tiny"]), corpus.tokenizer, directory)
        # Whole sequences only, as run_mlm's concatenation gives them: nothing to gain by packing.
        chunks = corpus.chunks("train", max_len, overlap=True)
        chosen = rng.permutation(np.flatnonzero(chunks.lengths == max_len))[:rows]
        ids, texts, labels = (
            [chunk.tolist() for chunk in chunks.read(chosen)],
            [""] * rows,
            [0] * rows,
        )
    else:
        source = find_model("minilm")
        model, _ = load_for_classification(source, LABELS)
        tokenizer = load_tokenizer(source, read_config(source))
        save_model(model, tokenizer, directory)
        insert_adapters(model.bert, ADAPTER_SIZE)
        adapters = {name: p for name, p in model.state_dict().items() if "adapter" in name}
        write_tensors(directory / "adapters.safetensors", adapters, {"format": "pt"})
        if job == "lora":
            write_lora(directory, max_len)
        reviews = Reviews.load(Dataset(data))
        chosen = rng.permutation(len(reviews.texts["train"]))
        if max_len > 256:  # a job of long texts: full length, all of them
            long = [
                row for row in chosen[: 40 * rows] if len(reviews.texts["train"][row]) > 6 * max_len
            ]
            chosen = np.array(long)
        texts = [reviews.texts["train"][row] for row in chosen[:rows]]
        labels = reviews.labels["train"][chosen[:rows]].tolist()
        ids = [row.tolist() for row in TokenizedTexts(texts, tokenizer, max_len).ids]
    shuffled = [list(range(i, min(i + batch, rows))) for i in range(0, rows, batch)]
    by_length = sorted(range(rows), key=lambda row: len(ids[row]))
    grouped = [by_length[i : i + batch] for i in range(0, rows, batch)]
    grouped = [grouped[i] for i in rng.permutation(len(grouped))]
    return Problem(job, directory, precision, max_len, ids, texts, labels, shuffled, grouped)
