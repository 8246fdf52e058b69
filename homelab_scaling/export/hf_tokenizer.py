"""Our tokenizers as Hugging Face's: the same ids for any text, nothing added, nothing cleaned up."""

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from homelab_scaling.data.tokenizers import EOT, N_BYTES, BytesTokenizer, FileTokenizer, Tokenizer
from homelab_scaling.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = (
    "",
    " ",
    "Once upon a time,  there was\n\n\ta 'tokenizer' that didn't.\r\n",
    "def f(x):\n    return x ** 2  # y != z , n't .\n",
    "Grüße, 世界! \U0001f600 e\u0301 \u00a0\u200b\x00\x7f\ufffd",
    f"a{EOT}b {EOT}\n{EOT}{EOT} </s> <s> [PAD] <unk>",
)
"""Texts on which two tokenizers that differ would show it: blanks, clean-up, many-byte characters, special tokens."""


def to_hugging_face(tokenizer: Tokenizer, context_tokens: int) -> "PreTrainedTokenizerBase":
    """A `PreTrainedTokenizerFast` that gives exactly the ids of `tokenizer`.

    A text that spells out the end-of-text token gets the ids of its characters (`split_special_tokens`), as in
    training. Who wants the token itself appends `eos_token_id`.

    Raises:
        DataError: some text gets other ids.
    """
    from tokenizers import Tokenizer as Engine
    from transformers import PreTrainedTokenizerFast

    engine = Engine.from_str(_json_of(tokenizer))
    eos = engine.id_to_token(tokenizer.eot_id)
    made = PreTrainedTokenizerFast(
        tokenizer_object=engine,
        eos_token=eos,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
    with quiet_transformers():  # about texts longer than the context
        check_same_ids(tokenizer, made)
    return made


def check_same_ids(tokenizer: Tokenizer, made: "PreTrainedTokenizerBase", texts: tuple[str, ...] = PROBES) -> None:
    """Refuses a pair of tokenizers that differ on one of the texts.

    Raises:
        DataError: they do; where.
    """
    for text, wanted in zip(texts, tokenizer.encode_batch(list(texts)), strict=True):
        found = made(text)["input_ids"]
        if found != wanted.tolist():
            raise DataError(
                f"{tokenizer.name}: Hugging Face's version gives other ids than in training (of {text[:40]!r}), "
                "so it cannot be exported with this version of transformers"
            )


def _json_of(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, BytesTokenizer):
        return bytes_engine_json()
    assert isinstance(tokenizer, FileTokenizer)
    plain = json.loads(tokenizer.to_json())
    plain["truncation"] = plain["padding"] = None
    if _adds_tokens(plain["post_processor"]):
        plain["post_processor"] = None  # we never train with what it would put around a text
    return json.dumps(plain, ensure_ascii=False)


def _adds_tokens(processor: Any) -> bool:
    """Whether a post-processor puts special tokens around a text; the one that only trims offsets stays."""
    return processor is not None and processor["type"] != "ByteLevel"


def bytes_engine_json() -> str:
    """A tokenizer.json with one id per byte, 0 to 255, and 256 for end of text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    letters = letters_of_bytes()
    engine: Any = Engine(models.BPE(vocab={letters[b]: b for b in range(N_BYTES)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(EOT, special=True, normalized=False)])
    text: str = engine.to_str(pretty=True)
    return text


def letters_of_bytes() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else from 256 on.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [b for b in range(N_BYTES) if b not in seen]
    return [chr(b) if b in seen else chr(N_BYTES + hidden.index(b)) for b in range(N_BYTES)]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' bars and notes off the screen; what goes wrong is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
