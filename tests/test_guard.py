"""Which replies are out of bounds, what follows from it, and which checkpoint is the best."""

import json

import pytest

from finetune.args import TrainArgs
from finetune.guard import best_checkpoint, decide, find_violations

BASE = {
    "step": 0, "loss": 4.0, "free_silence": 0.5, "data_silence": 0.6, "free_words_per_minute": 60.0,
    "data_words_per_minute": 90.0, "free_repetition": 0.05, "data_repetition": 0.0, "free_treble": 0.01,
    "data_treble": 0.02, "free_tor_turn": 0.9, "data_tor_turn": 0.8, "free_turns": 10,
}  # fmt: skip


def violated(**measures):
    return [violation.measure for violation in find_violations({f"free_{k}": v for k, v in measures.items()}, BASE)]


def test_replies_like_the_base_the_data_or_between_are_in_bounds():
    assert not find_violations(BASE, BASE)
    recorded = {key.replace("data_", "free_"): value for key, value in BASE.items() if key.startswith("data_")}
    assert not find_violations(recorded, BASE)
    assert not violated(silence=0.55, words_per_minute=75.0, repetition=0.02, treble=0.015)


@pytest.mark.parametrize(
    ("measure", "inside", "outside"),
    [
        ("silence", 0.88, 0.95), ("silence", 0.22, 0.1), ("words_per_minute", 26.0, 20.0),
        ("words_per_minute", 180.0, 200.0), ("repetition", 0.28, 0.4), ("treble", 0.07, 0.1),
    ],
)  # fmt: skip
def test_replies_beyond_both_by_more_than_the_margin_are_out_of_bounds(measure, inside, outside):
    assert violated(**{measure: inside}) == [] and violated(**{measure: outside}) == [measure]


def test_few_turns_and_unknown_measures_are_not_judged():
    assert violated(tor_turn=0.0) == [] and violated(tor_turn=0.0, turns=8) == ["tor_turn"]
    assert violated(silence=None, flatness=0.9, loops=1.0) == []
    assert not find_violations({"free_silence": 1.0}, {})


def test_a_violation_names_measure_value_and_bounds():
    (violation,) = find_violations({"free_silence": 1.0}, BASE)
    assert "silence" in str(violation) and "1" in str(violation) and "0.2 to 0.9" in str(violation)


@pytest.fixture
def record(tmp_path):
    """A run folder with evaluations of (step, loss, measures), and checkpoints at some of the steps."""

    def make(*evaluations, checkpoints=()):
        rows = [BASE, *({"step": s, "loss": loss} | measures for s, loss, measures in evaluations)]
        for row in rows[1:]:
            row["violations"] = [v.measure for v in find_violations(row, BASE)]
        (tmp_path / "metrics.eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in checkpoints:
            (tmp_path / f"checkpoints/checkpoint_{step:06d}").mkdir(parents=True)
        return tmp_path

    return make


def arguments(**settings):
    return TrainArgs(data={}, run_dir="r", **settings)


MUTE = {"free_silence": 1.0, "free_words_per_minute": 0.0}
SILENT = {"free_silence": 1.0}


@pytest.mark.parametrize(
    ("evaluations", "acts"),
    [
        ([(10, 3.0, {})], False),
        ([(10, 3.0, MUTE)], True),  # two measures
        ([(10, 3.0, SILENT)], False),  # one may be chance
        ([(10, 3.0, SILENT), (20, 3.0, SILENT)], True),
        ([(10, 3.0, SILENT), (20, 3.0, {}), (30, 3.0, SILENT)], False),
        ([(10, 3.0, MUTE), (20, 3.0, {})], False),  # recovered
    ],
)
def test_when_the_guard_acts(record, evaluations, acts):
    folder, step = record(*evaluations, checkpoints=[10, 20]), evaluations[-1][0]
    decision = decide(folder, step, arguments(guard={"action": "stop"}), 0)
    assert decision.ends == decision.is_failure == acts
    assert not decide(folder, step, arguments(guard={"action": "warn"}), 0).ends
    assert not decide(folder, step + 1, arguments(guard={"action": "stop"}), 0).ends, "not evaluated yet"


def test_a_rollback_leads_to_the_newest_checkpoint_that_was_good(record):
    folder = record((10, 3.0, {}), (20, 3.0, {}), (30, 2.9, MUTE), checkpoints=[0, 10, 15, 25, 30])
    args = arguments(guard={"action": "rollback", "max_rollbacks": 2})
    decision = decide(folder, 30, args, 1)
    assert decision.back_to.name == "checkpoint_000015" and not decision.ends
    assert "silence" in decision.reason and "step 30" in decision.reason
    last = decide(folder, 30, args, 2)
    assert last.ends and last.is_failure and last.back_to is None and "checkpoint_000015" in last.reason


def test_without_a_good_checkpoint_a_rollback_ends_the_run(record):
    folder = record((10, 3.0, MUTE), checkpoints=[10])
    decision = decide(folder, 10, arguments(guard={"action": "rollback"}), 0)
    assert decision.ends and "no checkpoint" in decision.reason


def test_early_stop_counts_evaluations_since_the_best(record):
    folder = record((10, 3.0, {}), (20, 2.9, {}), (30, 2.95, {}), (40, 2.91, {}), checkpoints=[10])
    args = arguments(early_stop=2)
    assert not decide(folder, 30, args, 0).ends
    decision = decide(folder, 40, args, 0)
    assert decision.ends and not decision.is_failure and "step 20" in decision.reason
    assert not decide(folder, 40, arguments(), 0).ends


def test_the_best_checkpoint_has_sound_replies_and_then_the_lowest_loss(record):
    folder = record((10, 3.0, {}), (20, 2.9, {}), (30, 2.5, MUTE), (40, 2.8, {}), checkpoints=[0, 10, 20, 30])
    step, path, reason = best_checkpoint(folder)
    assert (step, path.name) == (20, "checkpoint_000020") and "2.9" in reason


def test_without_evaluated_checkpoints_there_is_no_best(record):
    assert best_checkpoint(record((10, 3.0, {}), checkpoints=[0, 5])) is None
