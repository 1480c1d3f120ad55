// BERT is arithmetic. Here is all of it, without a library: a text becomes words, words become ids,
// ids become vectors, and vectors become answers. It computes what minitune/model.py computes, with
// matrices of int8: whole numbers from -127 to 127, times a scale that a few neighbours share.
//
// T is the number of tokens, C the length of their vectors, H the number of heads, D = C / H.
// T vectors lie end to end in one Float32Array: vector t begins at t * C.
"use strict";

// ---- Text to ids: BERT's normalizer, then WordPiece (minitune/tokenizer.py) ----

const CHINESE = "\\u4e00-\\u9fff\\u3400-\\u4dbf\\uf900-\\ufaff\\u{20000}-\\u{2a6df}" +
  "\\u{2a700}-\\u{2b81f}\\u{2b920}-\\u{2ceaf}\\u{2f800}-\\u{2fa1f}";

// What finds any of these tokens in a text; of two that begin at one place the longer.
function finder(tokens) {
  const longestFirst = tokens.map((token) => token.content).sort((a, b) => b.length - a.length);
  const escaped = longestFirst.map((token) => token.replace(/[.*+?^${}()|[\]\\\/]/g, "\\$&"));
  return new RegExp(`(${escaped.join("|") || "(?!)"})`, "u");
}

class Tokenizer {
  // `spec` is made by minitune/support/page/__init__.py.
  constructor(spec) {
    this.spec = spec;
    this.added = new Map(spec.added.map(({ content, id }) => [content, id]));
    const isPiece = (id) => !spec.apart.includes(id); // of words; the others are added tokens only
    this.ids = new Map(spec.vocab.map((token, id) => [token, id]).filter(([, id]) => isPiece(id)));
    this.before = finder(spec.added.filter((token) => !token.normalized)); // looked for before and
    this.after = finder(spec.added.filter((token) => token.normalized)); // after normalizing
  }

  // One spelling for each word: no control characters, no accents, lower case.
  normalize(text) {
    const { markup, clean, chinese, accents, lowercase } = this.spec;
    if (markup) text = text.replace(/<br\s*\/?>/gi, " ");
    if (clean) {
      text = text.replace(/(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}\p{Cs}\ufffd]/gu, "");
      text = text.replace(/\p{White_Space}/gu, " ");
    }
    if (chinese) text = text.replace(new RegExp(`[${CHINESE}]`, "gu"), " $& "); // a word each
    if (accents) text = text.normalize("NFD").replace(/\p{Mn}/gu, ""); // é is e and an accent
    // One by one: at the end of a word Σ would become ς, where BERT has σ.
    return lowercase ? Array.from(text, (letter) => letter.toLowerCase()).join("") : text;
  }

  // The words of a text, each {text, ids}. Punctuation is a word, too.
  words(text) {
    const words = [];
    const addToken = (token) => words.push({ text: token, ids: [this.added.get(token)] });
    text.split(this.before).forEach((part, i) => { // every second part is an added token
      if (i % 2) return addToken(part);
      this.normalize(part).split(this.after).forEach((piece, k) => {
        if (k % 2) return addToken(piece);
        for (const word of piece.split(/\p{White_Space}+|([\p{P}$+<=>^`|~])/u).filter(Boolean)) {
          words.push({ text: word, ids: this.pieces(word) });
        }
      });
    });
    return words;
  }

  // WordPiece: the longest beginning that the vocabulary has, and so on with the rest, as "##rest".
  pieces(word) {
    const letters = Array.from(word), ids = [];
    if (letters.length > this.spec.longest) return [this.spec.unk];
    for (let start = 0; start < letters.length;) {
      let end = letters.length, id;
      for (; end > start; end--) {
        id = this.ids.get((start ? "##" : "") + letters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [this.spec.unk];
      ids.push(id);
      start = end;
    }
    return ids;
  }

  encode(text) {
    return this.words(text).flatMap((word) => word.ids);
  }
}

// ---- Vectors to vectors ----

// A matrix of float32; or of int8, where each group of neighbours in a row has a scale, in units.
class Matrix {
  constructor(rows, columns, numbers, group = columns, scales = null, unit = 1) {
    Object.assign(this, { rows, columns, numbers, group, scales, unit });
  }

  // Write a row into y from `start` on, as every `step`th number; add it to what is there if `keep`
  // is 1.
  row(row, y, start, step = 1, keep = 0) {
    const { columns, numbers, group, scales, unit } = this, end = (row + 1) * columns;
    for (let i = row * columns, j = start; i < end;) {
      const scale = scales ? scales[i / group] * unit : 1;
      for (const next = i + group; i < next; i++, j += step) {
        y[j] = keep * y[j] + scale * numbers[i];
      }
    }
  }
}

// y = x W' + b for T vectors: every number of y is a dot product of a vector and a row of W. Four
// rows and two vectors at a time: a number that is loaded once and used often makes it fast.
function linear(x, W, b = new Float32Array(W.rows)) {
  const { rows, columns } = W, T = x.length / columns;
  const y = new Float32Array(T * rows), w = new Float32Array(4 * columns);
  for (let r = 0; r < rows; r += 4) {
    const height = Math.min(4, rows - r);
    for (let k = 0; k < height; k++) W.row(r + k, w, k, 4); // side by side
    const put = (t, s0, s1, s2, s3) => {
      const start = t * rows + r;
      y[start] = s0 + b[r];
      if (height > 1) y[start + 1] = s1 + b[r + 1];
      if (height > 2) y[start + 2] = s2 + b[r + 2];
      if (height > 3) y[start + 3] = s3 + b[r + 3];
    };
    for (let t = 0; t < T; t += 2) {
      const next = Math.min(t + 1, T - 1);
      let j = t * columns, k = next * columns;
      let p0 = 0, p1 = 0, p2 = 0, p3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
      for (let m = 0; m < 4 * columns; j++, k++, m += 4) {
        const u = x[j], v = x[k], w0 = w[m], w1 = w[m + 1], w2 = w[m + 2], w3 = w[m + 3];
        p0 += u * w0; p1 += u * w1; p2 += u * w2; p3 += u * w3;
        q0 += v * w0; q1 += v * w1; q2 += v * w2; q3 += v * w3;
      }
      put(t, p0, p1, p2, p3);
      put(next, q0, q1, q2, q3);
    }
  }
  return y;
}

// Each vector gets mean 0 and variance 1; then every number has a scale and a shift of its own.
function layerNorm(x, weight, bias, epsilon) {
  const C = weight.length;
  for (let start = 0; start < x.length; start += C) {
    let mean = 0, variance = 0;
    for (let i = 0; i < C; i++) mean += x[start + i] / C;
    for (let i = 0; i < C; i++) variance += (x[start + i] - mean) ** 2 / C;
    const scale = 1 / Math.sqrt(variance + epsilon);
    for (let i = 0; i < C; i++) x[start + i] = (x[start + i] - mean) * scale * weight[i] + bias[i];
  }
  return x;
}

// x times the probability that a normal random number is below x. The error function is that of
// Abramowitz & Stegun, Handbook of Mathematical Functions, 7.1.26: right to 1.5e-7.
function gelu(x) {
  for (let i = 0; i < x.length; i++) {
    const z = Math.abs(x[i]) * Math.SQRT1_2, t = 1 / (1 + 0.3275911 * z);
    let series = 1.061405429;
    for (const c of [-1.453152027, 1.421413741, -0.284496736, 0.254829592]) series = c + series * t;
    const tail = (series * t * Math.exp(-z * z)) / 2;
    x[i] *= x[i] < 0 ? tail : 1 - tail;
  }
  return x;
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
}

// Numbers as shares of 1: all positive, the larger ones much larger.
function softmax(x) {
  let most = -Infinity, sum = 0;
  for (let i = 0; i < x.length; i++) most = Math.max(most, x[i]);
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] - most);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
  return x;
}

const logSoftmax = (x) => softmax(Float64Array.from(x)).map(Math.log);

// ---- BERT ----

class Bert {
  // `tensors` says where each tensor lies in the buffer, under the names of minitune/model.py.
  constructor(config, tensors, buffer) {
    this.config = config;
    this.tensors = new Map(tensors.map(({ name, rows, columns, start, group, scales, unit }) => {
      const size = rows * columns;
      if (!group) return [name, new Matrix(rows, columns, new Float32Array(buffer, start, size))];
      const numbers = new Int8Array(buffer, start, size);
      const shared = new Uint16Array(buffer, scales, size / group);
      return [name, new Matrix(rows, columns, numbers, group, shared, unit)];
    }));
  }

  vector(name) {
    return this.tensors.get(name).numbers;
  }

  linear(x, name) {
    return linear(x, this.tensors.get(`${name}.weight`), this.vector(`${name}.bias`));
  }

  norm(x, name) {
    const weight = this.vector(`${name}.weight`), bias = this.vector(`${name}.bias`);
    return layerNorm(x, weight, bias, this.config.layer_norm_eps);
  }

  // A small layer that was trained inside a frozen network, if there is one: minitune/adapters.py.
  adapter(x, name) {
    if (!this.tensors.has(`${name}.up.weight`)) return x;
    return add(this.linear(gelu(this.linear(x, `${name}.down`)), `${name}.up`), x);
  }

  // What the layers start from: for each token the sum of the vectors of its word, of its position
  // and of the first token type.
  embed(ids) {
    const C = this.config.hidden_size, x = new Float32Array(ids.length * C);
    const [word, position, type] = ["word", "position", "token_type"].map(
      (name) => this.tensors.get(`bert.embeddings.${name}.weight`));
    ids.forEach((id, t) => {
      word.row(id, x, t * C);
      position.row(t, x, t * C, 1, 1);
      type.row(0, x, t * C, 1, 1);
    });
    return this.norm(x, "bert.embeddings.norm");
  }

  // Each token takes a mixture of the values of all tokens. Its query and their keys decide the
  // shares, by dot products. Returns the result (T, C) and the shares, (T, T) for each head.
  attention(x, name) {
    const { hidden_size: C, num_attention_heads: H } = this.config, D = C / H, T = x.length / C;
    const qkv = this.linear(x, `${name}.qkv`); // query, key and value of a token side by side
    const y = new Float32Array(T * C), heads = [];
    for (let h = 0; h < H; h++) {
      const q = new Float32Array(T * D), k = q.slice(), v = q.slice(); // v is transposed, (D, T)
      for (let t = 0; t < T; t++) {
        for (let i = 0, j = t * 3 * C + h * D; i < D; i++, j++) {
          q[t * D + i] = qkv[j] / Math.sqrt(D);
          k[t * D + i] = qkv[j + C];
          v[i * T + t] = qkv[j + 2 * C];
        }
      }
      const shares = linear(q, new Matrix(T, D, k)); // (T, T)
      for (let t = 0; t < T; t++) softmax(shares.subarray(t * T, (t + 1) * T));
      const mixed = linear(shares, new Matrix(D, T, v)); // (T, D)
      for (let t = 0; t < T; t++) y.set(mixed.subarray(t * D, (t + 1) * D), t * C + h * D);
      heads.push(shares);
    }
    return [this.linear(y, `${name}.out`), heads];
  }

  // Two sublayers. What each computes is added to what went in, and normalised.
  layer(x, name) {
    const [mixed, heads] = this.attention(x, `${name}.attention`);
    const y = add(this.adapter(mixed, `${name}.attention_adapter`), x);
    this.norm(y, `${name}.attention_norm`);
    const wide = gelu(this.linear(y, `${name}.feed_forward.up`));
    const narrow = this.linear(wide, `${name}.feed_forward.down`);
    const z = add(this.adapter(narrow, `${name}.feed_forward_adapter`), y);
    return [this.norm(z, `${name}.feed_forward_norm`), heads];
  }

  // Token ids to the vectors after the embeddings and after each layer, and the attention of each
  // layer.
  read(ids) {
    const states = [this.embed(ids)], attention = [];
    for (let l = 0; l < this.config.num_hidden_layers; l++) {
      const [x, heads] = this.layer(states[l], `bert.layers.${l}`);
      states.push(x);
      attention.push(heads);
    }
    return { states, attention };
  }

  // The mean of each number over all tokens, and its standard deviation.
  pool(x) {
    const C = this.config.hidden_size, T = x.length / C;
    const mean = new Float64Array(C), square = new Float64Array(C);
    for (let i = 0; i < x.length; i++) {
      mean[i % C] += x[i] / T;
      square[i % C] += x[i] ** 2 / T;
    }
    return [mean, square.map((value, i) => Math.sqrt(Math.max(0, value - mean[i] ** 2)))];
  }

  // One score for each label. `pooling` says how the vectors of a text become one vector.
  logits({ states }, pooling) {
    const last = states[states.length - 1];
    if (pooling === "cls") { // that of [CLS], the first token
      const first = last.slice(0, this.config.hidden_size);
      return this.linear(this.linear(first, "pooler.dense").map(Math.tanh), "classifier");
    }
    if (pooling === "mean") return this.linear(Float32Array.from(this.pool(last)[0]), "classifier");
    const features = states.flatMap((x) => this.pool(x).flatMap((vector) => Array.from(vector)));
    const mean = this.vector("head.mean"), std = this.vector("head.std");
    const standard = Float32Array.from(features, (value, i) => (value - mean[i]) / std[i]);
    return this.linear(standard, "head.classifier"); // "layers": minitune/features.py
  }

  // The log-probability of each word at one position. Words are compared with their embeddings.
  fill({ states }, position) {
    const C = this.config.hidden_size, last = states[states.length - 1];
    const x = last.slice(position * C, (position + 1) * C);
    const guess = this.norm(gelu(this.linear(x, "head.dense")), "head.norm");
    const embeddings = this.tensors.get("bert.embeddings.word.weight");
    return logSoftmax(linear(guess, embeddings, this.vector("head.bias")));
  }
}
