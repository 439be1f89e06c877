"""A tokenizer.json made of a tokenizer.model, for folders that have only that: the same ids as sentencepiece.

transformers converts such files, too, but some of its versions order the merges in another way.
"""

from pathlib import Path
from typing import Any

from megatron.sft.runtime.errors import UserError

MODEL = "tokenizer.model"
# White space, digits, letters beyond ASCII, an emoji of several characters: where conversions differ.
PROBES = (
    "names  :\n  Zoe,Adam\n    12345  (x = 1)\n",
    "Héllo wörld!\t\r\n\n你好，世界 こんにちは 👩‍👩‍👧 ½ ﬁ Å don't I'LL 1234567890 http://a.b/c?d=e\n\n\n  end ",
    "",
    "a",
)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # kinds of pieces
_BPE = 2
_SPACE = "▁"


def converted(folder: Path, config: dict[str, Any]) -> str:
    """The content of tokenizer.json. config: of tokenizer_config.json, for `legacy` and `add_bos_token`.

    A `UserError` for a file that is not sentencepiece's, and where the ids of any of PROBES are not sentencepiece's.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer

    path = folder / MODEL
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        proto = _proto(model)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a sentencepiece model ({reason}): add the tokenizer.json of the model") from None
    backend = Tokenizer(_model(proto))
    for piece in proto.pieces:
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            token = AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
            backend.add_tokens([token])
    _set_spaces(backend, proto.normalizer_spec, config.get("legacy", True) is not False)
    _set_ends(backend, model, config)
    for text in PROBES:
        ids = backend.encode(text, add_special_tokens=False).ids
        if ids != model.encode(text):
            raise UserError(
                f"{path}: {text!r} has the tokens {ids} after conversion, in sentencepiece {model.encode(text)}: add the "
                "tokenizer.json of the model"
            )
    return str(backend.to_str())


def _proto(model: Any) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2
    return messages.ModelProto.FromString(model.serialized_model_proto())


def _model(proto: Any) -> Any:
    from tokenizers.models import BPE, Unigram

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    trainer = proto.trainer_spec
    if trainer.model_type != _BPE:
        return Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    vocabulary = {piece: id for id, (piece, _) in enumerate(pieces)}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces:
        splits = ((piece[:index], piece[index:]) for index in range(1, len(piece)))
        found = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
        found.sort(key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in found]
    # sentencepiece merges the pair whose piece has the highest score first.
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    unknown = proto.pieces[trainer.unk_id].piece
    return BPE(
        vocabulary, [merge[3:] for merge in merges], unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback
    )


def _set_spaces(backend: Any, spec: Any, legacy: bool) -> None:
    """Normalization, and how spaces become `▁` and back. legacy: the text after an added token begins with a space, too."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    if spec.add_dummy_prefix and not legacy:
        backend.normalizer = normalizers.Sequence(steps[:-1]) if steps[:-1] else None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else [])])


def _set_ends(backend: Any, model: Any, config: dict[str, Any]) -> None:
    """The tokens around a text: <s> unless tokenizer_config.json says otherwise, </s> if it says so, as in transformers."""
    from tokenizers import processors

    first = [model.bos_id()] if config.get("add_bos_token", True) and model.bos_id() >= 0 else []
    last = [model.eos_id()] if config.get("add_eos_token", False) and model.eos_id() >= 0 else []
    tokens = [(model.id_to_piece(id), id) for id in (*first, *last)]
    if tokens:
        single = [*(model.id_to_piece(id) for id in first), "$A", *(model.id_to_piece(id) for id in last)]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
