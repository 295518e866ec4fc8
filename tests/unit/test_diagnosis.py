"""Each warning comes when it should, names a setting that exists, and a healthy run has none."""

import re
from typing import Any

import pytest

from conf.check import check_overrides
from report.diagnosis import RECENT, RULES, Diagnosis

HEALTHY = {
    "reward": 0.5, "no_signal_share": 0.3, "completion_tokens": 100.0, "truncated_share": 0.05, "entropy": 0.8,
    "reference_kl": 0.05, "clipped_share": 0.02, "mismatch": 0.01, "capped_share": 0.0, "lag": 0.0, "constant_share": 0.1,
    "constant_text": "7", "explained_variance": 0.3,
}  # fmt: skip


def diagnosed(**late: Any) -> dict[str, str]:
    """What is said after ten steps, of which the later half are changed."""
    diagnosis, found = Diagnosis(), {}
    for step in range(1, 11):
        found = diagnosis.add({"step": step, **HEALTHY, **(late if step > RECENT else {})})
    return found


def test_a_healthy_run_has_no_warnings():
    assert diagnosed() == {}
    absent = dict.fromkeys(("reference_kl", "clipped_share", "constant_share", "explained_variance"))
    assert diagnosed(**absent) == {}


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("no_signal", {"no_signal_share": 0.9}),
        ("entropy_collapse", {"entropy": 0.02}),
        ("length_explosion", {"completion_tokens": 400.0, "truncated_share": 0.5}),
        ("cut_off", {"truncated_share": 0.95}),
        ("kl_runaway", {"reference_kl": 2.0}),
        ("never_clipped", {"clipped_share": 0.0}),
        ("always_clipped", {"clipped_share": 0.9}),
        ("mismatch", {"mismatch": 0.3}),
        ("mismatch", {"capped_share": 0.2, "lag": 1.5}),
        ("constant_answers", {"constant_share": 0.9}),
        ("blind_critic", {"explained_variance": -0.5}),
    ],
)
def test_what_goes_wrong_is_said_with_a_setting_that_exists(name: str, late: dict[str, Any]):
    found = diagnosed(**late)
    assert list(found) == [name]
    settings = re.findall(r"\b(?:algorithm|learner|sampling|runtime|engine|model|data|reward)\.[a-z_]+", found[name])
    assert settings
    check_overrides([f"{key}=1" for key in settings])


def test_every_rule_is_tried():
    (marker,) = (
        m for m in test_what_goes_wrong_is_said_with_a_setting_that_exists.pytestmark if m.name == "parametrize"
    )
    assert {name for name, _ in marker.args[1]} == set(RULES)


def test_a_run_that_goes_on_remembers():
    rows = [{"step": step, **HEALTHY} for step in range(1, 6)]
    diagnosis = Diagnosis(rows)
    for step in range(6, 11):
        found = diagnosis.add({"step": step, **HEALTHY, "entropy": 0.01})
    assert list(found) == ["entropy_collapse"]
