"""Whether texts end in the right number or formula, by Hugging Face's math-verify, in a process of its own.

What a text asks it to compute may take forever, such as 9^(9^9), within one call of C code that nothing interrupts: the
process is then killed, and the answer counts as wrong. It reads pairs of answer and text as lines of JSON, and writes 1,
0, or - where the answer is none.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
from functools import cache

LIMIT = 10.0  # seconds for one text
log = logging.getLogger("baton")


class MathVerifier:
    """A process that is started when it is first asked, and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def __call__(self, answer: str, text: str) -> str:
        """`1`, `0`, or `-` where the answer is no number or formula."""
        process = self._running()
        process.stdin.write(json.dumps([answer, text]) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], LIMIT)
        if ready and (line := process.stdout.readline().strip()):
            return line
        log.warning("numeric: %r was not worked out in %g s, and counts as wrong", text[:60], LIMIT)
        process.kill()
        process.wait()
        self._process = None
        return "0"

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, env=environment)
            self._process.stdout.readline()  # it is ready
        return self._process


@cache
def verifier() -> MathVerifier:
    """That of this process."""
    return MathVerifier()


def main() -> None:
    """Answers until its input ends."""
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        answer, text = json.loads(line)
        gold = parse(answer, parsing_timeout=None)
        found = verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None) if gold else None
        print("-" if found is None else int(found), flush=True)


if __name__ == "__main__":
    main()
