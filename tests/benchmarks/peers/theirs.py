"""The jobs as their libraries do them: transformers' Trainer and pipeline, AdapterHub's adapters, peft.

As shipped: what a tutorial's few lines give, in float32, with padding to the longest of a shuffled
batch. Tuned: batches of alike lengths, bfloat16 where the processor multiplies it, no dropout on
attention weights (which would keep the fused kernel from running); AdamW is fused and attention
SDPA in both.
"""

import tempfile
import time

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from tests.benchmarks.peers.problem import ADAPTER_SIZE, EPOCHS, LR, RATE, Problem

transformers.logging.set_verbosity_error()


class Clock(transformers.TrainerCallback):
    """Seconds of all epochs; saving, which comes after each, is not counted."""

    seconds = 0.0

    def on_epoch_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_epoch_end(self, *args, **kwargs):
        self.seconds += time.perf_counter() - self.started


class GivenBatches(transformers.Trainer):
    """Trainer, over given batches."""

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_dataset, batch_sampler=self.given, collate_fn=self.data_collator
        )


def our_name(name: str) -> str:
    """minitune's name for a tensor of AdapterHub's bottlenecks or peft's; any other as it is."""
    name = name.replace(".modules_to_save", "").replace(".default", "")
    if ".adapters." not in name:
        return name
    layer = name.split(".")[3]
    which = "attention_adapter" if ".attention.output." in name else "feed_forward_adapter"
    half = "down" if "adapter_down" in name else "up"
    return f"bert.layers.{layer}.{which}.{half}.{name.rpartition('.')[2]}"


class Theirs:
    """One job, ready to be timed."""

    def __init__(self, problem: Problem, tuned: bool):
        self.problem, self.tuned, self.bf16 = problem, tuned, tuned and problem.precision == "bf16"
        kind = (
            "AutoModelForMaskedLM" if problem.job == "mlm" else "AutoModelForSequenceClassification"
        )
        self.model = getattr(transformers, kind).from_pretrained(
            problem.directory, attention_probs_dropout_prob=0.0 if tuned else 0.1
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(problem.directory)
        if problem.job == "adapter":
            import adapters  # not for the other jobs: it takes memory

            adapters.init(self.model)
            factor = self.model.config.hidden_size // ADAPTER_SIZE
            config = adapters.DoubleSeqBnConfig(non_linearity="gelu", reduction_factor=factor)
            self.model.add_adapter("ours", config)
            self.model.train_adapter("ours")
            weights = load_file(problem.directory / "adapters.safetensors")
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    if ".adapters." in name:
                        p.copy_(weights[our_name(name)])
        elif problem.job == "lora":
            import peft

            folder = problem.directory / "lora"
            self.model = peft.PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        elif problem.job == "feature":
            self.model.bert.requires_grad_(False)
        self.run = self.label if problem.job == "label" else self.train

    def _collator(self):
        if self.problem.job == "mlm":
            return transformers.DataCollatorForLanguageModeling(
                self.tokenizer, mlm_probability=RATE
            )
        return transformers.DataCollatorWithPadding(self.tokenizer)

    def _rows(self) -> list[dict]:
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in self.problem.ids]
        if self.problem.job == "mlm":
            return rows
        return [
            row | {"labels": label} for row, label in zip(rows, self.problem.labels, strict=True)
        ]

    def check(self) -> dict[str, Tensor]:
        """Loss and gradients of the first batch in float32, under our names for adapters; or logits."""
        self.model.eval()
        rows = self._rows()
        chosen = [rows[row] for row in self.problem.grouped[0]]
        if self.problem.job == "mlm":
            tokens, positions, labels = self.problem.blanks
            targets = torch.full_like(tokens, -100)
            targets[positions] = labels
            shape = len(chosen), -1
            out = self.model(input_ids=tokens.view(shape), labels=targets.view(shape))
        else:
            out = self.model(**self._collator()(chosen))
        if self.problem.job in ("label", "feature"):
            return {"logits": out.logits.detach()}
        out.loss.backward()
        gradients = {
            our_name(name): p.grad
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        self.model.zero_grad()
        return {"loss": out.loss.detach()} | gradients

    def _trainer(self) -> type[transformers.Trainer]:
        if self.problem.job != "adapter":
            return GivenBatches
        from adapters import AdapterTrainer

        return type("GivenBatchesForAdapters", (GivenBatches, AdapterTrainer), {})

    def train(self) -> float:
        """Seconds of training, saving not among them."""
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            arguments = transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=len(self.problem.shuffled[0]),
                num_train_epochs=EPOCHS if self.problem.job == "feature" else 1,
                learning_rate=LR,
                warmup_ratio=0.1,
                weight_decay=0.01,
                save_strategy="epoch",
                bf16=self.bf16,
                use_cpu=True,
                disable_tqdm=True,
                report_to=[],
            )
            trainer = self._trainer()(
                self.model,
                arguments,
                train_dataset=self._rows(),
                data_collator=self._collator(),
                callbacks=[clock],
            )
            trainer.given = self.problem.grouped if self.tuned else self.problem.shuffled
            trainer.train()
        return clock.seconds

    def label(self) -> float:
        """Seconds from texts to labels."""
        options = {"batch_size": 32} if self.tuned else {}
        model = self.model.to(torch.bfloat16) if self.bf16 else self.model
        pipe = transformers.pipeline(
            "text-classification",
            model=model.eval(),
            tokenizer=self.tokenizer,
            device="cpu",
            **options,
        )
        started = time.perf_counter()
        texts = sorted(self.problem.texts, key=len) if self.tuned else self.problem.texts
        answers = pipe(texts, truncation=True, max_length=self.problem.max_len)
        assert len(answers) == len(texts)
        return time.perf_counter() - started
