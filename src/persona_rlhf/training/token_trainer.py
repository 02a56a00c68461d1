"""TRL on rows that are token ids already, and without a word."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from datasets import Dataset
from trl import DPOTrainer  # type: ignore[attr-defined]  # exported lazily


class TokenDPOTrainer(DPOTrainer):
    """DPOTrainer whose data set holds `prompt_ids`, `chosen_ids` and `rejected_ids`, as the base's own template gives
    them (SFTTrainer takes token ids as it is)."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and closing lines of TRL, transformers and datasets go nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
