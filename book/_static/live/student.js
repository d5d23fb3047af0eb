// The published student, run by ONNX Runtime Web in this browser. Nothing of it is loaded before the reader asks.
(() => {
  "use strict";
  const { make } = live;
  let session = null; // one for the page, however many widgets it has

  async function open() {
    const runtime = await import(`${live.folder}ort.wasm.bundle.min.mjs`);
    runtime.env.wasm.wasmPaths = { wasm: `${live.folder}ort-wasm-simd-threaded.wasm` };
    runtime.env.wasm.numThreads = 1; // several would need headers that a plain web server does not send
    const opened = await runtime.InferenceSession.create(`${live.folder}student_cnn.onnx`);
    let turn = Promise.resolve(); // a session answers one question at a time
    return (pixels, shape) => {
      const images = new runtime.Tensor("uint8", pixels, [1, ...shape]);
      turn = turn.then(() => opened.run({ images }));
      return turn.then(({ logits }) => Array.from(logits.data));
    };
  }

  // The pixels of a canvas as the network takes them: (H, W, RGB) uint8.
  function pixelsOf(canvas) {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return Uint8Array.from({ length: (3 * data.length) / 4 }, (_, i) => data[4 * Math.floor(i / 3) + (i % 3)]);
  }

  // A picture of any size: the square in its middle, on white, in the network's size.
  async function fitted(file, size) {
    let source = await createImageBitmap(file);
    let side = Math.min(source.width, source.height);
    let [x, y] = [(source.width - side) / 2, (source.height - side) / 2].map(Math.floor);
    for (;;) {
      // Halved until it fits: at one go some browsers would look at a few pixels only.
      const next = side > 2 * size ? Math.ceil(side / 2) : size;
      const canvas = live.canvas(next);
      const context = canvas.getContext("2d");
      context.fillStyle = "#fff";
      context.fillRect(0, 0, next, next);
      context.imageSmoothingQuality = "high";
      context.drawImage(source, x, y, side, side, 0, 0, next, next);
      if (next === size) return canvas;
      [source, side, x, y] = [canvas, next, 0, 0];
    }
  }

  // The part of the widget below the table. It calls column(text) to rename the student's column, ready() when the
  // student is there, and own(canvas) with a picture of the reader's. compute(canvas, recorded) gives the student's
  // logits, or null as long as it is not loaded.
  live.student = ({ data, open: unfolded, ready, own, column }) => {
    const status = make("p", { "aria-live": "polite", class: "live-status" });
    const summary = make("summary", {}, "Run the student itself, in your browser");
    const element = make("details", { class: "live-student", open: unfolded }, summary);

    if (location.protocol === "file:" || !live.runtime) {
      const why = live.runtime
        ? "A page that was opened as a file may not start it. Serve the site instead: run python -m http.server in " +
          "its folder, and open the address that it prints."
        : "This copy of the site was built without it. In a clone of the repository, make site adds it if npm is " +
          "there and finds a network.";
      element.append(make("p", {}, why));
      return { element, compute: () => null };
    }

    const megabytes = Math.round(live.runtime.bytes / 1e6);
    const start = make("button", { type: "button", click: load }, `Load the student (${megabytes} MB, once)`);
    const file = make("input", {
      type: "file",
      accept: "image/*",
      id: live.id(),
      click: () => (file.value = ""), // so that the same picture can be chosen again
      change: () => take(file.files[0]),
    });
    const drop = make(
      "div",
      { class: "live-drop", hidden: true, dragover: (event) => event.preventDefault(), drop: dropped },
      make("label", { for: file.id }, "A picture of your own, chosen or dropped here: "),
      file,
    );
    element.append(
      make(
        "p",
        {},
        "The probabilities above were recorded. With the student loaded they are computed here, on your device, for " +
          "the test images and for pictures of your own, which never leave your browser.",
      ),
      start,
      drop,
      status,
    );

    let run = null;
    async function load() {
      start.disabled = true;
      status.textContent = "Loading …";
      try {
        run = await (session ??= open());
      } catch (error) {
        session = null;
        start.disabled = false;
        status.textContent = `The student could not be loaded (${error.message}). Try again.`;
        return;
      }
      start.remove();
      drop.hidden = false;
      column("student, live");
      ready();
    }

    async function take(picture) {
      if (!picture) return;
      try {
        own(await fitted(picture, data.shape[0]));
      } catch {
        status.textContent = `${picture.name} is not a picture that this browser can read.`;
      }
    }
    function dropped(event) {
      event.preventDefault();
      take(event.dataTransfer.files[0]);
    }

    async function compute(canvas, recorded) {
      if (!run) return null;
      const began = performance.now();
      const logits = await run(pixelsOf(canvas), data.shape);
      const took = performance.now() - began;
      let note = "It knows ten classes only, and will name one of them whatever it sees.";
      if (recorded) {
        const furthest = Math.max(...logits.map((z, c) => Math.abs(z - recorded[c])));
        note = `No logit is further than ${(Math.ceil(1000 * furthest) / 1000).toFixed(3)} from the recorded one.`;
      }
      status.textContent = `Computed here in ${took.toFixed(0)} ms. ${note}`;
      return logits;
    }
    return { element, compute };
  };
})();
