// From a text to what the page shows of it.
"use strict";

const MASK = "[MASK]";
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const logOdds = (log) => log - Math.log(Math.max(1 - Math.exp(log), 1e-12));
const unrelated = (ids) => ids.map((id) => ({ id, word: -1 })); // tokens of no word of the text

class Model {
  // `facts` are those of minitune/support/page/__init__.py; `buffer` holds the weights.
  constructor(facts, buffer) {
    this.facts = facts;
    this.tokenizer = new Tokenizer(facts.tokenizer);
    this.bert = new Bert(facts.config, facts.tensors, buffer);
  }

  // The words of a text, whether some had no room, and the sequences that are read to answer it,
  // first the one that is shown. A sequence has ids; for each of them the number of its word, -1
  // where the text has none; and the positions of its blanks.
  //
  // `question` numbers the prompt put to a masked language model; one too many: all prompts.
  prepare(text, question) {
    const { classifier, prompts } = this.facts, words = this.tokenizer.words(text);
    if (!classifier && text.includes(MASK)) return this.withBlanks(text);
    const tokens = words.flatMap(({ ids }, word) => ids.map((id) => ({ id, word })));
    if (classifier) { // a long text keeps two ends: TokenizedTexts of minitune/classification.py
      const { room, beginning } = classifier, cut = tokens.length > room;
      if (cut) tokens.splice(beginning, tokens.length - room);
      return { words, cut, sequences: [this.sequence(tokens)] };
    }
    const asked = prompts.filter((_, i) => i === question || question === prompts.length);
    const sequences = asked.flatMap((prompt) => prompt.blanks.map(({ ids, guesses }) => {
      const parts = { "{text}": tokens.slice(-prompt.room), [MASK]: unrelated(ids) };
      const filled = prompt.parts.flatMap((part) => parts[part] ?? unrelated(part));
      const { blanks, ...sequence } = this.sequence(filled);
      return { ...sequence, blanks: blanks.slice(0, 1), guesses, prompt };
    }));
    const cut = asked.some(({ room }) => tokens.length > room);
    return { words, cut, sequences };
  }

  // A text with blanks in it; what is too long for the model has no end.
  withBlanks(text) {
    const { mask } = this.facts.tokenizer, room = this.facts.config.max_position_embeddings - 2;
    const words = text.split(MASK).flatMap((part, i) => {
      const blank = i ? [{ text: MASK, ids: [mask] }] : [];
      return blank.concat(this.tokenizer.words(part));
    });
    const tokens = words.flatMap(({ ids }, word) => ids.map((id) => ({ id, word })));
    const sequence = this.sequence(tokens.slice(0, room));
    return { words, cut: tokens.length > room, sequences: [sequence], isFilled: true };
  }

  sequence(tokens) {
    const { cls, sep, mask } = this.facts.tokenizer;
    const framed = [...unrelated([cls]), ...tokens, ...unrelated([sep])];
    const ids = framed.map(({ id }) => id), words = framed.map(({ word }) => word);
    return { ids, words, blanks: ids.flatMap((id, t) => (id === mask ? [t] : [])) };
  }

  // Log-probabilities of the labels, from what BERT made of these sequences. As in
  // minitune/prompting.py a label has the mean of its words, and a word that of its tokens.
  labels(sequences, readings) {
    const { classifier, labels } = this.facts;
    if (classifier) {
      const { pooling, temperature } = classifier;
      return logSoftmax(this.bert.logits(readings[0], pooling).map((logit) => logit / temperature));
    }
    const scores = new Map(); // of the words, for each prompt
    sequences.forEach(({ blanks: [blank], guesses, prompt }, i) => {
      const logs = this.bert.fill(readings[i], blank);
      if (!scores.has(prompt)) scores.set(prompt, prompt.words.map(() => 0));
      for (const [word, token, length] of guesses) scores.get(prompt)[word] += logs[token] / length;
    });
    const answers = Array.from(scores, ([{ words, bias }, each]) => {
      const ofLabel = (label) => mean(each.filter((_, word) => words[word] === label));
      return logSoftmax(labels.map((_, label) => ofLabel(label) + bias[label]));
    });
    return logSoftmax(labels.map((_, label) => mean(answers.map((logs) => logs[label]))));
  }

  // Everything that one reading tells. `logs`, of the labels, are null for a text with blanks.
  answer(text, question) {
    const { words, cut, sequences, isFilled } = this.prepare(text, question);
    const readings = sequences.map(({ ids }) => this.bert.read(ids));
    const logs = isFilled ? null : Array.from(this.labels(sequences, readings));
    const [{ ids, words: wordOf, blanks }] = sequences, [{ attention }] = readings;
    const filled = blanks.map((position) => this.likely(this.bert.fill(readings[0], position)));
    const tokens = ids.map((id) => this.token(id)), texts = words.map((word) => word.text);
    const shown = { logs, cut, words: texts, wordOf, tokens, blanks, filled, attention };
    return { sequences, shown };
  }

  token(id) {
    return this.facts.tokenizer.vocab[id] ?? `[unused${id}]`;
  }

  likely(logs, count = 5) { // embeddings may have more rows than there are tokens
    const ids = Array.from(logs.keys()).slice(0, this.facts.tokenizer.vocab.length);
    ids.sort((a, b) => logs[b] - logs[a]);
    return ids.slice(0, count).map((id) => [this.token(id), Math.exp(logs[id])]);
  }

  // What a word adds to the log-odds of a label: what they lose when it is hidden.
  effect({ sequences, shown: { logs } }, word, label) {
    const { mask } = this.facts.tokenizer;
    const readings = sequences.map(({ ids, words }) =>
      this.bert.read(ids.map((id, t) => (words[t] === word ? mask : id))));
    return logOdds(logs[label]) - logOdds(this.labels(sequences, readings)[label]);
  }
}

// In a worker, so that typing is never held up. The first message brings the model, each other one
// a text, which ends the work on the text before.
function serve() {
  let model = null, newest = 0;
  self.onunhandledrejection = ({ reason }) => self.postMessage({ error: String(reason) });
  self.onmessage = async ({ data: { facts, buffer, number, text, question } }) => {
    if (!model) {
      model = new Model(facts, buffer);
      return;
    }
    newest = number;
    const answer = model.answer(text, question), { logs, wordOf } = answer.shown;
    self.postMessage({ number, shown: answer.shown });
    const label = logs ? logs.indexOf(Math.max(...logs)) : -1;
    for (const word of new Set(logs ? wordOf.filter((w) => w >= 0) : [])) {
      await new Promise((resolve) => setTimeout(resolve)); // here a newer message is received
      if (number !== newest) return;
      self.postMessage({ number, word, effect: model.effect(answer, word, label) });
    }
    self.postMessage({ number, isDone: true });
  };
}
