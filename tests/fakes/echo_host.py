"""An engine host process around `EchoEngine`: `python -m tests.fakes.echo_host --socket PATH`. Starts without torch."""

import argparse
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from engines.host import run_host
from engines.process import die_with_parent
from tests.fakes.echo_engine import ECHO_INFO, EchoEngine


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=ECHO_INFO.max_num_seqs)
    parser.add_argument("--max-model-len", type=int, default=ECHO_INFO.max_model_len)
    parser.add_argument("--drain-seconds", type=float, default=5.0)
    parser.add_argument("--raise-on-token", type=int)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--hold-at", type=int)
    parser.add_argument("--hold-file", type=Path)
    parser.add_argument("--fail-load", action="store_true")
    arguments = parser.parse_args()
    die_with_parent()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    info = replace(
        ECHO_INFO, max_num_seqs=arguments.max_num_seqs, max_model_len=arguments.max_model_len
    )

    def load(report: object) -> EchoEngine:
        if arguments.fail_load:
            raise ValueError("told to fail")
        return EchoEngine(
            info=info,
            raise_on_token=arguments.raise_on_token,
            step_seconds=arguments.step_seconds,
            hold_at=arguments.hold_at,
            hold_file=arguments.hold_file,
        )

    return run_host(
        load,
        model_id=info.model,
        socket_path=arguments.socket,
        drain_seconds=arguments.drain_seconds,
    )


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
