"""Filters of chains, one function each; True drops the chain."""

from collections.abc import Callable

from r1v3.config import Filters
from r1v3.data.blindness import blind_phrase
from r1v3.data.special_tokens import SPECIAL_TOKENS
from r1v3.distill.chain import Chain
from r1v3.distill.conclusion import contradicts
from r1v3.distill.languages import is_mixed
from r1v3.distill.questions import Question
from r1v3.distill.repetition import has_loop, hesitations, repeated_phrases
from r1v3.distill.text import words
from r1v3.rewards.format import format_reward

Filter = Callable[[Chain, Question, Filters], bool]


def refused(chain: Chain, question: Question, config: Filters) -> bool:
    """The teacher refused the request."""
    return chain.finish == "refused"


def no_thought(chain: Chain, question: Question, config: Filters) -> bool:
    """There is an answer without a thought."""
    return not chain.thoughts


def several_thoughts(chain: Chain, question: Question, config: Filters) -> bool:
    """More than one thought, or a tag within a thought."""
    return len(chain.thoughts) > 1 or "<think>" in chain.thought


def truncated(chain: Chain, question: Question, config: Filters) -> bool:
    """The limit on tokens, or another one of the server, came before the end."""
    return chain.finish != "stop" or not chain.closed


def no_boxed_answer(chain: Chain, question: Question, config: Filters) -> bool:
    r"""Not exactly one `\boxed{}` behind the thought, which the reward of GRPO will ask for."""
    return format_reward(f"x</think>{chain.answer}") == 0.0


def special_token(chain: Chain, question: Question, config: Filters) -> bool:
    """Thought or answer spell a token of the chat template, which SFT refuses."""
    return any(token in chain.response for token in SPECIAL_TOKENS)


def too_short(chain: Chain, question: Question, config: Filters) -> bool:
    """The thought has fewer words than `least_words`."""
    return len(words(chain.thought)) < config.least_words


def too_long(chain: Chain, question: Question, config: Filters) -> bool:
    """The thought has more words than `most_words`."""
    return len(words(chain.thought)) > config.most_words


def mixed_languages(chain: Chain, question: Question, config: Filters) -> bool:
    """Thought and answer are in several languages, or in one that is not expected."""
    text = f"{chain.thought}\n{chain.answer}"
    return is_mixed(text, config.languages, config.other_language)


def loop(chain: Chain, question: Question, config: Filters) -> bool:
    """The thought says the same over and over."""
    return has_loop(chain.thought, config.loop_repeats, config.loop_words)


def rambling(chain: Chain, question: Question, config: Filters) -> bool:
    """The thought comes back to the same phrases, or doubts every other sentence."""
    return (
        repeated_phrases(chain.thought) > config.repeated_phrases
        or hesitations(chain.thought) > config.hesitations
    )


def cannot_see(chain: Chain, question: Question, config: Filters) -> bool:
    """The thought says that it cannot see the picture."""
    return blind_phrase(chain.thought, config.blind_phrases) is not None


def contradiction(chain: Chain, question: Question, config: Filters) -> bool:
    """The thought ends with another answer than the one that is given."""
    if chain.final is None:
        return False
    return contradicts(chain.thought, chain.final, question.options or ())


# In the order in which a report counts them. What needs a verdict or a score is told elsewhere.
FILTERS: dict[str, Filter] = {
    "refused": refused,
    "no thought": no_thought,
    "several thoughts": several_thoughts,
    "truncated": truncated,
    "no boxed answer": no_boxed_answer,
    "special token": special_token,
    "too short": too_short,
    "too long": too_long,
    "mixed languages": mixed_languages,
    "loop": loop,
    "rambling": rambling,
    "cannot see": cannot_see,
    "contradiction": contradiction,
}
# Nothing further can be said of a reply that has none.
_ALONE = ("refused",)


def caught_by(chain: Chain, question: Question, config: Filters) -> list[str]:
    """Names of the filters that a chain does not pass, those that are off included."""
    found: list[str] = []
    for name, drops in FILTERS.items():
        if name == "mixed languages" and name in config.off:
            continue  # its library need not be there
        if drops(chain, question, config):
            found.append(name)
            if name in _ALONE:
                break
    if "no thought" in found and "too short" in found:
        found.remove("too short")
    return found
