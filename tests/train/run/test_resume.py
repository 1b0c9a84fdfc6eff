"""A run in two parts: what `make test` has of `smollm3 train`. (Signals, kills, damage: the slow tests beside this.)"""

from runs import same_end, train


def test_stopping_and_going_on_changes_no_bit(whole, place):
    """T1."""
    run = place / "two"
    train(place, run, "run.steps=4")
    assert train(place, run, "--resume", "auto")["step"] == 8
    same_end(run, whole)
