"""What the doctor finds, and what to do about it."""

from dataclasses import dataclass

GOOD, NOTE, WRONG = "good", "note", "wrong"


@dataclass
class Finding:
    """What was looked at, what was found, and what to do about it, if anything."""

    subject: str
    kind: str  # GOOD, NOTE, or WRONG: has to be put right
    found: str
    advice: str = ""

    def line(self) -> str:
        """For people."""
        mark = {GOOD: "ok   ", NOTE: "note ", WRONG: "WRONG"}[self.kind]
        return f"{mark} {self.found}" + (f"\n      -> {self.advice}" if self.advice else "")
