// Greedy generation from an exported folder with onnxruntime-node, states kept between calls.
//
//   npm install --ignore-scripts       (the CPU needs nothing that the install script downloads)
//   node generate.mjs FOLDER "Once upon a time" [NEW_TOKENS]
//
// It reads export.json for the names and shapes of the states, so that it runs attention, windows
// and recurrent mixers alike: what comes out as `output` goes in as `input` at the next call.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const ARRAYS = { float32: Float32Array, float16: Uint16Array, int64: BigInt64Array };

export class Model {
  static async load(folder) {
    const read = async (name) => JSON.parse(await readFile(join(folder, name), "utf8"));
    const model = new Model();
    model.about = await read("export.json");
    model.session = await ort.InferenceSession.create(join(folder, model.about.file));
    const settings = { ...(await read("config.json")), ...(await read("generation_config.json").catch(() => ({}))) };
    model.ends = [settings.eos_token_id ?? []].flat();
    model.tokenizer = new Tokenizer(await read("tokenizer.json"), await read("tokenizer_config.json"));
    return model;
  }

  // A state of one sequence that has not begun: zeros, and no column yet where it grows.
  start(state) {
    const shape = [1, ...state.shape];
    const size = shape.reduce((product, n) => product * n, 1);
    return new ort.Tensor(state.dtype, new ARRAYS[state.dtype](size), shape);
  }

  // New token ids, as they are made.
  async *generate(prompt, maxNewTokens) {
    const states = Object.fromEntries(this.about.states.map((s) => [s.input, this.start(s)]));
    let [tokens, seen] = [prompt, 0];
    for (let step = 0; step < maxNewTokens; step++) {
      const total = seen + tokens.length;
      const inputs = {
        input_ids: whole(tokens),
        attention_mask: whole(Array(total).fill(1)),
        position_ids: whole(tokens.map((_, i) => seen + i)),
      };
      for (const name of Object.keys(inputs)) {
        if (!this.about.inputs.includes(name)) delete inputs[name];
      }
      const outputs = await this.session.run({ ...inputs, ...states });
      for (const state of this.about.states) states[state.input] = outputs[state.output];
      const [, rows, vocabulary] = outputs.logits.dims;
      const token = largest(outputs.logits.data.subarray((rows - 1) * vocabulary));
      yield token;
      if (this.ends.includes(token)) return;
      [tokens, seen] = [[token], total];
    }
  }
}

function whole(values) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

function largest(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

const [folder, text, count = "64"] = process.argv.slice(2);
if (!text) {
  console.error('usage: node generate.mjs FOLDER "text" [NEW_TOKENS]');
  process.exit(2);
}
const model = await Model.load(folder);
const prompt = model.tokenizer.encode(text).ids;
const made = [];
for await (const token of model.generate(prompt, Number(count))) made.push(token);
console.log(model.tokenizer.decode(made, { skip_special_tokens: true }));
console.log(JSON.stringify({ prompt, made }));
