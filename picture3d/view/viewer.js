// A small point cloud viewer on a 2-D canvas: drag to turn, pinch or buttons to zoom, one button per way of looking.
(() => {
  "use strict";
  const host = document.getElementById("viewer");
  const source = document.getElementById("scenes");
  if (!host || !source) return;
  const scenes = JSON.parse(source.textContent).map(unpack);
  if (!scenes.length) return;

  const stage = host.querySelector(".stage");
  const controls = host.querySelector(".controls");
  const still = stage.querySelector(".still");
  const canvas = element("canvas", { tabIndex: 0 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "LiDAR sweep in three dimensions. Arrow keys turn it, plus and minus zoom.");
  const context = canvas.getContext("2d");
  if (!context) return;
  stage.append(canvas);

  const NIGHT = [13, 18, 25];
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const state = { scene: 0, mode: null, onlyMistakes: false, turning: !calm, visible: true };
  const camera = { yaw: 0, pitch: 0.36, distance: 44 };
  let width = 0, height = 0, pixels = null, words = null, depth = null;
  let shown = null, from = null, to = null, fadeStart = 0, scheduled = false, lastTime = 0;

  // Unpacking ---------------------------------------------------------------------------------------------------------
  function bytes(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  function positions(text, range) {
    const view = new DataView(bytes(text).buffer), out = new Float32Array(view.byteLength / 2);
    for (let i = 0; i < out.length; i++) out[i] = view.getInt16(2 * i, true) / 32767 * range;
    return out;
  }
  function unpack(scene) {
    const modes = scene.modes.map((mode) => {
      const palette = bytes(mode.palette), index = bytes(mode.index), rgb = new Uint8Array(3 * index.length);
      for (let i = 0; i < index.length; i++) for (let c = 0; c < 3; c++) rgb[3 * i + c] = palette[3 * index[i] + c];
      const extra = mode.extra && { ...mode.extra, xyz: positions(mode.extra.xyz, scene.range) };
      return { ...mode, rgb, extra };
    });
    return { ...scene, xyz: positions(scene.xyz, scene.range), known: scene.known && bytes(scene.known), modes };
  }

  // Choosing what is shown --------------------------------------------------------------------------------------------
  function element(name, properties, ...children) {
    const made = Object.assign(document.createElement(name), properties || {});
    made.append(...children);
    return made;
  }
  const scene = () => scenes[state.scene];
  const mode = () => scene().modes.find((m) => m.key === state.mode) || scene().modes[0];

  function wantedColors() {
    const chosen = mode();
    const truth = scene().modes.find((m) => m.key === "truth");
    if (!chosen.prediction || !state.onlyMistakes || !truth) return chosen.rgb;
    const out = new Uint8Array(chosen.rgb.length), known = scene().known;
    for (let i = 0; i < out.length; i += 3) {
      const same = chosen.rgb[i] === truth.rgb[i] && chosen.rgb[i + 1] === truth.rgb[i + 1] && chosen.rgb[i + 2] === truth.rgb[i + 2];
      const color = known && !known[i / 3] ? [40, 46, 54] : same ? [62, 72, 84] : [255, 92, 92];
      out[i] = color[0]; out[i + 1] = color[1]; out[i + 2] = color[2];
    }
    return out;
  }
  function show(fade) {
    const wanted = wantedColors();
    from = fade && !calm && shown && shown.length === wanted.length ? shown.slice() : wanted;
    to = wanted;
    shown = from.slice();
    fadeStart = performance.now();
    tell();
    draw();
  }
  function tell() {
    const chosen = mode();
    for (const button of controls.querySelectorAll("[data-mode]")) button.setAttribute("aria-pressed", String(button.dataset.mode === chosen.key));
    const told = controls.querySelector(".told");
    told.replaceChildren(element("p", { textContent: chosen.caption }));
    if (chosen.prediction && scene().modes.some((m) => m.key === "truth")) {
      const box = element("input", { type: "checkbox", checked: state.onlyMistakes });
      box.addEventListener("change", () => { state.onlyMistakes = box.checked; show(true); controls.querySelector(".only input").focus({ preventScroll: true }); });
      told.firstChild.append(element("br"), element("label", { className: "only" }, box, "show only mistakes"));
    }
    let legend = chosen.legend;
    if (chosen.prediction && state.onlyMistakes) legend = [["wrong", "#ff5c5c"], ["right", "#3e4854"]];
    if (legend) {
      told.append(element("ul", { className: "legend" }, ...legend.map(([name, color]) => {
        const patch = element("i");
        patch.style.background = color;
        return element("li", {}, patch, name);
      })));
    } else if (chosen.ramp) {
      told.append(element("div", { className: "ramp" }, chosen.ramp[0], element("i"), chosen.ramp[1]));
    }
  }
  function buildControls() {
    const groups = element("div", { className: "groups" });
    for (const name of new Set(scene().modes.map((m) => m.group))) {
      const buttons = scene().modes.filter((m) => m.group === name).map((m) => {
        const button = element("button", { type: "button", textContent: m.label });
        button.dataset.mode = m.key;
        button.addEventListener("click", () => { state.mode = m.key; show(true); });
        return button;
      });
      groups.append(element("div", { className: "group" }, element("span", { textContent: name }), element("div", {}, ...buttons)));
    }
    controls.replaceChildren(groups, element("div", { className: "told" }));
  }

  // Camera ------------------------------------------------------------------------------------------------------------
  function aim() { camera.yaw = (scene().heading - 24) * Math.PI / 180; }
  function settle() { state.turning = false; if (hint) hint.style.opacity = 0; }
  function zoom(factor) { camera.distance = Math.min(120, Math.max(6, camera.distance * factor)); settle(); draw(); }
  function turn(dx, dy) {
    camera.yaw -= dx;
    camera.pitch = Math.min(1.55, Math.max(0.03, camera.pitch + dy));
    settle();
    draw();
  }
  const pointers = new Map();
  canvas.addEventListener("pointerdown", (event) => { pointers.set(event.pointerId, event); canvas.setPointerCapture(event.pointerId); });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    if (pointers.size === 1) turn((event.clientX - before.clientX) * 0.006, (event.clientY - before.clientY) * 0.005);
    else if (pointers.size === 2) {
      const other = [...pointers.entries()].find(([id]) => id !== event.pointerId)[1];
      const apart = (a) => Math.hypot(a.clientX - other.clientX, a.clientY - other.clientY) + 1;
      zoom(apart(before) / apart(event));
    }
    pointers.set(event.pointerId, event);
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // plain scrolling belongs to the page
    event.preventDefault();
    zoom(Math.exp(event.deltaY * 0.005));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0.12, 0], ArrowRight: [-0.12, 0], ArrowUp: [0, 0.08], ArrowDown: [0, -0.08] }[event.key];
    if (step) { turn(...step); event.preventDefault(); }
    if (event.key === "+" || event.key === "=") zoom(0.85);
    if (event.key === "-") zoom(1.18);
  });

  // Drawing -----------------------------------------------------------------------------------------------------------
  function resize() {
    const box = canvas.getBoundingClientRect();
    if (!box.width || !box.height) return;
    const scale = Math.min(window.devicePixelRatio || 1, 2, Math.sqrt(1.6e6 / (box.width * box.height)));
    width = Math.max(1, Math.round(box.width * scale));
    height = Math.max(1, Math.round(box.height * scale));
    canvas.width = width;
    canvas.height = height;
    pixels = context.createImageData(width, height);
    words = new Uint32Array(pixels.data.buffer);
    depth = new Float32Array(width * height);
    paint(performance.now());
  }
  function draw() {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame((now) => { scheduled = false; paint(now); });
  }

  function paint(now) {
    if (!pixels || !shown || !state.visible) return;
    const passed = Math.min(50, now - lastTime);
    lastTime = now;
    let moving = false;
    if (state.turning) { camera.yaw += passed * 0.00006; moving = true; }
    if (from !== to) {
      const share = Math.min(1, (now - fadeStart) / 320);
      for (let i = 0; i < shown.length; i++) shown[i] = from[i] + (to[i] - from[i]) * share;
      if (share === 1) from = to;
      moving = true;
    }
    words.fill(0xff000000 | NIGHT[2] << 16 | NIGHT[1] << 8 | NIGHT[0]);
    depth.fill(Infinity);
    const chosen = mode();
    splat(scene().xyz, shown, null, 0.11, 2.0);
    if (chosen.extra) splat(chosen.extra.xyz, null, chosen.extra.color, 0.07, 1.6);
    context.putImageData(pixels, 0, 0);
    still.style.visibility = "hidden";
    if (moving) draw();
  }

  function splat(xyz, colors, fixed, size, least) {
    const cy = Math.cos(camera.yaw), sy = Math.sin(camera.yaw), cp = Math.cos(camera.pitch), sp = Math.sin(camera.pitch);
    const fx = cy * cp, fy = sy * cp, fz = -sp, rx = sy, ry = -cy, dx = -cy * sp, dy = -sy * sp, dz = -cp;
    const ex = -fx * camera.distance, ey = -fy * camera.distance, ez = -2 - fz * camera.distance;
    const focal = Math.max(width, height * 1.25) / 2 / Math.tan(24 * Math.PI / 180);
    const scale = Math.max(width / 1400, 0.55) * 1.0, small = least * Math.max(1, scale * 1.15), large = 9 * Math.max(1, scale);
    const mx = width / 2, my = height * 0.47;
    for (let i = 0, n = xyz.length; i < n; i += 3) {
      const x = xyz[i] - ex, y = xyz[i + 1] - ey, z = xyz[i + 2] - ez;
      const far = fx * x + fy * y + fz * z;
      if (far < 0.4) continue;
      const inverse = focal / far;
      const u = mx + (rx * x + ry * y) * inverse, v = my + (dx * x + dy * y + dz * z) * inverse;
      if (u < -9 || v < -9 || u > width + 9 || v > height + 9) continue;
      const radius = Math.min(large, Math.max(small, size * inverse)) / 2;
      const clear = Math.exp(-1.1 * Math.pow(far / 130, 1.5)), fog = 1 - clear;
      const r = (fixed ? fixed[0] : colors[i]) * clear + NIGHT[0] * fog;
      const g = (fixed ? fixed[1] : colors[i + 1]) * clear + NIGHT[1] * fog;
      const b = (fixed ? fixed[2] : colors[i + 2]) * clear + NIGHT[2] * fog;
      const word = 0xff000000 | b << 16 | g << 8 | r;
      const top = Math.max(0, Math.round(v - radius)), bottom = Math.min(height - 1, Math.round(v + radius) - 1);
      for (let row = top; row <= bottom; row++) {
        const off = row + 0.5 - v, half = radius > 1.4 ? Math.sqrt(Math.max(0.2, radius * radius - off * off)) : radius;
        const begin = Math.max(0, Math.round(u - half)), end = Math.min(width - 1, Math.round(u + half) - 1);
        for (let at = row * width + begin, last = row * width + end; at <= last; at++) {
          if (far < depth[at]) { depth[at] = far; words[at] = word; }
        }
      }
    }
  }

  // Beginning ---------------------------------------------------------------------------------------------------------
  const hint = element("span", { className: "hint", textContent: "Drag to turn. Ctrl and scroll, or the buttons, to zoom." });
  const zooms = element("div", { className: "zoom" });
  for (const [label, name, factor] of [["+", "Zoom in", 0.8], ["−", "Zoom out", 1.25]]) {
    const button = element("button", { type: "button", className: "plain", textContent: label });
    button.setAttribute("aria-label", name);
    button.addEventListener("click", () => zoom(factor));
    zooms.append(button);
  }
  const corner = element("div", { className: "corner" });
  if (scenes.length > 1) {
    const choice = element("select", {}, ...scenes.map((s, i) => element("option", { value: String(i), textContent: s.name })));
    choice.setAttribute("aria-label", "Sweep");
    choice.addEventListener("change", () => { state.scene = Number(choice.value); shown = null; aim(); buildControls(); show(false); });
    corner.append(choice);
  }
  corner.append(hint);
  stage.append(corner, zooms);
  state.mode = (scene().modes.find((m) => m.key === "truth") || scene().modes[0]).key;
  aim();
  buildControls();
  new ResizeObserver(resize).observe(canvas);
  new IntersectionObserver(([entry]) => { state.visible = entry.isIntersecting; if (state.visible) draw(); }).observe(stage);
  resize();
  show(false);
})();
