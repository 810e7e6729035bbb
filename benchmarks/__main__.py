"""``python -m pytorch_ext.benchmarks``: the suites, without the packages of ``pytorch-ext bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import suites
from .parts import Options


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pytorch_ext.benchmarks")
    parser.add_argument("--suite", default="quick", help=", ".join(suites.SUITES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--filter", default="", metavar="TEXT")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--tiny", action="store_true", help="shapes of no interest: does everything run?")
    parser.add_argument("--out", type=Path, default=Path("bench-output"))
    words = vars(parser.parse_args(argv))
    out, options = words.pop("out"), Options(**words)
    if sentence := suites.wrong(options):
        parser.error(sentence)
    return suites.command(options, out)


if __name__ == "__main__":
    sys.exit(main())
