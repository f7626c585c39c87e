// --- passes

const show = (slider) => {
  const card = slider.closest('.st-card'), rows = card.querySelectorAll('.tl-row'), row = rows[slider.value];
  if (!row) return;
  const text = row.querySelector('.tl-text').cloneNode(true), stage = card.querySelector('.st-stage');
  // the finished text is plain, as it came
  if (slider.value === slider.max) text.querySelectorAll('.tl-changed, .tl-open').forEach((part) => { part.className = 'tl-final'; });
  stage.replaceChildren(...text.childNodes);
  card.querySelector('output').textContent = row.querySelector('.tl-label').textContent;
  rows.forEach((other) => other.classList.toggle('st-at', other === row));
};
const play = (slider, at) => {  // every pass once, until the reader takes the slider
  if (!slider.isConnected || !('play' in slider.dataset) || at > slider.max) return;
  slider.value = at;
  show(slider);
  setTimeout(play, 900, slider, at + 1);
};
const kept = {};  // where readers have left sliders that are drawn again while a run trains
const putBack = (slider) => {
  const at = kept[slider.ariaLabel] || slider.max, row = slider.closest('.st-card').querySelectorAll('.tl-row')[at];
  if (slider.value === at && (at === slider.max || row.matches('.st-at'))) return;
  slider.value = at;
  show(slider);
};
document.addEventListener('input', ({target}) => {
  if (!target.matches || !target.matches('.st-slide input')) return;
  delete target.dataset.play;
  if ('kept' in target.dataset) kept[target.ariaLabel] = target.value === target.max ? null : target.value;
  show(target);
});

// --- other words for a word of a text

const WORD = /[\p{L}\p{N}'’-]+/gu, SIGNS = /[↵∎]/g;
const BEFORE = 300, AFTER = 120;  // characters around a word that the model reads
const plain = (text) => text.replace(SIGNS, '');
const words = (stage) => [...stage.textContent.matchAll(WORD)].map((found) => [found.index, found.index + found[0].length]);
const rangeOf = (stage, [start, end]) => {  // places in the text as places in its elements
  const range = new Range(), walk = document.createTreeWalker(stage, NodeFilter.SHOW_TEXT);
  for (let at = 0, node; (node = walk.nextNode()); at += node.length) {
    if (start >= at && start < at + node.length) range.setStart(node, start - at);
    if (end > at && end <= at + node.length) range.setEnd(node, end - at);
  }
  return range;
};
const placeAt = (stage, {clientX, clientY}) => {
  const spot = document.caretPositionFromPoint && document.caretPositionFromPoint(clientX, clientY);
  const range = spot ? new Range() : document.caretRangeFromPoint(clientX, clientY);
  if (spot) range.setEnd(spot.offsetNode, spot.offset);
  range.setStart(stage, 0);
  return range.toString().length;
};
let asking = null;  // the stage, the word's place, and the list that is open at it
const fold = (isBack) => {
  if (!asking) return;
  asking.list.remove();
  if (isBack) asking.stage.focus();
  asking = null;
};
const type = (id, value) => {
  const box = document.querySelector(`#${id} textarea, #${id} input`);
  box.value = value;
  box.dispatchEvent(new Event('input', {bubbles: true}));
};
const offer = (stage, place, byKey = false) => {
  fold(false);
  const text = stage.textContent, card = stage.closest('.st-card');
  const list = document.createElement('div'), word = text.slice(...place);
  list.className = 'st-list';
  list.setAttribute('role', 'dialog');
  list.setAttribute('aria-label', `other words for ${word}`);
  list.innerHTML = '<div class="st"><p class="st-muted">looking for words that fit …</p></div>';
  const box = rangeOf(stage, place).getBoundingClientRect(), around = card.getBoundingClientRect();
  card.append(list);
  list.style.top = `${box.bottom - around.top + 6}px`;
  list.style.left = `${Math.max(8, Math.min(box.left - around.left, around.width - list.offsetWidth - 8))}px`;
  const near = text.slice(Math.max(0, place[0] - BEFORE), place[0]), rest = text.slice(place[1], place[1] + AFTER);
  const escaped = (part) => plain(part).replace(/_/g, '\\_');
  // whole words only
  const left = place[0] > BEFORE ? near.replace(/^\S*\s/, '') : near;
  const right = text.length > place[1] + AFTER ? rest.replace(/\s\S*$/, '') : rest;
  const gap = `${escaped(left)}[...]${/[^\s↵∎]/u.test(right) ? escaped(right) : ''}`;
  asking = {stage, place, list, byKey, gap: `${stage.dataset.model}\n${gap}`};
  if (document.querySelector('#st-answer [data-word]') && answered()) return;  // asked before
  type('st-writer', stage.dataset.model);
  type('st-gap', gap);
  setTimeout(() => document.querySelector('#st-offer').click(), 50);
};
const answered = () => {  // the studio's answer goes to the word, unless it is for an earlier one
  const answer = document.querySelector('#st-answer .st');
  if (!asking || !answer || !asking.list.isConnected) return false;
  if (answer.dataset.gap !== asking.gap && !answer.querySelector('.st-notice')) return false;
  const had = asking.list.contains(document.activeElement);
  asking.list.replaceChildren(answer.cloneNode(true));
  const first = asking.list.querySelector('[data-word]');
  if (first && (had || asking.byKey)) first.focus();
  return true;
};
const take = (word) => {
  const {stage, place} = asking, card = stage.closest('.st-card'), copy = card.querySelector('[data-copy]');
  // gradio keeps elements and changes them, so what was kept may be of an earlier text
  if (!card.classList.contains('st-exchanged')) card.first = [[...stage.cloneNode(true).childNodes], copy.dataset.copy];
  const mark = document.createElement('mark'), range = rangeOf(stage, place);
  mark.className = 'st-taken';
  mark.textContent = word;
  range.deleteContents();
  range.insertNode(mark);
  copy.dataset.copy = stage.textContent.replace(/↵\n/g, '\n').replace(SIGNS, '');
  copy.textContent = 'copy';
  card.classList.add('st-exchanged');
  if (!card.querySelector('.st-undo')) {
    const undo = document.createElement('button');
    undo.type = 'button';
    undo.className = 'st-undo';
    undo.textContent = 'back to the text as it was written';
    undo.style.marginLeft = '1rem';
    copy.after(undo);
  }
  const at = place[0];
  fold(true);
  choose(stage, [at, at + word.length]);
};
const undo = (button) => {
  const card = button.closest('.st-card'), [nodes, text] = card.first, stage = card.querySelector('.st-stage');
  fold(false);
  stage.replaceChildren(...nodes);
  card.querySelector('[data-copy]').dataset.copy = text;
  card.classList.remove('st-exchanged');
  button.remove();
  stage.focus();
};
const settled = (stage) => {  // the final text, not a pass on the way to it
  const slider = stage.closest('.st-card').querySelector('.st-slide input');
  if (!slider || stage.closest('.st-exchanged')) return;
  delete slider.dataset.play;
  if (slider.value === slider.max) return;
  slider.value = slider.max;
  show(slider);
};

// --- by keyboard: arrows choose a word of a text, Enter asks for others

const choose = (stage, place) => {
  const range = rangeOf(stage, place), selection = getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
  stage.chosen = place[0];
};
const tell = (token) => {  // what a pointer would be told
  token.closest('.st-heat').nextElementSibling.textContent = `${token.textContent.trim() || 'space'}: ${token.title}`;
};
document.addEventListener('keydown', (event) => {
  const {target, key} = event, stage = target.matches && target.matches('.st-stage[data-model]') && target;
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[key];
  if (step && target.matches && target.matches('.st-heat')) {
    const tokens = [...target.children], at = tokens.findIndex((token) => token.matches('.st-at'));
    event.preventDefault();
    if (at >= 0) tokens[at].classList.remove('st-at');
    const next = tokens[Math.max(0, Math.min(at + step, tokens.length - 1))];
    next.classList.add('st-at');
    return tell(next);
  }
  if (key === 'Escape' && asking) { event.preventDefault(); return fold(true); }
  if (target.matches && target.matches('.st-words button') && /^Arrow(Up|Down)$/.test(key)) {
    event.preventDefault();
    const next = key === 'ArrowDown' ? target.nextElementSibling : target.previousElementSibling;
    return next && next.focus();
  }
  if (stage) {
    const places = words(stage), at = places.findIndex(([start]) => start === stage.chosen);
    if (step && places.length) {
      event.preventDefault();
      settled(stage);
      choose(stage, places[at < 0 ? 0 : Math.max(0, Math.min(at + step, places.length - 1))]);
    }
    if ((key === 'Enter' || key === ' ') && at >= 0) {
      event.preventDefault();
      offer(stage, places[at], true);
    }
  }
  // Enter does what the button says; Shift+Enter, which gradio takes for it, begins a line
  if (key === 'Enter' && target.matches && target.matches('.gradio-container textarea')) {
    event.stopImmediatePropagation();
    if (event.shiftKey || event.isComposing) return;
    event.preventDefault();
    const buttons = [...document.querySelectorAll('button.primary')].filter((button) => button.offsetParent);
    if (buttons.length) setTimeout(() => buttons[0].click(), 50);
  }
}, true);

document.addEventListener('keypress', (event) => {  // by which gradio submits
  if (event.key === 'Enter' && event.target.matches('.gradio-container textarea')) event.stopImmediatePropagation();
}, true);

// --- the rest

const visible = () => [...document.querySelectorAll('.st-view')].find((view) => view.offsetParent);
let stops = [];
const stopped = () => {  // what was written stays, and says so
  const view = visible(), state = view && view.querySelector('.st-state');
  if (!state) return;
  const written = state.previousElementSibling && state.previousElementSibling.matches('.st-bar');
  state.textContent = 'stopped';
  state.classList.remove('st-state');
  const stage = state.parentElement.querySelector('.st-stage');
  if (stage && written) {
    const copy = document.createElement('button');
    copy.dataset.copy = stage.textContent.replace(/↵\n/g, '\n');
    copy.textContent = 'copy';
    stage.after(copy);
  }
  view.querySelectorAll('.st-caret, .st-bar').forEach((part) => part.remove());
};
const report = (view) => {  // tell screen readers when the visible view begins, waits and ends
  const told = document.querySelector('#st-status'), state = view && view.querySelector('.st-state');
  if (!told) return;
  const words = state ? state.textContent : told.textContent && 'finished';
  if (words !== told.textContent) told.textContent = words;
};
const copyText = (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement('textarea');  // the clipboard of pages that are not https
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand('copy');
  area.remove();
  return Promise.resolve();
};
document.addEventListener('click', (event) => {
  const {target} = event, stage = target.closest('.st-stage[data-model]'), other = target.closest('[data-word]');
  if (other && asking) return take(other.dataset.word);
  if (target.closest('.st-undo')) return undo(target);
  if (asking && !target.closest('.st-list') && target.id !== 'st-offer' && !target.closest('#st-offer')) fold(false);
  if (stage && getSelection().isCollapsed) {
    settled(stage);
    const at = placeAt(stage, event), place = words(stage).find(([start, end]) => start <= at && at <= end);
    if (place) offer(stage, place);
  }
  // the last progress may come later than the click
  if (target.closest('button.primary, .st-another, .st-stop')) stops.forEach(clearTimeout);
  if (target.closest('.st-stop')) stops = [300, 1500, 4000, 10000].map((wait) => setTimeout(stopped, wait));
  const copied = target.closest('[data-copy]'), token = target.closest('.st-heat span');
  if (copied) copyText(copied.dataset.copy).then(() => { copied.textContent = 'copied'; });
  if (token) tell(token);
  if (window.innerWidth <= 640 && target.closest('button.primary, button.sm, .st-another'))
    // once more when the result has made the page longer
    [50, 1500].forEach((wait) => setTimeout(() => visible().scrollIntoView({behavior: 'smooth'}), wait));
});
new MutationObserver((changes) => {
  changes.forEach(({target, addedNodes}) => {
    if (target.parentElement && target.parentElement.closest('#st-answer')) answered();
    addedNodes.forEach((node) => {
      const slider = node.querySelector && node.querySelector('.st-slide input[data-play]');
      if (slider && !window.matchMedia('(prefers-reduced-motion: reduce)').matches) play(slider, 0);
    });
  });
  document.querySelectorAll('[data-kept]').forEach(putBack);
  // a reload repeats the request that is shown
  const view = visible();
  report(view);
  const link = view && view.querySelector('.st-asked a');
  if (link && location.search !== link.search) history.replaceState(null, '', link.href);
}).observe(document.documentElement, {childList: true, subtree: true, characterData: true});
