"""What can be trained on? A prepared folder, opened and checked in well under a second, without torch.

Opening compares every size and header with the manifest, so a damaged folder is refused before a GPU is touched. The
ranks of a run read the manifest alone, and share that work (`llmtrain.train.feed.check_together`).
Letters: T = seq_len. Sample i is tokens i*T to i*T + T, both inclusive: T inputs and, shifted by one, T targets.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtrain.data.manifest import FILE, PREPARE_COMMAND, Manifest, load_manifest
from llmtrain.data.shards import TokenFile, check_shard, token_dtype
from llmtrain.errors import DataError

TOKEN_BYTES_FILE = "token_bytes.npy"
TOKENIZER_FILE = "tokenizer.model"

HEADERS = 1024  # token files of which a rank compares the header before it trains; of all the size

TokenBytes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder. `token_bytes[id]` is how many bytes of text a token stands for: control tokens none."""

    path: Path
    manifest: Manifest
    train: TokenFile
    validation: TokenFile
    token_bytes: TokenBytes

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER_FILE

    def num_samples(self, seq_len: int) -> int:
        """Samples in one epoch. Raises DataError where the train split is shorter than one."""
        count = (len(self.train) - 1) // seq_len
        if count < 1:
            raise DataError(
                f"the train split of {self.path} has {len(self.train)} tokens, one sample needs batch.seq_len + 1 = "
                f"{seq_len + 1}: lower batch.seq_len or prepare more text"
            )
        return count

    def identity(self) -> str:
        """The same for two ranks where both see one folder, and not two copies of it."""
        found = (self.path / FILE).stat()
        return f"{found.st_ino} {found.st_ctime_ns}"

    def check(self, rank: int = 0, ranks: int = 1, most: int = HEADERS) -> int:
        """Compare rank `rank`'s share of the token files with the manifest. Returns how many. Raises DataError.

        The header of `most` of them is read; that of another when it is first read.
        """
        return sum(split.check(rank, ranks, most) for split in (self.train, self.validation))

    def verify(self, command: str = PREPARE_COMMAND) -> None:
        """Hash every token file and compare with the manifest. Opening checks only sizes and headers."""
        for split in (self.train, self.validation):
            split.verify(_remedy(command))


def open_data(path: str | Path, command: str = PREPARE_COMMAND) -> PreparedData:
    """Open and check the prepared folder `path`. Raises DataError that ends with what to do about it.

    `command` is what prepares this folder, for example `llmtrain prepare --config configs/demo_cosine.yaml`.
    """
    data = open_unchecked(path, command)
    data.check(most=len(data.train.paths) + len(data.validation.paths))
    return data


def open_unchecked(path: str | Path, command: str = PREPARE_COMMAND) -> PreparedData:
    """`open_data` without a look at the token files, however many there are. Raises DataError.

    Each is compared with the manifest when it is first read.
    """
    path = Path(path)
    manifest = load_manifest(path, command)
    remedy = _remedy(command)
    _check_hash(path / TOKENIZER_FILE, manifest.tokenizer_hash, 32, remedy)
    _check_hash(path / TOKEN_BYTES_FILE, manifest.token_bytes_hash, 16, remedy)
    dtype = token_dtype(manifest.vocab_size)
    check = functools.partial(
        check_shard, vocab_size=manifest.vocab_size, tokenizer_hash=manifest.tokenizer_hash, remedy=remedy
    )
    return PreparedData(
        path=path,
        manifest=manifest,
        train=TokenFile(path, manifest.train.shards, dtype, check),
        validation=TokenFile(path, manifest.validation.shards, dtype, check),
        token_bytes=np.load(path / TOKEN_BYTES_FILE, allow_pickle=False),
    )


def file_hash(raw: bytes, size: int) -> str:
    """BLAKE2b of `size` bytes, in hex. A tokenizer's has 32, as token files carry it; other files' have 16."""
    return hashlib.blake2b(raw, digest_size=size).hexdigest()


def _check_hash(path: Path, wanted: str, size: int, remedy: str) -> None:
    try:
        found = file_hash(path.read_bytes(), size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {remedy}") from None
    if found != wanted:
        raise DataError(f"{path}: hash is {found}, the manifest wants {wanted}. {remedy}")


def _remedy(command: str) -> str:
    return f"Copy the folder again from where it was prepared, or prepare it anew with: {command} --force"
