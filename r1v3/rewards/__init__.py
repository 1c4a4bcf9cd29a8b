"""Rewards of the Skywork-R1V3 report: format, rules, LLM verifier, and their sum."""

from r1v3.rewards.combine import Gradable, Reward, score, total_reward
from r1v3.rewards.extract import extract_answer
from r1v3.rewards.format import format_reward
from r1v3.rewards.rules import accuracy_reward
from r1v3.rewards.verifier import LLMVerifier, Verdict

__all__ = [
    "Gradable",
    "LLMVerifier",
    "Reward",
    "Verdict",
    "accuracy_reward",
    "extract_answer",
    "format_reward",
    "score",
    "total_reward",
]
