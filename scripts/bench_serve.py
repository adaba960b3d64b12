"""Attack, load and kill `metalearn serve`, and write benchmarks/serve.md.

python scripts/bench_serve.py [requests=10000] [kills=20]

1. Random and hostile requests: status codes, memory, and whether it still serves.
2. Time of a prediction with 8 clients, on a run and on a pretrained network.
3. kill -9 in the middle of writes: every example whose answer arrived must be there afterwards.
"""

import collections
import contextlib
import http.client
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from attacks import Attack
from pages import ROOT
from served import Server, image, new

from metalearn.report.environment import describe_environment

_CLIENTS = 8
_RUN = ["experiment=demo", "train.steps=60", "val.episodes=20", "test.episodes=20"]


def attack(words: list[str], count: int) -> list[str]:
    """Send hostile requests; return lines about them."""
    server = Server(*words)
    attacks = [Attack(server, seed) for seed in range(4)]
    memory, done, start = [], 0, time.time()
    while done < count:
        with ThreadPoolExecutor(len(attacks)) as pool:
            list(pool.map(lambda one: [one.once() for _ in range(50)], attacks))
        done += 50 * len(attacks)
        memory.append(server.memory())
        if done % 1000 == 0:
            print(f"{done} requests, {memory[-1]:.0f} MiB, {time.time() - start:.0f} s", flush=True)
    codes = sum((one.codes for one in attacks), collections.Counter())
    own = new(server, 3)
    status, _ = server.form(f"/api/classifiers/{own}/predict", ("files", "x", image(0, 99)))
    errors = server.end()
    tenth = max(1, len(memory) // 10)
    first, last = (np.mean(part) for part in (memory[tenth : 2 * tenth], memory[-tenth:]))
    table = ", ".join(f"{code}: {number:,}" for code, number in sorted(codes.items()))
    tracebacks = errors.count("Traceback")
    return [
        f"{done:,} requests by {len(attacks)} clients in {time.time() - start:.0f} s: {table}.",
        f"Answers with status 500: {codes['500']}; tracebacks: {tracebacks}. Resident memory: "
        f"{first:.0f} MiB in the second tenth of the requests, {last:.0f} MiB in the last "
        f"({last - first:+.0f} MiB); largest {max(memory):.0f} MiB. Afterwards a prediction has "
        f"status {status}.",
    ]


def load(words: list[str], name: str, seconds: float) -> str:
    """Let clients predict; return a row of the table."""
    server = Server(*words)
    own, times, counter = new(server, 5), [], itertools.count()
    path = f"/api/classifiers/{own}/predict"
    server.form(path, ("files", "x.png", image(0, 1)))

    def client(end: float) -> None:
        while time.time() < end:
            number = next(counter)
            start = time.perf_counter()
            status, _ = server.form(path, ("files", "x.png", image(number % 5, 1000 + number)))
            times.append(time.perf_counter() - start)
            assert status == 200

    rows = []
    for clients in (1, _CLIENTS):
        times.clear()
        end = time.time() + seconds
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, [end] * clients))
        p50, p99 = np.quantile(times, [0.5, 0.99]) * 1000
        rows.append(f"| {name} | {clients} | {len(times)} | {p50:.0f} ms | {p99:.0f} ms |")
    server.end()
    return "\n".join(rows)


def kill(words: list[str], count: int) -> str:
    """Kill the server in the middle of writes; return a line."""
    rng, own = random.Random(0), ""
    acknowledged: list[str] = []
    for turn in range(count):
        server = Server(*words)
        own = own or new(server)
        _check(server, own, acknowledged)
        killer = threading.Timer(rng.uniform(0.05, 1.0), server.end, (signal.SIGKILL,))
        killer.start()
        with contextlib.suppress(OSError, http.client.HTTPException):
            for number in range(10_000):
                file = ("files", "x.png", image(number % 5, turn * 10_000 + number))
                label = ("labels", "", b"abcde"[number % 5 : number % 5 + 1])
                status, content = server.form(f"/api/classifiers/{own}/examples", file, label)
                if status == 409:  # full: begin another
                    own, acknowledged = new(server), []
                    continue
                acknowledged.append(content["added"][0]["id"])
        killer.join()
    server = Server(*words)
    present = _check(server, own, acknowledged)
    errors = server.end()
    return (
        f"{count} times killed with -9 while a client adds examples: of {len(acknowledged):,} "
        f"acknowledged examples, {len(acknowledged):,} are there after the restarts ({present:,} "
        f"examples in all). Ctrl-C then prints: `{errors.strip()}`."
    )


def _check(server: Server, own: str, acknowledged: list[str]) -> int:
    _, content = server.send("GET", f"/api/classifiers/{own}")
    present = {one["id"] for one in json.loads(content)["examples"]}
    missing = set(acknowledged) - present
    assert not missing, f"{len(missing)} acknowledged examples are lost"
    return len(present)


def main() -> None:
    """Run all three parts and write the page."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    requests, kills = int(options.get("requests", 10_000)), int(options.get("kills", 20))
    with tempfile.TemporaryDirectory() as name:
        words = [f"run={name}/run"]
        command = [sys.executable, "-m", "metalearn", "train", *_RUN, f"hydra.run.dir={name}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        def state(part: str) -> str:
            return f"state={name}/{part}"

        lines = attack([*words, state("attack")], requests)
        print("\n".join(lines), flush=True)
        rows = [
            load([*words, state("load")], "run (MAML, conv4)", 15),
            load([state("load"), "head=ridge"], "efficientnet_lite0", 30),
        ]
        print("\n".join(rows), flush=True)
        lines.append(kill([*words, state("kill")], kills))
        print(lines[-1], flush=True)
    hardware = describe_environment("cpu")
    text = "\n".join([
        "# metalearn serve under attack, load and kills", "",
        "`python scripts/bench_serve.py` (`make bench-serve`). Requests of the attack: invalid "
        "HTTP, truncated and chunked bodies, 40 MB, wrong types, hosts, origins and tokens, names "
        "that are paths, formulas or markup, PNG and zip bombs, corrupt images, and valid ones.",
        "", *(f"- {line}" for line in lines), "",
        "Time of a prediction of one new image, a new connection each:", "",
        "| network | clients | requests | p50 | p99 |", "|---|---|---|---|---|", *rows, "",
        f"Environment: {json.dumps(hardware)}", "",
    ])  # fmt: skip
    (ROOT / "benchmarks" / "serve.md").write_text(text)


if __name__ == "__main__":
    main()
