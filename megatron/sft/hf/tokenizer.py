"""The tokenizer of a Hugging Face folder, with tokenizer.json's ids in every version of transformers.

AutoTokenizer chooses a class by config.json's model_type, and some classes build another tokenizer of the vocabulary than
tokenizer.json describes. Here transformers gives templates and special tokens, and tokenizer.json all that makes ids.
"""

import tempfile
from pathlib import Path
from typing import Any

from megatron.sft.hf.sentencepiece_model import PROBES
from megatron.sft.hf.tokenizer_files import TOKENIZER, has_own_ids, tokenizer_json, tokens_to_add
from megatron.sft.runtime.errors import UserError


def read_tokenizer(folder: Path) -> Any:
    """The (fast) tokenizer of a local folder; code in the folder is not run. A `UserError` if it cannot be loaded."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        if not has_own_ids(folder):
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        elif (folder / TOKENIZER).is_file():
            tokenizer = _with_own_ids(folder, folder)
        else:
            with tempfile.TemporaryDirectory() as name:
                for path in folder.iterdir():
                    if path.is_file() and path.suffix in (".json", ".jinja"):
                        (Path(name) / path.name).symlink_to(path.resolve())
                (Path(name) / TOKENIZER).write_text(tokenizer_json(folder), encoding="utf-8")
                tokenizer = _with_own_ids(Path(name), folder)
    except UserError:
        raise
    except Exception as error:  # transformers raises what it likes for a damaged file
        raise _not_loaded(folder, error) from None
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer folder {folder} has no fast tokenizer: add its {TOKENIZER}")
    return tokenizer


def _with_own_ids(files: Path, folder: Path) -> Any:
    """transformers' plain class for templates and special tokens, with tokenizer.json as it is and the tokens that other files
    add. files: where they are; folder: whose they are."""
    import transformers
    from tokenizers import AddedToken, Tokenizer

    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(files, local_files_only=True, trust_remote_code=False)
    tokenizer.name_or_path = str(folder)
    backend = Tokenizer.from_file(str(files / TOKENIZER))
    for token in tokens_to_add(folder):
        flags = {name: value for name, value in token.items() if name not in ("id", "content")}
        backend.add_tokens([AddedToken(token["content"], **flags)])
        if backend.token_to_id(token["content"]) != token["id"]:
            raise UserError(f"tokenizer folder {folder}: {token['content']!r} cannot be added: add it to its {TOKENIZER}")
    tokenizer._tokenizer = backend
    return tokenizer


def _not_loaded(folder: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    if (folder / TOKENIZER).is_file():
        return UserError(f"tokenizer folder {folder} cannot be loaded ({reason}): download it again")
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    return UserError(
        f"tokenizer folder {folder} has no {TOKENIZER}, and transformers cannot make one of {files} ({reason}): add the "
        f"{TOKENIZER} that belongs to the model"
    )


def auto_tokenizer_note(folder: Path, tokenizer: Any) -> str:
    """What transformers' AutoTokenizer makes differently of the folder; empty if nothing."""
    import transformers

    if not has_own_ids(folder):
        return ""
    prefix = f"the ids are those of {folder}'s vocabulary file; AutoTokenizer of transformers {transformers.__version__}"
    try:
        other: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        theirs = [other.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]
    except Exception as error:  # it is not used
        return f"{prefix} cannot load it ({type(error).__name__})"
    ours = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in PROBES]
    for text, ids, other_ids in zip(PROBES, ours, theirs, strict=True):
        if ids != other_ids:
            counts = f"{len(other_ids)} instead of {len(ids)}"
            return f"{prefix} ({type(other).__name__}) makes other tokens of texts such as {text[:40]!r} ({counts})"
    if len(tokenizer) != len(other):
        return f"{prefix} ({type(other).__name__}) has {len(other)} tokens instead of {len(tokenizer)}"
    return ""
