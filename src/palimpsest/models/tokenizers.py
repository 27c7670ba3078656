"""A byte-level BPE tokenizer trained on the user's own texts.

Any text can be written with it (its alphabet is the 256 bytes), so nothing is ever unknown; `<unk>` exists only because
tools expect one.  The same texts give the same tokenizer.  Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from palimpsest.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)  # ids 0 to 3
# AutoTokenizer imposes this class's normalizer and splitting on whatever lies beside such a model
IMPOSED = {"qwen2": "Qwen2Tokenizer"}
SMALLEST = len(SPECIAL) + 256  # the special tokens and one token a byte


def train_bpe(
    texts: Iterable[str], *, vocab_size: int = 1024, max_length: int = 256, model_type: str = ""
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `vocab_size` tokens (fewer where the texts offer fewer merges).

    It adds `<bos>` in front when called by itself, pads on the left (as batched generation wants it), and reloads with
    ``AutoTokenizer.from_pretrained``, beside a model of `model_type` too.  `InputError` if there is no text or
    `vocab_size` is below 260.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < SMALLEST:
        raise InputError(
            f"vocab_size must be at least {SMALLEST} (256 bytes and {len(SPECIAL)} specials), not {vocab_size}"
        )
    texts = [text for text in texts if text]
    if not texts:
        raise InputError("no text to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if model_type in IMPOSED:
        imposed = getattr(transformers, IMPOSED[model_type])().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = imposed.normalizer, imposed.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
