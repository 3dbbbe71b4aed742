"use strict";
// A tooltip on the charts: the step at the pointer, its stage, and the nearest value of each curve.
for (const plot of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(plot.dataset.chart);
  const [low, high, log] = chart.y;
  const make = (tag, style, parent) => {
    const made = document.createElement(tag);
    made.className = style;
    parent.append(made);
    return made;
  };
  const hair = make("div", "hair", plot);
  const box = make("div", "readout", plot);
  const dots = chart.series.map((s) => make("i", "spot " + s[1], plot));
  const fraction = (v) => (log ? Math.log(Math.max(v, low) / low) / Math.log(high / low) : (v - low) / (high - low));
  const show = (v) => (chart.percent ? (v * 100).toFixed(1) + " %" : String(Number(v.toPrecision(4))));
  const nearest = (xs, at) => {
    let a = 0;
    let b = xs.length - 1;
    while (a < b) {
      const mid = (a + b) >> 1;
      if (xs[mid] < at) a = mid + 1;
      else b = mid;
    }
    return a > 0 && at - xs[a - 1] < xs[a] - at ? a - 1 : a;
  };
  const hide = () => plot.classList.remove("over");
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointercancel", hide);
  plot.addEventListener("pointermove", (event) => {
    const area = plot.getBoundingClientRect();
    const at = Math.min(Math.max((event.clientX - area.left) / area.width, 0), 1) * chart.x;
    // Of all curves, the recorded step that is nearest to the pointer.
    const found = chart.series.map((s) => nearest(s[2], at));
    const steps = chart.series.map((s, i) => s[2][found[i]]);
    const step = steps.reduce((x, y) => (Math.abs(y - at) < Math.abs(x - at) ? y : x));
    const band = chart.bands.find((b) => step <= b[1]);
    box.replaceChildren();
    make("b", "", box).textContent = "step " + step.toLocaleString("en") + (band ? ", " + band[0] : "");
    chart.series.forEach((s, i) => {
      const value = s[3][found[i]];
      const line = make("div", "", box);
      make("i", "key " + s[1], line);
      line.append(s[0].split(",")[0] + " ");
      make("span", "", line).textContent = show(value);
      dots[i].style.left = (100 * steps[i]) / chart.x + "%";
      dots[i].style.top = 100 * (1 - fraction(value)) + "%";
    });
    hair.style.left = (100 * step) / chart.x + "%";
    const right = step > chart.x / 2;
    box.style.left = right ? "auto" : (100 * step) / chart.x + "%";
    box.style.right = right ? 100 - (100 * step) / chart.x + "%" : "auto";
    plot.classList.add("over");
  });
}
