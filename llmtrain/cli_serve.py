"""`llmtrain serve`: learning rates over HTTP. No torch."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes.")] = 1,
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Show the run folders in DIR.", exists=True, file_okay=False)
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer only who sends the token in FILE.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Pages of this origin may ask; again for more.")
    ] = None,
) -> None:
    """Answer with learning rates over HTTP; needs the extra `serve`."""
    from llmtrain.errors import EnvironmentError

    try:
        from llmtrain.serve.server import serve as serve_until_told
    except ModuleNotFoundError as error:
        raise EnvironmentError(f"{error.name} is not installed: pip install 'llmtrain[serve]'") from None
    from llmtrain.serve.settings import Settings, read_token

    token = None if token_file is None else read_token(token_file)
    serve_until_told(Settings(host, port, workers, runs, token, tuple(cors or ())))
