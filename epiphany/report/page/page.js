// The page: its sections from the content, which stands as JSON in the element #content.

const COLORS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8b6fd0', '#7a7a7a'];
const MANY_STEPS = 30;
const OTHERS = 'Everything else';

// Buttons of which one is pressed; `select` is called with its key, first with the first one's.
function tabs(entries, select) {
  const buttons = entries.map(([key, label]) => el('button', {type: 'button', onclick: () => press(key)}, label));
  const press = (key) => {
    buttons.forEach((button, i) => button.setAttribute('aria-pressed', String(entries[i][0] === key)));
    select(key);
  };
  if (entries.length) press(entries[0][0]);
  return el('div', {class: 'tabs'}, buttons);
}

function section(title, ...children) {
  return el('section', {class: 'part'}, el('h2', {}, title), ...children);
}

function colorOf(i) { return COLORS[i % COLORS.length]; }

function header(runs) {
  const run = runs[0], settings = run.settings, steps = run.curves.steps;
  const facts = [settings['model.path'], settings['algorithm.name'], settings['model.quantization'],
                 `step ${steps.length ? steps[steps.length - 1] : 0} of ${settings['run.steps']}`, ...run.machine];
  const legend = runs.length === 1 ? null : el('p', {class: 'legend'}, runs.map((of, i) => {
    const name = el('span', {class: 'key'}, `● ${of.name}  `);
    name.style.color = colorOf(i);
    return name;
  }));
  return el('header', {}, el('h1', {}, run.name),
    el('p', {class: 'note'}, facts.filter((fact) => fact && fact !== 'none').join(' · ')), legend);
}

function percent(value) { return value === null ? '-' : `${(100 * value).toFixed(1)}%`; }

function evaluationTable(runs) {
  const rows = runs.flatMap((run) => run.evaluations.flatMap((record) => ['greedy', 'sampled']
    .filter((kind) => record[kind]).map((kind) => {
      const of = record[kind];
      const right = of.lenient === null ? '-' : `${percent(of.lenient)} (${percent(of.low)} to ${percent(of.high)})`;
      return [...(runs.length > 1 ? [run.name] : []), kind, record.step, of.prompts, right, percent(of.strict),
              shortNumber(of.reward), shortNumber(of.mean_tokens), percent(of.truncated), of.unscorable || ''];
    })));
  return table([...(runs.length > 1 ? ['run'] : []), '', 'step', 'questions', 'right (95 % interval)', 'strict form',
                'mean reward', 'tokens', 'truncated', 'not scored'], rows);
}

function table(headings, rows) {
  return el('div', {class: 'scroll'}, el('table', {},
    el('thead', {}, el('tr', {}, headings.map((heading) => el('th', {}, heading)))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map((cell) => el('td', {dir: 'auto'}, safeText(cell))))))));
}

function evaluationCharts(runs) {
  return ['greedy', 'sampled'].map((kind) => {
    const lines = runs.map((run, i) => {
      const records = run.evaluations.filter((record) => record[kind]);
      const checks = records.some((record) => record[kind].lenient !== null);
      const [value, low, high] = checks ? ['lenient', 'low', 'high'] : ['reward', 'reward_low', 'reward_high'];
      const of = (key) => records.map((record) => record[kind][key] ?? null);
      return {label: run.name, color: colorOf(i), steps: records.map((record) => record.step), values: of(value),
              low: of(low), high: of(high), checks};
    }).filter((line) => line.values.some((x) => x !== null));
    if (!lines.length) return null;
    const what = lines[0].checks ? 'share of right answers' : 'mean reward';
    return chart({name: `held-out questions, ${kind}`, note: `${what}, with its 95 % interval`, lines});
  });
}

// The names of the curves of a section, with their notes: `a/*` stands for all names that begin with `a/`.
function namesOf(entries, runs) {
  const known = new Set(runs.flatMap((run) => Object.keys(run.curves.values)));
  return Object.entries(entries).flatMap(([name, note]) => name.endsWith('/*')
    ? [...known].filter((key) => key.startsWith(name.slice(0, -1))).map((key) => [key, note])
    : known.has(name) ? [[name, note]] : []);
}

function curveCharts(entries, runs, isSmooth) {
  return namesOf(entries, runs).map(([name, note]) => {
    const lines = runs.map((run, i) => ({label: run.name, color: colorOf(i), steps: run.curves.steps,
                                         values: run.curves.values[name] || run.curves.steps.map(() => null)}))
      .filter((line) => line.values.some((value) => value !== null));
    return lines.length ? chart({name: name.replaceAll('_', ' ').replaceAll('/', ': '), note, lines, isSmooth}) : null;
  });
}

function curveSections(sections, runs) {
  const known = Object.keys(Object.assign({}, ...Object.values(sections)));
  const covered = (name) => known.some((key) => key === name || (key.endsWith('/*') && name.startsWith(key.slice(0, -1))));
  const others = [...new Set(runs.flatMap((run) => Object.keys(run.curves.values)))].filter((name) => !covered(name));
  const grids = Object.entries(sections).map(([title, entries]) => [title, entries, el('div', {class: 'charts'})]);
  grids.push([OTHERS, Object.fromEntries(others.map((name) => [name, 'see docs/metrics.md'])),
              el('div', {class: 'charts'})]);
  const draw = (isSmooth) => grids.forEach(([, entries, grid]) => grid.replaceChildren(
    ...curveCharts(entries, runs, isSmooth).filter((drawn) => drawn !== null)));
  const hasMany = runs.some((run) => run.curves.steps.length > MANY_STEPS);
  const box = el('input', {type: 'checkbox', checked: hasMany, onchange: () => draw(box.checked)});
  draw(hasMany);
  return [el('label', {class: 'smooth'}, box, ' smooth the curves'),
          ...grids.filter(([, , grid]) => grid.children.length).map(([title, , grid]) => title !== OTHERS
            ? section(title, grid) : el('details', {class: 'part'}, el('summary', {}, title), grid))];
}

function timeTable(runs) {
  const share = (seconds, of) => of ? `${seconds.toFixed(1)} s (${percent(seconds / of)})` : '-';
  return table(['run', 'steps', 'of it sampling', 'of it learning', 'evaluations'], runs.map(({name, seconds}) => [
    name, `${seconds.steps.toFixed(1)} s`, share(seconds.sampling, seconds.steps), share(seconds.learning, seconds.steps),
    `${seconds.evaluations.toFixed(1)} s`]));
}

function warningList(runs) {
  const all = runs.flatMap((run) => run.warnings.map((warning) => ({...warning, run: run.name})));
  if (!all.length) return [el('p', {class: 'note'}, 'None.')];
  return all.map((warning) => el('article', {class: warning.is_current ? 'warning' : 'warning past'},
    el('h4', {}, warning.name, runs.length > 1 ? ` (${warning.run})` : ''),
    el('p', {}, safeText(warning.text)),
    el('p', {class: 'note'}, `in ${warning.steps} steps between ${warning.first} and ${warning.last}` +
      (warning.is_current ? ', and at the end' : ''))));
}

function settingsTable(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const shown = (value) => value === undefined ? '' : value === null ? 'null' :
    typeof value === 'object' ? JSON.stringify(value) : String(value);
  const rows = names.map((name) => [name, ...runs.map((run) => shown(run.settings[name]))]);
  const differing = rows.filter(([, ...values]) => new Set(values).size > 1);
  const headings = ['setting', ...runs.map((run) => run.name)];
  return [
    runs.length > 1 ? el('div', {}, el('h4', {}, 'What differs'), table(headings, differing)) : null,
    el('details', {}, el('summary', {}, `all ${rows.length} settings`), table(headings, rows)),
  ];
}

function plans(runs) {
  return runs.filter((run) => run.plan.length).map((run) => el('div', {},
    runs.length > 1 ? el('h4', {}, run.name) : null, el('pre', {}, safeText(run.plan.join('\n')))));
}

function main() {
  const content = JSON.parse(document.getElementById('content').textContent), runs = content.runs;
  const versions = runs.map((run) => [run.name, Object.entries(run.versions).map((pair) => pair.join(' ')).join(', ')]);
  const every = Math.max(...runs.map((run) => run.curves.every));
  document.body.append(
    header(runs),
    section('Held-out questions', el('div', {class: 'charts'}, evaluationCharts(runs)), evaluationTable(runs)),
    section('Warnings', warningList(runs)),
    content.answers ? section('The same questions, before and after', sideBySide(content.answers)) : '',
    ...curveSections(content.sections, runs),
    section('Where the time went', timeTable(runs), el('p', {class: 'note'},
      'Sampling: of the worker that sampled longest. It and learning overlap where runtime.max_staleness is over 0.')),
    content.rollouts.length ? section('Rollouts', rolloutViewer(content.rollouts, content.has_tokens)) : '',
    section('Settings', settingsTable(runs)),
    section('Plan, machine and versions', plans(runs), table(['run', 'versions'], versions),
      every > 1 ? el('p', {class: 'note'}, `Of the longest run, every ${every}th step is drawn.`) : null),
  );
}

main();
