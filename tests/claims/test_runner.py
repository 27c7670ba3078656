import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from palimpsest.claims import ClaimError, results, runner
from palimpsest.claims.definition import NotFinite
from palimpsest.core.errors import InputError

HOLDS = """
@claim(**settings(note="on purpose"))
def measure(seed, mechanism=True, scale=1.0):
    note(seed, mechanism)
    return {"a": scale + 0.1 * seed, "b": 0.1 * seed + (0 if mechanism else 1), "c": seed}
"""
UNTESTED = """
@claim(**settings())
def measure(seed, mechanism=True, scale=1.0):
    return {"a": 1 + seed, "b": seed}
"""
FAILS = """
@claim(**settings())
def measure(seed, mechanism=True, scale=1.0):
    return {"a": 0.01 * seed, "b": 0.0}
"""
UNCLEAR = """
@claim(**settings())
def measure(seed, mechanism=True, scale=1.0):
    return {"a": float(seed % 2), "b": 0.0 if mechanism else 2.0}
"""
BROKEN = """
@claim(**settings())
def measure(seed, mechanism=True, scale=1.0):
    return {"a": float("nan") if seed == 1 and mechanism else 1.0, "b": 0.0 if mechanism else 1.0}
"""
LACKS = HOLDS.replace('"b"', '"d"')


def of(paper, body):
    return body.replace("settings(", f"settings(paper={paper!r}, ")


@pytest.mark.parametrize(
    ("body", "verdict", "control"),
    [
        (HOLDS, "holds", "fails"),
        (UNTESTED, "untested", "holds"),
        (FAILS, "fails", "fails"),
        (UNCLEAR, "unclear", "fails"),
    ],
)
def test_verdicts(write_claims, body, verdict, control):
    result = runner.run(write_claims(body).measure, seeds=4, workers=1)
    assert (result.verdict, result.control) == (verdict, control)


def test_a_result_holds_what_was_measured(write_claims):
    result = runner.run(write_claims(HOLDS).measure, seeds=(7, 8, 9), scale=0.5, workers=1)
    (outcome,) = result.expectations
    assert result.seeds == (7, 8, 9)
    assert outcome.expect == "a - b >= 0.2"
    assert outcome.mean == pytest.approx(0.5)
    assert (outcome.low, outcome.high) == (outcome.mean, outcome.mean)
    assert outcome.interval == "point: all 3 values are equal"
    assert outcome.control[0] == pytest.approx(-0.5)
    mean, low, high = result.measured["c"]
    assert mean == 8
    assert 7 <= low < 8 < high <= 9
    assert result.note == "on purpose"
    assert result.machine["threads"] == 1
    assert result.machine["dtype"] == "float32"


@pytest.mark.parametrize("seeds", [1, 0, (3,), (3, 3)])
def test_an_interval_needs_two_seeds(write_claims, seeds):
    with pytest.raises(InputError, match="at least 2 different seeds"):
        runner.run(write_claims(HOLDS).measure, seeds=seeds, workers=1)


def test_a_value_that_is_not_finite_fails_the_claim_with_words(write_claims, tmp_path):
    module = write_claims(BROKEN)
    result = runner.run(module.measure, seeds=3, workers=1)
    assert result.verdict == "fails"
    assert result.note == "muse, seed 1: a is nan"
    assert result.measured == {}
    results.append(tmp_path / "claims.jsonl", result)  # NaN is not JSON: the line has none
    (line,) = results.read(tmp_path / "claims.jsonl")
    assert line["expectations"][0]["mean"] is None
    with pytest.raises(NotFinite):
        module.measure(1)


def test_a_control_that_breaks_down_does_not_hold(write_claims):
    body = BROKEN.replace("seed == 1 and mechanism", "seed == 1 and not mechanism")
    result = runner.run(write_claims(body).measure, seeds=3, workers=1)
    assert (result.verdict, result.control) == ("holds", "fails")
    assert result.note == "muse, seed 1, control: a is nan"


def test_a_missing_value_is_an_error_not_a_verdict(write_claims):
    with pytest.raises(ClaimError, match="muse, seed 0: measure returned no b"):
        runner.run(write_claims(LACKS).measure, seeds=2, workers=1)


def test_a_value_that_only_some_seeds_have_is_an_error(write_claims):
    body = HOLDS.replace('"c": seed', '**({"c": 1} if seed else {})')
    with pytest.raises(ClaimError, match="different values: c in some only"):
        runner.run(write_claims(body).measure, seeds=2, workers=1)


def test_processes_measure_the_same_as_this_one(write_claims):
    body = """
    @claim(**settings())
    def measure(seed, mechanism=True, scale=1.0):
        import numpy, torch
        torch.manual_seed(seed)
        x = torch.randn(64, 64)
        return {"a": float((x @ x).sum()), "b": float(numpy.random.rand()), "threads": torch.get_num_threads()}
    """
    module = write_claims(body)
    here = runner.run(module.measure, seeds=2, workers=1)
    there = runner.run(module.measure, seeds=2, workers=2, fresh=True)
    assert there.measured == here.measured
    assert there.measured["threads"] == (1, 1, 1)
    assert (here.machine["processes"], there.machine["processes"]) == ("1", "2")


def test_errors_come_home_from_another_process(write_claims):
    body = """
    from palimpsest.core.errors import MissingExtra

    @claim(**settings())
    def measure(seed, mechanism=True, scale=1.0):
        raise MissingExtra("gymnasium", "rl")

    @claim(**settings(paper="whp"))
    def measure_whp(seed, mechanism=True, scale=1.0):
        raise KeyError("lost")
    """
    module = write_claims(body)
    found = {claim.paper: error for claim, error in runner.run_all([module.measure, module.measure_whp], 2, workers=2)}
    assert type(found["muse"]) is InputError
    assert str(found["muse"]).startswith("muse, seed ")
    assert str(found["muse"]).endswith("this needs the package 'gymnasium': pip install 'palimpsest[rl]'")
    assert type(found["whp"]) is ClaimError
    assert "KeyError: 'lost'" in str(found["whp"])


def test_a_process_that_dies_is_said_so(write_claims):
    body = """
    import os

    @claim(**settings())
    def measure(seed, mechanism=True, scale=1.0):
        os._exit(1)
    """
    with pytest.raises(ClaimError, match="a measuring process died"):
        runner.run(write_claims(body).measure, seeds=2, workers=2)


def test_what_was_measured_before_an_interruption_is_not_measured_again(write_claims):
    body = """
    @claim(**settings())
    def measure(seed, mechanism=True, scale=1.0):
        note(seed, mechanism)
        if seed == 2 and LOG.with_suffix(".stop").exists():
            raise KeyboardInterrupt
        return {"a": 1.0, "b": 0.0 if mechanism else 1.0}
    """
    module = write_claims(body)
    stop = module.LOG.with_suffix(".stop")
    stop.touch()
    with pytest.raises(KeyboardInterrupt):
        runner.run(module.measure, seeds=3, workers=1)
    stop.unlink()
    module.LOG.unlink()
    assert runner.run(module.measure, seeds=3, workers=1).verdict == "holds"
    assert module.LOG.read_text().split("\n")[:-1] == ["2 True", "0 False", "1 False", "2 False"]
    module.LOG.unlink()
    runner.run(module.measure, seeds=3, workers=1)
    assert not module.LOG.exists()
    runner.run(module.measure, seeds=3, workers=1, fresh=True)
    assert len(module.LOG.read_text().splitlines()) == 6


def test_a_changed_claim_is_measured_again(write_claims):
    module = write_claims(HOLDS)
    runner.run(module.measure, seeds=2, workers=1)
    module.LOG.unlink()
    with open(module.__file__, "a") as source:
        source.write("# changed\n")
    runner.run(module.measure, seeds=2, workers=1)
    assert len(module.LOG.read_text().splitlines()) == 4


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_measuring_processes_end_when_their_parent_does(write_claims, tmp_path, how):
    """A killed ``reproduce --all`` leaves no processes behind, and Ctrl-C does not wait for the runs under way."""
    module = write_claims("""
    import os, time

    @claim(**settings())
    def measure(seed, mechanism=True, scale=1.0):
        note(os.getpid())
        time.sleep(600)
    """)
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started with
        sys.path.insert(0, {str(tmp_path)!r})
        if __name__ == "__main__":
            from palimpsest.claims import runner
            import {module.__name__} as module
            runner.run(module.measure, seeds=2, workers=2)
        """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        children = wait_for(lambda: module.LOG.read_text().split() if module.LOG.exists() else [], 2)
        parent.send_signal(how)
        wait_for(lambda: [child for child in children if not alive(child)], 2)
        assert parent.wait(60) == -how
    finally:
        parent.kill()
        parent.wait()


def alive(process):
    """Whether a process runs (a zombie, which nobody may reap in a container, does not)."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, count, patience=60.0):
    end = time.monotonic() + patience
    while len(found := condition()) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"only {found} after {patience} s")
        time.sleep(0.05)
    return found


def test_reproduce_goes_on_after_a_claim_that_cannot_be_measured(paper_claims, tmp_path, capsys):
    paper_claims(muse=HOLDS, whp=of("whp", LACKS), eco=of("eco", FAILS))
    path = tmp_path / "results" / "claims.jsonl"
    with pytest.raises(ClaimError, match="whp, seed 0: measure returned no b"):
        runner.reproduce(["muse", "whp", "eco"], seeds=2, json_path=path, workers=1)
    lines = results.read(path)
    assert [(line["paper"], line["verdict"]) for line in lines] == [("muse", "holds"), ("eco", "fails")]
    assert list(lines[0]) == [
        "paper", "statement", "paper_says", "seeds", "measured", "expectations", "verdict", "control", "note",
        "seconds", "version", "machine", "date",
    ]  # fmt: skip
    found = runner.reproduce(["eco", "muse"], seeds=2, json_path=path, workers=1)
    assert [result.paper for result in found] == ["eco", "muse"]
    assert results.exit_code(found) == 1
    assert "runs: 8, of which 8 are kept from before" in capsys.readouterr().err


def test_several_claims_that_cannot_be_measured_are_raised_together(paper_claims, tmp_path):
    paper_claims(muse=LACKS, whp=of("whp", LACKS))
    with pytest.raises(ExceptionGroup, match="2 of 2 claims could not be measured") as caught:
        runner.reproduce(["muse", "whp"], seeds=2, json_path=tmp_path / "claims.jsonl", workers=1)
    assert {type(error) for error in caught.value.exceptions} == {ClaimError}


def test_another_verdict_than_last_time_prints_what_differs(paper_claims, tmp_path, capsys):
    paper_claims(muse=HOLDS)
    path = tmp_path / "claims.jsonl"
    runner.reproduce(["muse"], seeds=2, json_path=path, workers=1)
    assert "what differs" not in capsys.readouterr().err
    (line,) = results.read(path)
    line["verdict"], line["machine"]["packages"]["torch"], line["seeds"] = "fails", "0.4.1", [0, 1, 2]
    path.write_text(json.dumps(line) + "\n")
    runner.reproduce(["muse"], seeds=2, json_path=path, workers=1)
    printed = capsys.readouterr().err
    assert "'holds' now, 'fails' on" in printed
    assert "machine.packages.torch" in printed
    assert "0.4.1" in printed
    assert "[0, 1, 2]" in printed


def test_no_claims_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no claims to reproduce"):
        runner.reproduce([], json_path=tmp_path / "claims.jsonl")


def test_the_same_through_ray(write_claims, monkeypatch):
    ray = pytest.importorskip("ray")
    module = write_claims(HOLDS)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(module.__file__))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    here = runner.run(module.measure, seeds=2, workers=1)
    ((_, there),) = runner.run_all([module.measure], 2, ray="local", fresh=True)
    assert there.measured == here.measured
    assert there.machine["processes"] == "Ray"
    assert not ray.is_initialized()
