"""Fine-tuning a prompt: the masked language model learns to fill the blank of a cloze better.

A new classifier on a pretrained model knows nothing of its labels, and a few labelled texts are
too few to teach it. A prompt answers without any (prompting.py). So training starts there: a text
becomes a cloze, "An unforgettable film. It was [MASK].", the scores of the labels are those of
their words at the blank, and the loss is -log softmax(scores)[label]. No new parameter is needed:
the head is that of pretraining (Schick & Schütze 2021, "Exploiting Cloze Questions for Few Shot
Text Classification"; Gao et al. 2021, "Making Pre-trained Language Models Better Few-shot
Learners"). Each template has an offset for each label, which matches the prior over unlabelled
texts (calibration.py) and then stays, so that before the first step the answers are those of the
calibrated prompt.

Several templates answer together: in training each batch draws one of them, as dropout draws
units; a prediction is the mean of the log-probabilities of all.

Shapes: B texts of a batch, N texts, W words of all labels, L labels.
"""

import itertools

import torch
from torch import Tensor, nn

from minitune.batching import PackedBatch, reading_tokens, sorted_batches
from minitune.calibration import match_prior, mean_log_probabilities
from minitune.classification import TokenizedTexts
from minitune.model import BertForMaskedLM
from minitune.prompting import Template, Verbalizer
from minitune.support.errors import UserError
from minitune.support.runtime import Runtime
from minitune.tokenizer import Tokenizer

# Of all pairs of prompting.TEMPLATES this is among the best three on both datasets, and as good as
# all eight in a quarter of the time: tests/benchmarks/LOG.md.
TEMPLATES = ("{text} I thought it was [MASK].", "{text} Just [MASK]!")
UNLABELLED = 256  # training texts whose answers match the prior
CLOZE_LEN = 128  # tokens of a cloze


class ClozeClassifier(nn.Module):
    """A masked language model with templates and words: texts in, scores of labels out."""

    pooling, temperature = "cloze", 1.0
    beginning = 0.0  # of a long text only the end is read: most reviewers end with a verdict

    def __init__(
        self,
        model: BertForMaskedLM,
        tokenizer: Tokenizer,
        templates: list[Template],
        verbalizer: Verbalizer,
        max_len: int,
    ):
        """`max_len`: tokens of a cloze. UserError for a word of several tokens, or no room."""
        super().__init__()
        self.bert, self.head, self.tokenizer = model.bert, model.head, tokenizer
        if max(map(len, verbalizer.ids)) > 1:
            several = tokenizer.decode(next(ids for ids in verbalizer.ids if len(ids) > 1))
            takes = "--explain and --method prompt take words of one token"
            raise UserError(f"--words: the tokenizer splits {several!r}; {takes}")
        self.templates, self.max_len = templates, max_len
        self.rooms = [template.room(max_len, blank=1) for template in templates]
        words, mean = torch.tensor(verbalizer.ids).squeeze(1), verbalizer.mean
        self.register_buffer("words", words, persistent=False)  # (W,)
        self.register_buffer("mean", mean, persistent=False)  # (W, L), from words to labels
        self.register_buffer("offsets", torch.zeros(len(templates), mean.size(1)))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities (B, L) for texts: by one random template in training, else by all."""
        numbers = range(len(self.templates))
        if self.training:
            numbers = [int(torch.randint(len(self.templates), ()))]
        return mean_log_probabilities([self.answer(*self.clozes(batch, k), k) for k in numbers])

    def clozes(self, batch: PackedBatch, k: int) -> tuple[PackedBatch, Tensor]:
        """The texts in template k, and where the blanks are, (B,)."""
        tokens, ends = batch.tokens.tolist(), batch.cu_seqlens.tolist()
        filled = [self.cloze(tokens[i + 1 : j - 1], k) for i, j in itertools.pairwise(ends)]
        clozes = PackedBatch.from_sequences([torch.tensor(ids) for ids, _ in filled])
        clozes = clozes.to(batch.tokens.device)
        blanks = torch.tensor([position for _, position in filled], device=batch.tokens.device)
        return clozes, clozes.cls_positions + blanks

    def cloze(self, text: list[int], k: int) -> tuple[list[int], int]:
        """Ids from [CLS] to [SEP] of a text, given without these, in template k; and the blank."""
        ids, start = self.templates[k].fill(text[-self.rooms[k] :], [self.tokenizer.mask_id])
        return self.tokenizer.frame(ids), 1 + start

    def answer(self, clozes: PackedBatch, blanks: Tensor, k: int) -> Tensor:
        """Scores (B, L) of clozes of template k with blanks at these ascending positions (B,).

        A score is the mean of the logits of a label's words, plus the offset. A logit is a word's
        log-probability but for a sum over the vocabulary, which is the same for all labels.
        """
        hidden = self.bert(clozes, blanks)
        # The head in float32, as prompting.FillMask has it.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.head(hidden.float(), self.bert.embeddings.word.weight)
            return logits[:, self.words] @ self.mean + self.offsets[k]

    @torch.no_grad()
    def calibrate(self, texts: TokenizedTexts, runtime: Runtime) -> None:
        """Set the offsets so that over these texts all labels are equally probable."""
        self.eval()
        self.offsets.zero_()
        scores = torch.zeros(len(self.templates), len(texts.lengths), self.mean.size(1))
        with runtime.autocast():
            for rows in sorted_batches(texts.lengths, reading_tokens(runtime.device)):
                batch = texts.select(rows).pack().to(runtime.device)
                for k in range(len(self.templates)):
                    scores[k, rows] = self.answer(*self.clozes(batch, k), k).cpu()
        self.offsets.copy_(torch.stack([match_prior(each) for each in scores]))

    def masked_lm(self) -> BertForMaskedLM:
        """The masked language model by itself; it shares all weights."""
        with torch.device("meta"):  # without memory: both parts are replaced
            model = BertForMaskedLM(self.bert.config)
        model.bert, model.head = self.bert, self.head
        return model


class OneTemplate(nn.Module):
    """One template of a ClozeClassifier as a model of clozes, so that explain.py can ask it.

    All clozes of a batch have the blank at one position.
    """

    pooling = "cloze"

    def __init__(self, model: ClozeClassifier, k: int, position: int):
        super().__init__()
        self.model, self.bert, self.k, self.position = model, model.bert, k, position

    def forward(self, clozes: PackedBatch) -> Tensor:
        return self.model.answer(clozes, clozes.cls_positions + self.position, self.k)
