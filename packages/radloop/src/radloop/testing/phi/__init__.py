"""Synthetic PHI: identities of nobody, planted into instances as real archives hold them.

The cleaner must not know these lists: it is measured against them.
"""

from radloop.testing.phi.identities import SCRIPTS, Identity, Script, identity, plant

__all__ = ["SCRIPTS", "Identity", "Script", "identity", "plant"]
