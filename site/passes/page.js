"use strict";
/* The page: letters in cells, which the passes change in place. */

const LENGTH = Math.min(192, model.context);
const REST = 1; // seconds before a pass
const lastPass = model.blocks.length;
const cells = Array.from({ length: LENGTH }, () => document.createElement("span"));

/** The text that is being written. `screens` holds the letters {symbol, kind} of all cells in the
    noise and after every pass, as far as they are known. */
let run;

function begin() {
  const prompt = readPrompt(find("prompt").value).slice(0, LENGTH - 1);
  const noise = drawNoise(Number(find("seed").value), LENGTH);
  const first = noise.map((u, at) => {
    const isGiven = at < prompt.length;
    const token = isGiven ? prompt[at] : nearest(u, codebook);
    return { symbol: model.symbols[token], kind: isGiven ? "given" : "noise" };
  });
  run = {
    prompt,
    screens: [first],
    steps: write(noise, prompt, model.temperature),
    shown: 0,
    due: 0, // letters that should be there by now
    at: null,
    isDone: false,
  };
  run.due = -REST * speed();
  find("text").textContent = "";
  show(0);
  say("Noise: every letter is the code that is nearest to a random point.");
  play(true);
}

// --- the passes

/** Compute the next letter that is not given, and show it. */
function advance() {
  let step;
  do {
    step = run.steps.next().value;
    if (step.at === 0) beginPass(step.pass);
    run.screens[step.pass][step.at] = letterOf(step);
  } while (step.at < run.prompt.length);
  run.at = step.at;
  // after a look back all letters are drawn
  if (run.shown === step.pass) draw(step.at, true);
  else show(step.pass);
  markCursor();
  if (step.at === LENGTH - 1) endPass(step.pass);
}

function letterOf({ pass, at, token, isNoise }) {
  const symbol = model.symbols[token];
  const before = run.screens[pass - 1][at];
  if (before.kind === "given") return before;
  if (isNoise) return { symbol, kind: "gap" };
  const isFilled = pass > 1 && (before.kind === "gap" || before.symbol !== symbol);
  return { symbol, kind: isFilled ? "filled" : "written" };
}

function beginPass(pass) {
  run.screens[pass] = run.screens[pass - 1].slice();
  show(pass);
  const block = lastPass - pass + 1;
  say(pass === 1
    ? `Block ${block} writes, and leaves noise where it expects an easy letter.`
    : `Block ${block} fills in the gaps of which it is sure, most of them.`);
}

const count = (pass, kind) => run.screens[pass].filter((letter) => letter.kind === kind).length;

const counted = (number, name) => `${number} ${name}${number === 1 ? "" : "s"}`;

function endPass(pass) {
  run.due = -REST * speed();
  const gaps = count(pass, "gap");
  if (pass === 1) {
    const written = counted(count(pass, "written"), "letter");
    say(`Block ${lastPass} has written ${written} and left ${counted(gaps, "gap")}.`);
  } else {
    const wrong = gaps === 1 ? "1 stays a gap, as it was" : `${gaps} stay gaps, as it was`;
    const left = gaps ? `${wrong} not sure of the letter` : "no gap is left";
    const filled = counted(count(pass, "filled"), "letter");
    say(`Block ${lastPass - pass + 1} has filled in ${filled}; ${left}.`);
  }
  if (pass === lastPass) end();
}

function end() {
  run.isDone = true;
  run.at = null;
  find("text").textContent = run.screens[lastPass].map((letter) => letter.symbol).join("").trim();
  markCursor();
  play(false);
}

// --- showing

const say = (text) => { find("status").textContent = text; };

/** Show the letters after a pass, 0 for the noise. */
function show(pass) {
  run.shown = pass;
  cells.forEach((_, at) => draw(at, false));
  markCursor();
  document.querySelectorAll("#passes button").forEach((button, index) => {
    button.disabled = !run.screens[index];
    button.setAttribute("aria-pressed", String(index === pass));
  });
}

function draw(at, isFresh) {
  const { symbol, kind } = run.screens[run.shown][at];
  cells[at].className = isFresh ? `${kind} fresh` : kind;
  cells[at].textContent = symbol;
}

function markCursor() {
  const isLive = run.at !== null && run.shown === run.screens.length - 1;
  document.querySelector(".cursor")?.classList.remove("cursor");
  if (isLive) cells[run.at].classList.add("cursor");
}

// --- playing

const speed = () => Math.round(3 * 100 ** (find("speed").value / 100));

function play(isPlaying) {
  run.isPlaying = isPlaying && !run.isDone;
  find("play").textContent = run.isPlaying ? "Pause" : run.isDone ? "Again" : "Play";
  find("step").disabled = run.isDone;
  if (run.isPlaying) {
    const mine = run;
    let last = performance.now();
    requestAnimationFrame(function frame(now) {
      if (run !== mine || !run.isPlaying) return;
      run.due += (Math.min(Math.max(now - last, 0), 100) / 1000) * speed();
      last = now;
      const stop = performance.now() + 20;
      while (run.due >= 1 && run.isPlaying && performance.now() < stop) {
        run.due -= 1;
        advance();
      }
      // a slow machine does not catch up
      run.due = Math.min(run.due, 2);
      requestAnimationFrame(frame);
    });
  }
}

function showSpeed() {
  const text = `${speed()} letters a second`;
  find("speed").setAttribute("aria-valuetext", text);
  find("rate").textContent = text;
}

function setUp() {
  cells.forEach((cell) => {
    cell.style.setProperty("--phase", `${-3 * Math.random()}s`);
    cell.style.setProperty("--beat", `${0.9 + 1.2 * Math.random()}s`);
  });
  find("stage").append(...cells);
  const names = ["Noise"];
  for (let pass = 1; pass <= lastPass; pass++) {
    names.push(`Block ${lastPass - pass + 1} ${pass === 1 ? "writes" : "fills in"}`);
  }
  names.forEach((name, pass) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      play(false);
      show(pass);
      // the letters themselves are hidden from screen readers
      if (pass) say(`${name}: ${run.screens[pass].map((one) => one.kind === "gap" ? "_" : one.symbol).join("").trim()}`);
      else say("Noise: its letters mean nothing.");
    });
    find("passes").append(button);
  });
  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    begin();
  });
  find("again").addEventListener("click", () => {
    find("seed").value = Math.floor(Math.random() * 1e6);
    begin();
  });
  find("play").addEventListener("click", () => (run.isDone ? begin() : play(!run.isPlaying)));
  find("step").addEventListener("click", () => {
    play(false);
    advance();
  });
  find("speed").addEventListener("input", showSpeed);
  const millions = (model.parameters / 1e6).toFixed(1);
  find("name").textContent = `${model.name}, ${millions} million weights`;
  showSpeed();
  begin();
}

setUp();
