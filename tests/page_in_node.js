// Runs the program of a page without a browser: node page_in_node.js PAGE < CALLS > RESULTS
// Calls are a JSON list of {"encode": text} and {"answer": text, "question": n, "effects": bool}.
"use strict";

const fs = require("fs");

const page = fs.readFileSync(process.argv[2], "utf-8");
const content = (id) => page.match(new RegExp(`id="${id}">([^]*?)</script>`))[1];
const program = `${content("bert")}\n${content("answers")}\nModel`;
const { buffer } = Uint8Array.from(Buffer.from(content("weights"), "base64"));
const Model = require("vm").runInThisContext(program);
const model = new Model(JSON.parse(content("facts")), buffer);

const results = JSON.parse(fs.readFileSync(0, "utf-8")).map(({ encode, answer, question = 0, effects }) => {
  if (encode !== undefined) return model.tokenizer.encode(encode);
  const started = process.cpuUsage().user, found = model.answer(answer, question);
  const { attention, ...shown } = found.shown;
  const result = { ...shown, ids: found.sequences[0].ids };
  result.seconds = (process.cpuUsage().user - started) / 1e6;
  result.attention = attention.map((heads) => heads.map((weights) => Array.from(weights)));
  if (effects) {
    const label = shown.logs.indexOf(Math.max(...shown.logs));
    result.effects = shown.words.map((_, word) => model.effect(found, word, label));
  }
  return result;
});
process.stdout.write(JSON.stringify(results));
