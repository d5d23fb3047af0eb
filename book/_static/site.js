// What the pages do by themselves: enlarge a figure, print what is folded, keep the Tab key to what one wants to reach.
"use strict";

// A click or Enter on a figure shows it at its own size in a dialog, which Esc, a click or the button closes.
const enlarge = (link) => {
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  dialog.setAttribute("aria-label", "Figure");
  const image = link.querySelector("img").cloneNode();
  image.removeAttribute("style");
  // On a narrow screen, too, a figure is as wide as on a page that has room for it, and scrolls.
  image.style.width = `${Math.max(innerWidth - 64, Math.min(image.naturalWidth || 900, 900))}px`;
  const close = document.createElement("button");
  close.textContent = "Close";
  const box = document.createElement("div");
  box.tabIndex = 0;
  box.append(image);
  dialog.append(close, box);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => { dialog.remove(); link.focus(); });
  document.body.append(dialog);
  dialog.showModal();
};
document.querySelectorAll(".bd-article a.image-reference").forEach((link) =>
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab, as of any link
    event.preventDefault();
    enlarge(link);
  }));

// Solutions and code that are folded are printed, dark on white, and everything is as it was afterwards.
let folded = [];
let theme = null;
const unfold = () => {
  theme ??= document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  folded.push(...document.querySelectorAll(".bd-article details:not([open])"));
  folded.forEach((details) => (details.open = true));
};
const fold = () => {
  document.documentElement.dataset.theme = theme ?? document.documentElement.dataset.theme;
  theme = null;
  folded.forEach((details) => (details.open = false));
  folded = [];
};
addEventListener("beforeprint", unfold);
addEventListener("afterprint", fold);
matchMedia("print").addEventListener("change", (media) => (media.matches ? unfold() : fold()));

// Copy buttons are for the mouse: with one per cell, the Tab key would hardly get anywhere else.
addEventListener("load", () => document.querySelectorAll("button.copybtn").forEach((button) => (button.tabIndex = -1)));

// A formula that is wider than the page scrolls, and can be reached to do so; the theme does this for code and tables.
const reachFormulas = () => document.querySelectorAll("div.math mjx-container").forEach((formula) => {
  if (formula.scrollWidth > formula.clientWidth + 1) formula.tabIndex = 0;
  else formula.removeAttribute("tabindex");
});
addEventListener("load", () => window.MathJax?.startup?.promise?.then(reachFormulas));
addEventListener("resize", reachFormulas);
