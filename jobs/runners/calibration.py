"""The tokens that a job calibrates with: from a packaged corpus, or from a file that somebody uploaded."""

from pathlib import Path

from compression.calibration import CalibrationTokens, sample_tokens
from compression.recipe import Calibration
from evaluation.corpora import Corpus, load_corpus
from evaluation.perplexity import tokenize
from jobs.context import JobFailedError, RunnerContext
from jobs.file_check import FileContentError, read_texts
from jobs.files import FileStore, UploadNotFoundError


def calibration_tokens(context: RunnerContext, source: Path) -> CalibrationTokens:
    """Sampled as the job's specification says, under the source's tokenizer.

    Raises:
        JobFailedError: the file is gone or unreadable.
        CalibrationError: the text is shorter than one sample.
        CorpusError
    """
    settings = Calibration(**context.spec.get("calibration") or {})
    file_id = settings.file
    corpus = load_corpus(settings.corpus) if file_id is None else _uploaded(context.home, file_id)
    token_ids, _ = tokenize(source, corpus)
    return sample_tokens(token_ids, settings, sha256=corpus.sha256)


def _uploaded(home: Path, file_id: str) -> Corpus:
    try:
        info, path = FileStore(home / "files").open_for_job(file_id)
        return Corpus(name=file_id, text="\n\n".join(read_texts(path)), sha256=info.sha256)
    except UploadNotFoundError as error:
        raise JobFailedError("file_not_found", str(error)) from None
    except FileContentError as error:
        raise JobFailedError("bad_calibration", f"{file_id}: {error}") from None
