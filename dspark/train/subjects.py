"""What self-play talks about: subjects with their shares, and the phrases and system prompts that steer a conversation there.

All phrases are our own, general ones. None is the beginning of a benchmark's prompt, so that the corpus stays clean for measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

OPENED_SHARE = 0.7  # of a subject's rows: a forced opening; the others: one of its system prompts and a free first turn


@dataclass(frozen=True)
class Subject:
    """One subject: its ``share`` of the rows (relative to the other subjects' shares), the phrases that the first user turn
    opens with (under the template's own system prompt), and system prompts that steer a free first turn (None: the template's own).

    Raises ValueError if the share is not positive or if openings or systems are empty.
    """

    name: str
    share: float
    openings: tuple[str, ...]
    systems: tuple[str | None, ...] = (None,)

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"subject {self.name!r} has share {self.share}: give a positive number")
        if not self.openings or not self.systems:
            raise ValueError(f"subject {self.name!r} needs at least one opening and one system prompt (None is the template's own)")

    def starts(self) -> list[tuple[float, str | None, str]]:
        """Every way to start a row: (weight, system prompt, opening); the weights add up to ``share``."""
        opened = [(self.share * OPENED_SHARE / len(self.openings), None, opening) for opening in self.openings]
        free = [(self.share * (1 - OPENED_SHARE) / len(self.systems), system, "") for system in self.systems]
        return opened + free


SUBJECTS: tuple[Subject, ...] = (
    Subject(
        "chat",
        0.25,
        (
            "What should I",
            "Can you explain why",
            "Why do people",
            "How can I get better at",
            "I have been thinking about",
            "What is the difference between",
            "My friend told me that",
            "Tell me about the history of",
            "Give me some advice on",
            "I'm planning a trip to",
            "What happens when",
            "Imagine that you are",
            "Write a short story about",
            "Write a poem that",
            "Write a polite email to",
            "Help me decide whether",
            "How does a",
            "What would you say to someone who",
            "Describe what it feels like to",
            "Is it true that",
        ),
        (
            None,
            "You are a patient teacher who explains science and history in plain words.",
            "You are a friendly travel guide and cook.",
            "You are a writer who helps people with letters, stories and speeches.",
            "You are a careful adviser on health, work and everyday life.",
        ),
    ),
    Subject(
        "mathematics",
        0.2,
        (
            "Solve for x:",
            "A gardener has",
            "If a train travels",
            "What is the sum of",
            "Calculate the area of",
            "A shop sells pencils at",
            "How many ways are there to",
            "Find the probability that",
            "Work this out step by step:",
            "A tank holds",
            "Three friends share",
            "Simplify the expression",
            "The price of a coat is",
            "What is the average of",
            "Prove that",
            "Every week a farmer",
            "A class of students",
            "What percentage of",
        ),
        (
            "You are a mathematics tutor. You solve word problems step by step and state the answer at the end.",
            "You help pupils with arithmetic, fractions, percentages and simple equations.",
            "You are an expert in algebra, geometry and probability.",
        ),
    ),
    Subject(
        "code",
        0.2,
        (
            "Write a Python function that",
            "Write a Python class for",
            "Explain what this code does:\n```python\n",
            "Complete this Python function:\n```python\ndef ",
            "Finish the body of this function and return only the code:\n```python\nfrom typing import List\n\n\ndef ",
            "Fix the bug in this code:\n```python\n",
            "How do I read a file in",
            "Write a SQL query that",
            "Write a shell script that",
            "Write a JavaScript function that",
            "Write unit tests for",
            "In Python, what is the difference between",
            "Implement an algorithm that",
            "Convert this loop to a list comprehension:",
            "Refactor the following code so that",
            "Given a list of integers, write",
            "Given a string, return",
            "How can I sort",
        ),
        (
            "You are an experienced Python programmer. You answer with short, working code.",
            "You review code, find bugs and explain how to fix them.",
            "You help with SQL, shell scripts and web development.",
        ),
    ),
    Subject(
        "summaries",
        0.15,
        (
            "Summarize the following text in two sentences:\n\nThe",
            "Summarize this article:\n\n",
            "Give me the main points of this passage:\n\nIn",
            "What is the following paragraph about?\n\n",
            "Shorten this message:\n\nDear",
            "Write a title for this text:\n\n",
            "Rewrite this paragraph in simpler words:\n\n",
            "Extract the key facts from this report:\n\nOn",
            "TL;DR of this discussion:\n\n",
            "Read the meeting notes and say what was decided:\n\n",
            "Rewrite the following text so that it is more concise:\n\n",
            "Summarize the plot of",
        ),
        (
            "You summarize texts that the user pastes. You keep the facts and drop the rest.",
            "You are an editor. The user sends a paragraph, you make it shorter and clearer.",
        ),
    ),
    Subject(
        "structured",
        0.2,
        (
            "List ten",
            "Make a list of",
            "Give me a JSON object with",
            "Write a table in Markdown that compares",
            "Create a checklist for",
            "Write a recipe for",
            "Make a weekly schedule for",
            "Write a YAML configuration for",
            "Write an HTML page with",
            "Generate five examples of",
            "Fill in this form:\nName:",
            "Put these items in alphabetical order:",
            "Write step-by-step instructions for",
            "Make a CSV file with the columns",
            "Write a packing list for",
            "Outline a presentation about",
            "Extract the names and dates as JSON from:",
            "Write the terms and conditions for",
        ),
        (
            "You answer with numbered lists and tables only.",
            "You turn the user's request into JSON, YAML, CSV or a form.",
            "You write plans, schedules, checklists and templates.",
        ),
    ),
)
