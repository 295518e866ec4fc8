// Answers to read: the same questions before and after, and rollouts token by token.

const OUTCOMES = {
  won: 'wrong before, right after',
  lost: 'right before, wrong after',
  right: 'right before and after',
  wrong: 'wrong before and after',
  rose: 'more reward after than before',
  fell: 'less reward after than before',
  stayed: 'the same reward before and after',
};
// From here on a token is shaded fully.
const FULL_NATS = 4, FULL_GAP = 0.1;

function sideBySide(answers) {
  const box = el('div', {class: 'questions'});
  const shown = Object.keys(OUTCOMES).filter((name) => answers.counts[name]);
  const select = (name) => {
    const questions = answers.questions.filter((question) => question.outcome === name);
    const note = questions.length < answers.counts[name] ? `, of which ${questions.length} are shown` : '';
    box.replaceChildren(
      el('p', {class: 'note'}, `${answers.counts[name]} questions: ${OUTCOMES[name]}${note}.`),
      ...questions.map((question) => comparison(question, answers.steps)));
  };
  const buttons = tabs(shown.map((name) => [name, `${OUTCOMES[name]} (${answers.counts[name]})`]), select);
  return [buttons, box];
}

function comparison(question, steps) {
  return el('article', {class: 'question'},
    el('h4', {dir: 'auto'}, safeText(question.question)),
    question.reference ? el('p', {class: 'note'}, 'reference answer: ', safeText(question.reference)) : null,
    el('div', {class: 'columns'}, question.answers.map((answer, i) => el('section', {},
      el('h5', {}, i === 0 ? `before (step ${steps[i]})` : `step ${steps[i]}`, ' ', verdict(answer)),
      el('pre', {dir: 'auto'}, answer ? safeText(answer.text) : 'not asked')))));
}

function verdict(answer) {
  if (!answer) return null;
  if (answer.error) return el('span', {class: 'bad'}, safeText(`not scored: ${answer.error}`));
  if (answer.right === null) return el('span', {class: 'note'}, `reward ${shortNumber(answer.reward)}`);
  return answer.right >= 1 ? el('span', {class: 'good'}, '✓ right') : el('span', {class: 'bad'}, '✗ wrong');
}

function rolloutViewer(steps, hasTokens) {
  const box = el('div', {});
  let shading = 'logprobs', current = 0;
  const show = () => {
    const step = steps[current];
    box.replaceChildren(
      el('p', {class: 'note'}, `The first ${step.groups.length} of the ${step.of_groups} groups of step ${step.step}.`),
      ...step.groups.map((group) => groupOf(group, () => shading)));
  };
  const byStep = tabs(steps.map((step, i) => [i, `step ${step.step}`]), (i) => { current = i; show(); });
  if (!hasTokens) {
    return [el('p', {class: 'note'}, 'Tokens are not shown: the tokenizer of the model was not found.'), byStep, box];
  }
  const byShading = tabs([
    ['logprobs', 'shade by log-probability'], ['gap', 'shade by the gap between engine and learner'], ['', 'plain'],
  ], (name) => { shading = name; box.querySelectorAll('.answer').forEach((answer) => answer.repaint()); });
  return [byStep, byShading, box];
}

function groupOf(group, shading) {
  const rewards = group.answers.map((answer) => answer.reward).filter((reward) => reward !== null);
  const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
  return el('details', {class: 'group'},
    el('summary', {}, group.answers.map((answer) => rewardMark(answer, low, high)),
      el('span', {dir: 'auto'}, safeText(group.question.slice(0, 160)))),
    el('p', {class: 'question-text', dir: 'auto'}, safeText(group.question)),
    group.reference ? el('p', {class: 'note'}, 'reference answer: ', safeText(group.reference)) : null,
    group.answers.map((answer) => answerOf(answer, shading)),
    group.answers.length < group.of_answers
      ? el('p', {class: 'note'}, `${group.of_answers - group.answers.length} more answers are left out.`) : null);
}

function rewardMark(answer, low, high) {
  const mark = el('span', {class: 'mark', title: answer.error ? 'not scored' : `reward ${answer.reward}`});
  const share = answer.reward === null ? null : high === low ? 0.5 : (answer.reward - low) / (high - low);
  mark.style.background = share === null ? 'transparent' : `color-mix(in srgb, var(--good) ${100 * share}%, var(--bad))`;
  return mark;
}

function answerOf(answer, shading) {
  const terms = Object.entries(answer.terms).map(([name, value]) => `${name} ${shortNumber(value)}`).join(', ');
  const versions = answer.versions.length > 1 ? `, sampled from versions ${answer.versions.join(', ')}` : '';
  const details = el('details', {class: 'answer'},
    el('summary', {}, `sample ${answer.sample}: `,
      answer.error ? el('span', {class: 'bad'}, safeText(answer.error)) : `reward ${shortNumber(answer.reward)}`,
      el('span', {class: 'note'}, ` ${terms}; ${answer.tokens} tokens, ends by ${answer.finish_reason}${versions}`)));
  const isBuilt = () => details.children.length > 1;
  details.repaint = () => { if (isBuilt()) details.lastChild.replaceWith(textOf(answer, shading())); };
  details.addEventListener('toggle', () => {  // built when it is looked at
    if (details.open && !isBuilt()) details.append(textOf(answer, shading()));
  });
  return details;
}

function textOf(answer, shading) {
  if (!answer.pieces) return el('pre', {dir: 'auto'}, safeText(answer.text));
  const tokens = answer.pieces.map((piece, i) => token(piece, answer.logprobs[i], answer.policy_logprobs[i], shading));
  if (answer.left_out) {
    tokens.splice(answer.head, 0, el('span', {class: 'note'}, `\n[... ${answer.left_out} tokens are left out ...]\n`));
  }
  return el('pre', {dir: 'auto'}, tokens);
}

function token(piece, logprob, policyLogprob, shading) {
  const gap = logprob === null || policyLogprob === null ? null : policyLogprob - logprob;
  const told = logprob === null ? 'not sampled' : `log-probability ${logprob}` +
    (gap === null ? '' : `, of the learner ${policyLogprob} (gap ${gap.toFixed(4)})`);
  const element = el('span', {title: told, class: logprob === null ? 'given' : null}, safeText(piece));
  const strength = shading === 'gap' ? Math.abs(gap || 0) / FULL_GAP : shading ? -(logprob || 0) / FULL_NATS : 0;
  if (strength > 0.02) {
    const color = shading === 'gap' ? 'var(--gap)' : 'var(--unlikely)';
    element.style.background = `color-mix(in srgb, ${color} ${Math.round(70 * Math.min(1, strength))}%, transparent)`;
  }
  return element;
}
