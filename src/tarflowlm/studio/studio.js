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
document.addEventListener('click', ({target}) => {
  const copied = target.closest('[data-copy]'), token = target.closest('.st-heat span');
  if (copied) navigator.clipboard.writeText(copied.dataset.copy).then(() => { copied.textContent = 'copied'; });
  if (token) token.closest('.st-heat').nextElementSibling.textContent = `${token.textContent}: ${token.title}`;
  if (window.innerWidth <= 640 && target.closest('button.primary'))
    [...document.querySelectorAll('.st-view')].find((view) => view.offsetParent).scrollIntoView({behavior: 'smooth'});
});
new MutationObserver((changes) => changes.forEach(({addedNodes}) => addedNodes.forEach((node) => {
  const slider = node.querySelector && node.querySelector('.st-slide input[data-play]');
  if (slider && !window.matchMedia('(prefers-reduced-motion: reduce)').matches) play(slider, 0);
}))).observe(document.documentElement, {childList: true, subtree: true});
