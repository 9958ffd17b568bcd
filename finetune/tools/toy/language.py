"""Words, voices and roles of the tiny world."""

from typing import NamedTuple

from finetune.prompts.text import wrap_system_prompt


class ToyVoice(NamedTuple):
    pitch: int  # index into PITCHES
    timbre: int  # index into TIMBRES


class ToyRole(NamedTuple):
    place: str
    hour: str
    thing: str


# All frequencies are multiples of 25 Hz: whole periods in half a frame, so that a sound is alike in all its frames.
PITCHES = (100, 125, 150, 175, 200, 225, 250, 275)  # Hz
TIMBRES = (7350, 7950, 8550, 9150, 9750)  # Hz
BANDS = tuple(range(900, 6301, 600))  # Hz, centres of the bands; two or three of them sound in a frame of a word
AGENT_VOICES = {
    "basalt": ToyVoice(0, 0),
    "cedar": ToyVoice(2, 1),
    "flint": ToyVoice(4, 2),
    "maple": ToyVoice(6, 3),
    "willow": ToyVoice(7, 4),
}
USER_VOICES = {"rain": ToyVoice(1, 3), "snow": ToyVoice(3, 0), "wind": ToyVoice(5, 1)}
VOICES = AGENT_VOICES | USER_VOICES
ROLES = {
    "Ada": ToyRole("harbour", "seven", "boats"),
    "Bruno": ToyRole("bakery", "eight", "bread"),
    "Celia": ToyRole("library", "nine", "books"),
    "Dario": ToyRole("station", "ten", "trains"),
    "Emil": ToyRole("garden", "eleven", "roses"),
}
QUESTIONS = {
    "who": ("who", "are", "you"),
    "where": ("where", "is", "it"),
    "when": ("when", "do", "you", "open"),
    "what": ("what", "is", "there"),
}
NEUTRAL_WORDS = ("la", "mi", "re", "so")  # only in voice prompts
_NAMES = [word for name, role in ROLES.items() for word in (name, *role)]
_ASKED = [word for question in QUESTIONS.values() for word in question]
_OTHERS = ["hello", "this", "is", "in", "the", "from", "we", "have", "i", "am"]
WORDS = tuple(dict.fromkeys([*_NAMES, *_OTHERS, *_ASKED, *NEUTRAL_WORDS]))


def text_prompt(role: str) -> str:
    """The text prompt that gives the agent its role, wrapped in `<system>` tags."""
    return wrap_system_prompt(f"You are {role} from the {ROLES[role].place}.")


def greeting(role: str) -> list[str]:
    """What the agent says first."""
    return ["hello", "this", "is", role, ROLES[role].place]


def expected_reply(role: str, question: str) -> list[str]:
    """What an agent in that role answers to one of QUESTIONS."""
    place, hour, thing = ROLES[role]
    replies = {"who": f"i am {role}", "where": f"in the {place}", "when": f"from {hour}", "what": f"we have {thing}"}
    return replies[question].split()


def is_held_out(role: str, voice: str) -> bool:
    """Whether this role never speaks in this (agent) voice in the training data: one voice of each role."""
    return list(ROLES).index(role) == list(AGENT_VOICES).index(voice)
