import os
import signal

from smollm3_jax.train.run.stop import Stop


def test_a_signal_asks_and_handlers_come_back(caplog):
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    assert not stop.agreed()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM: stopping after this step; once more to stop at once" in caplog.text


def test_a_second_signal_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = Stop()
    stop(signal.SIGINT, None)
    stop(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]
