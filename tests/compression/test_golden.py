"""Checkpoints written by version 1 of the format, low-rank by version 2, INT8 and 2:4 by version 3. They must load for
ever: never write them anew."""

from pathlib import Path

import pytest
import torch

from compression.checkpoint import checkpoint_hash, open_checkpoint, verify_checkpoint
from compression.hf import check_fingerprint, load_model

GOLDEN = Path(__file__).parent / "golden"
HASHES = {
    "dense": "0ef9f200ebd976c04827dc36a280051d154165eacd10c37e0f3203912578d9d6",
    "int4": "69aa4116405e0de995ff6ac28b69cc72799935127a5dd84dc2595e070925065b",
    "int4-asymmetric": "7c27b6dbcd1bb864464f9f27b0b1ba60e4fc527ca5b424756eb91ae4ca091526",
    "int8": "7074bddc37cd7ac74929aa070fd47c32b58560e8ad94748a81f18741bad88631",
    "two-four": "1b19d5e0052d985227709ed8bc9deed3f0e203915c8feeb9aaa8b8fbd245008e",
    "low-rank": "31fe5f0862719111dda1561f89f5a083a3d036ba57c3a44eb95c45404a13a959",
}
KINDS = {
    "dense": {"dense"},
    "low-rank": {"low_rank"},
    "int8": {"dense", "int8"},
    "two-four": {"dense", "two_four"},
}


def test_each_golden_checkpoint_is_known() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == HASHES.keys()


@pytest.mark.parametrize("name", HASHES)
def test_it_verifies_and_gives_the_logits_that_it_gave(name: str) -> None:
    folder = GOLDEN / name
    assert verify_checkpoint(folder).problems == ()
    manifest = open_checkpoint(folder).manifest
    assert checkpoint_hash(manifest) == HASHES[name]
    kinds = {matrix.linear.kind for matrix in manifest.matrices}
    assert kinds == KINDS.get(name, {"dense", "int4"})
    assert manifest.fingerprint is not None
    # Their spread is 0.1, written down with four decimals; of "dense" they were computed in bfloat16.
    model = load_model(folder, dtype=torch.float32)
    tolerance = 0.02 if name == "dense" else 0.001
    assert check_fingerprint(model, manifest.fingerprint, tolerance=tolerance) <= tolerance
