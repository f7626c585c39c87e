// Sets the formulas of a page with KaTeX. Pages without formulas fetch nothing, and where KaTeX
// cannot be fetched, formulas stay as they are written.
const KATEX = "https://cdn.jsdelivr.net/npm/katex@0.16.22/dist/";
const STYLE = "sha384-5TcZemv2l/9On385z///+d7MSYlvIEw9FuZTIdZ14vJLqWphw7e7ZPuOiCHJcFCP";
const SCRIPT = "sha384-cMkvdD8LoxVzGF/RPUKAcvmm49FQ0oxwDF3BGKtDXcEc+T1b2N+teh/OJfpU0jr6";

function setFormulas(formulas) {
  for (const formula of formulas) {
    // \( ... \) in a line, \[ ... \] on lines of its own
    const written = formula.textContent.trim();
    const tex = written.slice(2, -2);
    const displayMode = written.startsWith("\\[");
    katex.render(tex, formula, { displayMode, throwOnError: false, strict: false });
  }
}

const formulas = document.querySelectorAll(".arithmatex");
if (formulas.length > 0) {
  const style = document.createElement("link");
  Object.assign(style, { rel: "stylesheet", href: KATEX + "katex.min.css", integrity: STYLE });
  const script = document.createElement("script");
  Object.assign(script, { src: KATEX + "katex.min.js", integrity: SCRIPT });
  style.crossOrigin = script.crossOrigin = "anonymous";
  script.addEventListener("load", () => setFormulas(formulas));
  document.head.append(style, script);
}
