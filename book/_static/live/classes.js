// The temperature over recorded logits (widget "temperature"), and the same with the student itself (widget "student").
(() => {
  "use strict";
  const { make } = live;

  // Temperatures that a reader would name, nearly even on a logarithmic scale.
  const temperatures = [];
  const until = (end, step) => {
    for (let T = temperatures.at(-1) ?? 1 - step; T < end - 1e-9; ) temperatures.push((T = +(T + step).toFixed(2)));
  };
  until(3, 0.1);
  until(6, 0.25);
  until(12, 0.5);
  until(20, 1);

  function slider(change) {
    const id = live.id();
    const shown = make("output", { for: id }, "");
    const set = (k) => {
      input.value = k;
      shown.textContent = `T = ${temperatures[k]}`;
      input.setAttribute("aria-valuetext", `T = ${temperatures[k]}`);
      change(temperatures[k]);
    };
    const last = temperatures.length - 1;
    const input = make("input", { id, type: "range", min: 0, max: last, input: () => set(+input.value) });
    const jumps = [1, 4, 20].map((T) =>
      make("button", { type: "button", click: () => set(temperatures.indexOf(T)) }, `T = ${T}`),
    );
    const label = make("label", { for: id }, "Temperature");
    return { element: make("div", { class: "live-slider" }, label, input, shown, ...jumps), set };
  }

  // The recorded images as canvases of their own size; pixels are exact, since a PNG loses nothing.
  async function pictures(data) {
    const sprite = new Image();
    sprite.src = data.pictures;
    await sprite.decode();
    const size = data.shape[0];
    return data.rows.map((_, k) => {
      const canvas = live.canvas(size, { "aria-hidden": "true" });
      const [x, y] = [k % data.columns, Math.floor(k / data.columns)];
      canvas.getContext("2d").drawImage(sprite, -x * size, -y * size);
      return canvas;
    });
  }

  async function widget({ withStudent, open = false }) {
    const data = live.cifar10;
    const names = data.class_names;
    const size = data.shape[0];
    const canvases = await pictures(data);
    const words = data.rows.map((_, k) => {
      const which = ["first", "second", "which the student gets wrong"][Math.floor(k / data.columns)];
      return `${names[data.labels[k]]}, ${which}`;
    });

    const state = { image: names.indexOf("cat"), T: 1, own: null, computed: null };
    const large = live.canvas(size, { class: "live-large", role: "img" });
    const title = make("p", { class: "live-title" });
    const table = live.probabilities("Probabilities, softened by T", names, ["teacher", "student"]);
    const said = live.announcer();

    function show() {
      const recorded = state.own ? null : state.image;
      const logits = [
        recorded === null ? null : data.teacher[recorded],
        state.computed ?? (recorded === null ? null : data.student[recorded]),
      ];
      const label = recorded === null ? null : data.labels[recorded];
      const softened = logits.map((z) => z && live.softmax(z, state.T));
      table.show(softened, label);
      large.getContext("2d").drawImage(state.own ?? canvases[state.image], 0, 0);
      large.setAttribute("aria-label", state.own ? "your picture" : `picture of a ${names[label]}`);
      const told = state.own ? ["As the student sees it"] : ["Label: ", make("strong", {}, names[label])];
      title.replaceChildren(...told);
      const sentence = (who, p) => `the ${who} gives ${names[live.argmax(p)]} ${live.percent(Math.max(...p))}`;
      const parts = ["teacher", "student"].flatMap((who, k) => (softened[k] ? [sentence(who, softened[k])] : []));
      said.say(`T = ${state.T}: ${parts.join(", ")}.`);
    }

    const picker = live.picker(
      "Test images of CIFAR-10, a column per class: the first two that the student gets right, " +
        "and the first that it gets wrong",
      data.columns,
      canvases.map((canvas, k) => ({ canvas, name: words[k] })),
      (k) => choose(k),
    );
    const temperature = slider((T) => {
      state.T = T;
      show();
    });
    const student =
      withStudent &&
      live.student({ data, open, own, ready: () => choose(state.image), column: (text) => table.name(1, text) });

    async function choose(k) {
      Object.assign(state, { image: k, own: null, computed: null });
      show();
      const computed = student && (await student.compute(canvases[k], data.student[k]));
      if (computed && state.image === k && !state.own) {
        state.computed = computed;
        show();
      }
    }
    async function own(canvas) {
      picker.select(null);
      Object.assign(state, { own: canvas, computed: null });
      show();
      const computed = await student.compute(canvas);
      if (state.own === canvas) {
        state.computed = computed;
        show();
      }
    }

    picker.select(state.image);
    temperature.set(0);
    const picture = make("div", { class: "live-picture" }, large, title);
    const body = make("div", { class: "live-body" }, picture, table.table);
    return [picker.element, temperature.element, body, said.element, ...(student ? [student.element] : [])];
  }

  live.widgets.temperature = () => widget({ withStudent: false });
  live.widgets.student = (settings) => widget({ withStudent: true, open: "open" in settings });
})();
