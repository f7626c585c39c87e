"use strict";
/* A stack of tied Mix-d blocks that turns noise into text (docs/math.md, eqs. 5, 9 and 9a). Symbols
   as there: d channels of a token, D width of the Transformer, E width of a head, k components. */

// --- what build.py wrote

const find = (id) => document.getElementById(id);
const model = JSON.parse(find("model").textContent);
const weights = readWeights(find("weights").textContent);

/** The tensors by name, flat and in float32; those of two bytes a number are bfloat16. */
function readWeights(base64) {
  const text = atob(base64.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const found = {};
  for (const { name, start, size, half } of model.tensors) {
    if (half) {
      // a bfloat16 is the upper half of a float32
      const wide = new Uint32Array(new Uint16Array(bytes.buffer, start, size));
      for (let i = 0; i < size; i++) wide[i] <<= 16;
      found[name] = new Float32Array(wide.buffer);
    } else {
      found[name] = new Float32Array(bytes.buffer, start, size);
    }
  }
  return found;
}

// --- the normal distribution and its mixtures, in float64 and log space (docs/math.md, section 8)

const HALF_LOG_2PI = 0.5 * Math.log(2 * Math.PI);
const BISECTIONS = 22;
const NEWTON_STEPS = 5;

/** log Q(a), the logarithm of the upper tail of the standard normal. */
function logUpperTail(a) {
  const logDensity = -0.5 * a * a - HALF_LOG_2PI;
  if (a < -2) return Math.log1p(-Math.exp(logUpperTail(-a)));
  if (a > 2) {
    // Laplace's continued fraction: Q(a) = N(a) / (a + 1 / (a + 2 / (a + 3 / ...)))
    let fraction = a;
    for (let n = 30; n > 0; n--) fraction = a + n / fraction;
    return logDensity - Math.log(fraction);
  }
  // Q(a) = 1/2 - N(a) (a + a^3 / 3 + a^5 / (3 * 5) + ...)
  let term = a;
  let sum = a;
  for (let n = 3; Math.abs(term) > 1e-17; n += 2) {
    term *= (a * a) / n;
    sum += term;
  }
  return Math.log(0.5 - Math.exp(logDensity) * sum);
}

const gelu = (x) => x * Math.exp(logUpperTail(-x));

/** x >= 0 with log Q(x) = logTail, of at most log 1/2. */
function upperQuantile(logTail) {
  let low = 0;
  let high = 1 + Math.sqrt(-2 * logTail);
  for (let step = 0; step < 60; step++) {
    const x = 0.5 * (low + high);
    if (logUpperTail(x) > logTail) low = x;
    else high = x;
  }
  return low;
}

function logSumExp(values) {
  const largest = Math.max(...values);
  return largest + Math.log(values.reduce((sum, value) => sum + Math.exp(value - largest), 0));
}

function logSoftmax(values) {
  const total = logSumExp(values);
  return values.map((value) => value - total);
}

/** The codes of all tokens, with `noise` also N(0, I), the last component. */
function makeCodebook(noise) {
  const d = model.channels;
  const logStd = Array.from(weights["codebook.log_std"]);
  const mean = logStd.map((_, k) => weights["codebook.mean"].subarray(k * d, k * d + d));
  if (noise) {
    logStd.push(0);
    mean.push(new Float32Array(d));
  }
  return { mean, logStd, std: logStd.map(Math.exp) };
}

/** The most probable component of a latent vector (docs/math.md, eq. 2). */
function nearest(z, book) {
  const costs = book.mean.map((mean, k) => {
    const square = z.reduce((sum, value, i) => sum + (value - mean[i]) ** 2, 0);
    return square / (2 * book.std[k] ** 2) + z.length * book.logStd[k];
  });
  return costs.indexOf(Math.min(...costs));
}

/** Weights given channel i of z, by Bayes' rule. */
function update(logAlpha, value, i, book) {
  return logSoftmax(logAlpha.map((w, k) => {
    const a = (value - book.mean[k][i]) / book.std[k];
    return w - 0.5 * a * a - book.logStd[k];
  }));
}

/** u of z, channel by channel (docs/math.md, eq. 9). */
function toNoise(z, logW, book) {
  let logAlpha = logSoftmax(logW);
  return z.map((value, i) => {
    const tail = (side) => logSumExp(logAlpha.map(
      (w, k) => w + logUpperTail((side * (value - book.mean[k][i])) / book.std[k])));
    const [lower, upper] = [tail(-1), tail(1)];
    logAlpha = update(logAlpha, value, i, book);
    return lower < upper ? -upperQuantile(lower) : upperQuantile(upper);
  });
}

/** z of u, by the same recursion. */
function toLatents(u, logW, book) {
  let logAlpha = logSoftmax(logW);
  return u.map((value, i) => {
    const z = invertMixture(value, logAlpha, i, book);
    logAlpha = update(logAlpha, z, i, book);
    return z;
  });
}

/** The z at which the mixture of channel i has the mass of the standard normal at u, on the side of
    the smaller tail: bisections in the bracket of docs/math.md, eq. 20, then Newton steps. They
    find scales above a millionth of the bracket's width; english-passes has 0.08 to 0.17, and means
    from -2.1 to 2.8. */
function invertMixture(u, logAlpha, i, book) {
  const side = u < 0 ? -1 : 1;
  const logWanted = logUpperTail(side * u);
  const center = book.mean.map((mean) => side * mean[i]);
  const candidates = center.map((m, k) => m + side * u * book.std[k]);
  let low = Math.min(...candidates);
  let high = Math.max(...candidates);
  let x = 0.5 * (low + high);
  for (let step = 0; step < BISECTIONS + NEWTON_STEPS; step++) {
    const a = center.map((m, k) => (x - m) / book.std[k]);
    const logTail = logSumExp(logAlpha.map((w, k) => w + logUpperTail(a[k])));
    if (logTail > logWanted) low = x;
    else high = x;
    const middle = 0.5 * (low + high);
    if (step < BISECTIONS) {
      x = middle;
      continue;
    }
    const logDensity = logSumExp(
      logAlpha.map((w, k) => w - 0.5 * a[k] * a[k] - HALF_LOG_2PI - book.logStd[k]));
    // on the logarithm of the tail, whose derivative is -density / tail
    x += (logTail - logWanted) * Math.exp(logTail - logDensity);
    if (!(x >= low && x <= high)) x = middle;
  }
  return side * x;
}

// --- one block: a causal Transformer with its KV cache, and the coupling

/** matrix [rows, x.length] times x, plus `start`. */
function multiply(matrix, x, start) {
  const width = x.length;
  const y = new Float32Array(matrix.length / width);
  for (let row = 0, at = 0; row < y.length; row++, at += width) {
    let sum = start ? start[row] : 0;
    for (let i = 0; i < width; i++) sum += matrix[at + i] * x[i];
    y[row] = sum;
  }
  return y;
}

const add = (x, y) => x.map((value, i) => value + y[i]);

/** Layer norm. */
function normalise(x, scale) {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  const unit = 1 / Math.sqrt(variance + 1e-5);
  return x.map((value, i) => (value - mean) * unit * scale[i]);
}

/** Rotary positions: channels (i, i + E / 2) turn by n times a frequency. */
function rotate(x, n) {
  const half = x.length / 2;
  const y = new Float32Array(x.length);
  for (let i = 0; i < half; i++) {
    const frequency = Math.fround(Math.exp(Math.fround(-Math.log(1e4) * (i / half))));
    const cos = Math.cos(Math.fround(n * frequency));
    const sin = Math.sin(Math.fround(n * frequency));
    y[i] = x[i] * cos - x[i + half] * sin;
    y[i + half] = x[i + half] * cos + x[i] * sin;
  }
  return y;
}

class Block {
  constructor(index) {
    const { layers, certainty, noise } = model.blocks[index];
    this.of = (name) => weights[`prior.blocks.${index}.${name}`];
    this.certainty = certainty;
    this.codebook = makeCodebook(noise);
    // without taps the Transformer reads the inputs as they are
    this.taps = this.of("transformer.input_taps") || new Float32Array(model.width).fill(1);
    this.layers = [];
    for (let i = 0; i < layers; i++) {
      const of = (name) => this.of(`transformer.layers.${i}.${name}`);
      this.layers.push({ of, keys: [], values: [] });
    }
    this.begin();
  }

  /** Forget all positions. */
  begin() {
    this.inputs = [];
    for (const layer of this.layers) layer.keys = [], layer.values = [];
  }

  /** Features c_n of the next position, from the latents before it, none at the first. */
  features(previous) {
    const n = this.inputs.length;
    this.inputs.push(previous ? this.input(previous) : this.of("start"));
    let x = new Float32Array(model.width);
    for (let k = 0; k < Math.min(this.taps.length / model.width, n + 1); k++) {
      const taps = this.taps.subarray(k * model.width);
      x = add(x, this.inputs[n - k].map((value, i) => value * taps[i]));
    }
    for (const layer of this.layers) {
      x = add(x, this.attend(normalise(x, layer.of("attention_norm.weight")), layer, n));
      const normal = normalise(x, layer.of("mlp_norm.weight"));
      const active = multiply(layer.of("up.weight"), normal).map(gelu);
      x = add(x, multiply(layer.of("down.weight"), active));
    }
    return normalise(x, this.of("transformer.norm.weight"));
  }

  input(z) {
    const lifted = multiply(this.of("input.lift.weight"), z, this.of("input.lift.bias")).map(gelu);
    const linear = multiply(this.of("input.linear.weight"), z, this.of("input.linear.bias"));
    const x = multiply(this.of("input.out.weight"), lifted, linear);
    const embedding = this.of("token_embedding.weight");
    if (!embedding) return x;
    return add(x, embedding.subarray(nearest(z, this.codebook) * model.width));
  }

  attend(x, layer, n) {
    const D = model.width;
    const E = D / model.heads;
    const qkv = multiply(layer.of("attention.qkv.weight"), x);
    const keys = new Float32Array(D);
    const y = new Float32Array(D);
    layer.keys.push(keys);
    layer.values.push(qkv.subarray(2 * D));
    for (let at = 0; at < D; at += E) {
      const scaled = (start, name) =>
        rotate(normalise(qkv.subarray(start, start + E), layer.of(`attention.${name}`)), n);
      const query = scaled(at, "query_scale");
      keys.set(scaled(D + at, "key_scale"), at);
      const scores = layer.keys.map((key) => {
        let sum = 0;
        for (let i = 0; i < E; i++) sum += query[i] * key[at + i];
        return sum / Math.sqrt(E);
      });
      logSoftmax(scores).forEach((logP, m) => {
        const p = Math.exp(logP);
        for (let i = 0; i < E; i++) y[at + i] += p * layer.values[m][at + i];
      });
    }
    return multiply(layer.of("attention.out.weight"), y);
  }

  logWeights(features) {
    const weight = this.of("coupling.weight_head.weight");
    return Array.from(multiply(weight, features, this.of("coupling.weight_head.bias")));
  }

  /** Whether the block acts on the next token (docs/math.md, eq. 9a). */
  isSure(logW) {
    return Math.exp(Math.max(...logSoftmax(logW).slice(0, model.symbols.length))) > this.certainty;
  }

  forward(z, features) {
    const logW = this.logWeights(features);
    return this.isSure(logW) ? toNoise(z, logW, this.codebook) : z;
  }

  inverse(u, features, temperature) {
    const logW = this.logWeights(features);
    if (!this.isSure(logW)) return u;
    return toLatents(u, logW.map((w) => w / temperature), this.codebook);
  }
}

// --- writing

const blocks = model.blocks.map((_, index) => new Block(index));
const codebook = makeCodebook(false);
const noisyCodebook = makeCodebook(true);

/** Inverts block after block, the last one first, position by position. Yields {pass, at, token,
    isNoise} as soon as a latent vector is known; pass 1 is that of the last block. `noise` is
    [T][d], `prompt` the tokens at the start, whose latents are drawn with the noise there. */
function* write(noise, prompt, temperature) {
  let states = noise.map((u) => Float32Array.from(u));
  let known = prompt.map(
    (token, t) => states[t].map((e, i) => codebook.mean[token][i] + codebook.std[token] * e));
  // the states of the prompt below every block: h^(0), ..., h^(L-1)
  const given = [known];
  for (const block of blocks.slice(0, -1)) {
    block.begin();
    known = known.map((z, t) => block.forward(z, block.features(given.at(-1)[t - 1])));
    given.push(known);
  }
  for (let index = blocks.length - 1; index >= 0; index--) {
    blocks[index].begin();
    const found = [];
    for (let at = 0; at < states.length; at++) {
      const features = blocks[index].features(found[at - 1]);
      found.push(given[index][at] || blocks[index].inverse(states[at], features, temperature));
      const isNoise = nearest(found[at], noisyCodebook) === model.symbols.length;
      const token = index === 0 && at in prompt ? prompt[at] : nearest(found[at], codebook);
      yield { pass: blocks.length - index, at, token, isNoise };
    }
    states = found;
  }
}

/** The tokens of the noise and after every pass, and the final text. */
function generate(noise, prompt = "", temperature = model.temperature) {
  const passes = [noise.map((u) => nearest(u, codebook))];
  for (const { pass, at, token } of write(noise, readPrompt(prompt), temperature)) {
    passes[pass] = passes[pass] || [];
    passes[pass][at] = token;
  }
  return { passes, text: passes.at(-1).map((token) => model.symbols[token]).join("") };
}

const DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/** The tokens of a prompt, read as the model's training text was; unknown letters are left out. */
function readPrompt(text) {
  const isLower = model.symbols.every((symbol) => symbol === symbol.toLowerCase());
  let words = isLower ? text.toLowerCase() : text;
  if (model.normalization === "text8") {
    // some letters become ASCII in lower case, so others go first
    words = text.replace(/<\|endoftext\|>|[^\x00-\x7f]/g, " ").toLowerCase();
    words = words.replace(/[0-9]/g, (digit) => ` ${DIGITS[digit]} `);
    words = words.replace(/[^a-z]+/g, " ").trim();
    const begins = /^\s/.test(text) ? " " : "", ends = /\s$/.test(text) ? " " : "";
    words = words ? begins + words + ends : begins && ends;
  }
  return Array.from(words, (symbol) => model.symbols.indexOf(symbol)).filter((token) => token >= 0);
}

/** Standard normal noise [T][d] from a seed: mulberry32 and Box-Muller. */
function drawNoise(seed, length) {
  let state = seed | 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let bits = Math.imul(state ^ (state >>> 15), 1 | state);
    bits = (bits + Math.imul(bits ^ (bits >>> 7), 61 | bits)) ^ bits;
    return (((bits ^ (bits >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
  return Array.from({ length }, () => Float32Array.from({ length: model.channels }, normal));
}
