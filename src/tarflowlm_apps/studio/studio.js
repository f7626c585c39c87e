const show = (slider) => {
  const card = slider.closest('.st-card'), rows = card.querySelectorAll('.tl-row'), row = rows[slider.value];
  if (!row) return;
  card.querySelector('.st-stage').replaceChildren(...row.querySelector('.tl-text').cloneNode(true).childNodes);
  card.querySelector('output').textContent = row.querySelector('.tl-label').textContent;
  rows.forEach((other) => other.classList.toggle('st-at', other === row));
};
const play = (slider, at) => {  // every pass once, until the reader takes the slider
  if (!slider.isConnected || !('play' in slider.dataset) || at > slider.max) return;
  slider.value = at;
  show(slider);
  setTimeout(play, 900, slider, at + 1);
};
document.addEventListener('input', ({target}) => {
  if (!target.matches || !target.matches('.st-slide input')) return;
  delete target.dataset.play;
  show(target);
});
const WORD = /[\p{L}\p{N}'’-]*/u, AT_END = /[\p{L}\p{N}'’-]*$/u;
const offer = (stage, {clientX, clientY}) => {  // others for the word under the pointer: a gap in its place
  const spot = document.caretPositionFromPoint && document.caretPositionFromPoint(clientX, clientY);
  const range = spot ? new Range() : document.caretRangeFromPoint(clientX, clientY);
  if (spot) range.setEnd(spot.offsetNode, spot.offset);
  range.setStart(stage, 0);
  const plain = (text) => text.replace(/[↵∎]/g, '');
  const left = plain(range.toString()), right = plain(stage.textContent).slice(left.length);
  const word = left.match(AT_END)[0] + right.match(WORD)[0], box = document.querySelector('#st-gap textarea, #st-gap input');
  if (!word || !getSelection().isCollapsed) return;
  box.value = left.replace(AT_END, '') + '[...4]' + right.replace(WORD, '');
  box.dispatchEvent(new Event('input', {bubbles: true}));
  setTimeout(() => document.querySelector('#st-offer').click(), 50);
};
const visible = () => [...document.querySelectorAll('.st-view')].find((view) => view.offsetParent);
const stopped = () => {  // what was written stays, and says so
  const view = visible(), bar = view && view.querySelector('.st-bar + .st-muted');
  if (!bar) return;
  bar.textContent = 'stopped';
  const stage = bar.parentElement.querySelector('.st-stage'), copy = document.createElement('button');
  copy.dataset.copy = stage.textContent.replace(/↵\n/g, '\n');
  copy.textContent = 'copy';
  stage.after(copy);
  view.querySelectorAll('.st-caret, .st-bar').forEach((part) => part.remove());
};
document.addEventListener('click', (event) => {
  const {target} = event, stage = target.closest('.st-write .st-stage');
  if (stage) offer(stage, event);
  // the last progress may come later than the click
  if (target.closest('.st-stop')) [300, 1500, 4000, 10000].forEach((wait) => setTimeout(stopped, wait));
  const copied = target.closest('[data-copy]'), token = target.closest('.st-heat span');
  if (copied) navigator.clipboard.writeText(copied.dataset.copy).then(() => { copied.textContent = 'copied'; });
  if (token) token.closest('.st-heat').nextElementSibling.textContent = `${token.textContent}: ${token.title}`;
  if (window.innerWidth <= 640 && target.closest('button.primary, button.sm'))
    // once more when the result has made the page longer
    [50, 1500].forEach((wait) => setTimeout(() => visible().scrollIntoView({behavior: 'smooth'}), wait));
});
new MutationObserver((changes) => changes.forEach(({addedNodes}) => addedNodes.forEach((node) => {
  const slider = node.querySelector && node.querySelector('.st-slide input[data-play]');
  if (slider && !window.matchMedia('(prefers-reduced-motion: reduce)').matches) play(slider, 0);
}))).observe(document.documentElement, {childList: true, subtree: true});
