"use strict";
(() => {
  const tip = document.getElementById("tip");
  const LEVELS = 8, BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588";
  const number = value => value.toLocaleString("en-US");

  const level = (held, heads) =>
    held <= 0 ? 0 : held >= heads ? LEVELS : Math.min(LEVELS - 1, Math.ceil(LEVELS * held / heads));

  const unpack = async (packed, width) => {
    const bytes = Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const view = new DataView(await new Response(stream).arrayBuffer());
    const size = view.byteLength / width;
    return width === 2
      ? Uint16Array.from({ length: size }, (_, i) => view.getUint16(2 * i, true))
      : Uint32Array.from({ length: size }, (_, i) => view.getUint32(4 * i, true));
  };

  const place = span => {
    const box = span.getClientRects()[0] || span.getBoundingClientRect();
    const right = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const above = box.top - tip.offsetHeight - 7;
    tip.style.left = Math.max(8, Math.min(box.left + box.width / 2 - tip.offsetWidth / 2, right)) + "px";
    tip.style.top = (above > 0 ? above : box.bottom + 7) + "px";
  };

  const shade = async figure => {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const { seen, columns, layers, pieces } = data;
    const box = figure.querySelector(".text"), spans = [...box.querySelectorAll(":scope > span")];
    const slider = figure.querySelector("input"), out = figure.querySelector("output");
    const button = figure.querySelector(".moment button");
    const left = await unpack(data.left, data.bytes), total = left.length / columns;
    const starts = [0];
    pieces.forEach(size => starts.push(starts[starts.length - 1] + size));
    const index = new Map(spans.map((span, i) => [span, i]));
    let step = data.start, current = -1, waiting = false;

    const count = (first, end, from, to) => {
      let held = 0;
      for (let i = first; i < end; i++)
        for (let c = from; c < to; c++) if (left[i * columns + c] > step) held++;
      return held;
    };
    const asked = data.asked === null ? -1 : seen.filter(one => one <= data.asked).length - 1;

    const show = () => {
      waiting = false;
      step = +slider.value;
      spans.forEach((span, i) => {
        const first = starts[i], end = Math.min(starts[i + 1], seen[step]);
        const kind = end > first ? "s" + level(count(first, end, 0, columns), (end - first) * columns) : "u";
        const old = span.classList[0];
        if (old !== kind) span.classList.replace(old, kind);
      });
      const now = `${number(seen[step])} of ${number(total)}`;
      out.textContent = now + (step === asked ? ", when the answer was asked for" : "");
      slider.setAttribute("aria-valuetext", now + " tokens read");
      if (current >= 0) tell(current);
    };

    const perLayer = (first, end) => {
      const heads = columns / layers.length, whole = (end - first) * heads;
      const held = layers.map((_, i) => count(first, end, i * heads, (i + 1) * heads));
      if (layers.length <= 8)
        return layers.map((name, i) => `layer ${name}: ${Math.round(100 * held[i] / whole)} %`).join("\n");
      const bars = held.map(one => one ? BARS[Math.min(7, Math.ceil(8 * one / whole) - 1)] : "\u00b7").join("");
      return `layers ${layers[0]} to ${layers[layers.length - 1]}: ${bars}`;
    };

    const tell = i => {
      const first = starts[i], last = starts[i + 1], end = Math.min(last, seen[step]);
      const lines = [last - first > 1 ? `positions ${number(first)} to ${number(last - 1)}` : `position ${number(first)}`];
      if (end <= first) lines.push("not read yet");
      else {
        const held = count(first, end, 0, columns), whole = (end - first) * columns, share = held / whole;
        const heads = share * data.heads;
        const exact = columns === data.heads && end - first === 1;
        const some = exact ? number(held) : (share ? "about " : "") + number(Math.round(10 * heads) / 10);
        lines.push(`held by ${some} of ${number(data.heads)} heads (${Math.round(100 * share)} %)`);
        if (layers.length) lines.push(perLayer(first, end));
      }
      const all = left.subarray(first * columns, last * columns).filter(one => one < seen.length);
      if (!all.length) lines.push("never let go");
      else {
        const [low, high] = [Math.min(...all), Math.max(...all)].map(one => number(seen[one]));
        const rest = (last - first) * columns - all.length;
        const when = low === high ? `let go at ${low} tokens read` : `let go from ${low} to ${high} tokens read`;
        lines.push(rest ? `${when}; ${Math.round(100 * rest / (all.length + rest))} % of heads hold it to the end` : when);
      }
      tip.textContent = lines.join("\n");
      tip.hidden = false;
      place(spans[i]);
    };
    const point = i => {
      if (current >= 0) spans[current].classList.remove("now");
      current = i;
      if (i < 0) { tip.hidden = true; return; }
      spans[i].classList.add("now");
      tell(i);
    };

    slider.max = seen.length - 1;
    slider.value = step;
    slider.disabled = false;
    slider.addEventListener("input", () => { if (!waiting) { waiting = true; requestAnimationFrame(show); } });
    if (button) button.addEventListener("click", () => { slider.value = asked; show(); });
    box.addEventListener("pointerover", event => { if (index.has(event.target)) point(index.get(event.target)); });
    box.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") point(-1); });
    box.addEventListener("blur", () => point(-1));
    box.addEventListener("scroll", () => { if (current >= 0 && !tip.hidden) place(spans[current]); });
    box.addEventListener("keydown", event => {
      const next = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (event.key === "Escape") point(-1);
      if (!spans[next]) return;
      event.preventDefault();
      spans[next].scrollIntoView({ block: "nearest" });
      point(next);
    });
    document.addEventListener("scroll", () => { if (current >= 0 && !tip.hidden) place(spans[current]); }, { passive: true });
    show();
    const answer = box.querySelector(".a");
    if (answer) box.scrollTop = answer.offsetTop - box.offsetTop - box.clientHeight / 2;
  };

  const sortable = table => {
    const body = table.tBodies[table.tBodies.length - 1];
    table.querySelectorAll("thead button").forEach(button => button.addEventListener("click", () => {
      const head = button.closest("th"), column = head.cellIndex;
      const way = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      table.querySelectorAll("thead th").forEach(one => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way);
      const key = row => row.cells[column].dataset.value;
      const sign = way === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined || y === undefined) return sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (x - y);
      });
      body.append(...rows);
    }));
  };

  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("figure.shaded").forEach(figure => {
    const start = () => shade(figure).catch(error => {
      figure.querySelector("output").textContent += ` (this browser cannot move the slider: ${error.message})`;
    });
    const fold = figure.closest("details");
    if (!fold || fold.open) start();
    else fold.addEventListener("toggle", start, { once: true });
  });
})();
