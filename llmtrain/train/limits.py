"""How long may a rank take, and how long may it be silent, before the job is ended?

Without progress: `engine.timeout_s`, or `engine.start_timeout_s` until each phase was done once (loading, compiling);
`checkpoint.timeout_s` for a save. The pre-flight, in which NCCL makes its first connections, has PREFLIGHT_S and
PREFLIGHT_RANK_S more for each rank: 316 s for 1024. Without a sign of life: `engine.death_s`, in which the report is
written and all have ended; a rank that starts may be silent as long as starting may take, because loading libraries can
stop all its threads.
"""

from typing import NamedTuple

from llmtrain.config import Config

PREFLIGHT_S, PREFLIGHT_RANK_S = 60.0, 0.25
END_S = 120  # more than wandb and a save under way are waited for at the end


class Limits(NamedTuple):
    """Longest times without progress, in seconds."""

    usual: float
    first: float  # until a phase was done once
    save: float
    preflight: float
    death: float  # from the last sign of a rank to the end of the others

    @classmethod
    def of(cls, config: Config, size: int) -> "Limits":
        """Those of so many ranks."""
        engine = config.engine
        preflight = PREFLIGHT_S + PREFLIGHT_RANK_S * size
        saving = config.checkpoint.timeout_s
        return cls(engine.timeout_s, engine.start_timeout_s, saving, preflight, engine.death_s)

    def of_phase(self, phase: str, known: bool) -> tuple[float, str]:
        """The limit of a phase, and the field that sets it."""
        if phase == "preflight":
            return self.preflight, "the pre-flight"
        if phase == "save":
            return self.save, "checkpoint.timeout_s"
        if phase == "end":
            return self.usual + END_S, "engine.timeout_s at the end"
        if known or self.usual >= self.first:
            return self.usual, "engine.timeout_s"
        return self.first, "engine.start_timeout_s"

    def of_silence(self, phase: str, report: float) -> tuple[float, str]:
        """How long a rank in this phase may give no sign, and the field that sets it.

        Of `death` so much is left for the report and for the others to end, at most half.
        """
        if phase in ("preflight", "start"):
            return self.of_phase(phase, known=False)
        silence = max(self.death / 2, self.death - report)
        return (silence, "engine.death_s") if silence < self.usual else (self.usual, "engine.timeout_s")
