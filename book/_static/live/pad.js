// A drawing pad for a network that has never seen one of the digits (widget "digits"). It is a perceptron of 80,000
// weights, small enough to be run here, without a runtime.
(() => {
  "use strict";
  const { make } = live;
  const SIDE = 28; // pixels of the network's images
  const PAD = 280;
  const PEN = 22; // about as wide as the strokes of MNIST

  // logits of 28x28 values from 0 to 255, white on black; the same sums as kdlib's MLP
  function network({ layers, mean, std }) {
    const decoded = layers.map((layer) => ({ ...layer, weights: new Int8Array(live.bytes(layer.weights).buffer) }));
    return (pixels) => {
      let values = Array.from(pixels, (pixel) => (pixel / 255 - mean) / std);
      decoded.forEach(({ weights, scale, bias }, depth) => {
        values = bias.map((start, row) => {
          let sum = 0;
          for (let i = 0; i < values.length; i++) sum += weights[row * values.length + i] * values[i];
          const output = start + scale[row] * sum;
          return depth < decoded.length - 1 ? Math.max(0, output) : output;
        });
      });
      return values;
    };
  }

  // A drawing as MNIST has its digits: within 20x20 pixels, its centre of mass in the middle of 28x28. Null if empty.
  function centred(canvas) {
    const { data } = canvas.getContext("2d").getImageData(0, 0, PAD, PAD);
    let [left, top, right, bottom, mass, x, y] = [PAD, PAD, -1, -1, 0, 0, 0];
    for (let i = 0; i < PAD * PAD; i++) {
      const ink = data[4 * i];
      if (!ink) continue;
      const [column, row] = [i % PAD, Math.floor(i / PAD)];
      [left, right] = [Math.min(left, column), Math.max(right, column)];
      [top, bottom] = [Math.min(top, row), Math.max(bottom, row)];
      mass += ink;
      x += ink * (column + 0.5);
      y += ink * (row + 0.5);
    }
    if (!mass) return null;
    const scale = 20 / Math.max(right - left + 1, bottom - top + 1);
    const small = live.canvas(SIDE);
    const context = small.getContext("2d");
    context.fillRect(0, 0, SIDE, SIDE);
    context.imageSmoothingQuality = "high";
    context.drawImage(canvas, SIDE / 2 - (scale * x) / mass, SIDE / 2 - (scale * y) / mass, scale * PAD, scale * PAD);
    const values = context.getImageData(0, 0, SIDE, SIDE).data;
    return Uint8Array.from({ length: SIDE * SIDE }, (_, i) => values[4 * i]);
  }

  function paint(canvas, pixels) {
    const image = new ImageData(SIDE, SIDE);
    const values = pixels ?? new Uint8Array(SIDE * SIDE);
    values.forEach((value, i) => image.data.set([value, value, value, 255], 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  live.widgets.digits = async () => {
    const data = live.digits;
    const { digit } = data;
    const logits = network(data);
    const names = [...Array(10).keys()].map(String);
    let pixels = null; // what the network sees

    const pad = live.canvas(PAD, {
      class: "live-pad",
      role: "img",
      "aria-label": "Pad to draw a digit on with a mouse or a finger. With a keyboard, choose one of the images below.",
    });
    const pen = pad.getContext("2d");
    const seen = live.canvas(SIDE, { class: "live-seen", role: "img", "aria-label": "what the network sees" });
    const raise = make("input", { type: "checkbox", id: live.id(), change: show });
    const table = live.probabilities("Probabilities", names, ["network"]);
    const said = live.announcer();
    const figures = make("p", { class: "live-figures" });
    const clear = make("button", { type: "button", click: empty }, "Clear");

    const size = SIDE * SIDE;
    const bytes = live.bytes(data.samples);
    const samples = data.labels.map((label, k) => {
      const canvas = live.canvas(SIDE, { "aria-hidden": "true" });
      const values = bytes.slice(k * size, (k + 1) * size);
      paint(canvas, values);
      return { canvas, values, name: `a ${label}, test image ${data.rows[k]}` };
    });
    const picker = live.picker("… or take a test image of MNIST", samples.length / 2, samples, take);

    function take(k) {
      pixels = samples[k].values;
      pen.imageSmoothingEnabled = false;
      pen.drawImage(samples[k].canvas, 0, 0, PAD, PAD);
      show();
    }

    function show() {
      const b = raise.checked ? data.bias : 0;
      const raised = pixels && logits(pixels).map((z, c) => z + (c === digit ? b : 0));
      const probabilities = raised && live.softmax(raised);
      table.show([probabilities], digit, "never seen");
      paint(seen, pixels);
      const { digit: ofDigit, all } = data.test[raise.checked ? 1 : 0];
      const percent = (share) => `${(100 * share).toFixed(1)} %`;
      figures.textContent =
        `On the 10,000 test images of MNIST, with the bias ${raise.checked ? "raised" : "as trained"}: ` +
        `${percent(ofDigit)} of the ${digit}s are recognised; of all digits, ${percent(all)}.`;
      if (!probabilities) return said.say("Draw a digit.");
      const best = live.argmax(probabilities);
      said.say(`The network says ${best}, with ${live.percent(probabilities[best])}.`);
    }

    function empty() {
      pen.fillStyle = "#000";
      pen.fillRect(0, 0, PAD, PAD);
      pixels = null;
      picker.select(null);
      show();
    }

    // Drawing. A pointer is a mouse, a finger or a pen; a second finger is not primary, and its line would cross over
    // from the first. The pad may be shown smaller than it is.
    let last = null;
    const position = (event) => {
      const box = pad.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top].map((x) => (x * PAD) / box.width);
    };
    pad.addEventListener("pointerdown", (event) => {
      if (!event.isPrimary || event.button) return;
      if (picker.selected() !== null) empty(); // what is drawn does not mix with a test image
      pad.setPointerCapture(event.pointerId);
      last = position(event);
      draw(event);
    });
    pad.addEventListener("pointermove", (event) => last && event.isPrimary && draw(event));
    for (const end of ["pointerup", "pointercancel"]) {
      pad.addEventListener(end, (event) => event.isPrimary && (last = null));
    }
    function draw(event) {
      const next = position(event);
      Object.assign(pen, { strokeStyle: "#fff", lineWidth: PEN, lineCap: "round", lineJoin: "round" });
      pen.beginPath();
      pen.moveTo(...last);
      pen.lineTo(...next);
      pen.stroke();
      last = next;
      pixels = centred(pad);
      show();
    }

    const left = make(
      "div",
      { class: "live-picture" },
      make("p", { class: "live-title" }, "Draw a digit"),
      pad,
      make("div", { class: "live-under" }, clear, seen, make("small", {}, "what the network sees")),
    );
    const toggle = make(
      "p",
      { class: "live-toggle" },
      raise,
      make("label", { for: raise.id }, `Raise the bias of the ${digit} by ${data.bias}`),
    );
    const first = data.labels.indexOf(digit);
    picker.select(first);
    take(first);
    return [make("div", { class: "live-body" }, left, table.table), picker.element, toggle, said.element, figures];
  };
})();
