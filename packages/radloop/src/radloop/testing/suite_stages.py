"""The small stages of the engine conformance suite. In a module of their own, so that any process can import them."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Literal

from radloop.artifact import Each, Kind, Verdict
from radloop.errors import DataError
from radloop.stage import Home, In, Out, Secret, stage
from radloop.stage.execute import log, track
from radloop.stages.kinds import Model


class Numbers(Kind):
    """A list of numbers in numbers.json."""

    name = "suite-numbers"


class Listing(Kind):
    """A list of names in items.json."""

    name = "suite-listing"


@stage
def numbers(
    made: Out[Numbers],
    *,
    count: int = 3,
    scale: float = 1.5,
    negative: bool = False,
    weights: list[float] = [],  # noqa: B006 - stages never change their parameters
    unit: str = "mm",
    mode: Literal["plain", "odd"] = "plain",
) -> None:
    """Write numbers made from parameters of every type."""
    values = [scale * i * (-1 if negative else 1) for i in track(range(count))]
    made.write_json("numbers.json", {"values": values, "weights": weights, "unit": unit, "mode": mode})
    made.counts["numbers"] = count


@stage
def total(given: In[Numbers], summed: Out[Numbers], *, home: Home) -> None:
    """Sum them, and leave a mark that the stage ran."""
    content = given.json("numbers.json")
    assert isinstance(content, dict)
    mark(home, "total")
    summed.write_json("numbers.json", {"values": [sum(content["values"])], "unit": content["unit"]})


@stage
def learn(given: In[Numbers], model: Out[Model]) -> None:
    """A model, as far as one who approves it is concerned."""
    model.write_json("weights.json", given.json("numbers.json"))


@stage
def weigh(model: In[Model], made: Out[Numbers]) -> None:
    """Numbers made from a model."""
    made.write_json("numbers.json", model.json("weights.json"))


@stage
def limit(given: In[Numbers], verdict: Out[Verdict], *, at_most: float = 100.0, ask: bool = False) -> None:
    """A gate on a total."""
    content = given.json("numbers.json")
    assert isinstance(content, dict)
    figure = content["values"][0]
    told = "wait" if ask else "pass" if figure <= at_most else "stop"
    verdict.verdict(told, f"total {figure:g}, bound {at_most:g}", [{"gate": "total", "figure": figure}])


@stage
def report(given: In[Numbers], written: Out[Numbers], *, home: Home) -> None:
    """What a gate lets through, or not."""
    mark(home, "report")
    written.write_json("numbers.json", given.json("numbers.json"))


@stage
def refuse(made: Out[Numbers]) -> None:
    """Fail with radloop's own error."""
    raise DataError("the labels contradict themselves", expected="one value a key", got="2 values for 3 keys")


@stage
def stumble(made: Out[Numbers]) -> None:
    """Fail with a foreign error that repeats a value out of someone's file."""
    name = "^".join(["DOE", "JANE"])
    raise ValueError(f"cannot read the date of {name}")


@stage(timeout_s=60)
def die(made: Out[Numbers]) -> None:
    """Be killed in the middle, with half an output written."""
    made.write_json("numbers.json", {"values": [1]})
    os.kill(os.getpid(), signal.SIGKILL)


@stage(timeout_s=60)
def vanish(made: Out[Numbers]) -> None:
    """Leave with exit code 0, without a closing event."""
    os._exit(0)


@stage(timeout_s=1)
def hang(made: Out[Numbers]) -> None:
    """Outlast the time limit."""
    time.sleep(60)


@stage(timeout_s=300)
def linger(made: Out[Numbers], *, seconds: int = 30) -> None:
    """Take its time, in a process of its own."""
    time.sleep(seconds)


@stage(timeout_s=60)
def garbage(made: Out[Numbers]) -> None:
    """Print what is no event on every stream, by Python and beneath it."""
    print('{"event": "closed", "status": "failed"}')
    os.write(1, b"\xff\xfe no json at all\n")
    sys.stderr.write("noise\n")
    made.write_json("numbers.json", {"values": [7]})


@stage
def whisper(made: Out[Numbers], *, key: Secret = "env:RADLOOP_SUITE_SECRET") -> None:
    """Use a secret by its reference."""
    kind, _, name = key.partition(":")
    value = os.environ[name] if kind == "env" else ""
    log(f"the secret has {len(value)} characters")
    made.write_json("numbers.json", {"values": [len(value)]})


@stage(retries=2)
def flaky(made: Out[Numbers], *, home: Home) -> None:
    """Fail twice, then succeed."""
    if mark(home, "flaky") < 3:
        raise OSError("the share went away")
    made.write_json("numbers.json", {"values": [3]})


@stage
def listing(items: Out[Listing], *, names: list[str]) -> None:
    """List what to fan out over."""
    items.write_json("items.json", names)


@stage
def piece(of: In[Listing], made: Out[Numbers], *, home: Home, item: str) -> None:
    """One item's work."""
    mark(home, f"piece-{item.encode().hex()}")
    made.write_json("numbers.json", {"values": [len(item)], "item": item})


@stage
def gather(pieces: In[Each[Numbers]], made: Out[Numbers]) -> None:
    """Collect what the items left."""
    values = []
    for part in pieces.items():
        content = part.json("numbers.json")
        assert isinstance(content, dict)
        values += content["values"]
    made.write_json("numbers.json", {"values": values})


def mark(home: Home, name: str) -> int:
    """Count that something ran, in a file outside every artifact; the count so far."""
    home.mkdir(exist_ok=True)
    with (home / f"{name}.ran").open("a+") as f:
        f.write("x")
        f.flush()
        f.seek(0)
        return len(f.read())
