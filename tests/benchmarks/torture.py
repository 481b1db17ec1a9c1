"""Breaks things, all of them, and counts: `make torture`, or `make torture ONLY="kills bits"`. Minutes to an hour each.

kills       SIGKILL before, in the middle of and after every call that changes the store, in every stage of a language
            model's and a control task's run; then the same command: every state and file as in the undisturbed run
random      200 SIGKILLs at random moments of data/reviews, 6 iterations
snapshots   50 SIGKILLs at random moments of a run with a checkpoint every 5 iterations; then each iteration restored
full_disk   ENOSPC at every call of a whole run that needs space, and from then on; then the same command with space again
bits        every file of a finished run: cut at every length and one bit of every byte flipped where it is small, 1,000 of
            each where it is large; noticed on read, under its name
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import write_example  # noqa: E402
from control import write_control  # noqa: E402
from faults import HARMLESS_TO_A_FULL_DISK, KILLS, Faults, Point, contents, same_as_reference  # noqa: E402

from flows.perform import restore  # noqa: E402
from flows.runs.run import open_run, references  # noqa: E402
from flows.runs.verify import verify  # noqa: E402
from flows.store.store import Store, read_table  # noqa: E402
from schemas.artifacts import Manifest, RunRecord, TrainState  # noqa: E402
from schemas.errors import BatonError  # noqa: E402
from schemas.records import decode  # noqa: E402
from schemas.tables import TABLES  # noqa: E402

SMALL = 4096  # bytes


def language(folder: Path) -> Path:
    """One iteration of a tiny language model, with the stages that are off by default."""
    example = write_example(folder / "tiny")
    config = yaml.safe_load((example / "config.yaml").read_text())
    config |= {"iterations": 1, "reward": {"center_on_demonstrations": True, "components": {"reward_model": {
        "source": "reward_model"}}}}
    (example / "config.yaml").write_text(yaml.safe_dump(config))
    return example


def control(folder: Path) -> Path:
    """Two iterations of CartPole with all that goes from one to the next."""
    return write_control(folder / "small", iterations=2, rollout={"num_steps": 8}, reward={"normalize": "scale"},
                         policy={"hidden": [4], "normalize_observations": True}, tracking={"enabled": False},
                         evaluate={"every": 1})


EXAMPLES = [control, language]


def recorded(work: Path) -> Iterator[tuple[str, Faults, list[Point]]]:
    """Each example with its fault points."""
    for make in EXAMPLES:
        folder = work / make.__name__
        folder.mkdir()
        faults = Faults(make(folder), folder)
        yield make.__name__, faults, faults.record()
        faults.close()


def ways(name: str) -> tuple[str, ...]:
    return KILLS if name == "write" else ("before", "after")


def kills(work: Path) -> Iterator[str]:
    """Up to a label's commit in one store, kill after kill, as what a kill leaves takes nothing from the next; from the link
    on, when there is but one chance, each from the store as it was at the label's beginning."""
    for name, faults, points in recorded(work):
        labels, done = list(dict.fromkeys(point.label for point in points)), Counter()
        chain = work / name / "chain"
        for number, label in enumerate(labels):
            print(f"  {name}: {label}, {number} of {len(labels)}, {done.total()} kills", file=sys.stderr, flush=True)
            own = [point for point in points if point.label == label]
            link = next(point.call for point in own if point.name == "link")
            for point in own[link:]:
                for how in ways(point.name):
                    assert faults.at(point, how) == {"code": -9, "call": point.name}, (point, how)
                    assert faults.go_on()["code"] == 0, (point, how)
                    same_as_reference(faults)
                    done[how] += 1
            faults.store, store = chain, faults.store
            done += _until_it_is_linked(faults, label)
            faults.store = store
        faults.store = chain
        assert faults.go_on()["code"] == 0
        same_as_reference(faults)
        stages = len({label.partition("/")[0] for label in labels if "/" in label})
        yield (f"{name}: {len(points)} calls for {len(labels)} artifacts and records, {stages} kinds; {done.total()} kills "
               f"({', '.join(f'{n} {how}' for how, n in done.items())}): the same bytes each time")


def _until_it_is_linked(faults: Faults, label: str) -> Counter:
    """Kills at call after call of the label, in the store as each kill leaves it, until it is committed; how many."""
    done = Counter()
    for call in itertools.count():
        name = "write"  # until the first kill says which call it was
        for how in KILLS:
            if how not in ways(name):
                continue
            said = faults.again_at(Point(label, call, "", ""), how)
            assert said["code"] == -9, (label, call, how, said)
            name = said.get("call", "link")  # none: it was committed before
            done[how] += "call" in said
            if name == "link":
                return done


def full_disk(work: Path) -> Iterator[str]:
    for name, faults, points in recorded(work):
        needing = [point for point in points if point.name not in HARMLESS_TO_A_FULL_DISK]
        for number, point in enumerate(needing):
            said = faults.at(point, "ENOSPC")
            assert said["code"] == 1 and "No space left on device" in said["error"], (point, said)
            assert faults.go_on()["code"] == 0, point
            same_as_reference(faults)
            if number % 20 == 0:
                print(f"  {name}: {number} of {len(needing)} calls", file=sys.stderr, flush=True)
        yield f"{name}: full at each of {len(needing)} calls: said each time, and the same bytes afterwards"


def random_(work: Path, kills: int = 200) -> Iterator[str]:
    example = work / "reviews"
    shutil.copytree(ROOT / "data/reviews", example)
    config = yaml.safe_load((example / "config.yaml").read_text())
    config |= {"iterations": 6, "tracking": {"enabled": False}, "execution": {"threads": 1}}
    (example / "config.yaml").write_text(yaml.safe_dump(config))
    runs = _killed_at_random(Faults(example, work), kills)
    yield f"data/reviews, 6 iterations: {kills} kills, {runs} runs that ended, each in the same bytes"


def snapshots(work: Path, kills: int = 50, every: int = 5) -> Iterator[str]:
    example = write_example(work / "tiny")
    config = yaml.safe_load((example / "config.yaml").read_text())
    config |= {"iterations": 12, "checkpoints": {"every": every}, "evaluate": config["evaluate"] | {"every": 0}}
    (example / "config.yaml").write_text(yaml.safe_dump(config))
    runs = _killed_at_random(Faults(example, work), kills)
    yield f"12 iterations, a snapshot every {every}: {kills} kills, {runs} runs that ended, each in the same bytes"
    (example / "config.yaml").write_text(yaml.safe_dump(config | {"checkpoints": {"every": 1}}))
    (work / "plain").mkdir()
    plain = Faults(example, work / "plain")
    plain.record()
    plain.close()
    ours, theirs = (open_run(Store(place / "reference"), "tiny") for place in (work, work / "plain"))
    for iteration in range(1, 13):
        model = ours.state(iteration).actor
        updates = restore(ours.store, model)
        digests = theirs.store.manifest(theirs.state(iteration).actor.artifact).digests()
        assert ours.store.manifest(model.artifact).digests() == digests
        for part in ("actor", "critic", "optimizer"):
            ours.store.folder(model.artifact, part)  # every file checked
        yield f"iteration {iteration}: restored by {len(updates)} updates, as in a run with every checkpoint written"
    assert verify(ours.store, None)[1] == []


def _killed_at_random(faults: Faults, kills: int) -> int:
    """How many runs have ended meanwhile, each in the same bytes.

    A life lasts up to `longest` seconds, which grows while nothing is committed: what is committed is never lost.
    """
    rng, killed, runs, longest, before = random.Random(0), 0, 0, 1.0, -1
    faults.record()
    reference = contents(faults.work / "reference")
    while killed < kills:
        if faults.go_on(rng.uniform(0, longest))["code"] == 0:
            assert contents(faults.store) == reference and verify(Store(faults.store), None)[1] == []
            shutil.rmtree(faults.store)
            runs, longest = runs + 1, 1.0
            continue
        killed += 1
        there = len(Store(faults.store).artifacts()) if faults.store.exists() else 0
        longest, before = (1.0 if there > before else longest * 1.5), there
        print(f"  {killed} killed, {there} artifacts, {runs} runs whole", file=sys.stderr, flush=True)
    assert faults.go_on()["code"] == 0 and contents(faults.store) == reference
    assert verify(Store(faults.store), None)[1] == []
    faults.close()
    return runs + 1


def bits(work: Path) -> Iterator[str]:
    """In memory where a record is decoded from its bytes, else in the file, as the store reads it."""
    example, rng, counts = language(work), random.Random(0), Counter()
    faults = Faults(example, work)
    faults.record()
    faults.close()
    store = Store(work / "reference")
    run = open_run(store, "tiny")
    records = {Path(store.files.address(f"runs/tiny/{name}")): kind for name, kind in (
        ("run.json", RunRecord), ("iterations/000000.json", TrainState), ("iterations/000001.json", TrainState))}
    for ref in references(run):
        manifest = store.manifest(ref)
        records[Path(store.uri, "artifacts", ref.stage, ref.identity, "manifest.json")] = Manifest
        for entry in manifest.files:
            path = Path(store.place(ref, entry.path))

            def read(manifest=manifest, entry=entry):
                there = store.checked(manifest, entry)
                return read_table(there, entry, TABLES[entry.path]) if entry.path in TABLES else there.read_bytes()

            for damaged in _damaged(path.read_bytes(), rng):
                kept = path.read_bytes()
                path.write_bytes(damaged)
                _require(path, read)
                path.write_bytes(kept)
                counts["files"] += 1
        counts["of artifacts"] += len(manifest.files)
    for path, kind in records.items():
        for damaged in _damaged(path.read_bytes(), rng):
            _require(path, lambda damaged=damaged, path=path, kind=kind: decode(damaged, str(path), kind))
            counts["records"] += 1
    yield (f"{counts['of artifacts']} files in {counts['files']:,} damaged versions, {len(records)} records in "
           f"{counts['records']:,}: all noticed")


def _damaged(data: bytes, rng: random.Random) -> Iterator[bytes]:
    lengths = range(len(data)) if len(data) <= SMALL else [0, len(data) - 1, *rng.sample(range(len(data)), 1000)]
    yield from (data[:length] for length in lengths)
    for place in range(len(data)) if len(data) <= SMALL else rng.sample(range(len(data)), 1000):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def _require(path: Path, read: Callable[[], object]) -> None:
    try:
        read()
    except BatonError as error:
        assert path.name in str(error), (path, error)
    else:
        raise AssertionError(f"{path}: damage went unnoticed")


CHECKS = {"kills": kills, "random": random_, "snapshots": snapshots, "full_disk": full_disk, "bits": bits}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"some of {', '.join(CHECKS)}; all if none is named")
    options = parser.parse_args()
    if unknown := set(options.checks) - set(CHECKS):
        parser.error(f"no check {sorted(unknown)[0]!r}; there are {', '.join(CHECKS)}")
    for name in options.checks or CHECKS:
        with tempfile.TemporaryDirectory() as work:
            for line in CHECKS[name](Path(work)):
                print(f"{name:<10} {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
