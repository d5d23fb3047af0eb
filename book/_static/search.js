// The search finds sections and quotes their prose. It replaces the step of Sphinx's search that finds whole pages;
// sections.js, written by tools/polish.py, holds [address, title, title of the page, text] of each.
"use strict";

const MOST = 30; // results that are listed

Search.hasIndex = () => true;

const searchWords = (query) => query.toLowerCase().match(/[\p{Letter}\p{Number}]+/gu) ?? [];

// Words match from their beginning: "distil" finds "distillation"; a plural finds its singular.
const matcher = (word) => new RegExp(`(?<![\\p{L}\\p{N}])${word.replace(/(?<=...)s$/, "")}`, "giu");

const scoreSection = ([address, title, page, text], words) => {
  let score = 0;
  for (const word of words) {
    const count = (where) => (where.match(matcher(word)) ?? []).length;
    const body = count(text);
    const own = count(title), of = count(page);
    if (!body && !own && !of) return 0; // every word has to be there
    const first = title === page; // the beginning of a page
    score += (own ? 12 : 0) + (of ? (first ? 10 : 4) : 0) + Math.min(body, 8) + (body * 200) / (text.length + 400);
  }
  return score;
};

const excerpt = (text, words) => {
  const hits = words.map((word) => text.search(matcher(word))).filter((at) => at >= 0);
  const at = hits.length ? Math.min(...hits) : 0;
  const start = at < 100 ? 0 : text.lastIndexOf(" ", at - 80) + 1;
  const end = start + 240 < text.length ? text.lastIndexOf(" ", start + 240) : text.length;
  return (start ? "… " : "") + text.slice(start, end) + (end < text.length ? " …" : "");
};

const mark = (element, text, words) => {
  const pattern = new RegExp(words.map((word) => matcher(word).source).join("|"), "giu");
  let end = 0;
  for (const { 0: hit, index } of text.matchAll(pattern)) {
    element.append(text.slice(end, index));
    element.append(Object.assign(document.createElement("mark"), { textContent: hit }));
    end = index + hit.length;
  }
  element.append(text.slice(end));
};

Search.query = (query) => {
  const words = searchWords(query);
  const found = Search.sections
    .map((section) => ({ section, score: words.length ? scoreSection(section, words) : 0 }))
    .filter(({ score }) => score > 0)
    .sort((a, b) => b.score - a.score);
  for (const { section: [address, title, page, text] } of found.slice(0, MOST)) {
    const item = document.createElement("li"), link = document.createElement("a"), quoted = document.createElement("p");
    link.href = address;
    link.textContent = title === page ? title : `${page} › ${title}`;
    quoted.className = "context";
    mark(quoted, excerpt(text, words), words);
    item.append(link, quoted);
    Search.output.append(item);
  }
  Search.stopPulse();
  Search.title.textContent = "Search results";
  const more = found.length > MOST ? `, the best ${MOST} of which are listed` : "";
  Search.status.textContent = found.length
    ? `${found.length} section${found.length > 1 ? "s" : ""} found${more}.`
    : "No section has all of these words.";
};
