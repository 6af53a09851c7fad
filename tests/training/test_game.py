"""The rules of the adversarial game on numbers alone."""

import json
import math

import numpy as np
import pytest

from lightning_tucodec.training.game import Alarms, Gate, RateController, Turn


@pytest.mark.parametrize(
    ("accuracy", "turn"),
    [
        (0.0, (True, False)),
        (0.7999, (True, False)),
        (0.8, (True, True)),
        (0.9499, (True, True)),
        (0.95, (False, True)),
        (1.0, (False, True)),
    ],
)
def test_the_gate_opens_at_its_thresholds(accuracy: float, turn: tuple[bool, bool]) -> None:
    assert Gate(accuracy=accuracy).turn == Turn(*turn)


def test_the_running_accuracy_moves_the_gate_through_its_three_states() -> None:
    gate = Gate()
    turns = []
    for _ in range(100):
        turns.append(gate.turn)
        gate.update(1.0)
    # a = 1 − 0.5 · 0.95ⁿ passes 0.8 after 18 and 0.95 after 45 batches.
    assert turns[:18] == [(True, False)] * 18
    assert turns[18:45] == [(True, True)] * 27
    assert set(turns[45:]) == {(False, True)}
    assert gate.streak == 55
    for _ in range(100):
        gate.update(0.5)
    assert gate.turn == (True, False)


def plant(control: RateController, disturbance: float) -> tuple[list[float], float]:
    """Rates of a codec that follows the factor's logarithm slowly, on crops of differing content.

    Returns:
        Rates over that of the frozen codec, and the mean rate of that one.
    """
    random = np.random.default_rng(1)
    moved, rates = 0.0, []
    for step in range(4000):
        moved += (disturbance - 0.5 * math.log(control.factor) - moved) / 200
        rates.append(math.exp(moved))
        content = 0.3 * math.exp(random.normal(0, 0.3))
        if control.due(step):
            control.update(content * rates[-1] * math.exp(random.normal(0, 0.02)), content)
    return rates, control.reference


@pytest.mark.parametrize("disturbance", [0.2, -0.2])
def test_the_controller_holds_a_rate_that_is_pushed_away(disturbance: float) -> None:
    rates, _ = plant(RateController(), disturbance)
    assert max(abs(rate - 1) for rate in rates[-2000:]) < 0.03
    free, _ = plant(RateController(gain=0.0, speed=0.0), disturbance)
    assert abs(free[-1] - 1) > 0.15


def test_a_named_target_is_reached() -> None:
    control = RateController(target=0.27)
    rates, reference = plant(control, 0.0)
    assert max(abs(rate * reference / 0.27 - 1) for rate in rates[-800:]) < 0.03
    assert abs(control.error) < 0.03


def test_the_factor_stays_within_bounds() -> None:
    control = RateController()
    assert control.factor == 1.0
    for _ in range(1000):
        control.update(50.0, 0.5)
    assert control.factor == pytest.approx(16, rel=0.01)


def test_alarms_sound_once_until_it_is_well_again() -> None:
    alarms, gate = Alarms(patience=10), Gate()
    lines = []
    for _ in range(30):
        gate.update(0.5)
        lines += alarms.update(gate, [0.0, 0.0, 0.0])
    assert len(lines) == 1
    assert "trained alone for 10 batches" in lines[0]
    gate.accuracy, gate.streak = 0.99, 0
    for _ in range(12):
        gate.update(1.0)
        lines += alarms.update(gate, [0.0, 0.0, 0.0])
    assert len(lines) == 2
    assert "the codec is trained alone" in lines[1]
    gate.accuracy, gate.streak = 0.9, 0
    assert alarms.update(gate, [0.0, 0.0, 0.0]) == []
    for _ in range(200):
        gate.accuracy = 0.9
        lines += alarms.update(gate, [0.0, -0.02, 0.001])
    assert len(lines) == 3
    assert "by +0.0, -1.6, +0.1 of 255" in lines[2]


def test_state_goes_through_json() -> None:
    for one in (
        Gate(accuracy=0.7, streak=3),
        RateController(0.3, ratio=1.1, observations=5),
        Alarms(),
    ):
        again = type(one)().load(json.loads(json.dumps(one.state())))
        assert again == one
