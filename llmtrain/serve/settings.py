"""How is the service started?"""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import ConfigError

_SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Settings:
    """Where it listens, what it shows, and to whom."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    workers: int = 1
    runs: Path | None = None
    token: str | None = None
    cors: tuple[str, ...] = ()


def read_token(path: Path) -> str:
    """The token in a file, without the line's end. Raises ConfigError where it is missing, short or not ASCII."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"--token-file: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--token-file: {path} is not ASCII text") from None
    if len(token) < _SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(
            f"--token-file: {path} must hold one word of at least {_SHORTEST_TOKEN} characters; "
            f"make one with: openssl rand -hex 32 > {path}"
        )
    return token
