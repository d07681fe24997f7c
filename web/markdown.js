// Markdown from a model, as elements. The library reads it; the elements are made here, one kind for each kind of
// token, and their text is set as text. No HTML is ever parsed (the page's policy forbids it too: `trusted-types`), so
// markup in an answer is shown as it was written.

import { imageAddress, LINK_ATTRIBUTES, linkAddress } from "./addresses.js";
import { copyText, el, iconButton } from "./dom.js";
import { icon } from "./icons.js";
import { Marked, Tokenizer } from "./vendor/marked.esm.js";

const READING_MS = 1000;
let readingEndsAt = 0;

/** Some texts cost the reader the square of their length. It passes here at every step, and can be stopped. */
function step() {
  if (performance.now() > readingEndsAt) throw new Error("Reading takes too long.");
  return false; // go on as usual
}

/** A list is one step, so a list of very many lines is read as several. */
function list(text) {
  const lines = /^(?:[^\n]*\n){1000}/.exec(text);
  return lines ? Tokenizer.prototype.list.call(this, lines[0]) : false;
}

const marked = new Marked({ gfm: true }, { tokenizer: { space: step, escape: step, list } });

/** Read Markdown; what the reader cannot follow, too deep or too slow, is one paragraph of plain text. */
function read(text) {
  readingEndsAt = performance.now() + READING_MS;
  try {
    return marked.lexer(text);
  } catch {
    const plain = { type: "escape", raw: text, text };
    return Object.assign([{ type: "paragraph", raw: text, tokens: [plain] }], { links: {} });
  }
}

// --- tokens as elements ----------------------------------------------------------------------------------------------

const drawers = {
  space: () => [],
  def: () => [],
  text: (token) => (token.tokens ? drawAll(token.tokens) : decodeEntities(token.text)),
  escape: (token) => token.text,
  html: (token) => (/^<br\s*\/?>$/i.test(token.text.trim()) ? el("br") : token.text),
  br: () => el("br"),
  hr: () => el("hr"),
  strong: (token) => el("strong", {}, drawAll(token.tokens)),
  em: (token) => el("em", {}, drawAll(token.tokens)),
  del: (token) => el("del", {}, drawAll(token.tokens)),
  codespan: (token) => el("code", {}, token.text),
  checkbox: (token) => (token.checked ? "☑ " : "☐ "),
  paragraph: (token) => el("p", {}, drawAll(token.tokens)),
  blockquote: (token) => el("blockquote", {}, drawAll(token.tokens)),
  // The page's own headings are the first two levels.
  heading: (token) => el(`h${Math.min(token.depth + 2, 6)}`, {}, drawAll(token.tokens)),
  list(token) {
    const items = token.items.map((item) => el("li", {}, drawAll(item.tokens)));
    return token.ordered ? el("ol", { start: token.start === 1 ? null : token.start }, items) : el("ul", {}, items);
  },
  link(token) {
    const words = drawAll(token.tokens);
    const address = linkAddress(token.href);
    // The tooltip tells where it goes, whatever its words say.
    return address ? el("a", { href: address, title: address, ...LINK_ATTRIBUTES }, words) : words;
  },
  image(token) {
    const address = imageAddress(token.href);
    if (address) return el("img", { src: address, alt: token.text, loading: "lazy" });
    return el("span.not-loaded", {}, `Image: ${token.text} (${token.href})`);
  },
  code: drawCode,
  table: drawTable,
};

function drawAll(tokens) {
  return tokens.flatMap((token) => (drawers[token.type] ?? drawUnknown)(token));
}

const drawUnknown = (token) => token.raw;

/** A block by itself; text that stands alone (markup, say) is a paragraph. */
function drawBlock(token) {
  const drawn = drawAll([token]);
  return drawn.map((each) => (each instanceof Node ? each : el("p", {}, each)));
}

function drawCode({ text, lang }) {
  const copy = iconButton(icon("copy"), "Copy code", () => copied(copy, text));
  const head = el("div.code-head", {}, el("span", {}, /^\S*/.exec(lang ?? "")[0]), copy);
  return el("div.code", {}, head, el("pre", { tabindex: 0 }, el("code", {}, text))); // scrolled by keyboard too
}

function drawTable({ header, rows, align }) {
  const row = (cells, tag) =>
    el("tr", {}, cells.map((cell, column) => el(tag, { "data-align": align[column] }, drawAll(cell.tokens))));
  const table = el("table", {}, el("thead", {}, row(header, "th")), el("tbody", {}, rows.map((cells) => row(cells, "td"))));
  return el("div.table", { tabindex: 0, role: "region", "aria-label": "Table" }, table);
}

const ENTITIES = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", ndash: "–", mdash: "—", hellip: "…", copy: "©",
  reg: "®", trade: "™", deg: "°", plusmn: "±", times: "×", divide: "÷", middot: "·", bull: "•", larr: "←", rarr: "→",
  uarr: "↑", darr: "↓", le: "≤", ge: "≥", ne: "≠", euro: "€", laquo: "«", raquo: "»",
};

/** Markdown may hold HTML's names for characters; the common ones are read, others stay as they are written. */
function decodeEntities(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w+));/gi, (whole, decimal, hexadecimal, name) => {
    if (name) return ENTITIES[name] ?? whole;
    const code = decimal ? Number(decimal) : parseInt(hexadecimal, 16);
    return code > 31 && code <= 0x10ffff ? String.fromCodePoint(code) : whole;
  });
}

// --- the view --------------------------------------------------------------------------------------------------------

/** Copy, and show on the button whether it is done. */
export async function copied(button, text) {
  button.replaceChildren(icon((await copyText(text)) ? "check" : "warning"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

export function markdown(text) {
  const view = new MarkdownView();
  view.finish(text);
  return view.element;
}

/**
 * Markdown that grows. Only its end is parsed and drawn again, at most once a frame, and less often where that takes
 * long: a long answer costs as much a word as a short one.
 */
export class MarkdownView {
  element = el("div.markdown");
  #text = "";
  #blocks = [];
  #settled = 0; // blocks that no further text can change …
  #settledLength = 0; // … and how much of the text they are
  #frame = 0;
  #restUntil = 0;

  /** Show more text, soon. */
  append(delta) {
    this.#text += delta;
    this.#frame ||= requestAnimationFrame(this.#onFrame);
  }

  /** Show exactly this text, now. */
  finish(text = this.#text) {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#text = text;
    const tokens = read(text);
    // A reference at the end may give a link to words far above.
    const first = Object.keys(tokens.links).length ? 0 : this.#countUnchanged(tokens);
    this.#replaceFrom(first, tokens.slice(first));
    this.#settled = this.#settledLength = 0;
  }

  get text() {
    return this.#text;
  }

  #onFrame = () => {
    this.#frame = 0;
    const began = performance.now();
    if (began < this.#restUntil) {
      this.#frame = requestAnimationFrame(this.#onFrame);
      return;
    }
    this.#drawEnd();
    this.#restUntil = performance.now() + 3 * Math.max(0, performance.now() - began - 4);
  };

  #drawEnd() {
    const text = this.#text.replace(/\r\n?/g, "\n"); // as the parser counts it
    const tokens = read(text.slice(this.#settledLength));
    this.#replaceFrom(this.#settled, tokens);
    const open = indexOfOpenEnd(tokens);
    this.#settled += open;
    for (const token of tokens.slice(0, open)) this.#settledLength += token.raw.length;
  }

  #countUnchanged(tokens) {
    const changed = tokens.findIndex((token, place) => token.raw !== this.#blocks[place]?.raw);
    return changed < 0 ? tokens.length : changed;
  }

  /** Put the blocks of the tokens in place of all blocks from `first` on. */
  #replaceFrom(first, tokens) {
    for (const block of this.#blocks.splice(first)) block.nodes.forEach((node) => node.remove());
    for (const token of tokens) {
      const nodes = drawBlock(token);
      this.element.append(...nodes);
      this.#blocks.push({ raw: token.raw, nodes });
    }
  }
}

/** More text can change the last block, and the one before it: a list goes on after a blank line. */
function indexOfOpenEnd(tokens) {
  let solid = 0;
  for (let place = tokens.length - 1; place > 0; place--) {
    if (tokens[place].type !== "space" && ++solid === 2) return place;
  }
  return 0;
}
