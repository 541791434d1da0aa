"""Will a run start here, and last?

Each probe looks at one thing that stops runs on clusters, and says what it found and, where that is a problem, what to
do. Probes only look (the one of the run folder writes a small file and removes it), load no torch, and stand absence:
what is not there is a note, not a failure. Each has two seconds: what hangs is itself the finding.

`wrong` is what keeps a run from starting or loses it; `note` is worth knowing; `fine` is the rest.
"""
