"""What a test of released adapters by new policy documents found: who passes, who is revoked, who must retrain."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from persona_rlhf.evaluation.gate import Verdict
from persona_rlhf.release.audit import Head
from persona_rlhf.release.results import plain
from persona_rlhf.release.table import printable


class Retested(NamedTuple):
    """One released user under the new documents. `verdict` is the gate's on his adapter as it was trained; `fixed`
    says whether questions about fixed aspects decided too, which are asked at the verdict's alpha alone; `revoked`
    whether his adapter had been called back before."""

    user_id: str
    slug: str
    alpha: float
    verdict: Verdict
    fixed: bool
    revoked: bool

    @property
    def passes(self) -> bool:
        """Whether the adapter may stay as it was released: the gate would release it, and passed it at this alpha.

        Where new documents ask less, so that a larger alpha passes at once, the smaller one was not looked at.
        """
        looked = any(look.passed and look.alpha == self.alpha for look in self.verdict.looks)
        asked = not self.fixed or self.verdict.alpha == self.alpha
        return self.verdict.admitted and looked and asked and not self.revoked

    @property
    def remedy(self) -> str | None:
        """What gives the user an adapter again, where he has none: another alpha, or training under the new rules."""
        if self.passes:
            return None
        return f"alpha {self.verdict.alpha:g}" if self.verdict.admitted else "retrain"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "user_id": self.user_id,
            "slug": self.slug,
            "status": "passes" if self.passes else "revoked",
            "must_retrain": self.remedy == "retrain",
            "alpha": self.alpha,
            "admissible_alpha": self.verdict.alpha,
            "revoked_before": self.revoked,
            "verdict": plain(self.verdict),
        }


class Recertified(NamedTuple):
    """All released users of a run under the new documents, and the head of the audit trail that tells of it."""

    policy_hash: str
    users: list[Retested]
    head: Head

    @property
    def failed(self) -> list[Retested]:
        """Whose adapters may not stay."""
        return [user for user in self.users if not user.passes]

    @property
    def looks(self) -> int:
        """Looks at the certify probes that this test took."""
        return sum(len(user.verdict.looks) for user in self.users)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "policy_hash": self.policy_hash,
            "tested": len(self.users),
            "passed": len(self.users) - len(self.failed),
            "revoked": len(self.failed),
            "must_retrain": sum(user.remedy == "retrain" for user in self.users),
            "looks": self.looks,
            "users": [user.to_json() for user in self.users],
            "audit_head": str(self.head),
        }


def recertified_table(found: Recertified) -> Table:
    """A row a user, those who may not stay first."""
    table = Table(
        title=f"{len(found.users) - len(found.failed)} of {len(found.users)} released adapters pass the new documents",
        caption=f"policy {found.policy_hash[:16]}; {found.looks} looks at certify, entered in the audit trail. Who is "
        "trained again is judged on these probes again: count it in `gate.runs`.",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("user", "status", "released at", "admissible at", "remedy", "why"):
        table.add_column(name, overflow="fold")
    for user in sorted(found.users, key=lambda user: user.passes):
        alphas = f"{user.alpha:g}", f"{user.verdict.alpha:g}"
        why = "revoked before" if user.revoked else user.verdict.reason
        status = "passes" if user.passes else "revoked"
        table.add_row(escape(printable(user.user_id)), status, *alphas, user.remedy or "", escape(why))
    return table
