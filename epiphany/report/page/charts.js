// Elements and charts. Knows numbers; knows nothing of runs. No function here or elsewhere sets HTML.

const SVG = 'http://www.w3.org/2000/svg';
const WIDTH = 380, HEIGHT = 190, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 22;
// Characters that change how a text looks without being seen: they are shown by their code.
const HIDDEN = new RegExp('[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f' +
  '\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufe00-\\ufe0e\\ufeff\\uffa0\\ufff9-\\ufffb\\u{e0000}-\\u{e0fff}]', 'u');

function el(name, attributes, ...children) {
  const element = document.createElement(name);
  return filled(element, attributes, children);
}

function svg(name, attributes, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? '' : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}

// Text of a model: each hidden character is shown as its code.
function safeText(text) {
  const parts = [];
  let plain = '';
  for (const character of String(text)) {
    if (!HIDDEN.test(character)) { plain += character; continue; }
    if (plain) parts.push(plain);
    plain = '';
    const code = 'U+' + character.codePointAt(0).toString(16).toUpperCase().padStart(4, '0');
    parts.push(el('span', {class: 'hidden-character', title: 'a character that is not seen'}, code));
  }
  if (plain) parts.push(plain);
  return parts;
}

function shortNumber(value) {
  if (value === null || value === undefined) return '-';
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function ticksBetween(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw) || raw;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(i * step);
  return ticks;
}

// The mean of each value and its neighbors, over a twentieth of the curve.
function smoothed(values) {
  const reach = Math.floor(values.length / 40);
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((x) => x !== null);
    return near.reduce((sum, x) => sum + x, 0) / near.length;
  });
}

// `lines`: {label, color, steps, values, low, high}; low and high, a band around the values, may be missing.
function chart({name, note, lines, isSmooth}) {
  const readout = el('div', {class: 'readout'}, note);
  const points = lines.flatMap((line) => [...line.values, ...(line.low || []), ...(line.high || [])])
    .filter((value) => value !== null);
  const steps = lines.flatMap((line) => line.steps);
  let [low, high] = [Math.min(...points), Math.max(...points)];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (last === first ? 0.5 : (step - first) / (last - first));
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low));
  const drawing = svg('svg', {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img', 'aria-label': `${name}: ${note}`});
  for (const tick of ticksBetween(low, high, 4)) {
    drawing.append(svg('line', {class: 'grid', x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick)}));
    drawing.append(svg('text', {class: 'tick', x: LEFT - 6, y: y(tick) + 3.5, 'text-anchor': 'end'}, shortNumber(tick)));
  }
  for (const tick of ticksBetween(first, last, 5).filter(Number.isInteger)) {
    drawing.append(svg('text', {class: 'tick', x: x(tick), y: HEIGHT - 6, 'text-anchor': 'middle'}, String(tick)));
  }
  for (const line of lines) drawLine(drawing, line, x, y, isSmooth);
  const cursor = svg('line', {class: 'cursor', y1: TOP, y2: HEIGHT - BOTTOM, visibility: 'hidden'});
  drawing.append(cursor);
  const all = [...new Set(steps)].sort((a, b) => a - b);
  drawing.addEventListener('pointermove', (event) => {
    const box = drawing.getBoundingClientRect();
    const at = first + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first);
    const step = all.reduce((best, s) => Math.abs(s - at) < Math.abs(best - at) ? s : best, all[0]);
    for (const key of ['x1', 'x2']) cursor.setAttribute(key, x(step));
    cursor.setAttribute('visibility', 'visible');
    readout.replaceChildren(`step ${step}: `, ...lines.flatMap((line, i) => valueAt(line, step, i > 0)));
  });
  drawing.addEventListener('pointerleave', () => {
    cursor.setAttribute('visibility', 'hidden');
    readout.replaceChildren(note);
  });
  return el('figure', {class: 'chart', 'data-name': name}, el('figcaption', {}, name), drawing, readout);
}

function drawLine(drawing, line, x, y, isSmooth) {
  if (line.low) {
    const known = line.steps.map((_, i) => i).filter((i) => line.low[i] !== null);
    const edge = [...known.map((i) => [line.steps[i], line.high[i]]),
                  ...known.reverse().map((i) => [line.steps[i], line.low[i]])];
    drawing.append(svg('polygon', {
      points: edge.map(([step, value]) => `${x(step)},${y(value)}`).join(' '), fill: line.color, opacity: 0.15}));
  }
  if (isSmooth) {
    drawing.append(path(line.steps, line.values, x, y, {stroke: line.color, opacity: 0.25}));
    drawing.append(path(line.steps, smoothed(line.values), x, y, {stroke: line.color}));
    return;
  }
  drawing.append(path(line.steps, line.values, x, y, {stroke: line.color}));
  if (line.values.filter((value) => value !== null).length > 40) return;
  line.values.forEach((value, i) => {
    if (value !== null) drawing.append(svg('circle', {cx: x(line.steps[i]), cy: y(value), r: 2, fill: line.color}));
  });
}

function path(steps, values, x, y, attributes) {
  let data = '', isDown = false;
  values.forEach((value, i) => {
    if (value === null) { isDown = false; return; }
    data += `${isDown ? 'L' : 'M'}${x(steps[i]).toFixed(2)} ${y(value).toFixed(2)}`;
    isDown = true;
  });
  return svg('path', {d: data, fill: 'none', 'stroke-width': 1.6, ...attributes});
}

function valueAt(line, step, isLater) {
  const i = line.steps.indexOf(step);
  if (i < 0) return [];
  const text = line.values[i] === null ? '-' : String(line.values[i]);
  const label = el('span', {class: 'key'}, `${line.label} ${text}`);
  label.style.color = line.color;
  return [isLater ? ', ' : '', label];
}
