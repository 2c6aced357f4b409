"""Schemathesis: requests that our OpenAPI document allows, and ones that it does not; each answer is held against it.

SCHEMATHESIS_EXAMPLES is how many it makes up for each operation at most, besides those that it derives from the
document. None of the answers may be a 5xx.
"""

import os
import subprocess
import sys
import tempfile


def command(url: str, num_examples: int) -> tuple[str, ...]:
    """Every check but one: a request may fit the schema and still be refused, as a token id above the
    vocabulary, which no schema can say. Unloading and sleeping would leave other requests without a model; one that is
    being loaded answers 503; and a stream of events lasts as long as its job, which may be paused.
    """
    return (
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--max-examples", str(num_examples), "--workers", "1"),
        *("--exclude-checks", "positive_data_acceptance"),
        *("--exclude-path-regex", "(load|sleep|restart|events)$"),
        *("--request-timeout", "60", "--no-color"),
    )


if __name__ == "__main__":
    examples = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "100"))
    with tempfile.TemporaryDirectory() as folder:  # it keeps what it found there
        done = subprocess.run(command(os.environ["LATHE_URL"], examples), cwd=folder)
    sys.exit(done.returncode)
