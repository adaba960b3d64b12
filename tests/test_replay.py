"""Replays and threads change no bit, and what cannot be replayed is computed and reported."""

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from metalearn.engine import process, replay, threads
from metalearn.run import scoring
from metalearn.run.step import Training


@pytest.mark.parametrize("meta_batch", [1, 4])
def test_threads_change_no_bit_of_pooled_blocks(meta_batch, library, make_run, monkeypatch):
    monkeypatch.setattr(process, "ALL_THREADS", 2)
    states = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            run = make_run("algo=protonet", f"train.meta_batch={meta_batch}", "train.steps=4")
            torch.set_num_threads(count)
            states.append(trained(run, 3, []).state.params)
        finally:
            torch.set_num_threads(1)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def trained(run, steps, notes):
    training = Training(run)
    training.note = notes.append
    for _ in range(steps):
        training.meta_step()
        training.count()
    return training


@pytest.mark.parametrize(
    "name",
    [
        "maml",
        "protonet",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("reptile", "proto_maml")),
    ],
)
def test_replay_and_threads_change_no_bit(name, either, make_run, monkeypatch):
    make = functools.partial(
        make_run, f"algo={name}", "train.meta_batch=4", "train.steps=6", "engine.task_chunk=2"
    )
    notes: list[str] = []
    expected = trained(make(), 6, notes).state.params
    monkeypatch.setattr(replay, "_SECONDS", -1.0)
    monkeypatch.setattr(replay, "_CALLS", -1.0)
    monkeypatch.setattr(process, "ALL_THREADS", 2)
    try:
        training = trained(make(), 6, notes)
    finally:
        torch.set_num_threads(1)
    assert len(training._replays._replays) == 1 and not notes
    assert all(training._replays._replays.values())
    for key, value in training.state.params.items():
        assert torch.equal(value, expected[key]), key


def test_tests_are_replayed_with_the_same_scores(library, make_run, monkeypatch):
    run = make_run("algo=maml", "test.episodes=6", "engine.evaluation_batch=2", "episode.query=2")
    run = dataclasses.replace(run, test_engine=dataclasses.replace(run.test_engine, chunk=1))
    expected: Any = scoring.test(run, run.state, None), scoring.evaluate(run, run.state, run.val, 4)
    monkeypatch.setattr(replay, "_SECONDS", -1.0)
    monkeypatch.setattr(replay, "_CALLS", -1.0)
    seen: list[Any] = []

    class Noted(replay.Replays):
        def _checked(self, *args):
            seen.append(super()._checked(*args))
            return seen[-1]

    monkeypatch.setattr(scoring, "Replays", Noted)
    replays = Noted(lambda line: None)
    tested: Any = scoring.test(run, run.state, None)
    assert torch.equal(tested.confidence, expected[0].confidence)
    for _ in range(2):  # validations share their traces
        scores = scoring.evaluate(run, run.state, run.val, 4, replays=replays)
        assert torch.equal(scores, expected[1])
    assert [one.__name__ for one in seen] == ["replay", "replay"]


def test_trace_does_not_take_an_input_for_a_constant():
    def hidden(x):
        return torch.from_numpy(x.numpy()) * 2

    with pytest.raises(RuntimeError, match="an input is used without an operation"):
        replay.recorded(hidden, torch.ones(2))
    constant = torch.full((2,), 3.0)
    result, replayed = replay.recorded(lambda x: x * constant, torch.ones(2))
    assert result.tolist() == replayed(torch.ones(2)).tolist() == [3, 3]


def test_step_that_cannot_be_traced_is_computed_and_reported(monkeypatch):
    monkeypatch.setattr(replay, "_SECONDS", -1.0)
    monkeypatch.setattr(replay, "_CALLS", -1.0)
    notes: list[str] = []
    replays = replay.Replays(notes.append)

    def reads_a_value(state, chunk):
        return chunk * 2 if float(chunk.sum()) > 0 else chunk

    for _ in range(3):
        assert replays(reads_a_value, {}, [torch.ones(2)])[0].tolist() == [2, 2]
    assert len(notes) == 1 and notes[0].endswith("reads a value")


def test_a_trace_of_the_only_chunk_is_checked_with_the_next(monkeypatch):
    monkeypatch.setattr(replay, "_SECONDS", -1.0)
    monkeypatch.setattr(replay, "_CALLS", -1.0)
    notes: list[str] = []
    replays, count = replay.Replays(notes.append), itertools.count()

    def counts(state, chunk):
        return chunk + torch.full((2,), float(next(count)))

    chunks = [torch.full((2,), 10.0 * number) for number in range(5)]
    results = [replays(counts, {}, [chunk])[0][0].item() for chunk in chunks]
    assert results == [0, 11, 22, 33, 44]
    assert notes == ["the step is not replayed from a trace: the results differ"]


def test_workers_do_not_wait_for_each_other():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads.in_order(lambda _: None, range(4))

        def nested(_):
            torch.set_num_threads(2)  # as torch does by itself when it is first used in a thread
            return threads.in_order(lambda index: index, range(2))

        assert threads.in_order(nested, range(4)) == [[0, 1]] * 4
    finally:
        threads.in_order(lambda _: torch.set_num_threads(1), range(4))
        torch.set_num_threads(before)


def test_chunks_are_computed_by_single_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = threads.in_order(lambda _: torch.get_num_threads(), range(4))
        assert seen == [1] * 4 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
