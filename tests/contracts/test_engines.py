"""What every engine promises, asked of each, on the real SmolLM2.

The fake, the oracle, and vLLM (CPU build) in one process and sharded over three.
"""

import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.engines.base import AdapterError
from actors.models.loading import load_base_model
from actors.models.source import ModelSource
from actors.models.weight_sharing import SharesAdapter, named_base_weights
from actors.rollout import RolloutWorker
from actors.types import AdapterLayout, Prompt, Request, Sampling
from benchmarks.common import sample_groups
from learner.model.policy import Policy
from tests.helpers.bench import Bench
from tests.helpers.learners import make_learner
from tests.helpers.presets import algorithm
from tests.helpers.rollouts import scored, table


def test_completions_agree_with_themselves(bench: Bench):
    bench.engine.load_adapter(bench.adapter(3))
    for c in bench.sample(tokens=5):
        assert 1 <= len(c.token_ids) <= 5 and len(c.logprobs) == len(c.token_ids)
        assert all(p <= 0 for p in c.logprobs)
        assert [(s.version, s.count) for s in c.version_spans] == [(3, len(c.token_ids))]
        assert (c.finish_reason == "length") == (c.token_ids[-1] not in (1, 2))


def test_the_same_seeds_give_the_same_completions(bench: Bench):
    bench.engine.load_adapter(bench.adapter(1))
    first = bench.sample(seed=5)
    assert [c.token_ids for c in bench.sample(seed=5)] == [c.token_ids for c in first]
    assert [c.token_ids for c in bench.sample(seed=50)] != [c.token_ids for c in first]


def test_unfinished_sequences_survive_an_update_and_their_rows_say_so(bench: Bench):
    bench.engine.load_adapter(bench.adapter(1))
    bench.engine.submit(
        [Request(f"r/{i}", bench.tokens("Count from one."), Sampling(1.0, 6, 100 + i)) for i in range(12)]
    )
    early = bench.engine.step() + bench.engine.step()
    bench.engine.load_adapter(bench.adapter(2))
    done = early + bench.finish()
    assert len(done) == 12
    spans = {c.request_id: [(s.version, s.count) for s in c.version_spans] for c in done}
    crossed = [s for s in spans.values() if len(s) == 2]
    assert crossed and all([version for version, _ in s] == [1, 2] for s in crossed)
    # What was waiting when the adapter changed has nothing of the old one.
    assert any(s[0][0] == 2 for s in spans.values())
    assert all(sum(n for _, n in spans[c.request_id]) == len(c.token_ids) for c in done)


def test_vllms_copy_of_the_adapter_is_what_was_loaded(vllm: Bench):
    adapter = vllm.adapter(1)
    vllm.engine.load_adapter(adapter)
    assert isinstance(vllm.engine, SharesAdapter)
    slots, layout = vllm.engine.adapter_slots(), adapter.layout
    for entry, slot in zip(layout.entries, slots, strict=True):
        scale = layout.scaling if entry.side == "B" else 1.0
        torch.testing.assert_close(slot, scale * entry.view(adapter.flat), atol=0, rtol=0)
    # What a learner writes there is what the engine samples from, as if it had been loaded.
    with torch.no_grad():
        for slot in slots:
            slot.mul_(0.5)
    halved = [c.logprobs for c in vllm.sample(temperature=0.0, tokens=4, count=2)]
    flat = 0.5 * adapter.flat
    vllm.engine.load_adapter(replace(adapter, version=2, flat=flat))
    assert [c.logprobs for c in vllm.sample(temperature=0.0, tokens=4, count=2)] == halved


def test_sequences_that_wait_for_room_in_the_cache_are_counted_and_sample_the_same(vllm: Bench, crowded: Bench):
    samples = {}
    for bench in (vllm, crowded):
        bench.engine.load_adapter(bench.adapter(1, seed=3))
        before = bench.engine.preemptions
        bench.engine.submit(
            [Request(f"w/{i}", bench.tokens(f"Count from {i}."), Sampling(0.0, 40, i)) for i in range(6)]
        )
        samples[bench] = sorted(bench.finish(), key=lambda c: c.request_id)
        assert (bench.engine.preemptions > before) == (bench is crowded)
    for alone, waited in zip(samples[vllm], samples[crowded], strict=True):
        assert waited.token_ids == alone.token_ids
        assert waited.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert [(s.version, s.count) for s in waited.version_spans] == [(1, len(waited.token_ids))]


@pytest.mark.parametrize("name", ["oracle", "vllm", "sharded"])
def test_a_stop_text_ends_a_completion_in_the_middle(name: str, request: pytest.FixtureRequest):
    """The rest of the batch goes on, and what ended is the beginning of what would have been sampled without it."""
    bench: Bench = request.getfixturevalue(name)
    bench.engine.load_adapter(bench.adapter(1))
    whole = bench.sample(temperature=0.0, tokens=12, count=1)[0]
    prefixes = [bench.tokenizer.decode(whole.token_ids[:count]) for count in range(13)]
    stop = prefixes[5].removeprefix(prefixes[3])  # two tokens long
    assert len(stop) > 1 and stop not in prefixes[4]
    sampling = [Sampling(0.0, 12, stop=(stop,)), Sampling(0.0, 12), Sampling(0.0, 12, stop=("<|im_end|>", "\0"))]
    requests = [Request(f"s/{i}", bench.tokens("What is 2 + 2?"), s) for i, s in enumerate(sampling)]
    bench.engine.submit(requests)
    stopped, *others = sorted(bench.finish(), key=lambda c: c.request_id)
    assert [c.token_ids for c in others] == [whole.token_ids] * 2
    assert (stopped.token_ids, stopped.text, stopped.finish_reason) == (whole.token_ids[:5], prefixes[5], "stop")
    assert stopped.logprobs == pytest.approx(whole.logprobs[:5], abs=1e-4)
    assert [(span.version, span.count) for span in stopped.version_spans] == [(1, 5)]


@pytest.mark.parametrize("damage", ["nan", "short"])
def test_refuses_a_bad_adapter_and_keeps_the_old_one(bench: Bench, damage: str):
    good = bench.adapter(1, seed=1)
    bench.engine.load_adapter(good)
    before = bench.sample(temperature=0.0, seed=7)
    flat = good.flat.clone()
    if damage == "nan":
        flat[3] = float("nan")
    bad = replace(good, version=2, flat=flat if damage == "nan" else flat[:-1])
    with pytest.raises(AdapterError):
        bench.engine.load_adapter(bad)
    after = bench.sample(temperature=0.0, seed=7)
    assert [c.token_ids for c in after] == [c.token_ids for c in before]
    assert after[0].version_spans[0].version == 1


def test_refuses_an_adapter_of_another_shape(oracle: Bench, vllm: Bench, sharded: Bench):
    entries = tuple(replace(e, module=e.module.replace("q_proj", "k_proj")) for e in oracle.layout.entries)
    for bench in (oracle, vllm, sharded):
        other = bench.adapter(1)
        with pytest.raises(AdapterError, match="other modules"):
            bench.engine.load_adapter(replace(other, layout=AdapterLayout(8, 16.0, entries)))


def test_vllm_and_the_oracle_say_the_same(oracle: Bench, vllm: Bench, sharded: Bench):
    for seed in (None, 3):
        adapter = oracle.adapter(1, seed=seed)
        oracle.engine.load_adapter(adapter)
        expected = oracle.sample(temperature=0.0, tokens=12, count=1)
        for bench in (vllm, sharded):
            bench.engine.load_adapter(adapter)
            assert bench.sample(temperature=0.0, tokens=12, count=1)[0].token_ids == expected[0].token_ids


def test_base_requests_beside_the_adapters_get_the_base_model(vllm: Bench):
    """The patched CPU kernel: stock vLLM gives a base request the adapter's output when they share a batch."""
    from vllm import SamplingParams

    engine: Any = vllm.engine
    engine.load_adapter(vllm.adapter(0))
    base = vllm.sample(temperature=0.0, count=1)[0]
    engine.load_adapter(vllm.adapter(1, seed=3))
    adapted = vllm.sample(temperature=0.0, count=1)[0]
    assert adapted.token_ids != base.token_ids
    prompt: Any = {"prompt_token_ids": list(vllm.tokens("What is 2 + 2?")), "cache_salt": "base"}
    params = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False)
    engine.submit([Request("with/0", vllm.tokens("What is 2 + 2?"), Sampling(0.0, 8, 0))])
    engine._start(engine._waiting.popleft())
    engine._engine.add_request("without", prompt, params)
    outputs = {}
    while engine._engine.has_unfinished_requests():
        outputs |= {o.request_id: tuple(o.outputs[0].token_ids) for o in engine._engine.step() if o.finished}
    engine._running.clear()
    engine._spans.finish("with/0", 1, len(outputs["with/0"]))
    assert outputs == {"with/0": adapted.token_ids, "without": base.token_ids}
    # And the adapter is still there after a batch without it.
    assert vllm.sample(temperature=0.0, count=1)[0].token_ids == adapted.token_ids


def test_the_shared_weights_are_the_models(shared: Bench, real: tuple[ModelSource, Any, Policy]):
    own, shared_weights = (named_base_weights(policy.lora.model) for policy in (real[2], shared.policy) if policy)
    assert own.keys() == shared_weights.keys()
    engine = shared.engine.base_weights()  # type: ignore[attr-defined]
    for name, tensor in own.items():
        weight = shared_weights[name]
        torch.testing.assert_close(weight, tensor, atol=0, rtol=0)
        assert isinstance(weight, torch.Tensor) and weight.data_ptr() == engine[name].data_ptr()


@pytest.mark.parametrize("name", ["oracle", "vllm", "shared", "sharded"])
def test_engine_and_learner_agree_before_and_after_updates(name: str, request: pytest.FixtureRequest):
    """Mean |difference| of log-probabilities <= 1e-3 in float32, with a warm prefix cache and prompts of many blocks.

    The adapter changes a lot between steps, so one token sampled from a stale cache block would show.
    """
    bench: Bench = request.getfixturevalue(name)
    policy = bench.policy
    assert policy is not None
    with torch.no_grad():
        policy.lora.flat.copy_(bench.adapter(0, seed=11, scale=0.03).flat)
    learner = make_learner(policy, algorithm(), learning_rate=0.02)
    worker = RolloutWorker(bench.engine, seed=1)
    prompts = [Prompt(i, "", bench.tokens(f"What is {i} + {i}?"), "", None, "") for i in range(2)]
    assert len(prompts[0].token_ids) > 128
    texts = []
    for _ in range(2):
        worker.load_adapter(learner.adapter())
        groups = []
        for _ in range(2):  # the second time, the prompts are in the prefix cache
            groups = sample_groups(worker, prompts, Sampling(1.0, 10), 4)
        stats = learner.step(table([scored(g) for g in groups]))
        assert 0 < stats.logprob_gap <= 1e-3
        assert stats.logprob_gap_max <= 1e-2
        texts.append([c.token_ids for g in groups for c in g.trajectories])
    assert texts[0] != texts[-1]
    with torch.no_grad():
        policy.lora.flat.zero_()


def test_the_exported_adapter_is_the_adapter_to_peft(oracle: Bench, real: tuple[ModelSource, Any, Policy], tmp_path):
    """What `write_peft_folder` writes, plain PEFT loads, and it says the same as the engine."""
    from peft import PeftModel

    from actors.models.peft_folder import write_peft_folder

    source, _, _ = real
    adapter = oracle.adapter(1, seed=3)
    oracle.engine.load_adapter(adapter)
    (expected,) = oracle.sample(temperature=0.0, count=1)
    write_peft_folder(tmp_path, adapter, base_model=source.path)
    base = load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)
    model = PeftModel.from_pretrained(base, str(tmp_path))
    ids = torch.tensor([oracle.tokens("What is 2 + 2?")])
    with torch.no_grad():
        generated = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    assert tuple(generated[0, ids.shape[1] :].tolist()) == expected.token_ids


def test_an_engine_that_lost_a_process_says_so_and_leaves_none(sharded: Bench):
    """The last test: it ends the engine."""
    engine: Any = sharded.engine
    ranks = [w.proc for w in engine._engine.engine_core.engine_core.model_executor.workers]
    engine.submit([Request("r/0", sharded.tokens("Count from one."), Sampling(1.0, 50, 1))])
    engine.step()
    os.kill(ranks[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError):
        while engine.unfinished:
            engine.step()
    for process in ranks:
        process.join(timeout=20)
    assert not any(process.is_alive() for process in ranks)
