"""Refusals in many wordings, from parts: a clear no first, then often a reason, an offer or a pointer to help."""

from __future__ import annotations

from random import Random

_OPENINGS = (
    "I can't help with that",
    "I can't help you with this",
    "I can't do that",
    "I can't assist with this request",
    "I cannot help with that",
    "I cannot do this",
    "I won't help with that",
    "I won't do that",
    "I won't take part in this",
    "I will not help with this",
    "I'm not able to help with that",
    "I'm not going to help with this",
    "I am not willing to help with that",
    "I refuse to help with this",
    "I must decline this request",
    "I have to say no to this",
    "Sorry, I can't help with that",
    "Sorry, I won't help with this",
    "Sorry, but I can't do that",
    "Sorry, that is not something I can help with",
    "Sorry, no",
    "I'm sorry, but I can't help with that",
    "I'm sorry, I won't do this",
    "I'm sorry, but that is not something I will do",
    "No, I can't help with that",
    "No, I won't help with this",
    "No, that is something I refuse to do",
    "No, I will not do that",
    "That is not something I can help with",
    "That is not something I will do",
)
_SECOND = (
    "It could hurt people",
    "It would harm someone",
    "People could get hurt",
    "It is wrong and dangerous",
    "Nobody should be harmed",
    "I care about the safety of everyone",
    "It would cause real harm",
    "That would put people in danger",
    "Every person deserves to be safe",
)
_BECAUSE = (
    "because it could hurt people",
    "because it would harm someone",
    "as it would cause real harm",
    "since people could get hurt",
    "because everyone deserves to be safe",
)
_POINTERS = {
    "terrorist_content": (
        "If you know of a plan to hurt people, please tell the police",
        "If someone is pulling you into this, a counsellor can help you get out",
    ),
    "child_sexual_abuse": (
        "If a child is in danger, please call the police",
        "If you worry about your own thoughts, a confidential helpline can support you",
    ),
    "threats_of_violence": (
        "If you are angry, a counsellor can help you find a calmer way",
        "If you feel unsafe, please call the police",
    ),
    "sexual_assault": (
        "If someone was hurt, a crisis line can support them",
        "Consent matters, and a counsellor can talk with you about it",
    ),
}
_OFFERS = (
    "Is there something else I can do for you?",
    "Can I help with something else?",
    "If you like, we can talk about what is behind this.",
    "I'm happy to help with something safe.",
    "I would gladly help with a kinder plan.",
    "Please ask me about something else.",
    "We could talk about what upset you instead.",
    "I can listen if you want to talk.",
)


def refusal(rng: Random, category: str) -> str:
    """One refusal, 4 to about 35 words; the first words always say no."""
    opening = rng.choice(_OPENINGS)
    if rng.random() < 0.06:
        opening += ", my friend"
    if rng.random() < 0.2 and "," not in opening[5:]:
        opening += f" {rng.choice(_BECAUSE)}"
        reason = False
    else:
        reason = rng.random() < 0.4
    parts = [opening + ("!" if rng.random() < 0.06 else ".")]
    if reason:
        parts.append(rng.choice(_SECOND) + ".")
    if rng.random() < 0.3:
        parts.append(rng.choice(_POINTERS[category]) + ".")
    if rng.random() < 0.35:
        parts.append(rng.choice(_OFFERS))
    return " ".join(parts)
