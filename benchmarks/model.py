"""What most benchmarks begin with: a packaged model, converted once, and calibration text under its tokenizer."""

from pathlib import Path

from compression.calibration import CalibrationTokens, sample_tokens
from compression.import_model import import_packaged
from compression.recipe import Calibration
from compression.registry import ModelNotFoundError, ModelRegistry
from evaluation.corpora import load_corpus
from evaluation.perplexity import tokenize

HOME = Path.home() / ".cache" / "lathe"


def packaged_model(name: str, home: Path = HOME) -> Path:
    """Its checkpoint in the registry of `home`, where it is put if it is not there."""
    registry = ModelRegistry(home / "models")
    try:
        return registry.get(name).path
    except ModelNotFoundError:
        import_packaged(registry, name)
        return registry.get(name).path


def calibration_tokens(source: Path, settings: Calibration) -> CalibrationTokens:
    corpus = load_corpus(settings.corpus)
    return sample_tokens(tokenize(source, corpus)[0], settings, sha256=corpus.sha256)
