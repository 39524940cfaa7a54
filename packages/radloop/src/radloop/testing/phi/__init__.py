"""Synthetic PHI: identities of nobody, planted into instances as real archives hold them, with an answer key and a score.

- here, `identity` and `plant`: one patient, one instance; the phantom hospital and tests draw on them;
- `generate.generate`: a seeded set of instances of many IODs, each with what a de-identification is required to do to it;
- `score.score`: correct over required actions, as the MIDI-B challenge counts them.

The cleaner must not know these lists: it is measured against them.
"""

from __future__ import annotations

from radloop.testing.phi.identities import SCRIPTS, Identity, Script, identity, plant

__all__ = ["SCRIPTS", "Identity", "Script", "identity", "plant"]
