// What a reader can touch. A page has, in Markdown, with empty lines around what is there without JavaScript:
//
//   <link rel="stylesheet" href="../_static/live/live.css">
//   <div class="live" data-live="temperature">   or "digits", or "student", perhaps with data-open, which unfolds it
//
//   ![A picture](_static/live/temperature.png)
//
//   </div>
//   <script src="../_static/live/live.js" defer></script>
//
// The widget of that name takes the place of the div's content. No framework, and nothing from elsewhere.
(() => {
  "use strict";
  if (window.live) return; // a page may have several such divs, each with a script element
  const folder = new URL(".", document.currentScript.src).href;

  // The scripts of each widget, in order. They are scripts even where they hold data: a page that is opened as a
  // file may load a script, but may not fetch anything.
  const needs = {
    temperature: ["cifar10.js", "classes.js"],
    student: ["cifar10.js", "runtime.js", "student.js", "classes.js"],
    digits: ["digits.js", "pad.js"],
  };
  const live = (window.live = { folder, widgets: {} });

  const loading = {};
  live.script = (name) =>
    (loading[name] ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = folder + name;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${name} could not be loaded`));
      document.head.append(script);
    }));

  // An element: make("p", {id: "a"}, "text", child). Functions become listeners.
  live.make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };

  live.softmax = (logits, temperature = 1) => {
    const largest = Math.max(...logits); // it cancels, and keeps exp from overflowing
    const powers = logits.map((z) => Math.exp((z - largest) / temperature));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map((power) => power / sum);
  };

  live.argmax = (values) => values.indexOf(Math.max(...values));
  live.percent = (p) => (p < 0.00005 ? "<0.01 %" : `${(100 * p).toFixed(2)} %`);
  live.bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  let ids = 0;
  live.id = () => `live-${++ids}`;

  // A table of probabilities, a row per class and a column per network, with a bar behind each number.
  // Returns the element and a function that fills it: show({network: [p, …]}, {mark: row, note: "label"}).
  live.probabilities = (caption, classes, networks) => {
    const { make } = live;
    const cells = networks.map(() => classes.map(() => make("td", {}, make("span"))));
    const heads = networks.map((name, k) => make("th", { scope: "col", class: `live-of-${k}` }, name));
    const rows = classes.map((name, c) => {
      const head = make("th", { scope: "row" }, name);
      return make("tr", {}, head, ...cells.map((column) => column[c]));
    });
    const table = make(
      "table",
      { class: "live-table" },
      make("caption", {}, caption),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "class"), ...heads)),
      make("tbody", {}, ...rows),
    );
    const show = (columns, mark = null, note = "label") => {
      columns.forEach((probabilities, k) => {
        const best = probabilities && live.argmax(probabilities);
        cells[k].forEach((cell, c) => {
          cell.firstChild.textContent = probabilities ? live.percent(probabilities[c]) : "–";
          cell.style.setProperty("--share", probabilities ? probabilities[c] : 0);
          cell.className = `live-of-${k}${c === best ? " live-best" : ""}`;
        });
      });
      rows.forEach((row, c) => {
        row.classList.toggle("live-label", c === mark);
        row.firstChild.replaceChildren(classes[c], c === mark ? make("small", {}, ` ${note}`) : "");
      });
    };
    const name = (k, text) => (heads[k].textContent = text);
    return { table, show, name };
  };

  // A sentence for those who hear the page: it waits until the reader's hand rests.
  live.announcer = () => {
    const element = live.make("p", { class: "live-said", "aria-live": "polite" });
    let timer;
    const say = (text) => {
      clearTimeout(timer);
      timer = setTimeout(() => (element.textContent = text), 250);
    };
    return { element, say };
  };

  // Pictures to choose from, one radio button each, so that the arrow keys go through them.
  live.picker = (legend, columns, pictures, choose) => {
    const { make } = live;
    const group = live.id();
    const inputs = pictures.map(({ name }, k) =>
      make("input", { type: "radio", name: group, value: k, "aria-label": name, change: () => choose(k) }),
    );
    const grid = make(
      "div",
      { class: "live-pictures", style: `--columns: ${columns}` },
      ...pictures.map(({ canvas, name }, k) => make("label", { title: name }, inputs[k], canvas)),
    );
    const element = make("fieldset", {}, make("legend", {}, legend), grid);
    const select = (k) => inputs.forEach((input, i) => (input.checked = i === k));
    const selected = () => inputs.find((input) => input.checked)?.value ?? null;
    return { element, select, selected };
  };

  live.canvas = (size, attributes = {}) => {
    const canvas = live.make("canvas", { width: size, height: size, ...attributes });
    canvas.getContext("2d", { willReadFrequently: true }); // small pictures, whose pixels are read
    return canvas;
  };

  async function mount(place) {
    const name = place.dataset.live;
    for (const script of needs[name]) await live.script(script);
    place.replaceChildren(...(await live.widgets[name](place.dataset)));
    place.classList.add("live-ready");
  }
  for (const place of document.querySelectorAll("div.live[data-live]")) mount(place);
})();
