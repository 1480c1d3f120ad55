"""The exercises in reading order, and the mistakes that their checks know by name.

A mistake is made of the lesson's own lines by replacing text, each old text standing there once.
`observations` has, under the name of each exercise, what is compared.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.exercises.source import Lesson, file_to_fill_in

FOLDER = Path("runs/exercises")
Edits = tuple[tuple[str, str], ...]  # (old text, new text)


@dataclass(frozen=True, eq=False)
class Exercise:
    """One or two bodies to write."""

    name: str  # of the file to fill in
    title: str
    read: str  # first, for five minutes
    lessons: tuple[Lesson, ...]
    hint: str
    mistakes: dict[str, Edits]  # by what is said about them
    note: str = "Only the missing bodies are used; the rest is there to be read."

    @property
    def file(self) -> Path:
        """To fill in."""
        return FOLDER / f"{self.name}.py"

    def text(self) -> str:
        """Of the file to fill in."""
        heading = (
            f"Exercise {self.number}: {self.title}.\n\nRead first: {self.read}.\n{self.note}\n"
        )
        command = f"    python -m tests.exercises check {self.number}"
        return file_to_fill_in(f"{heading}\n{command}", self.lessons)

    @property
    def number(self) -> int:
        """As the commands take it."""
        return 1 + EXERCISES.index(self)

    def lesson_of(self, edits: Edits) -> Lesson:
        """The one in which all old texts stand once; LookupError where it is not one."""
        fit = [x for x in self.lessons if all(x.code.count(old) == 1 for old, _ in edits)]
        if len(fit) != 1:
            raise LookupError(f"exercise {self.name}: {len(fit)} lessons have {edits}")
        return fit[0]


EXERCISES = (
    Exercise(
        "masking",
        "masking 80/10/10",
        "minitune/masking.py, its first lines; Devlin et al. 2019, section 3.1",
        (Lesson("minitune.masking:mask_tokens"),),
        """\
Find the positions of tokens that are not special (torch.isin, nonzero). Give each of them a random
number and take those with the smallest: that is a choice of exactly so many (topk). The labels
are what stands there. One more random number for each chosen token decides what becomes of it:
below 0.8 [MASK], from 0.8 to 0.9 a random word, else nothing. Write into a clone.""",
        {
            "[CLS] and [SEP] are chosen too: special tokens never are.": (
                ("(~torch.isin(tokens, tokenizer.special_ids))", "torch.ones_like(tokens)"),
            ),
            "Every token is chosen by a draw of its own, so that M varies: it is to be exact.": (
                ("ordinary[chosen]", "ordinary[draw < rate]"),
            ),
            "The tokens that were given are changed: work on a clone.": (
                ("tokens.clone()", "tokens"),
            ),
            "The labels are read after the masking: they are the ids that stood there before.": (
                (
                    "return masked, positions, labels",
                    "return masked, positions, masked[positions]",
                ),
            ),
            "There is a label for every token: there is one for each chosen position.": (
                ("return masked, positions, labels", "return masked, positions, tokens"),
            ),
            "The positions do not ascend.": ((".sort().values", ""),),
            "Every chosen token becomes [MASK]: 10% become a random word and 10% stay as they are.": (
                (
                    "masked[positions[is_random]] = random[is_random]",
                    "masked[positions] = tokenizer.mask_id",
                ),
            ),
            "No token stays as it is: 80% become [MASK], and 20% instead of 10% a random word.": (
                ("(u >= 0.8) & (u < 0.9)", "u >= 0.8"),
            ),
            "The random words are 10% of what is left after [MASK]: they are 10% of all that are chosen.": (
                ("(u < 0.9)", "(torch.rand(u.shape, generator=generator) < 0.1)"),
            ),
            "A second draw decides on the random words, and some replace a [MASK]: that gives 72/10/18.": (
                (
                    "(u >= 0.8) & (u < 0.9)",
                    "torch.rand(u.shape, generator=generator) < 0.1",
                ),
            ),
            "The random words may be special tokens, [PAD] or [MASK] for example.": (
                ("vocabulary[tokenizer.special_ids] = False", "pass"),
            ),
            "The draws do not come from `generator`: the same seed must give the same masks.": (
                (
                    "draw = torch.rand(ordinary.numel(), generator=generator)",
                    "draw = torch.rand(ordinary.numel())",
                ),
            ),
        },
        note="`whole_word` is always False here: you need not treat it.",
    ),
    Exercise(
        "attention",
        "attention of one sequence",
        "minitune/attention.py, its first lines; Vaswani et al. 2017, section 3.2.1",
        (Lesson("minitune.attention:attention_weights"), Lesson("minitune.attention:one_sequence")),
        """\
Scores first: for every head h, query m and key n the sum of q · k over the D dimensions, so (H, m,
n): torch.einsum writes that in one line. Divide by √D. The softmax runs over the keys, since the
weights of one query sum to 1. A second einsum sums the values by these weights, back to (m, H, D).""",
        {
            "The scores are not divided by √D.": ((" / q.size(-1) ** 0.5", ""),),
            "The scores are divided by D: it is √D.": ((" ** 0.5", ""),),
            "The scores are divided by √H, of the number of heads: it is √D, of their size.": (
                ("q.size(-1)", "q.size(1)"),
            ),
            "The softmax runs over the queries: the weights of one query over all keys sum to 1.": (
                (".softmax(-1)", ".softmax(-2)"),
            ),
            "The softmax runs over the heads: the weights of one query over all keys sum to 1.": (
                (".softmax(-1)", ".softmax(0)"),
            ),
            "There is no softmax.": ((".softmax(-1)", ""),),
            "Tokens see only what stands before them (a causal mask): in BERT they see both sides.": (
                (
                    ".softmax(-1)",
                    ".masked_fill(torch.ones_like(scores).triu(1).bool(), -1e9).softmax(-1)",
                ),
            ),
            "The weights are applied to the keys: they are for the values.": (
                ("attention_weights(q, k), v)", "attention_weights(q, k), k)"),
            ),
            "exp() of a large score overflows: subtract the largest of the row first, or use softmax().": (
                ("scores.softmax(-1)", "scores.exp() / scores.exp().sum(-1, keepdim=True)"),
            ),
        },
    ),
    Exercise(
        "packed",
        "attention over packed sequences",
        "minitune/attention.py, its first lines; minitune/batching.py, PackedBatch",
        (Lesson("minitune.attention:reference"),),
        """\
cu_seqlens.diff() are the lengths of the sequences, and cu_seqlens_q.diff() the numbers of queries
in them. tensor.split(list of lengths) cuts a tensor at all boundaries at once. Call `one_sequence`
for each, and put the results end to end.""",
        {
            "Sequences see their neighbours: each must attend to its own keys only.": (
                ("in sequences]", "in [(q, k, v)]]"),
            ),
            "The scores of other sequences are set to 0: they must be -inf, since exp(0) is 1.": (
                (
                    "    return torch.cat(",
                    """\
    rows, columns = (torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in (counts, lengths))
    scores = torch.einsum("mhd,nhd->hmn", q, k) / q.size(-1) ** 0.5 * (rows[:, None] == columns)
    return torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v)
    return torch.cat(""",
                ),
            ),
            "All sequences are cut to one length, T / B: they have lengths of their own.": (
                (
                    "zip(q.split(counts), k.split(lengths), v.split(lengths), strict=True)",
                    "zip(*(x.split(len(x) // len(lengths)) for x in (q, k, v)))",
                ),
            ),
            "A sequence sees those before it: its keys begin where it begins, not at 0.": (
                (
                    "zip(q.split(counts), k.split(lengths), v.split(lengths), strict=True)",
                    "((q1, k[:end], v[:end]) for q1, end in zip(q.split(counts), cu_seqlens[1:]))",
                ),
            ),
            "The results are in another order than the sequences.": (
                ("in sequences]", "in reversed(list(sequences))]"),
            ),
        },
    ),
    Exercise(
        "online_softmax",
        "online softmax",
        "minitune/attention.py, the docstring of `Tiled`; Milakov & Gimelshein 2018",
        (Lesson("minitune.attention:_tiled_forward"),),
        """\
Divide q by √D once. Start with top = -inf, total = 0 and out = 0. For each block of Tiled.KEY_BLOCK
keys and values (split along dimension -2): its scores q @ k1.mT; the new top, the maximum of the
old one and of the block; the weights exp(scores - top); the correction exp(old top - new top), by
which `total` and `out` are multiplied before the block's share is added. At the end out / total,
and top + log(total).""",
        {
            "The scores are not divided by √D.": ((" * q.size(-1) ** -0.5", ""),),
            "All scores are held at once: take Tiled.KEY_BLOCK keys at a time.": (
                ("k.split(Tiled.KEY_BLOCK, -2), v.split(Tiled.KEY_BLOCK, -2)", "[k], [v]"),
            ),
            "`total` is not corrected when a block brings a larger score.": (
                ("correction * total", "total"),
            ),
            "`out` is not corrected when a block brings a larger score.": (
                ("correction * out", "out"),
            ),
            "The correction is the wrong way round: it is exp(old top - new top).": (
                ("torch.exp(old_top - top)", "torch.exp(top - old_top).nan_to_num(posinf=0)"),
            ),
            "The output is not divided by `total` at the end.": (("out / total", "out"),),
            "lse lacks `top`: it is top + log(total).": (("top + total.log()", "total.log()"),),
            "exp() of a large score overflows: subtract the largest one so far.": (
                ("torch.maximum(top, scores.amax(-1, keepdim=True))", "torch.zeros_like(top)"),
            ),
            "Only the last block counts: `total` and `out` are sums over all blocks.": (
                ("correction = torch.exp(old_top - top)", "correction = torch.zeros_like(top)"),
            ),
        },
    ),
    Exercise(
        "layer",
        "residual sums and LayerNorm, in BERT's order",
        "minitune/model.py, the first lines, and `SelfAttention` and `FeedForward`",
        (Lesson("minitune.model:Layer.forward"),),
        """\
Twice the same: a sublayer, dropout, the adapter, then the residual sum with what went into the
sublayer, then LayerNorm. With `positions` the attention gives fewer rows than x has, so that x must
be reduced to the same rows before the sum: x.index_select(0, pad_rows(positions)).""",
        {
            "Each LayerNorm stands before its sublayer (pre-LayerNorm): in BERT it follows the sum.": (
                ("self.attention(x,", "self.attention(self.attention_norm(x),"),
                ("x = self.attention_norm(x + y)", "x = x + y"),
                ("self.feed_forward(x)", "self.feed_forward(self.feed_forward_norm(x))"),
                ("return self.feed_forward_norm(x + y)", "return x + y"),
            ),
            "The residual sums are missing.": (
                ("self.attention_norm(x + y)", "self.attention_norm(y)"),
                ("self.feed_forward_norm(x + y)", "self.feed_forward_norm(y)"),
            ),
            "LayerNorm is applied to the sublayer's result before the sum: normalise the sum.": (
                ("self.attention_norm(x + y)", "x + self.attention_norm(y)"),
                ("self.feed_forward_norm(x + y)", "x + self.feed_forward_norm(y)"),
            ),
            "There is no LayerNorm between attention and feed-forward.": (
                ("self.attention_norm(x + y)", "x + y"),
            ),
            "There is no LayerNorm at the end.": (("self.feed_forward_norm(x + y)", "x + y"),),
            "The two LayerNorms are exchanged.": (
                ("x = self.attention_norm(", "x = self.feed_forward_norm("),
                ("return self.feed_forward_norm(", "return self.attention_norm("),
            ),
            "The second sum adds the input of the layer: it adds what went into the feed-forward.": (
                ("y = self.attention_adapter", "x0 = x\n    y = self.attention_adapter"),
                ("self.feed_forward_norm(x + y)", "self.feed_forward_norm(x0 + y)"),
            ),
            "The adapters are left out, or have the wrong place: after dropout, before the sum.": (
                ("self.attention_adapter", ""),
                ("self.feed_forward_adapter", ""),
            ),
            "The adapters come after the residual sum: they belong before it.": (
                ("self.attention_adapter", ""),
                (
                    "self.attention_norm(x + y)",
                    "self.attention_norm(self.attention_adapter(x + y))",
                ),
                ("self.feed_forward_adapter", ""),
                (
                    "self.feed_forward_norm(x + y)",
                    "self.feed_forward_norm(self.feed_forward_adapter(x + y))",
                ),
            ),
            "Dropout is left out.": (
                (
                    "self.dropout(self.attention(x, batch, positions))",
                    "self.attention(x, batch, positions)",
                ),
                ("self.dropout(self.feed_forward(x))", "self.feed_forward(x)"),
            ),
        },
    ),
    Exercise(
        "masked_loss",
        "the tied decoder's loss at the blanks",
        "minitune/pretraining.py, its first lines and `MaskedBatch`; minitune/model.py, its first lines",
        (
            Lesson("minitune.model:MaskedLMHead.forward"),
            Lesson("minitune.pretraining:MaskedLanguageModelling.loss"),
        ),
        """\
The head: dense, GELU, LayerNorm, and last a linear map whose matrix is the word embeddings
(F.linear takes it as it is, (V, C)) and whose bias is the head's own. The loss: one call of the
model for the blanks and the [CLS] of each sequence together (torch.cat of positions and
batch.cls_positions), split again; cross-entropy at the blanks, as a sum. For `bag_of_words_loss`
the tokens are those before masking: scatter the labels back. The result is masked + rate ·
summary_weight · bag, and masked alone.""",
        {
            "The decoder's bias is missing.": ((", self.bias)", ")"),),
            "The GELU is missing.": (("F.gelu(self.dense(hidden))", "self.dense(hidden)"),),
            "The head's LayerNorm is missing.": (
                ("self.norm(F.gelu(self.dense(hidden)))", "F.gelu(self.dense(hidden))"),
            ),
            "The decoder stands alone: dense, GELU and LayerNorm come before it.": (
                ("self.norm(F.gelu(self.dense(hidden)))", "hidden"),
            ),
            "The loss is a mean over the blanks: return sums, the training loop divides.": (
                ('reduction="sum")', 'reduction="mean")'),
            ),
            "The mean is over all tokens of the batch: return sums, over the blanks.": (
                ('reduction="sum")', 'reduction="sum") / batch.tokens.numel()'),
            ),
            "The loss is that of all tokens: only the blanks count.": (
                (
                    "F.cross_entropy(masked_logits, labels,",
                    "F.cross_entropy(model(batch, torch.arange(len(batch.tokens))).float(), "
                    "batch.tokens.scatter(0, positions, labels),",
                ),
            ),
            "The words to guess are read from the masked text: they are `labels`.": (
                ("(masked_logits, labels,", "(masked_logits, batch.tokens[positions],"),
            ),
            "The bag of words is that of the masked text: scatter the labels back first.": (
                ("batch.tokens.scatter(0, positions, labels)", "batch.tokens"),
            ),
            "The bag-of-words loss lacks the factor `rate`.": (("self.rate * ", ""),),
            "The bag-of-words loss is left out.": (
                ("masked_loss + self.rate * self.summary_weight * bag_loss", "masked_loss"),
            ),
            "What is reported has the bag-of-words loss in it: report the masked loss alone.": (
                (
                    "bag_loss, masked_loss",
                    "bag_loss, masked_loss + self.rate * self.summary_weight * bag_loss",
                ),
            ),
        },
    ),
    Exercise(
        "adapter",
        "an adapter and its trained set",
        "minitune/adapters.py, its first lines; Houlsby et al. 2019, section 2.1",
        (
            Lesson("minitune.adapters:Adapter.forward"),
            Lesson("minitune.adapters:adapter_parameters"),
        ),
        """\
The adapter is one line: down, GELU, up, and x added. The trained set is a list of names, such as
"bert.layers.0.attention_norm.weight". `parameters_of(model, paths)` gives the names of all
parameters of modules; the paths are "classifier", and in each layer both adapters and both
LayerNorms.""",
        {
            "The skip connection is missing: x + up(gelu(down(x))).": (("x + self.up", "self.up"),),
            "There is no nonlinearity between down and up.": (
                ("F.gelu(self.down(x))", "self.down(x)"),
            ),
            "The nonlinearity is ReLU: it is GELU.": (("F.gelu(", "F.relu("),),
            "The skip connection goes around `up` alone.": (
                ("x + self.up", "F.gelu(x) + self.up"),
            ),
            "The classifier is not trained: it is new, and random.": (('"classifier", ', ""),),
            "The LayerNorms of the layers are frozen: they train too.": (
                ('"attention_norm", ', ""),
                (', "feed_forward_norm"', ""),
            ),
            "The LayerNorm of the embeddings trains too: only those of the layers do.": (
                ('"classifier", ', '"classifier", "bert.embeddings.norm", '),
            ),
            "The pooler trains too: it stays frozen.": (
                ('"classifier", ', '"classifier", "pooler", '),
            ),
            "All parameters are trained: the pretrained ones are frozen, but for the LayerNorms.": (
                (
                    "return parameters_of(\n",
                    "return [name for name, _ in model.named_parameters()] or (\n",
                ),
            ),
            "The adapters themselves are not trained.": (
                ('"attention_adapter", ', ""),
                ('"feed_forward_adapter", ', ""),
            ),
        },
    ),
    Exercise(
        "lora",
        "LoRA and its merge",
        "minitune/lora.py, its first lines; Hu et al. 2022, section 4.1",
        (Lesson("minitune.lora:LoRA.forward"), Lesson("minitune.lora:LoRA.adapted")),
        """\
What the frozen map gives is super().forward(x). The weight, (maps · outputs, inputs), is that of
several maps, one below the other; A, (chosen, rank, inputs), and B, (chosen, outputs, rank), are for
those that self.chosen numbers. So chunk the result in self.maps parts, and to part self.chosen[i]
add scale · B[i] (A[i] dropout(x)), each by F.linear. The merge: self.rows() is W of the chosen maps,
(chosen, outputs, inputs), and B @ A has that shape.""",
        {
            "The update lacks the scale alpha / r.": (("self.scale * self.B.mT", "self.B.mT"),),
            "The frozen map's own result, W x + b, is missing.": (
                ("super().forward(x)", "(0 * super().forward(x))"),
            ),
            "The frozen map's bias is missing.": (
                ("super().forward(x)", "F.linear(x, self.weight)"),
            ),
            "The update goes to the first maps: it goes to those in `chosen`.": (
                ("zip(self.chosen, updates", "zip(range(len(updates)), updates"),
            ),
            "Dropout is left out: it stands before A.": (("self.dropout(x)", "x"),),
            "Dropout stands before the frozen map too: only A reads its result.": (
                ("super().forward(x)", "super().forward(self.dropout(x))"),
            ),
            "The merge lacks the scale alpha / r.": (
                ("self.scale * (self.B @ self.A)", "self.B @ self.A"),
            ),
            "The merge transposes the product: it is B A.": (
                ("(self.B @ self.A)", "(self.B @ self.A).mT"),
            ),
            "The merge lacks W.": (("self.rows() + ", ""),),
        },
        note="DoRA may be left out: self.magnitude is None here. Only the missing bodies are used.",
    ),
    Exercise(
        "prompt",
        "reading the answer of a cloze, its prior matched",
        "minitune/prompting.py, its first lines and `Verbalizer`; minitune/calibration.py, its first lines",
        (
            Lesson("minitune.prompting:Prompt.scores"),
            Lesson("minitune.calibration:match_prior"),
        ),
        """\
Scores: zeros (N, W) for the words first. For each blank of self.verbalizer.blanks build the query
of every text; self.fill_mask.log_probabilities gives (index of the text, logs (1, V)), in an order
of its own; add logs[0, token] / length for each (word, token, length) that this blank guesses. From
words to labels: @ self.verbalizer.mean. The prior: begin with a bias of 0; repeat: the mean of the
softmax of scores + bias over the texts, as a logarithm; take from the bias how far each label is
above the mean.""",
        {
            "The answers come shortest query first: put each where its index says.": (
                ("for i, logs in self.fill_mask", "for i, (_, logs) in enumerate(self.fill_mask"),
                ("log_probabilities(queries):", "log_probabilities(queries)):"),
            ),
            "A label gets the sum over its words, so that more words win: it is the mean.": (
                ("self.verbalizer.mean", "(self.verbalizer.mean > 0).float()"),
            ),
            "A word of several tokens gets the sum over them: it is the mean.": (
                (" / length", ""),
            ),
            "Probabilities are added: a score is a sum of log-probabilities.": (
                ("logs[0, token]", "logs[0, token].exp()"),
            ),
            "A label gets its best word: it is the mean over its words.": (
                (
                    "return scores @ self.verbalizer.mean",
                    "return torch.stack([scores[:, column > 0].amax(-1) for column in self.verbalizer.mean.T], 1)",
                ),
            ),
            "The mean of the scores is matched: it is the mean of the probabilities, after softmax.": (
                (".log_softmax(-1).logsumexp(0)", ".mean(0)"),
            ),
            "There is no softmax before the mean over the texts.": ((".log_softmax(-1)", ""),),
            "The bias has the wrong sign: it takes from the label that is too frequent.": (
                ("return bias.float()", "return -bias.float()"),
            ),
            "One step is too few: repeat until the means are equal.": (
                ("range(1000)", "range(1)"),
            ),
        },
    ),
    Exercise(
        "gradients",
        "integrated gradients that add up",
        "minitune/explain.py, its first lines and `Question`; Sundararajan et al. 2017, section 3",
        (Lesson("minitune.explain:integrated_gradients"),),
        """\
Cut the way into `steps` equal parts; their middles are a = (k + 0.5) / steps. At each, f is to be
computed with word embeddings that lie between those of question.without_words (a = 0) and those of
question.ids (a = 1): torch.lerp. A forward hook on question.model.bert.embeddings.word may return
other vectors than the module gave; its first rows are the tokens, the rest is padding and stays.
Give every token an `a` of its own that requires a gradient:
torch.autograd.grad(question.f(batch).sum(), shares) is then gradient · (e - e0) of each token.
Return the mean over the steps.""",
        {
            "The way begins at vectors of zeros: it begins at the text without words.": (
                ("F.embedding(starts, word.weight)", "torch.zeros_like(embedded[: len(starts)])"),
            ),
            "There is no way: the gradient is that at the text alone.": (
                ("(torch.arange(steps, device=total.device) + 0.5) / steps", "torch.ones(steps)"),
            ),
            "The gradient is not multiplied by e - e0.": (
                ("    for a in middles", "    seen = []\n    for a in middles"),
                (
                    "return torch.cat([points",
                    "seen.append(points)\n            return torch.cat([points",
                ),
                ("grad(f.sum(), shares)", "grad(f.sum(), seen[-1])"),
                ("derivative.view(-1, n)", "derivative.sum(-1).view(-1, n)"),
            ),
            "The sum over the steps is not divided by their number.": (("total / steps", "total"),),
            "The parts are taken at their beginnings: their middles need far fewer steps.": (
                (" + 0.5)", ")"),
            ),
            "The signs are lost: what speaks against the answer is negative.": (
                ("derivative.view(-1, n)", "derivative.abs().view(-1, n)"),
            ),
            "The way runs backwards, from the text to the text without words: all signs are wrong.": (
                (
                    "F.embedding(starts, word.weight), embedded[: len(starts)]",
                    "embedded[: len(starts)], F.embedding(starts, word.weight)",
                ),
            ),
        },
    ),
)
