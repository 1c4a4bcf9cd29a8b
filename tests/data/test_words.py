import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from r1v3.data.words import expand_words

# Qwen2's split: a word takes one leading blank or mark with it; punctuation stands alone.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "Wait, this is wrong. wait a moment. WAIT! Wait\twait\n(Wait x.wait\n",
    "Alternatively, go on. alternatively we could. Hmm, I think. hmm hmm\n",
    "waiting awaits await waited waiter Wait Wait wait wait\n",
    "é等Wait 等等 wait\n",
] * 20


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_end|>", "Wait!!"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def raw(tokenizer: Tokenizer, ids: list[int]) -> set[str]:
    return {tokenizer.id_to_token(token_id) or "" for token_id in ids}


def test_every_written_form_is_found_and_no_other_word(bpe: Tokenizer) -> None:
    """Encoding "Wait" and " Wait" only would leave five ways around a ban."""
    ids = expand_words(bpe, ["wait"])
    assert raw(bpe, ids) == {"Wait", "wait", "ĠWait", "Ġwait", "ĠWAIT", "(Wait", ".wait", "ĉwait"}
    assert ids == sorted(set(ids))


def test_a_ban_on_the_forms_leaves_no_single_token_way_to_write_the_word(bpe: Tokenizer) -> None:
    """Checked the other way round: from encoding real text, not from the vocabulary."""
    ids = set(expand_words(bpe, ["Wait", "Hmm", "Alternatively"]))
    for text in TEXTS[:4]:
        encoding = bpe.encode(text)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            word = text[start:end].strip(" \t\n.,!(").lower()
            assert (token_id in ids) == (word in {"wait", "hmm", "alternatively"}), text[start:end]


def test_words_are_merged_and_their_own_case_and_punctuation_do_not_matter(bpe: Tokenizer) -> None:
    separate = {*expand_words(bpe, ["WAIT,"]), *expand_words(bpe, [" hmm"])}
    assert expand_words(bpe, ["Hmm", "wait", "Wait"]) == sorted(separate)


def test_special_tokens_never_count(bpe: Tokenizer) -> None:
    """Here one reads "Wait!!": banning a special token would stop generation from ending."""
    assert bpe.token_to_id("Wait!!") == 2
    assert 2 not in expand_words(bpe, ["Wait"])


def test_a_transformers_tokenizer_gives_the_same_and_its_special_tokens_count_as_such(
    bpe: Tokenizer,
) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    assert expand_words(fast, ["Wait", "hmm"]) == expand_words(bpe, ["Wait", "hmm"])
    copy = Tokenizer.from_str(bpe.to_str())
    named = PreTrainedTokenizerFast(tokenizer_object=copy, pad_token="Ġwait")
    pad = named.pad_token_id
    assert pad not in expand_words(named, ["Wait"]) and pad is not None


def test_an_added_word_that_is_not_special_counts(bpe: Tokenizer) -> None:
    copy = Tokenizer.from_str(bpe.to_str())
    copy.add_tokens(["\n\nWait,"])
    added = copy.token_to_id("\n\nWait,")
    assert set(expand_words(copy, ["Wait"])) == {added, *expand_words(bpe, ["Wait"])}


def test_a_tokenizer_without_a_decoder_still_knows_its_blanks(bpe: Tokenizer) -> None:
    copy = Tokenizer.from_str(json.dumps({**json.loads(bpe.to_str()), "decoder": None}))
    assert copy.decoder is None
    assert expand_words(copy, ["Wait"]) == expand_words(bpe, ["Wait"])


def test_other_vocabularies() -> None:
    """Whole words, and sentencepiece's mark for a blank."""
    vocabulary = {"[UNK]": 0, "Wait": 1, "wait,": 2, "▁Wait": 3, "waiting": 4, "Straße": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    assert expand_words(words, ["wait"]) == [1, 2, 3]
    assert expand_words(words, ["STRASSE"]) == [5]
    words.decoder = decoders.Metaspace()
    assert expand_words(words, ["wait"]) == [1, 2, 3]


def test_a_word_without_a_single_token_is_named_with_its_pieces(bpe: Tokenizer) -> None:
    """Returning nothing for it would run NoWait without the ban, and nobody would know."""
    with pytest.raises(ValueError, match=r"the word 'Xylophone' is not a single token.*\['X'"):
        expand_words(bpe, ["Wait", "Xylophone"])
    with pytest.raises(ValueError, match="the word 'hold on' is not a single token"):
        expand_words(bpe, ["hold on"])


@pytest.mark.parametrize("words", ["Wait", [], [" "], ["Wait", ","]])
def test_words_must_be_words(bpe: Tokenizer, words: list[str]) -> None:
    with pytest.raises(ValueError, match="words must be"):
        expand_words(bpe, words)


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer must be .* got dict"):
        expand_words({}, ["Wait"])
