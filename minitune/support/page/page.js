// What is typed and what is shown. Everything from outside is put in as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const facts = JSON.parse($("facts").textContent);
const { num_hidden_layers: LAYERS, num_attention_heads: HEADS } = facts.config;
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function bars(list, rows) {
  list.replaceChildren(...rows.map(([name, share]) => {
    const bar = element("div", { className: "bar" });
    bar.style.width = percent(share);
    return element("li", {}, [
      element("span", { className: "name", textContent: name }),
      element("div", { className: "track" }, [bar]),
      element("span", { className: "share", textContent: percent(share) }),
    ]);
  }));
}

// Blue for what speaks for the answer, orange for what speaks against it; strength from -1 to 1.
function shade(node, strength) {
  const colour = strength < 0 ? "--orange" : "--blue";
  const alpha = `calc(${Math.min(1, Math.abs(strength)).toFixed(3)} * var(--strength))`;
  node.style.background = `rgba(var(${colour}), ${alpha})`;
}

// ---- The worker reads one text at a time, and of those typed meanwhile the last ----

let number = 0, isBusy = false, isWaiting = false, shown = null;

function startWorker() {
  const program = `${$("bert").textContent}\n${$("answers").textContent}\nserve();`;
  const worker = new Worker(URL.createObjectURL(new Blob([program], { type: "text/javascript" })));
  const characters = atob($("weights").textContent), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  $("weights").remove();
  worker.postMessage({ facts, buffer: bytes.buffer }, [bytes.buffer]);
  worker.onmessage = ({ data }) => receive(data);
  worker.onerror = ({ message }) => fail(message);
  return worker;
}

function fail(message) {
  $("note").textContent = `The model cannot be run here: ${message}`;
}

function ask() {
  document.documentElement.dataset.state = "working";
  if (isBusy) {
    isWaiting = true;
    return;
  }
  [isBusy, isWaiting] = [true, false];
  number += 1;
  worker.postMessage({ number, text: $("text").value, question: Number($("question").value) });
}

function receive(data) {
  if (data.error) fail(data.error);
  if (data.number !== number) return;
  if (data.shown) {
    isBusy = false;
    shown = { ...data.shown, effects: new Map() };
    showAnswer();
    showBlanks();
    showAttention();
    if (isWaiting) ask();
  } else if (data.isDone) {
    showStrongest();
    if (!isBusy) document.documentElement.dataset.state = "done";
  } else {
    shown.effects.set(data.word, data.effect);
    showEffects();
  }
}

// ---- The answer, and what each word adds ----

function showAnswer() {
  const { logs, words, wordOf, tokens, cut } = shown;
  $("note").textContent = cut ? "The text is too long: the model reads a part of it." : "";
  $("answer").hidden = $("effects").hidden = !logs;
  if (!logs) return;
  const probabilities = logs.map(Math.exp), best = logs.indexOf(Math.max(...logs));
  shown.label = facts.labels[best];
  $("label").textContent = `${shown.label}, ${percent(probabilities[best])}`;
  bars($("labels"), facts.labels.map((name, i) => [name, probabilities[i]]));
  $("for").textContent = `for “${shown.label}”`;
  const kept = [...new Set(wordOf.filter((word) => word >= 0))]; // the others had no room
  shown.nodes = new Map(kept.map((word) => [word, element("span", { textContent: words[word] })]));
  tokens.forEach((token, t) => {
    if (token === "[UNK]" && wordOf[t] >= 0) shown.nodes.get(wordOf[t]).className = "unknown";
  });
  const gap = (i) => (i && kept[i] !== kept[i - 1] + 1 ? " … " : " ");
  $("words").replaceChildren(...kept.flatMap((word, i) => [gap(i), shown.nodes.get(word)]));
  $("strongest").textContent = "";
}

function showEffects() {
  $("strongest").textContent = `${shown.effects.size} of ${shown.nodes.size} words …`;
  const most = Math.max(0.5, ...Array.from(shown.effects.values(), Math.abs));
  for (const [word, effect] of shown.effects) {
    const node = shown.nodes.get(word);
    shade(node, effect / most);
    const unknown = node.className ? "; the model does not know the word and reads [UNK]" : "";
    node.title = `${signed(effect)} to the log-odds of “${shown.label}”${unknown}`;
  }
}

function showStrongest() {
  const order = [...shown.effects].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 5);
  const listed = order.map(([word, effect]) => `“${shown.words[word]}” ${signed(effect)}`);
  $("strongest").textContent = order.length ? `Most of all, in log-odds: ${listed.join(", ")}` : "";
}

function showBlanks() {
  const { tokens, blanks, filled } = shown;
  $("blanks").hidden = !blanks.length;
  $("filled").replaceChildren(...filled.flatMap((likely, i) => {
    const list = element("ul", { className: "bars" }), at = blanks[i];
    bars(list, likely);
    const before = tokens.slice(Math.max(1, at - 3), at), after = tokens.slice(at + 1, at + 3);
    const nearby = [...before, "____", ...after];
    const words = nearby.filter((token) => token !== "[SEP]").join(" ").replaceAll(" ##", "");
    return [element("h3", { textContent: words }), list];
  }));
}

// ---- Attention: a picture of each head, and the tokens shaded by one row of it ----

let chosen = 0, from = 0, pointed = null; // the head, the token, and the one under the pointer

function draw(canvas, weights, T) {
  const size = Math.min(T, 64), pixel = (t) => Math.floor((t * size) / T); // of a long text the
  canvas.width = canvas.height = size; // largest of several weights is seen
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  for (let t = 0; t < T; t++) {
    for (let s = 0; s < T; s++) {
      const i = 4 * (pixel(t) * size + pixel(s)), alpha = 255 * Math.sqrt(weights[t * T + s]);
      image.data.set([66, 140, 210, Math.max(image.data[i + 3], alpha)], i);
    }
  }
  context.putImageData(image, 0, 0);
}

// A group of buttons is one stop of the Tab key; arrows, Home and End move inside it.
function moveByArrows(group, columns, choose) {
  group.addEventListener("keydown", (event) => {
    const buttons = [...group.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement), last = buttons.length - 1;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    const step = { ...steps, Home: -at, End: last - at }[event.key];
    if (step === undefined || at < 0) return;
    event.preventDefault();
    if (!buttons[at + step]) return;
    choose(at + step);
    buttons[at + step].focus();
  });
}

function makeHeads() {
  const width = HEADS > 6 ? "2.5rem" : "3.75rem";
  $("heads").style.gridTemplateColumns = `repeat(${HEADS}, minmax(0, ${width}))`;
  for (let i = 0; i < LAYERS * HEADS; i++) {
    const button = element("button", { type: "button", title: nameOfHead(i) }, [element("canvas")]);
    button.setAttribute("role", "radio");
    button.setAttribute("aria-label", nameOfHead(i));
    button.addEventListener("click", () => chooseHead(i));
    $("heads").append(button);
  }
  moveByArrows($("heads"), HEADS, chooseHead);
  moveByArrows($("tokens"), 1, chooseToken);
}

const nameOfHead = (i) => `Layer ${Math.floor(i / HEADS) + 1}, head ${(i % HEADS) + 1}`;

function chooseHead(i) {
  chosen = i;
  showRow();
}

function chooseToken(t) {
  from = t;
  showRow();
}

function showAttention() {
  const { tokens, attention, blanks } = shown, canvases = $("heads").querySelectorAll("canvas");
  shown.heads = attention.flat();
  shown.heads.forEach((weights, i) => draw(canvases[i], weights, tokens.length));
  from = blanks[0] ?? 0; // what the answer is read from
  pointed = null;
  $("tokens").replaceChildren(...tokens.flatMap((token, t) => {
    const button = element("button", { type: "button", textContent: token });
    const point = (at) => () => {
      pointed = at;
      showRow();
    };
    button.addEventListener("click", () => chooseToken(t));
    button.addEventListener("pointerenter", point(t));
    button.addEventListener("pointerleave", point(null));
    return [" ", button];
  }));
  showRow();
}

function showRow() {
  $("heads").querySelectorAll("button").forEach((button, i) => {
    button.setAttribute("aria-checked", i === chosen);
    button.tabIndex = i === chosen ? 0 : -1;
  });
  const { tokens, heads } = shown, T = tokens.length, t = pointed ?? from;
  const row = heads[chosen].subarray(t * T, (t + 1) * T);
  $("tokens").querySelectorAll("button").forEach((button, s) => {
    button.setAttribute("aria-pressed", s === t);
    button.tabIndex = s === from ? 0 : -1;
    shade(button, Math.sqrt(row[s]));
  });
  const most = Array.from(row.keys()).sort((a, b) => row[b] - row[a]).slice(0, 4);
  const listed = most.map((s) => `“${tokens[s]}” ${percent(row[s])}`).join(", ");
  // Read aloud where it was asked for, and not with each letter that is typed.
  $("looks").ariaLive = $("attention").contains(document.activeElement) ? "polite" : "off";
  $("looks").textContent = `${nameOfHead(chosen)}: “${tokens[t]}” attends to ${listed}`;
}

// ---- Start ----

function start() {
  const shape = `${LAYERS} layers of ${HEADS} heads, vectors of ${facts.config.hidden_size}`;
  const millions = (facts.parameters / 1e6).toFixed(1);
  $("shape").textContent = `BERT: ${shape}, ${millions} million parameters`;
  $("program").textContent = $("bert").textContent.trim();
  const questions = facts.prompts.map(({ sentence }) => sentence);
  if (questions.length > 1) questions.push("all of these together");
  questions.forEach((sentence, i) => $("question").append(new Option(sentence, i)));
  $("asking").hidden = !questions.length;
  $("text").value = "An unforgettable film: funny, warm and beautifully acted.";
  $("text").addEventListener("input", ask);
  $("question").addEventListener("change", ask);
  $("insert").addEventListener("click", () => {
    const text = $("text");
    text.setRangeText("[MASK]", text.selectionStart, text.selectionEnd, "end");
    text.focus();
    ask();
  });
  makeHeads();
}

start();
const worker = startWorker();
ask();
