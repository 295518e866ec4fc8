"""Each warning comes when it should, names a setting that exists, and a healthy run has none."""

import re
from typing import Any

import pytest

from conf.overrides import check_overrides
from epiphany.report.diagnosis import RECENT, RULES, Diagnosis

HEALTHY = {
    "reward": 0.5,
    "reward_terms": {"math": 0.3, "tags": 0.2},
    "zero_variance_share": 0.3,
    "completion_tokens": 100.0,
    "truncated_share": 0.05,
    "entropy": 0.8,
    "reference_kl": 0.05,
    "clipped_share": 0.02,
    "logprob_gap": 0.01,
    "capped_share": 0.0,
    "staleness": 0.0,
    "unscorable_share": 0.01,
    "unscorable_error": None,
    "constant_share": 0.1,
    "constant_text": "7",
    "length_correlation": 0.1,
    "constant_terms": {},
    "explained_variance": 0.3,
}


def diagnosed(**late: Any) -> dict[str, str]:
    """The warnings after ten steps, of which the later half are changed."""
    diagnosis, warnings = Diagnosis(), {}
    for step in range(1, 11):
        warnings = diagnosis.add({"step": step, **HEALTHY, **(late if step > RECENT else {})})
    return warnings


def test_a_healthy_run_has_no_warnings():
    assert diagnosed() == {}
    absent = dict.fromkeys(("reference_kl", "clipped_share", "constant_share", "explained_variance"))
    assert diagnosed(**absent) == {}


def test_steps_that_trained_nothing_set_off_no_warning_of_what_they_did_not_measure():
    assert diagnosed(entropy=None, logprob_gap=None, capped_share=None, clipped_share=None) == {}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("no_signal", {"zero_variance_share": 0.9}),
    ("entropy_collapse", {"entropy": 0.02}),
    ("length_explosion", {"completion_tokens": 400.0, "truncated_share": 0.5}),
    ("truncated_answers", {"truncated_share": 0.95}),
    ("kl_runaway", {"reference_kl": 2.0}),
    ("never_clipped", {"clipped_share": 0.0}),
    ("always_clipped", {"clipped_share": 0.9}),
    ("logprob_gap", {"logprob_gap": 0.3}),
    ("logprob_gap", {"capped_share": 0.2, "staleness": 1.5}),
    ("rewarded_length", {"length_correlation": 0.7, "completion_tokens": 150.0}),
    ("rewarded_length", {"length_correlation": -0.7, "completion_tokens": 50.0}),
    ("unscored_answers", {"unscorable_share": 0.1, "unscorable_error": "ValueError: no number"}),
    ("constant_answers", {"constant_share": 0.9}),
    ("constant_terms", {"constant_terms": {"tags": 0.0}}),
    ("constant_terms", {"constant_terms": {"tags": 1.0}}),
    ("sacrificed_term", {"reward_terms": {"math": 0.1, "tags": 0.9}, "reward": 0.6, "completion_tokens": 20.0}),
    ("blind_critic", {"explained_variance": -0.5}),
]


@pytest.mark.parametrize(("name", "late"), CASES)
def test_what_goes_wrong_is_said_with_a_setting_that_exists(name: str, late: dict[str, Any]):
    warnings = diagnosed(**late)
    assert list(warnings) == [name]
    sections = "algorithm|learner|warmup|sampling|runtime|engine|model|data|reward"
    settings = re.findall(rf"\b(?:{sections})(?:\.[a-z_]+)+", warnings[name])
    assert settings
    check_overrides([f"{key}=1" for key in settings if key != "reward.terms"])


def test_a_term_that_falls_with_the_reward_is_not_called_sacrificed():
    assert diagnosed(reward_terms={"math": 0.1, "tags": 0.2}, reward=0.3) == {}
    assert diagnosed(reward_terms={"math": 0.2, "tags": 0.4}) == {}


def test_every_rule_is_tried():
    assert {name for name, _ in CASES} == set(RULES)


def test_a_resumed_run_remembers_its_first_steps():
    rows = [{"step": step, **HEALTHY} for step in range(1, 6)]
    diagnosis, warnings = Diagnosis(rows), {}
    for step in range(6, 11):
        warnings = diagnosis.add({"step": step, **HEALTHY, "entropy": 0.01})
    assert list(warnings) == ["entropy_collapse"]
