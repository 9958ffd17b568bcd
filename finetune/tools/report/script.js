// A step under the pointer is read off in all charts at once.
const charts = [...document.querySelectorAll("[data-chart]")].map(figure => {
  const svg = figure.querySelector("svg"), output = figure.querySelector("output");
  const cursor = svg.querySelector(".cursor");
  return { svg, output, rest: output.innerHTML, cursor, ...JSON.parse(figure.dataset.chart) };
});
const nearest = (points, step) => points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
const show = step => charts.forEach(chart => {
  chart.cursor.style.visibility = step === null ? "hidden" : "visible";
  if (step === null) { chart.output.innerHTML = chart.rest; return; }
  const found = chart.curves.map(([style, points]) => nearest(points, step));
  chart.output.innerHTML = found.map((point, i) => `<span class="${chart.curves[i][0]}">${point[1]}</span>`).join(" · ")
    + ` <span class="muted">@ ${Math.round(found[found.length - 1][0])}</span>`;
  const x = chart.width * (chart.left + (chart.right - chart.left) * step / chart.last);
  chart.cursor.setAttribute("transform", `translate(${x} 0)`);
});
charts.forEach(chart => {
  chart.svg.addEventListener("pointermove", event => {
    const box = chart.svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - chart.left) / (chart.right - chart.left);
    show(Math.min(1, Math.max(0, share)) * chart.last);
  });
  chart.svg.addEventListener("pointerleave", () => show(null));
});
// Pictures follow the sound, and a click plays from there.
document.querySelectorAll(".sample").forEach(sample => {
  const sound = sample.querySelector("audio"), picture = sample.querySelector(".picture");
  const head = picture.querySelector(".playhead"), pane = sample.querySelector(".scroll");
  const words = [...picture.querySelectorAll(".word")], pixels = Number(picture.dataset.pixels);
  const draw = () => {
    const now = sound.currentTime, x = now * pixels;
    head.style.visibility = "visible";
    head.setAttribute("transform", `translate(${x} 0)`);
    words.forEach(word => word.classList.toggle("now", now >= word.dataset.start && now < word.dataset.end));
    if (!sound.paused) {
      pane.scrollLeft = x - pane.clientWidth / 2;
      requestAnimationFrame(draw);
    }
  };
  sound.addEventListener("play", () => {
    document.querySelectorAll("audio").forEach(other => other === sound || other.pause());
    draw();
  });
  sound.addEventListener("seeked", draw);
  picture.addEventListener("click", event => {
    sound.currentTime = (event.clientX - picture.getBoundingClientRect().left) / pixels;
    sound.play();
  });
});
