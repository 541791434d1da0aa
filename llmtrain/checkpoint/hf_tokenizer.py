"""How does the Hugging Face world read our tokenizer? As a `tokenizer.json` that gives the same ids.

SentencePiece's BPE joins, of all neighbours that together are a piece, the pair whose piece scores best. `tokenizers`
joins by a list of merges, so every way to cut a piece into two pieces is a merge, in the order of the piece's score.
Control tokens are never read from text (`split_special_tokens`), as in training.

Documents are trained on as text and EOS, without BOS: what stands before a document is the EOS of the one before. So
EOS is also the BOS token, and is put before an encoded text, as `llmtrain generate` does.

What cannot be said this way exactly (unigram models, normalisation, symbols of the user) is refused.
Format: https://huggingface.co/docs/tokenizers, as version 0.23 reads it.
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from llmtrain.checkpoint.files import write_file, write_json
from llmtrain.data.dataset import TOKENIZER_FILE
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.errors import DataError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType


def require_expressible(tokenizer: Tokenizer, where: str) -> None:
    """Raise DataError, naming what it is, where `transformers` would make other ids of a text than SentencePiece."""
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    normal = [piece for piece in model.pieces if piece.type == _NORMAL]
    joined = [piece for piece in normal if len(piece.piece) > 1]
    alphabet = {piece.piece for piece in normal if len(piece.piece) == 1}
    faults = {
        "it is not a BPE model": trainer.model_type != _BPE,
        "it normalises text": bool(normalizer.precompiled_charsmap),
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it keeps spaces as they are": not normalizer.escape_whitespaces,
        "its spaces end words": trainer.treat_whitespace_as_suffix,
        "it has symbols of the user": any(
            piece.type not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE) for piece in model.pieces
        ),
        "two of its pieces have the same score": len({piece.score for piece in joined}) < len(joined),
        "some letters are no pieces": not alphabet.issuperset("".join(piece.piece for piece in joined)),
    }
    found = [fault for fault, present in faults.items() if present]
    if found:
        raise DataError(
            f"tokenizer {where} cannot be written as tokenizer.json with the same ids: {', '.join(found)}; "
            "export the weights alone with --no-tokenizer"
        )


def write_tokenizer(tokenizer: Tokenizer, max_seq_len: int, folder: Path) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json into `folder`; see `require_expressible`."""
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    eos = model.pieces[tokenizer.eos_id].piece
    unknown = next((piece.piece for piece in model.pieces if piece.type == _UNKNOWN), None)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "bos_token": eos,
        "eos_token": eos,
        "unk_token": unknown,
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    write_file(folder / TOKENIZER_FILE, tokenizer.proto)
    write_json(folder / "tokenizer.json", _tokenizer_json(model, eos, tokenizer.eos_id, unknown))
    write_json(folder / "tokenizer_config.json", config)


def _tokenizer_json(model: Any, eos: str, eos_id: int, unknown: str | None) -> dict[str, Any]:
    prefix = model.normalizer_spec.add_dummy_prefix
    special = [(index, piece.piece) for index, piece in enumerate(model.pieces) if piece.type in (_UNKNOWN, _CONTROL)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": piece, **flags} for index, piece in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": _SPACE}, spaces] if prefix else [spaces],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": eos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": eos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": eos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [*decoders, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else decoders,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to cut a piece into two, the best-scored piece first, its cuts in the order of their parts' ids."""
    ids = {piece.piece: index for index, piece in enumerate(model.pieces) if piece.type == _NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(ids, key=lambda text: -model.pieces[ids[text]].score):
        cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
        whole = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(whole, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    return merges
